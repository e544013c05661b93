"""Logs: what a run notes of every update and of every episode, in memory or in a file that only grows.

A log's file holds its rows and nothing else, one after the other, so that NumPy alone can read it:
`np.memmap(path, dtype, "r")`, with the dtype that docs/reliability.md lists.
"""

import contextlib
import os
import shutil
import struct
import threading
import zlib
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from a3c_jax.asynchrony.whole_files import writing_whole

Rows = TypeVar("Rows", bound=tuple[np.ndarray, ...])

_BLOCK_BYTES = 1 << 16
_CODES = {"i4": "i", "i8": "q", "f8": "d"}


class StoredLog(NamedTuple):
    """The rows that a log had at one moment, in a file that may have grown since.

    Attributes:
      path: the file.
      rows: how many rows there were.
      crc32: the checksum of their bytes.
    """

    path: Path
    rows: int
    crc32: int


class Log(Generic[Rows]):
    """Columns of equal length, to which rows are added at the end.

    Rows are added by one thread at a time. They can be read once they are sealed, which costs nothing and
    copies nothing: from then on they never change, and may be read and written to a file while others are added.

    Args:
      form: a named tuple type with one field for each column.
      *dtypes: one for each column.

    Attributes:
      dtype: of one row, little-endian and without gaps.
    """

    def __init__(self, form: Any, *dtypes: DTypeLike) -> None:
        self._form: Any = form
        columns = zip(self._form._fields, dtypes, strict=True)
        self.dtype = np.dtype(
            [(name, np.dtype(dtype).newbyteorder("<")) for name, dtype in columns]
        )
        codes = (_CODES[np.dtype(dtype).str[1:]] for dtype in dtypes)
        self._pack = struct.Struct("<" + "".join(codes)).pack
        self._block = bytearray()
        self._length = 0
        self._stored = np.empty(0, self.dtype)  # the first rows, mapped if they are in a file
        self._sealed: list[np.ndarray] = []  # the rows after those, but for the last block
        self._file: LogFile | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def append(self, *row: float) -> None:
        """Adds one row: a number for each column."""
        self._block += self._pack(*row)
        self._length += 1
        if len(self._block) >= _BLOCK_BYTES:
            self.seal()

    def extend(self, count: int, *values: Any) -> None:
        """Adds `count` rows: for each column a vector of numbers, or one number for all rows."""
        rows = np.empty(count, self.dtype)
        for name, value in zip(self._form._fields, values, strict=True):
            rows[name] = value
        self._block += rows.tobytes()
        self._length += count

    def seal(self) -> int:
        """Lets the rows so far be read. Returns how many there are. No row may be added meanwhile."""
        if self._block:
            self._sealed.append(np.frombuffer(self._block, self.dtype))
            self._block = bytearray()
        return self._length

    def read(self, begin: int = 0, end: int | None = None) -> Rows:
        """The sealed rows from `begin` on, up to `end`, as columns that cannot be written to."""
        with self._lock:
            self._map()
            sealed = self._sealed.copy()
            parts, position = [], len(self._stored) + sum(map(len, sealed))
            end = position if end is None else end
            for block in reversed([self._stored, *sealed]):
                position -= len(block)
                if position < end:
                    parts.append(block[max(0, begin - position) : end - position])
                if position <= begin:
                    break
        parts = parts[::-1] or [self._stored[:0]]
        return as_columns(self._form, parts[0] if len(parts) == 1 else np.concatenate(parts))

    def restore(self, rows: np.ndarray | Rows) -> None:
        """Begins with the rows of an earlier run: an array of this log's dtype, mapped for instance, or columns."""
        if isinstance(rows, tuple):
            columns, rows = rows, np.empty(len(rows[0]), self.dtype)
            for name, column in zip(self._form._fields, columns, strict=True):
                rows[name] = column
        self._stored, self._sealed, self._block = rows, [], bytearray()
        self._length = len(rows)

    def keep_in(self, path: Path, earlier: StoredLog | None = None) -> None:
        """Keeps the rows in a file from now on, those that are restored included. A second call changes nothing.

        Args:
          path: the file. Rows in it that are not this log's are cut off. Whoever has mapped them keeps them.
          earlier: where the restored rows are, if they are in a file.

        Raises:
          ValueError: if the restored rows are not what they were.
          OSError: if the file cannot be written.
        """
        if self._file is None:
            self._file = LogFile(path, self._stored, earlier)
            self.flush()

    def flush(self, end: int | None = None, *, to_disk: bool = False) -> StoredLog | None:
        """Writes sealed rows to the file, if there is one, so that they no longer take memory.

        Args:
          end: write the rows up to there, which `seal` returned; None writes all.
          to_disk: whether to return only when they have reached the disk.

        Returns:
          What the file holds now; None if there is no file.

        Raises:
          OSError: if they cannot be written. They stay in memory then.
        """
        if self._file is None:
            return None
        with self._lock:
            file = self._file
            while self._sealed and (end is None or file.rows < end):
                file.append(self._sealed[0])
                del self._sealed[0]
            if to_disk:
                file.sync()
            return StoredLog(file.path, file.rows, file.crc32)

    def make_again(self) -> None:
        """Makes the file again if somebody has deleted it.

        Raises:
          OSError: if it cannot be made.
        """
        if self._file is not None:
            self._file.make_again()

    def close(self) -> None:
        """Closes the file. The rows in it can still be read."""
        with self._lock:
            if self._file is not None:
                self._map()
                self._file.close()
                self._file = None

    def _map(self) -> None:
        """Maps what was written to the file since the last time."""
        if self._file is not None and len(self._stored) < self._file.rows:
            self._stored = self._file.map()


class LogFile:
    """The file of a log.

    Args:
      path: the file.
      rows: what it holds at first.
      earlier: where these rows are, if they are in a file.

    Attributes:
      path: the file.
      rows: how many rows are in it.
      crc32: the checksum of their bytes.
    """

    def __init__(self, path: Path, rows: np.ndarray, earlier: StoredLog | None = None) -> None:
        self.path, self._dtype = path, rows.dtype
        self.rows, self.crc32 = len(rows), 0
        is_there = earlier is not None and _is_exactly(path, earlier.path, rows.nbytes)
        with contextlib.nullcontext() if is_there else writing_whole(path) as file:
            for block in _blocks(rows):
                self.crc32 = zlib.crc32(block, self.crc32)
                if file is not None:
                    file.write(block.data)
            if earlier is not None and self.crc32 != earlier.crc32:
                raise ValueError(
                    f"{earlier.path} is damaged: the checksum of its first {earlier.rows:,} rows does not match."
                )
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (closed by close)

    def append(self, rows: np.ndarray) -> None:
        """Writes rows at the end. If that fails, the next call writes where this one began."""
        self._file.seek(self.rows * self._dtype.itemsize)
        data = memoryview(np.ascontiguousarray(rows).view(np.uint8).data)
        rest = data
        while rest:
            rest = rest[self._file.write(rest) or 0 :]
        self.crc32 = zlib.crc32(data, self.crc32)
        self.rows += len(rows)

    def map(self) -> np.ndarray:
        """The rows, mapped from the file; read from it if the process has no file handle left for that."""
        try:
            return _mapped(self._file, self.rows, self._dtype)
        except OSError:
            self._file.seek(0)
            return np.frombuffer(self._file.read(self.rows * self._dtype.itemsize), self._dtype)

    def sync(self) -> None:
        """Returns when all rows are on the disk."""
        os.fsync(self._file.fileno())

    def make_again(self) -> None:
        """Makes the file again if somebody has deleted it, from what the system still holds of it."""
        if self.path.exists():
            return
        with open(self.path, "wb") as copy:
            self._file.seek(0)
            shutil.copyfileobj(self._file, copy)
        self._file.close()
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._file.close()


def map_rows(stored: StoredLog, dtype: np.dtype) -> np.ndarray:
    """The rows of a log, mapped from its file: nothing is read before somebody looks at it.

    Raises:
      OSError: if there is no such file.
      ValueError: if it has fewer rows.
    """
    size = os.stat(stored.path).st_size
    if size < stored.rows * dtype.itemsize:
        raise ValueError(
            f"{stored.path} must have {stored.rows:,} rows of {dtype.itemsize} bytes, got {size:,} bytes."
        )
    return _mapped(stored.path, stored.rows, dtype)


def as_columns(form: type[Rows], rows: np.ndarray) -> Rows:
    """The columns of an array of rows, as views that cannot be written to."""
    views = [rows[name] for name in rows.dtype.names or ()]
    for view in views:
        view.flags.writeable = False
    return form(*views)


def _mapped(file: Any, rows: int, dtype: np.dtype) -> np.ndarray:
    """So many rows of a file, which is open or given by its path. A file without any cannot be mapped."""
    return np.asarray(np.memmap(file, dtype, "r", shape=(rows,))) if rows else np.empty(0, dtype)


def _is_exactly(path: Path, earlier: Path, size: int) -> bool:
    """Whether both are the same file, and it has this size."""
    return path.exists() and path.samefile(earlier) and path.stat().st_size == size


def _blocks(rows: np.ndarray) -> Any:
    """The rows a few at a time."""
    step = (1 << 22) // rows.dtype.itemsize
    return (rows[begin : begin + step] for begin in range(0, len(rows), step))
