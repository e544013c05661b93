"""Worker threads over an opaque step function: start, stop, errors, budget.

Each thread repeats: pull a snapshot, call the step, apply its gradients. Nothing here knows of
environments, networks or losses, so that the asynchrony can be read, and tested, by itself.
"""

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from a3c_jax.parameters import SharedParameters, Snapshot

Step = Callable[[Any, Any], tuple[Any, Any, Any]]
Commit = Callable[[int, Snapshot, int, Any], None]


_POLL = 0.1
"""Seconds after which Ctrl-C is noticed at the latest."""


_TURN = 0.02
"""Seconds for which a thread goes on where there are more threads than may run. Shorter turns cost switches
(16 workers with 8 environments for 5 steps, 2 cores: at 5 ms a fifth), longer ones leave the others behind."""


class WorkerError(RuntimeError):
    """A worker thread failed; `__cause__` is its exception.

    Attributes:
      worker: which worker.
      pulled_version: the version of the parameters that it had pulled; None where it had pulled none.
      record: what its step reported, where the step itself did not fail.
      result: what the run came to until then, where `a3c_jax.train` raises it.
    """

    def __init__(
        self,
        worker: int,
        error: BaseException,
        pulled_version: int | None = None,
        record: Any = None,
    ) -> None:
        super().__init__(f"worker {worker} failed with {type(error).__name__}: {error}")
        self.worker = worker
        self.pulled_version = pulled_version
        self.record = record
        self.result: Any = None


class WorkerThreads:
    """The threads of one run.

    Args:
      step: `step(params, state) -> (gradients, state, record)`. It must have finished computing when it
        returns, so that no one waits for it with the lock held.
      store: the parameters they share.
      states: each worker's initial state; one thread is made for each.
      on_commit: called as `on_commit(worker, new_snapshot, staleness, record)` after each update, with
        the store's lock held.
      max_updates: how many updates to make, all threads together, exactly; None sets no limit.
      max_running: how many threads may be between their pull and their apply at the same time; None sets
        no limit. More threads than that take turns of 20 ms.

    Raises:
      ValueError: where there are no states.
    """

    def __init__(
        self,
        step: Step,
        store: SharedParameters,
        states: Sequence[Any],
        *,
        on_commit: Commit | None = None,
        max_updates: int | None = None,
        max_running: int | None = None,
    ) -> None:
        if not states:
            raise ValueError(
                "states must hold one state for each worker, got none; give at least one."
            )
        self.states = list(states)
        """Each worker's state as of its last update."""
        self._step = step
        self._store = store
        self._on_commit = on_commit
        self._max_updates = max_updates
        self._turns = _Turns(len(self.states) if max_running is None else max_running)
        self._begun = 0
        self._running = len(self.states)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._finished = threading.Event()
        self._error: WorkerError | None = None

    def run(self, on_tick: Callable[[], None] | None = None, interval: float = 0.5) -> None:
        """Runs the threads, once, until the budget is spent, `stop` is called, or one of them fails.

        However it ends, by an exception of `on_tick` or Ctrl-C too, no thread is alive afterwards. Only a
        second Ctrl-C does not wait for the segments being played; their threads end with them, or with the
        process.

        Args:
          on_tick: called from this thread every `interval` seconds.
          interval: seconds between two calls.

        Raises:
          WorkerError: the first exception of a worker, as its cause.
          KeyboardInterrupt: on Ctrl-C or SIGTERM, with the signal's number as its argument.
          RuntimeError: where they have run before.
        """
        if self._finished.is_set():
            raise RuntimeError("these WorkerThreads have run already; make new ones.")
        threads = [
            threading.Thread(
                target=self._work, args=(worker,), name=f"a3c-worker-{worker}", daemon=True
            )
            for worker in range(len(self.states))
        ]
        started = []
        with _noticed_signals() as noticed:
            try:
                for thread in threads:
                    thread.start()
                    started.append(thread)
                next_tick = time.monotonic() + interval
                while not noticed and not self._finished.wait(min(interval, _POLL)):
                    if on_tick is not None and time.monotonic() >= next_tick:
                        on_tick()
                        next_tick = time.monotonic() + interval
            finally:
                self.stop()
                for thread in started:
                    thread.join()
        if self._error is not None:
            raise self._error
        if noticed:
            raise KeyboardInterrupt(noticed[0])

    def stop(self) -> None:
        """Asks every thread to end after the segment it is playing. Any thread may call this."""
        self._stop.set()

    def _claim(self) -> bool:
        """Takes one update out of the budget, before it is begun; False where none is left."""
        with self._lock:
            if self._begun == self._max_updates:
                return False
            self._begun += 1
            return True

    def _work(self, worker: int) -> None:
        version, record = None, None
        self._turns.begin()
        try:
            while not self._stop.is_set() and self._claim():
                version, record = None, None
                params, version = self._store.pull()
                gradients, state, record = self._step(params, self.states[worker])

                def commit(
                    snapshot: Snapshot, staleness: int, state: Any = state, record: Any = record
                ) -> None:
                    self.states[worker] = state
                    if self._on_commit is not None:
                        self._on_commit(worker, snapshot, staleness, record)

                self._store.apply(gradients, version, worker, commit)
                self._turns.offer()
        except BaseException as error:
            with self._lock:
                if self._error is None:
                    self._error = WorkerError(worker, error, version, record)
                    self._error.__cause__ = error
            self._stop.set()
            self._finished.set()
        finally:
            self._turns.end()
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._finished.set()


class _Turns:
    """Lets so many threads go on at a time, in the order in which they came."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._since = threading.local()

    def begin(self) -> None:
        """Waits for a turn."""
        with self._lock:
            ticket = None if self._free > 0 else self._queue()
            self._free -= ticket is None
        self._await(ticket)

    def offer(self) -> None:
        """Ends a turn that has lasted, where someone waits for one, and waits for the next."""
        if not self._waiting or time.monotonic() < self._since.time + _TURN:
            return
        with self._lock:
            if not self._waiting:
                return
            ticket = self._queue()
            self._waiting.popleft().release()
        self._await(ticket)

    def end(self) -> None:
        """Leaves for good."""
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

    def _await(self, ticket: "threading.Lock | None") -> None:
        if ticket is not None:
            ticket.acquire()  # whoever makes place for this thread releases it
        self._since.time = time.monotonic()


@contextlib.contextmanager
def _noticed_signals() -> Iterator[list[int]]:
    """Notes the first Ctrl-C or SIGTERM in the list instead of raising it wherever the main thread happens to be.

    Python drops a KeyboardInterrupt that is raised inside a destructor or a callback of the garbage
    collector, and one that is raised inside a library may leave its locks held. A second signal is raised
    at once, as a KeyboardInterrupt. Outside the main thread, or where someone else handles a signal,
    nothing changes.
    """
    noticed: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if noticed:
            raise KeyboardInterrupt(number)
        noticed.append(number)

    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, handle)
    try:
        yield noticed
    finally:
        for number in ours:
            signal.signal(number, usual[number])
