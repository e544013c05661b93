"""Columns of numbers that grow at the end: what a run writes down of every update and every episode."""

from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike

C = TypeVar("C", bound=tuple[np.ndarray, ...])

_ROOM = 1024


class Columns(Generic[C]):
    """Vectors of one length, to which rows are added.

    A row never changes once it is there, and `rows` returns views: reading all of it costs nothing, however long it
    is, and needs no lock. Only one thread may add rows at a time.

    Args:
      form: a named tuple of the columns.
      *dtypes: one for each column.
    """

    def __init__(self, form: type[C], *dtypes: DTypeLike) -> None:
        self._form: Any = form
        self._columns = [np.empty(_ROOM, dtype) for dtype in dtypes]
        self._length = 0

    def append(self, *row: float) -> None:
        """Adds one row: a number for each column."""
        end = self._length
        if end == len(self._columns[0]):
            self._make_room(end + 1)
        for column, number in zip(self._columns, row, strict=True):
            column[end] = number
        self._length = end + 1  # last: whoever reads now finds whole rows only

    def extend(self, count: int, *values: Any) -> None:
        """Adds `count` rows: for each column a vector of them, or one number for all."""
        begin, end = self._length, self._length + count
        if end > len(self._columns[0]):
            self._make_room(end)
        for column, value in zip(self._columns, values, strict=True):
            column[begin:end] = value
        self._length = end

    def rows(self, begin: int = 0) -> C:
        """The rows so far from `begin` on, as views that cannot be written to."""
        end = self._length  # first: the columns are at least as long
        views = [column[begin:end] for column in self._columns]
        for view in views:
            view.flags.writeable = False
        return cast(C, self._form(*views))

    def _make_room(self, length: int) -> None:
        """New columns, twice as long as needed; the old ones stay as they are, for those who look at them."""
        columns = [np.empty(2 * length, column.dtype) for column in self._columns]
        for new, old in zip(columns, self._columns, strict=True):
            new[: self._length] = old[: self._length]
        self._columns = columns
