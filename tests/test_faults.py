"""What goes wrong around a run: workers, sinks, disks, clocks, threads; and what is left when it has."""

import asyncio
import builtins
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from faults import usual_ctrl_c
from small_runs import (
    WALK,
    Walk,
    assert_equal_runs,
    assert_exact_counters,
    fail_after,
    program,
    replay,
    small,
    train,
    words,
)

import a3c_jax
from a3c_jax import CheckpointFolder, SinkError, TrainingInterrupted, WorkerError, find_checkpoint

ROOT = Path(__file__).parent.parent
TIMEOUT = 60.0


def live_workers():
    return [t.name for t in threading.enumerate() if t.name.startswith("a3c-worker")]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Workers.


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("failing", [0, 25, 49], ids=["first", "middle", "last"])
def test_a_worker_that_raises_leaves_the_run_up_to_there(tmp_path, failing, num_workers):
    config = small(num_workers=num_workers)
    with pytest.raises(WorkerError, match=r"worker \d failed with MemoryError: no more") as caught:
        a3c_jax.train(
            fail_after(program(config, WALK), failing, MemoryError("no more"), once=True),
            checkpoints=CheckpointFolder(tmp_path),
        )
    assert not live_workers()
    result, checkpoint = caught.value.result, find_checkpoint(tmp_path)
    # The others finish the segment that they are in, and go on until they see that one has failed.
    assert failing <= result.version < 50 if num_workers > 1 else result.version == failing
    assert result.stop_reason == "failed"
    assert checkpoint.version == result.version
    assert_exact_counters(checkpoint)
    assert_equal_runs(replay(config, result.schedule), result)
    # It goes on to its end.
    end = train(config, resume=checkpoint)
    assert end.version == 50
    assert_equal_runs(replay(config, end.schedule), end)


def test_an_environment_that_returns_no_number_leaves_the_run_up_to_there(tmp_path):
    environment = Walk(np.nan, bad_from=50)
    with pytest.raises(WorkerError, match="NonFiniteError"):
        train(small(num_workers=3), environment, checkpoints=CheckpointFolder(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.version >= 12  # 48 steps of each environment are good
    assert all(np.isfinite(array).all() for array in checkpoint.params.values())
    assert_exact_counters(checkpoint)


# Sinks.


class Throws:
    def __init__(self, error, at=1):
        self.error, self.at, self.rows, self.closed = error, at, 0, 0

    def write(self, row, episodes):
        self.rows += 1
        if self.rows == self.at:
            raise self.error

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("at", [1, 3])
def test_a_sink_that_throws_ends_the_run_which_is_saved_all_the_same(tmp_path, at):
    sink, other = Throws(ZeroDivisionError("a sink"), at), Throws(None, -1)
    config = small(num_workers=2, max_steps=None, max_episodes=10**6)
    with pytest.raises(
        SinkError, match=r"Throws\.write failed with ZeroDivisionError: a sink"
    ) as caught:
        train(config, checkpoints=CheckpointFolder(tmp_path), sinks=[sink, other], interval=0.01)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert (sink.closed, other.closed) == (1, 1)
    assert other.rows == sink.rows > at, "the other did not get its rows"
    assert not live_workers()
    checkpoint = find_checkpoint(tmp_path)
    assert caught.value.result.version == checkpoint.version > 0
    assert caught.value.result.stop_reason == "failed"
    assert_exact_counters(checkpoint)
    longer = small(num_workers=2, max_steps=8 * (checkpoint.version + 20))
    result = train(longer, resume=checkpoint)
    assert_equal_runs(replay(longer, result.schedule), result)


def test_a_sink_that_throws_at_the_very_end_loses_nothing(tmp_path):
    with pytest.raises(SinkError) as caught:
        train(
            small(),
            checkpoints=CheckpointFolder(tmp_path),
            sinks=[Throws(ZeroDivisionError())],
            interval=1e6,
        )
    assert_equal_runs(caught.value.result, train(small()))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.version == 50
    assert words(train(small(), resume=checkpoint).params) == words(train(small()).params)


class Broken:
    """A sink that keeps what it gets and then fails, at each row and when it is closed."""

    def __init__(self):
        self.updates = []

    def write(self, row, episodes):
        self.updates.append(row["updates"])
        raise ZeroDivisionError("a row")

    def close(self):
        raise ZeroDivisionError("a close")


def test_sinks_get_every_row_of_a_run_that_a_worker_that_raises_ends():
    updates, built = [], fail_after(program(small(), WALK), 25)
    with pytest.raises(WorkerError):
        a3c_jax.train(
            built,
            on_progress=lambda row: updates.append(row["updates"]),
            updates_per_row=10,
            interval=1e6,
        )
    assert updates == [10, 20, 25]


def test_a_broken_sink_does_not_hide_a_worker_that_raises():
    sink = Broken()
    with pytest.raises(WorkerError, match="as told") as caught:
        a3c_jax.train(fail_after(program(small(), WALK), 25), sinks=[sink], interval=1e6)
    assert sink.updates == [25]
    assert caught.value.result.version == 25
    assert caught.value.__notes__ == ["As well, Broken.write failed with ZeroDivisionError: a row"]


def test_a_broken_sink_that_only_fails_to_close_does_not_keep_the_others_open():
    class FailsToClose(Throws):
        def close(self):
            super().close()
            raise self.error

    sinks = [
        FailsToClose(ZeroDivisionError("one"), -1),
        FailsToClose(OSError("two"), -1),
        Throws(None, -1),
    ]
    with pytest.raises(SinkError, match=r"close failed with ZeroDivisionError: one") as caught:
        train(small(), sinks=sinks)
    assert [sink.closed for sink in sinks] == [1, 1, 1]
    assert_equal_runs(caught.value.result, train(small()))


# Disks.


class Disk:
    """Fails in one call, from the n-th on, as a full or a read-only disk does."""

    def __init__(self, monkeypatch, call, number, first, times=10**6):
        self.calls, self.failed = 0, 0

        def wrap(function):
            def failing(*arguments, **options):
                if call == "open" and "partial" not in str(arguments[0]):
                    return function(*arguments, **options)
                self.calls += 1
                if first <= self.calls < first + times:
                    self.failed += 1
                    raise OSError(number, os.strerror(number))
                return function(*arguments, **options)

            return failing

        module = builtins if call == "open" else os
        monkeypatch.setattr(module, call, wrap(getattr(module, call)))


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["ENOSPC", "EROFS"])
def test_a_disk_that_fails_costs_a_warning_and_nothing_else(tmp_path, monkeypatch, call, number):
    # The first save is good: it opens and renames two logs and a checkpoint, and syncs both logs twice, the
    # checkpoint and the folder.
    disk = Disk(monkeypatch, call, number, first=7 if call == "fsync" else 4)
    folder = CheckpointFolder(tmp_path, every_seconds=None, every_updates=1)
    config = small(max_steps=8_000)
    message = rf"checkpoint of update .* cannot be written .*{os.strerror(number)}.* training goes"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        result = train(config, checkpoints=folder, interval=0.001)
    assert len(warned) == disk.failed >= 2
    assert_equal_runs(result, train(config))
    assert names(tmp_path) == [
        ".lock", "000000000000.checkpoint", "episodes.bin", "schedule.bin"
    ]  # fmt: skip
    assert find_checkpoint(tmp_path).version == 0


def test_a_disk_that_is_full_for_a_while_is_tried_again(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, "replace", errno.ENOSPC, first=4, times=1)
    folder = CheckpointFolder(tmp_path, every_seconds=None, every_updates=1)
    with pytest.warns(RuntimeWarning, match="No space left"):
        train(small(max_steps=8_000), checkpoints=folder, interval=0.001)
    assert disk.failed == 1
    assert disk.calls >= 5
    assert find_checkpoint(tmp_path).version == 1_000
    assert not list(tmp_path.glob(".*.partial"))


def test_a_first_save_that_fails_does_not_keep_a_run_from_starting(tmp_path, monkeypatch):
    Disk(monkeypatch, "open", errno.EROFS, first=1)
    with pytest.warns(RuntimeWarning, match="cannot be written") as warned:
        result = train(small(), checkpoints=CheckpointFolder(tmp_path))
    updates = [str(w.message).split(" cannot")[0] for w in warned]
    assert updates == ["the checkpoint of update 0", "the checkpoint of update 50"]
    assert result.version == 50
    assert names(tmp_path) == [".lock"]


class Removes(Throws):
    """A sink that deletes a folder at every row, or at the first few."""

    def __init__(self, folder, rows=10**6):
        super().__init__(KeyboardInterrupt(), rows)
        self.folder = folder

    def write(self, row, episodes):
        super().write(row, episodes)
        if self.rows < self.at:
            shutil.rmtree(self.folder, ignore_errors=True)


def test_a_folder_that_disappears_is_made_again(tmp_path):
    folder = CheckpointFolder(tmp_path / "run", every_seconds=None, every_updates=1)
    sink, config = Removes(folder.path), small(max_steps=8_000)
    result = train(config, checkpoints=folder, sinks=[sink], interval=0.001)
    assert sink.rows >= 2
    assert_equal_runs(result, train(config))
    # It was deleted once more after the last checkpoint, unless the row before that was the last one.
    assert not folder.path.exists() or find_checkpoint(folder.path).version == 1_000


def test_what_was_in_a_folder_that_disappears_is_in_the_one_made_again(tmp_path):
    folder = CheckpointFolder(tmp_path / "run", every_seconds=None, every_updates=1)
    # It is interrupted long before its budget is spent, however slow the machine is.
    config, sink = small(max_steps=100_000_000), Removes(folder.path, 3)
    with pytest.raises(TrainingInterrupted) as caught:
        train(config, checkpoints=folder, sinks=[sink], interval=0.001)
    checkpoint = find_checkpoint(folder.path)
    assert checkpoint.version == caught.value.result.version
    assert words(checkpoint.schedule) == words(caught.value.result.schedule)
    more = small(max_steps=checkpoint.environment_steps + 800)
    assert_equal_runs(train(more, resume=checkpoint), train(more))


def test_a_run_folder_that_disappears_costs_warnings(tmp_path):
    with pytest.warns(RuntimeWarning, match="No such file or directory"):
        result = train(
            small(max_steps=8_000),
            checkpoints=CheckpointFolder(tmp_path / "run" / "checkpoints"),
            sinks=[Removes(tmp_path / "run")],
            interval=0.001,
        )
    assert result.version == 1_000


# Interruptions, wherever they come.


class Interrupts:
    """Sends Ctrl-C the n-th time it is asked to."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)


class InterruptedFolder(CheckpointFolder):
    """Sends Ctrl-C while it saves for the n-th time."""

    def __init__(self, path, at):
        super().__init__(path)
        self.interrupt = Interrupts(at)

    def save(self, checkpoint):
        self.interrupt()
        return super().save(checkpoint)


def interrupted(tmp_path, at=0, interval=0.5, **options):
    with usual_ctrl_c(), pytest.raises(TrainingInterrupted) as caught:
        train(small(), checkpoints=InterruptedFolder(tmp_path, at), interval=interval, **options)
    assert caught.value.signal == signal.SIGINT
    assert find_checkpoint(tmp_path).version == caught.value.result.version
    return caught.value.result


def test_ctrl_c_in_the_setup_gives_a_result_without_updates(tmp_path):
    def loss(params, apply_fn, trajectory):
        interrupt()  # when it is traced
        return a3c_jax.losses.a3c_loss(params, apply_fn, trajectory)

    interrupt = Interrupts(1)
    with usual_ctrl_c(), pytest.raises(TrainingInterrupted) as caught:
        a3c_jax.train(
            small(hidden_sizes=(4,)),
            environment=WALK,
            loss=loss,
            checkpoints=CheckpointFolder(tmp_path),
        )
    assert (caught.value.result.version, caught.value.result.stop_reason) == (0, "interrupted")
    assert find_checkpoint(tmp_path).version == 0


def test_ctrl_c_in_the_first_save_gives_a_result_without_updates(tmp_path):
    result = interrupted(tmp_path, at=1)
    assert (result.version, result.stop_reason) == (0, "interrupted")


def test_ctrl_c_in_the_last_save_or_after_the_last_update_loses_nothing(tmp_path):
    assert_equal_runs(interrupted(tmp_path / "a", at=2), train(small()))
    at_the_last_row = interrupted(tmp_path / "b", on_progress=Interrupts(1), interval=1e6)
    assert_equal_runs(at_the_last_row, train(small()))
    assert at_the_last_row.stop_reason == "max_steps"


# Clocks.

DAY = 86_400.0


class Jumping:
    """A clock that jumps by a day each time it has been read so often."""

    def __init__(self, clock, jump, every=3):
        self.clock, self.jump, self.every, self.reads = clock, jump, every, 0

    def __call__(self):
        self.reads += 1
        return self.clock() + self.jump * (self.reads // self.every)


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forwards", "backwards"])
@pytest.mark.parametrize("clock", ["time", "monotonic"])
def test_a_clock_that_jumps_changes_nothing_that_counts(tmp_path, monkeypatch, clock, jump):
    expected = train(small(max_steps=8_000))
    jumping = Jumping(getattr(time, clock), jump)
    monkeypatch.setattr(time, clock, jumping)
    result = train(
        small(max_steps=8_000), checkpoints=CheckpointFolder(tmp_path), sinks=[Throws(None, -1)],
        interval=0.01,
    )  # fmt: skip
    monkeypatch.undo()
    if clock == "monotonic":
        assert jumping.reads >= 3
    assert_equal_runs(result, expected)
    assert 0.0 <= result.wall_clock["train"] < 100.0
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.version == 1_000
    assert 0.0 < checkpoint.seconds < 100.0
    assert (np.diff(checkpoint.episodes.seconds) >= 0.0).all()
    assert_exact_counters(checkpoint)


# Threads.


def test_sixty_four_workers_on_few_cores(tmp_path):
    config = small(num_workers=64, max_steps=16_000, optimizer="rmsprop")
    result = train(config, checkpoints=CheckpointFolder(tmp_path))
    assert result.version == 2_000
    assert_exact_counters(find_checkpoint(tmp_path))
    assert_equal_runs(replay(config, result.schedule), result)
    assert not live_workers()


def test_train_works_in_a_thread_that_is_not_the_main_one(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(small(), checkpoints=CheckpointFolder(tmp_path)))
    )
    thread.start()
    thread.join(TIMEOUT)
    assert_equal_runs(results[0], train(small()))
    assert find_checkpoint(tmp_path).version == 50


def test_train_works_in_a_running_event_loop_as_in_a_notebook():
    async def cell():
        return train(small(num_workers=2)), train(small())

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(tick())
        here = await cell()
        there = await asyncio.to_thread(train, small())
        other.cancel()
        assert ticks > 0
        return *here, there

    several, one, in_a_thread = asyncio.run(main())
    assert several.version == 50
    expected = train(small())
    assert_equal_runs(one, expected)
    assert_equal_runs(in_a_thread, expected)


def test_two_runs_at_once_are_each_what_they_are_alone(tmp_path):
    configs = [small(max_steps=8_000, seed=seed) for seed in (1, 2)]
    alone = [train(config) for config in configs]
    results, together = {}, threading.Barrier(2)

    class Meet(Throws):
        """At its first row each waits for the other, so that both are in the middle of their run."""

        def write(self, row, episodes):
            if not self.rows:
                together.wait(TIMEOUT)
            self.rows += 1

    def run(index):
        results[index] = train(
            configs[index],
            checkpoints=CheckpointFolder(tmp_path / str(index)),
            sinks=[Meet(None)],
            interval=0.001,
        )

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    for index in range(2):
        assert_equal_runs(results[index], alone[index])
        assert find_checkpoint(tmp_path / str(index)).config == configs[index]


MANY_RUNS = """
import json, os, threading
from a3c_jax import A3CConfig, train

config = A3CConfig(num_workers=2, envs_per_worker=1, t_max=2, hidden_sizes=(4,), max_steps=40)
rows = []
for _ in range(100):
    assert train(config).version == 20
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    rows.append((resident, threading.active_count(), len(os.listdir("/proc/self/fd"))))
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_many_runs_in_one_process_leave_nothing_behind():
    done = subprocess.run(
        [sys.executable, "-c", MANY_RUNS],
        capture_output=True,
        text=True,
        timeout=800,
        env=os.environ
        | {"PYTHONPATH": a3c_path(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    )
    assert done.returncode == 0, done.stderr
    mebibytes, threads, handles = np.array(json.loads(done.stdout)).T
    assert (threads == 1).all()
    assert len(set(handles[50:])) == 1
    # JAX keeps what it traced in caches of a fixed size. The allocator's own coming and going makes +-0.1 MiB a run.
    # A run whose programs stayed would be 9 MiB.
    last = mebibytes[-70:]
    slope = np.polyfit(np.arange(70), last, 1)[0]
    print(f"{slope:.3f} MiB a run over the last 70, {np.ptp(last):.0f} MiB between any two of them")
    assert slope < 0.25
    assert np.ptp(last) < 50.0


def a3c_path():
    return str(Path(a3c_jax.__file__).parent.parent)
