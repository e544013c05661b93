"""Logs: rows stay in order, what was read never changes, and a file holds them whatever happens to it."""

import ast
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from faults import no_file_larger_than, no_more_file_handles

from a3c_jax.asynchrony.logs import Log, StoredLog, map_rows
from a3c_jax.asynchrony.records import Schedule, make_episode_log, make_schedule_log

pytestmark = pytest.mark.usefixtures("switching_often")

WRITTEN = [("number", "<i4"), ("square", "<f8")]


class Pair(NamedTuple):
    number: np.ndarray
    square: np.ndarray


def make():
    return Log(Pair, np.int32, np.float64)


def add(log, numbers):
    for n in numbers:
        log.append(n, n**2)
    return log.seal()


def assert_squares(pair, numbers):
    assert isinstance(pair, Pair)
    assert (pair.number.dtype, pair.square.dtype) == (np.int32, np.float64)
    np.testing.assert_array_equal(pair.number, numbers)
    np.testing.assert_array_equal(pair.square, np.square(numbers, dtype=np.float64))


def assert_file_holds(path, numbers):
    """With NumPy alone."""
    rows = np.fromfile(path, WRITTEN)
    np.testing.assert_array_equal(rows["number"], numbers)
    np.testing.assert_array_equal(rows["square"], np.square(numbers, dtype=np.float64))


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("size", [1, 7, 1000, 5000])
def test_rows_come_back_in_their_order_however_they_were_added(tmp_path, size, in_file):
    log, n = make(), 0
    if in_file:
        log.keep_in(tmp_path / "log")
    assert_squares(log.read(), [])
    while n < 8_000:
        if n % 3 == 0:
            log.append(n, n**2)
            n += 1
        else:
            numbers = np.arange(n, n + size)
            log.extend(size, numbers, numbers.astype(float) ** 2)
            n += size
        if n % 10 == 0:
            assert len(log) == log.seal() == n
            assert_squares(log.read(n - 5), np.arange(n - 5, n))
        if n % 100 == 0:
            log.flush()
            assert_squares(log.read(), np.arange(n))
    log.seal()
    for begin, end in [(0, n), (n - 5, n), (17, 19), (3, 3), (0, 0), (n, n)]:
        assert_squares(log.read(begin, end), np.arange(begin, end))


def test_one_number_goes_into_all_rows_and_no_rows_change_nothing():
    log = make()
    log.extend(3, 2, [4.0, 4.0, 4.0])
    log.extend(0, 5, [])
    log.seal()
    assert_squares(log.read(), [2, 2, 2])


def test_what_was_read_never_changes_and_cannot_be_written_to(tmp_path):
    log = make()
    log.keep_in(tmp_path / "log")
    add(log, range(10))
    in_memory = log.read()
    log.flush()
    in_file = log.read()
    add(log, range(10, 20))
    log.flush()
    log.close()
    for pair in (in_memory, in_file):
        assert_squares(pair, np.arange(10))
        with pytest.raises(ValueError, match="read-only"):
            pair.number[0] = 4


def test_what_is_in_the_file_is_not_copied(tmp_path):
    log = make()
    log.keep_in(tmp_path / "log")
    add(log, range(10))
    log.flush()
    assert np.shares_memory(log.read().number, log.read().number)


def test_sealed_rows_can_be_read_and_written_while_another_thread_adds_rows(tmp_path):
    log, seen, lock = make(), [], threading.Lock()
    log.keep_in(tmp_path / "log")

    def write():
        for n in range(0, 30_000, 3):
            with lock:
                log.append(n, n**2)
                numbers = np.array([n + 1, n + 2])
                log.extend(2, numbers, numbers.astype(float) ** 2)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    is_alive = True
    while is_alive:
        is_alive = writer.is_alive()
        with lock:
            end = log.seal()
        seen.append((end, log.read(0, end), log.flush(end)))
    writer.join(30)
    for end, pair, stored in [*seen[::97], seen[-1]]:
        assert len(pair.number) == stored.rows == end
        assert_squares(pair, np.arange(end))
    log.seal()
    log.flush()
    assert_file_holds(tmp_path / "log", np.arange(30_000))


def test_a_row_has_a_value_for_each_column():
    with pytest.raises(Exception, match="expected 2 items"):
        make().append(1)
    with pytest.raises(ValueError, match="longer"):
        make().extend(1, 1, 2, 3)


def test_the_files_of_a_run_have_the_documented_rows():
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^(SCHEDULE|EPISODES) = (\[.*?\])$", page, re.M | re.S))
    assert np.dtype(ast.literal_eval(named["SCHEDULE"])) == make_schedule_log().dtype
    assert np.dtype(ast.literal_eval(named["EPISODES"])) == make_episode_log().dtype


# Files.


def test_a_log_goes_on_in_its_file_from_any_moment_and_the_rest_is_cut(tmp_path):
    path, log = tmp_path / "log", make()
    log.keep_in(path)
    add(log, range(5))
    moment = log.flush()
    add(log, range(5, 9))
    log.flush()
    longer = log.read()
    log.close()
    with open(path, "ab") as file:
        file.write(b"torn")  # by a process that was killed

    again = make()
    again.restore(map_rows(moment, again.dtype))
    again.keep_in(path, moment)
    assert_file_holds(path, range(5))
    add(again, range(5, 7))
    assert again.flush().rows == 7
    assert_squares(again.read(), np.arange(7))
    assert_file_holds(path, range(7))
    assert_squares(longer, np.arange(9))  # whoever had read the rest still has it
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_a_log_goes_on_in_another_file_and_the_first_stays(tmp_path):
    log = make()
    log.keep_in(tmp_path / "a")
    add(log, range(5))
    moment = log.flush()
    again = make()
    again.restore(map_rows(moment, again.dtype))
    again.keep_in(tmp_path / "b", moment)
    add(again, [5])
    again.flush()
    assert_file_holds(tmp_path / "a", range(5))
    assert_file_holds(tmp_path / "b", range(6))


def test_rows_in_memory_go_into_a_file_too(tmp_path):
    log = make()
    log.restore(Pair(np.arange(4, dtype=np.int32), np.arange(4.0) ** 2))
    add(log, [4])
    log.keep_in(tmp_path / "log")
    assert_file_holds(tmp_path / "log", range(5))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_file_that_has_changed_is_refused_and_left_as_it_is(tmp_path, elsewhere):
    path, log = tmp_path / "log", make()
    log.keep_in(path)
    add(log, range(5))
    moment = log.flush()
    log.close()
    content = bytearray(path.read_bytes())
    content[13] ^= 1
    path.write_bytes(content)
    again = make()
    again.restore(map_rows(moment, again.dtype))
    with pytest.raises(ValueError, match=r"log is damaged: the checksum of its first 5 rows"):
        again.keep_in(tmp_path / ("other" if elsewhere else "log"), moment)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_a_file_that_is_too_short_or_missing_cannot_be_mapped(tmp_path):
    (tmp_path / "log").write_bytes(b"\0" * 59)
    with pytest.raises(ValueError, match="must have 5 rows of 12 bytes, got 59 bytes"):
        map_rows(StoredLog(tmp_path / "log", 5, 0), make().dtype)
    with pytest.raises(FileNotFoundError):
        map_rows(StoredLog(tmp_path / "none", 5, 0), make().dtype)


def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path):
    log = make()
    log.keep_in(tmp_path / "log")
    add(log, range(5))
    log.flush()
    with no_file_larger_than(100):
        end = add(log, range(5, 20))
        for _ in range(3):
            with pytest.raises(OSError, match="too large"):
                log.flush()
        assert os.path.getsize(tmp_path / "log") == 100  # as much as went in
        assert_squares(log.read(0, end), np.arange(20))
    add(log, range(20, 22))
    log.flush()
    assert_file_holds(tmp_path / "log", range(22))
    assert_squares(log.read(), np.arange(22))


def test_rows_are_written_once_when_the_process_has_no_file_handle_left(tmp_path):
    log = make()
    log.keep_in(tmp_path / "log")
    with no_more_file_handles():
        for n in range(0, 20, 5):
            end = add(log, range(n, n + 5))
            assert log.flush(end).rows == end
            assert_squares(log.read(0, end), np.arange(end))
    add(log, range(20, 22))
    log.flush()
    log.close()
    assert_squares(log.read(), np.arange(22))
    assert_file_holds(tmp_path / "log", range(22))


def test_a_deleted_file_is_made_again(tmp_path):
    path, log = tmp_path / "log", make()
    log.keep_in(path)
    add(log, range(5))
    log.flush()
    path.unlink()
    log.make_again()
    add(log, range(5, 7))
    log.flush()
    assert_file_holds(path, range(7))
    assert_squares(log.read(), np.arange(7))


# Schedules larger than a part.


def test_the_summary_and_the_check_of_a_long_schedule_see_every_part():
    n = 600_000
    worker = np.zeros(n, np.int32)
    pulled = np.maximum(np.arange(n) - 2, 0)
    schedule = Schedule(worker, pulled)
    assert schedule.summarize_staleness() == (int(schedule.staleness.sum()), 2)
    schedule.check(1)
    for k, value in [(0, 1), (n - 1, n), (300_000, -1)]:
        bad = pulled.copy()
        bad[k] = value
        with pytest.raises(ValueError, match="pulled_version must name a version that exists"):
            Schedule(worker, bad).check(1)
    joined = np.concatenate([part.pulled_version for part, _ in schedule.parts(5)])
    np.testing.assert_array_equal(joined, pulled[5:])
