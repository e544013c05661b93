"""A sink that appends rows to a file, and survives a full disk and a torn last line."""

import json
import os
import warnings
from collections import deque
from pathlib import Path
from typing import IO

import numpy as np

from a3c_jax.asynchrony.metrics import Row
from a3c_jax.asynchrony.records import EpisodeLog

_MAX_WAITING = 10_000
_TAIL_BYTES = 1 << 16


class JsonLines:
    """Appends each row to a file as one JSON object a line; NaN and infinity become null.

    If the disk is full, rows wait in memory until there is room, up to the last 10,000. A torn last line, as a
    process leaves it that was killed, is cut off. If the first row is the one that the file ends with, as in a run that
    goes on, it is not written again.

    Args:
      path: the file. It is made if it does not exist.

    Raises:
      OSError: if the file cannot be opened.

    Warns:
      RuntimeWarning: once, if a row cannot be written; at the end, if rows are lost; and if the first row has fewer
        updates than the last one in the file, which is another run's then.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._file: IO[bytes] = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
        self._size, self._last_updates = _find_end(self._file)
        self._waiting: deque[bytes] = deque(maxlen=_MAX_WAITING)
        self._num_lost, self._warned = 0, False

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        if self._last_updates is not None:
            last, self._last_updates = self._last_updates, None
            updates = row.get("updates", np.inf)
            if updates == last:
                return
            if updates < last:
                warnings.warn(
                    f"{self._path} holds rows up to update {last:,.0f}, and now gets one of update {updates:,.0f}: it has "
                    "rows of two runs; give each run a file of its own.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        values = {k: v if np.isfinite(v) else None for k, v in row.items()}
        self._num_lost += len(self._waiting) == _MAX_WAITING
        self._waiting.append((json.dumps(values) + "\n").encode())
        self._write_waiting()

    def close(self) -> None:
        self._write_waiting()
        lost = self._num_lost + len(self._waiting)
        if lost:
            warnings.warn(f"{lost:,} rows of {self._path} are lost.", RuntimeWarning, stacklevel=2)
        self._file.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            try:
                os.ftruncate(self._file.fileno(), self._size)  # what is left of a failed attempt
                rest = line
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                if not self._warned:
                    warnings.warn(
                        f"rows cannot be written to {self._path} ({error.strerror}); training goes on, and the "
                        f"last {_MAX_WAITING:,} rows wait.",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                self._warned = True
                return
            self._size += len(line)
            self._waiting.popleft()


def _find_end(file: IO[bytes]) -> tuple[int, float | None]:
    """Where a file's last whole line ends, and the number of updates in it; None if there is no such number."""
    size, whole, tail_size = file.seek(0, os.SEEK_END), b"", _TAIL_BYTES
    while not whole and tail_size < 2 * size + _TAIL_BYTES:
        begin = file.seek(max(0, size - tail_size))
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        tail_size *= 2
    end = begin + len(whole) if size else 0
    try:
        return end, float(json.loads(whole.splitlines()[-1])["updates"])
    except (IndexError, KeyError, TypeError, ValueError):
        return end, None
