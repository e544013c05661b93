"""Limits how many threads run at once. Waiting threads take turns, first come first served."""

import threading
import time
from collections import deque


class Turns:
    """Places for threads that want to run, fewer than there are threads.

    More worker threads than cores only fight for the interpreter lock. If each keeps its place for a
    while and then passes it on, all of them advance and none is disturbed.

    Args:
      places: how many threads may run at once.
      seconds: how long a thread keeps its place at least, if another one waits. Shorter turns cost
        switches; in longer ones few threads make many updates in a row.
    """

    def __init__(self, places: int, seconds: float = 0.02) -> None:
        self._free = places
        self._seconds = seconds
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._mine = threading.local()

    def wait(self) -> None:
        """Returns when it is the calling thread's turn: at once, as long as its turn lasts."""
        since = getattr(self._mine, "since", None)
        if since is not None and (not self._waiting or time.monotonic() < since + self._seconds):
            return
        with self._lock:
            if since is None:
                ticket = None if self._free else self._queue()
                self._free -= ticket is None
            else:
                ticket = self._queue() if self._waiting else None
                if ticket is not None:
                    self._waiting.popleft().release()
        if ticket is not None:
            ticket.acquire()  # released by whoever makes room for this thread
        self._mine.since = time.monotonic()

    def leave(self) -> None:
        """Gives the calling thread's place back for good, if it has one."""
        if getattr(self._mine, "since", None) is None:
            return
        self._mine.since = None
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

    def _queue(self) -> threading.Lock:
        ticket = threading.Lock()
        ticket.acquire()
        self._waiting.append(ticket)
        return ticket
