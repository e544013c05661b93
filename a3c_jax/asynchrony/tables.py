"""A table that grows at the end: what a run notes of every update and of every episode."""

from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike

Rows = TypeVar("Rows", bound=tuple[np.ndarray, ...])

_INITIAL_ROWS = 1024


class Table(Generic[Rows]):
    """Columns of equal length, to which rows are added.

    A row never changes once it is there, so that `rows` can return views: reading the whole table
    copies nothing and needs no lock. Only one thread may add rows at a time.

    Args:
      form: a named tuple type with one field for each column.
      *dtypes: one for each column.
    """

    def __init__(self, form: type[Rows], *dtypes: DTypeLike) -> None:
        self._form: Any = form
        self._columns = [np.empty(_INITIAL_ROWS, dtype) for dtype in dtypes]
        self._length = 0

    def append(self, *row: float) -> None:
        """Adds one row: a number for each column."""
        end = self._length
        if end == len(self._columns[0]):
            self._make_room(end + 1)
        for column, number in zip(self._columns, row, strict=True):
            column[end] = number
        self._length = end + 1  # last, so that a reader finds whole rows only

    def extend(self, count: int, *values: Any) -> None:
        """Adds `count` rows: for each column a vector of numbers, or one number for all rows."""
        begin, end = self._length, self._length + count
        if end > len(self._columns[0]):
            self._make_room(end)
        for column, value in zip(self._columns, values, strict=True):
            column[begin:end] = value
        self._length = end

    def rows(self, begin: int = 0) -> Rows:
        """The rows from `begin` on, as views that cannot be written to."""
        end = self._length  # read first: the columns are at least as long
        views = [column[begin:end] for column in self._columns]
        for view in views:
            view.flags.writeable = False
        return cast(Rows, self._form(*views))

    def _make_room(self, length: int) -> None:
        """Replaces the columns by longer ones. The old ones stay as they are for their readers."""
        columns = [np.empty(2 * length, column.dtype) for column in self._columns]
        for new, old in zip(columns, self._columns, strict=True):
            new[: self._length] = old[: self._length]
        self._columns = columns
