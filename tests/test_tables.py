"""Tables that grow: rows stay in order, what was read never changes, and a view costs no copy."""

import threading
from typing import NamedTuple

import numpy as np
import pytest

from a3c_jax.asynchrony.tables import Table


class Pair(NamedTuple):
    number: np.ndarray
    square: np.ndarray


def make():
    return Table(Pair, np.int32, np.float64)


def assert_squares(pair, numbers):
    assert isinstance(pair, Pair)
    assert (pair.number.dtype, pair.square.dtype) == (np.int32, np.float64)
    np.testing.assert_array_equal(pair.number, numbers)
    np.testing.assert_array_equal(pair.square, np.square(numbers, dtype=np.float64))


@pytest.mark.parametrize("size", [1, 7, 1000, 1024, 5000])
def test_rows_come_back_in_their_order_however_they_were_added(size):
    table, n = make(), 0
    assert_squares(table.rows(), [])
    while n < 10_000:
        if n % 3 == 0:
            table.append(n, n**2)
            n += 1
        else:
            numbers = np.arange(n, n + size)
            table.extend(size, numbers, numbers.astype(float) ** 2)
            n += size
        if n % 10 == 0:
            assert_squares(table.rows(), np.arange(n))
    assert_squares(table.rows(), np.arange(n))
    assert_squares(table.rows(n - 5), np.arange(n - 5, n))


def test_one_number_goes_into_all_rows_and_no_rows_change_nothing():
    table = make()
    table.extend(3, 2, [4.0, 4.0, 4.0])
    table.extend(0, 5, [])
    assert_squares(table.rows(), [2, 2, 2])


def test_what_was_read_never_changes():
    table, seen = make(), []
    for n in range(3_000):
        seen.append(table.rows())
        table.append(n, n**2)
    for n in (0, 1, 1_023, 1_024, 1_025, 2_999):
        assert_squares(seen[n], np.arange(n))


def test_a_view_costs_no_copy_and_cannot_be_written_to():
    table = make()
    table.append(3, 9)
    first, second = table.rows(), table.rows()
    assert np.shares_memory(first.number, second.number)
    with pytest.raises(ValueError, match="read-only"):
        first.number[0] = 4


def test_a_table_can_be_read_while_another_thread_adds_rows():
    table, seen = make(), []

    def add():
        for n in range(0, 30_000, 3):
            table.append(n, n**2)
            numbers = np.array([n + 1, n + 2])
            table.extend(2, numbers, numbers.astype(float) ** 2)

    writer = threading.Thread(target=add, daemon=True)
    writer.start()
    while writer.is_alive():
        seen.append(table.rows())
    writer.join(30)
    for pair in [*seen[::97], table.rows()]:
        assert_squares(pair, np.arange(len(pair.number)))
    assert len(table.rows().number) == 30_000


def test_a_row_has_a_value_for_each_column():
    with pytest.raises(ValueError, match="shorter"):
        make().append(1)
    with pytest.raises(ValueError, match="longer"):
        make().extend(1, 1, 2, 3)
