"""Metrics: exact totals, a mean over a full window only, and sinks that show the numbers."""

import contextlib
import io
import json
import threading
import time

import numpy as np
import pytest
from faults import no_file_larger_than

from a3c_jax import own_checks
from a3c_jax.asynchrony.json_lines import JsonLines
from a3c_jax.asynchrony.metrics import Counters, ProgressBar, Report, Totals
from a3c_jax.asynchrony.parameters import Snapshot, Update
from a3c_jax.asynchrony.records import EpisodeLog
from a3c_jax.rollout import Episodes
from a3c_jax.worker import SegmentReport


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def count(counters, returns, lengths=None, worker=0, staleness=0, **values):
    """Counts an update in whose segment these episodes ended; the segment has some steps more."""
    ended = np.zeros(len(returns) + 2, bool)
    ended[1:-1] = True
    padded = np.full(len(ended), -77.0, np.float32)
    padded[ended] = returns
    steps = np.full(len(ended), 88, np.int32)
    steps[ended] = 1 if lengths is None else lengths
    report = SegmentReport(values, Episodes(ended, padded, steps), np.int32(len(returns)))
    counters.count(Update(worker, staleness, Snapshot(None, 0), {}), Report(report))


def episodes_of(counters):
    counters.log.seal()
    return counters.log.read()


def take_rows(counters, **options):
    return counters.make_rows(counters.take_moments(**options))


def take_row(counters):
    ((row, _),) = take_rows(counters)
    return row


def test_no_loss_may_call_a_metric_like_what_every_row_has():
    counters = Counters(steps_per_update=40, window=10)
    count(counters, [], gradient_norm=np.float32(1.0))  # which is added to what the loss reports
    assert set(take_row(counters)) == set(own_checks.TAKEN)


def test_totals_are_exact():
    counters = Counters(steps_per_update=40, window=10)
    for n in range(7):
        count(counters, [1.0] * n)  # none, one, several episodes an update
    totals = counters.totals
    assert (totals.updates, totals.environment_steps, totals.episodes) == (7, 7 * 40, 21)


def test_the_mean_return_is_that_of_the_last_window_and_none_before_there_are_so_many():
    counters = Counters(steps_per_update=1, window=3)
    count(counters, [10.0, 20.0])
    assert counters.mean_return is None
    count(counters, [])
    assert counters.mean_return is None
    count(counters, [60.0])
    assert counters.mean_return == (10 + 20 + 60) / 3
    count(counters, [])
    assert counters.mean_return == 30.0
    count(counters, [100.0])
    assert counters.mean_return == (20 + 60 + 100) / 3
    count(counters, [1.0, 2.0, 3.0, 4.0, 5.0])  # more than the window at once
    assert counters.mean_return == 4.0


def test_the_log_has_a_row_for_each_episode_in_the_order_of_the_updates(clock):
    counters = Counters(steps_per_update=20, window=2)
    counters.start_clock()
    clock.now += 1.5
    count(counters, [3.0], lengths=[30], worker=2)
    clock.now += 0.5
    count(counters, [], worker=5)
    count(counters, [7.25, -1.0], lengths=[4, 9], worker=1)
    expected = EpisodeLog(
        worker=np.array([2, 1, 1], np.int32),
        episode_return=np.array([3.0, 7.25, -1.0]),
        length=np.array([30, 4, 9], np.int32),
        environment_steps=np.array([20, 60, 60]),
        seconds=np.array([1.5, 2.0, 2.0]),
    )
    for actual, column in zip(episodes_of(counters), expected, strict=True):
        assert actual.dtype == column.dtype
        np.testing.assert_array_equal(actual, column)


def test_the_log_stays_as_it_was_read_and_is_empty_at_first():
    counters = Counters(steps_per_update=1, window=2)
    log = episodes_of(counters)
    assert [len(column) for column in log] == [0] * 5
    count(counters, [1.0])
    assert [len(column) for column in log] == [0] * 5
    assert [len(column) for column in episodes_of(counters)] == [1] * 5


def test_new_episodes_are_each_reported_once():
    counters = Counters(steps_per_update=1, window=2)

    def new_returns():
        ((_, episodes),) = take_rows(counters)
        return episodes.episode_return.tolist()

    assert new_returns() == []
    count(counters, [1.0, 2.0])
    count(counters, [3.0])
    assert new_returns() == [1, 2, 3]
    assert new_returns() == []
    count(counters, [4.0])
    assert new_returns() == [4]
    assert episodes_of(counters).episode_return.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("updates_per_row", [None, 2])
def test_the_last_row_is_of_the_last_update_and_there_is_only_one(updates_per_row):
    counters = Counters(steps_per_update=5, window=2, updates_per_row=updates_per_row)
    for _ in range(4):
        count(counters, [1.0])
    updates = [row["updates"] for row, _ in take_rows(counters)]
    assert updates == ([4] if updates_per_row is None else [2, 4])
    assert take_rows(counters, last=True) == []
    count(counters, [1.0])
    ((row, episodes),) = take_rows(counters, last=True)
    assert (row["updates"], len(episodes.worker)) == (5, 1)
    assert take_rows(counters, last=True) == []


def test_an_update_that_cannot_be_counted_is_not_counted_in_part():
    class Report:
        num_episodes = np.int32(2)

        @property
        def episodes(self):
            raise ZeroDivisionError

    counters = Counters(steps_per_update=5, window=2, updates_per_row=1)
    count(counters, [1.0])
    with pytest.raises(ZeroDivisionError):
        counters.count(Update(0, 2, Snapshot(None, 1), {}), Report())
    assert counters.totals == Totals(1, 5, 1, 0, 0)
    assert len(episodes_of(counters).worker) == 1
    assert [row["updates"] for row, _ in take_rows(counters)] == [1]


def test_a_row_holds_totals_and_rates_since_the_row_before(clock):
    counters = Counters(steps_per_update=50, window=4)
    counters.start_clock()
    count(counters, [10.0], staleness=1)
    count(counters, [20.0], staleness=4, loss=np.float32(0.5), entropy=np.float32(0.25))
    clock.now += 2.0
    row = take_row(counters)
    assert row == {
        "seconds": 2.0,
        "environment_steps": 100,
        "episodes": 2,
        "updates": 2,
        "steps_per_second": 100 / 2.0,
        "mean_return": 15.0,  # of the episodes there are, if fewer than the window
        "staleness": (1 + 4) / 2,
        "max_staleness": 4,
        "loss": 0.5,
        "entropy": 0.25,
    }
    assert type(row["loss"]) is float

    clock.now += 0.5
    count(counters, [], staleness=3, loss=np.float32(2.0))
    row = take_row(counters)
    assert row["seconds"] == 2.5
    assert row["environment_steps"] == 150
    assert row["steps_per_second"] == 50 / 0.5
    assert row["staleness"] == 3.0
    assert row["max_staleness"] == 4
    assert row["loss"] == 2.0


def test_rows_without_anything_new_or_any_time_between_them_are_no_error(clock):
    counters = Counters(steps_per_update=50, window=4)
    counters.start_clock()
    for _ in range(2):
        row = take_row(counters)
        assert (row["environment_steps"], row["episodes"], row["updates"]) == (0, 0, 0)
        assert row["steps_per_second"] == row["staleness"] == 0.0
        assert np.isnan(row["mean_return"])


def test_the_clock_can_be_started_later_than_the_counters_are_made(clock):
    counters = Counters(steps_per_update=50, window=4)
    clock.now += 100.0
    counters.start_clock()
    clock.now += 1.0
    count(counters, [1.0])
    assert take_row(counters)["steps_per_second"] == 50.0
    np.testing.assert_array_equal(episodes_of(counters).seconds, [1.0])


def test_the_episodes_of_a_segment_are_looked_at_only_if_one_ended():
    class Report:
        num_episodes = np.int32(0)

    counters = Counters(steps_per_update=5, window=2)
    counters.count(Update(0, 2, Snapshot(None, 1), {}), Report())
    assert counters.totals == (1, 5, 0, 2, 2)


def test_counters_that_go_on_from_an_earlier_run_are_those_of_one_run(clock):
    def first(counters):
        counters.start_clock()
        count(counters, [1.0, 2.0], lengths=[3, 4], worker=1, staleness=0)
        clock.now += 2.0
        count(counters, [4.0], staleness=5)

    def second(counters):
        clock.now += 1.0
        count(counters, [9.0], worker=2, staleness=3)

    whole, before, after = (Counters(steps_per_update=10, window=3) for _ in range(3))
    first(whole)
    second(whole)
    expected = (whole.totals, whole.mean_return, whole.seconds, episodes_of(whole))

    first(before)
    clock.now += 100.0  # nobody runs
    after.restore(before.totals, episodes_of(before), seconds=2.0)
    assert after.mean_return == (1 + 2 + 4) / 3
    ((_, episodes),) = take_rows(after)
    assert len(episodes.worker) == 0, "the earlier episodes were reported already"
    second(after)
    assert (after.totals, after.mean_return, after.seconds) == expected[:3]
    for column, values in zip(episodes_of(after), expected[3], strict=True):
        np.testing.assert_array_equal(column, values)
    assert take_row(after)["steps_per_second"] == 10.0  # of this run alone


def test_rows_can_be_taken_while_another_thread_counts():
    counters, lock = Counters(steps_per_update=5, window=50), threading.Lock()
    begun, errors = threading.Event(), []

    def write():
        try:
            for n in range(4000):
                with lock:
                    count(counters, [float(n)] * 2, lengths=[n, n])
                begun.set()
        except BaseException as error:
            errors.append(error)
        finally:
            begun.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert begun.wait(30)
    seen = []
    while writer.is_alive():
        with lock:
            moments = counters.take_moments()
        ((row, episodes),) = counters.make_rows(moments)  # all of it of one moment
        assert row["environment_steps"] == 5 * row["updates"]
        assert row["episodes"] == 2 * row["updates"]
        seen.append(episodes)
        if row["updates"] >= 50:
            assert row["mean_return"] == row["updates"] - 1 - 12  # of the last 25 updates
    writer.join(30)
    assert errors == []
    seen.extend(episodes for _, episodes in take_rows(counters))
    np.testing.assert_array_equal(
        np.concatenate([log.length for log in seen]), np.repeat(np.arange(4000), 2)
    )


def some_row(**changes):
    counters = Counters(steps_per_update=50, window=4)
    count(counters, [10.0])
    return take_row(counters) | changes


def episodes():
    return EpisodeLog(*(np.zeros(0) for _ in EpisodeLog._fields))


def test_json_lines_appends_one_valid_object_a_line_with_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"before": 1}\n', encoding="utf-8")
    sink = JsonLines(path)
    row = some_row(mean_return=float("nan"), loss=float("inf"), entropy=0.125)
    sink.write(row, episodes())
    sink.write(some_row(environment_steps=12345, updates=2), episodes())
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3, "not written at once"
    sink.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = path.read_text(encoding="utf-8").splitlines()
    before, first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert before == {"before": 1}
    assert set(first) == set(row)
    assert (first["mean_return"], first["loss"], first["entropy"]) == (None, None, 0.125)
    assert first["environment_steps"] == 50
    assert second["environment_steps"] == 12345


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("torn", ["", '{"updates": 9, "environ', "\0\0\0", '{"upd' * 20_000])
def test_json_lines_cuts_off_what_is_torn_and_does_not_repeat_the_last_row(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for updates in (1, 2, 3):
        sink.write(some_row(updates=updates), episodes())
    sink.close()
    with open(path, "a", encoding="utf-8") as file:
        file.write(torn)
    sink = JsonLines(path)
    for updates in (3, 4, 4):
        sink.write(some_row(updates=updates), episodes())
    sink.close()
    assert [row["updates"] for row in rows_in(path)] == [1, 2, 3, 4, 4]


def test_json_lines_loses_no_row_of_a_second_run_and_warns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        sink = JsonLines(path)
        with (
            pytest.warns(RuntimeWarning, match="rows up to update 3, and now")
            if path.stat().st_size
            else contextlib.nullcontext()
        ):
            sink.write(some_row(updates=1), episodes())
        for updates in (2, 3):
            sink.write(some_row(updates=updates), episodes())
        sink.close()
    assert [row["updates"] for row in rows_in(path)] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("line", ["{}", "[]", "null", "{", "\0", '{"updates": "many"}', "NaN"])
def test_json_lines_goes_on_after_any_garbage(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    sink = JsonLines(path)
    sink.write(some_row(updates=1), episodes())
    sink.close()
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert (first, json.loads(second)["updates"]) == (line, 1)


def test_rows_wait_while_the_disk_is_full_and_one_warning_says_so(tmp_path):
    path, sink = tmp_path / "metrics.jsonl", JsonLines(tmp_path / "metrics.jsonl")
    sink.write(some_row(updates=0), episodes())
    size = path.stat().st_size
    with pytest.warns(RuntimeWarning, match="rows cannot be written to .*metrics.jsonl") as warned:
        with no_file_larger_than(size + 20):
            for updates in range(1, 5):
                sink.write(some_row(updates=updates), episodes())
        sink.write(some_row(updates=5), episodes())
    assert len(warned) == 1
    sink.close()
    assert [row["updates"] for row in rows_in(path)] == list(range(6))


def test_rows_that_are_lost_are_counted(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.warns(RuntimeWarning) as warned, no_file_larger_than(20):
        for updates in range(10_003):
            sink.write(some_row(updates=updates), episodes())
        sink.close()
    assert [str(w.message).split(" of")[0] for w in warned[1:]] == ["10,003 rows"]


def test_json_lines_fails_when_it_is_made_where_the_folder_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        JsonLines(tmp_path / "missing" / "metrics.jsonl")


def shown(output):
    """The last state of the bar: each one overwrites the one before."""
    return [line for line in output.getvalue().replace("\n", "\r").split("\r") if line.strip()][-1]


@pytest.mark.parametrize(("max_steps", "total"), [(1_000, "1.00k/1.00k"), (None, "1.00k")])
def test_the_progress_bar_shows_the_numbers_and_the_final_total(max_steps, total):
    output = io.StringIO()
    bar = ProgressBar(max_steps, window=7, file=output, ncols=400)
    changes = {"seconds": 0.5, "staleness": 1.25}
    bar.write(some_row(environment_steps=400, episodes=3, **changes), episodes())
    bar.write(
        some_row(
            environment_steps=1_000, episodes=1_234, updates=5_678, mean_return=98.76, **changes
        ),
        episodes(),
    )
    bar.close()
    text = shown(output)
    for part in (
        total,
        "2,000 steps/s",
        "1,234 episodes",
        "5,678 updates",
        "last 7",
        "98.8",
        "1.25",
    ):
        assert part in text
    assert ("100%" in text) == (max_steps is not None)


def test_the_progress_bar_may_pass_its_total_by_the_last_segment():
    output = io.StringIO()
    bar = ProgressBar(1_000, file=output, ncols=400)
    bar.write(some_row(environment_steps=1_004, seconds=1.0), episodes())
    bar.close()
    assert "1,004 steps/s" in shown(output)
