"""Going on: an interrupted run is the run it would have been, wherever and however it was stopped."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import numpy as np
import pytest
from small_runs import (
    OPTIMIZERS,
    WALK,
    StopAt,
    Walk,
    assert_equal_runs,
    assert_exact_counters,
    cut_short,
    fail_after,
    program,
    replay,
    small,
    train,
    words,
)

import a3c_jax
from a3c_jax import (
    CheckpointFolder,
    TrainingInterrupted,
    WorkerError,
    find_checkpoint,
    load_checkpoint,
)
from a3c_jax.asynchrony.trees import name_leaves

ROOT = Path(__file__).parent.parent

LINEAR = {"learning_rate_schedule": "linear", "learning_rate": 0.05}


# One worker: bit for bit.


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("shared_rmsprop", "linear"),
        ("adam", "constant"),
        *(
            pytest.param(o, "linear", marks=pytest.mark.slow)
            for o in OPTIMIZERS
            if o != "shared_rmsprop"
        ),
        *(pytest.param(o, "constant", marks=pytest.mark.slow) for o in OPTIMIZERS if o != "adam"),
    ],
)
def test_one_worker_goes_on_bit_for_bit_from_anywhere(tmp_path, optimizer, schedule):
    config = small(optimizer=optimizer, **LINEAR | {"learning_rate_schedule": schedule})
    whole = train(config)
    assert whole.version == 50
    for updates in (0, 1, 24, 49, 50):
        checkpoint = cut_short(config, updates, tmp_path / str(updates))
        assert checkpoint.version == updates
        assert_equal_runs(train(config, resume=checkpoint), whole)


def test_one_worker_may_be_interrupted_again_and_again(tmp_path):
    config = small(**LINEAR)
    checkpoint = None
    for updates in (7, 1, 0, 13):
        checkpoint = cut_short(config, updates, tmp_path, resume=checkpoint)
    assert checkpoint.version == 21
    assert_equal_runs(train(config, resume=checkpoint), train(config))


def test_a_longer_budget_goes_on_to_what_the_longer_run_would_have_been(tmp_path):
    train(small(max_steps=160), checkpoints=CheckpointFolder(tmp_path))
    assert_equal_runs(train(small(), resume=find_checkpoint(tmp_path)), train(small()))


def test_the_running_mean_goes_on_over_the_episodes_of_before_which_no_sink_sees_again(tmp_path):
    class Last(StopAt):
        def write(self, row, episodes):
            self.row = row
            self.seen = [*getattr(self, "seen", []), *episodes.length]

    config = small(solved_window=30)
    checkpoint = cut_short(config, 40, tmp_path)
    assert len(checkpoint.episodes.length) >= 30
    sink = Last(None)
    result = train(config, resume=checkpoint, sinks=[sink])
    returns = result.episodes.episode_return
    assert 0 < len(returns) - len(checkpoint.episodes.length) < 30
    np.testing.assert_allclose(sink.row["mean_return"], returns[-30:].mean())
    # And a sink is told of the new ones alone.
    assert sink.seen == result.episodes.length[len(checkpoint.episodes.length) :].tolist()
    assert sink.row["episodes"] == len(returns)


ENDLESS = {"max_steps": None, "max_episodes": 10**9}


def test_one_worker_that_ctrl_c_stops_goes_on_bit_for_bit(tmp_path):
    with pytest.raises(TrainingInterrupted) as caught:
        train(
            small(**ENDLESS),
            checkpoints=CheckpointFolder(tmp_path),
            sinks=[StopAt(update=100)],
            interval=0.001,
        )
    checkpoint = find_checkpoint(tmp_path)
    assert 100 <= checkpoint.version == caught.value.result.version
    config = small(max_steps=8 * (checkpoint.version + 100))
    assert_equal_runs(train(config, resume=checkpoint), train(config))


def test_the_running_episodes_go_on_and_are_not_begun_anew(tmp_path):
    # Cut in the middle of episodes: the next to end are longer than what was played since.
    config = small()
    checkpoint = cut_short(config, 11, tmp_path)
    assert_exact_counters(checkpoint)
    result = train(config, resume=checkpoint)
    count = len(checkpoint.episodes.length)
    assert words([c[:count] for c in result.episodes]) == words(list(checkpoint.episodes))
    whole = train(config)
    assert result.episodes.length.tolist() == whole.episodes.length.tolist()


# Several workers: exact counters, and a replay of the whole.


@pytest.mark.parametrize("num_workers", [pytest.param(2, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_several_workers_go_on_and_count_exactly(tmp_path, optimizer, num_workers):
    config = small(num_workers=num_workers, optimizer=optimizer, max_steps=2_000, **LINEAR)
    checkpoint = None
    for updates in (1, 60, 90):
        checkpoint = cut_short(config, updates, tmp_path, resume=checkpoint)
        assert_exact_counters(checkpoint)
    assert checkpoint.version == 151
    result = train(config, resume=checkpoint, checkpoints=CheckpointFolder(tmp_path))
    assert result.version == 250
    assert_exact_counters(find_checkpoint(tmp_path))
    assert words([c[:151] for c in result.schedule]) == words(list(checkpoint.schedule))
    assert_equal_runs(replay(config, result.schedule), result)


def test_what_others_were_playing_when_a_process_was_killed_is_played_again(tmp_path):
    # A checkpoint of a running run, as a killed process leaves it: the segments being played are lost,
    # and counted once all the same.
    class First(CheckpointFolder):
        def due(self, version):
            return version >= 20 and not (self.path / "kept").exists()

        def save(self, checkpoint):
            path = super().save(checkpoint)
            if checkpoint.version >= 20 and not (self.path / "kept").exists():
                path.rename(self.path / "kept")
            return path

    class WhenSaved(StopAt):
        def write(self, row, episodes):
            if (tmp_path / "kept").exists():
                super().write(row, episodes)

    config = small(num_workers=4, **ENDLESS)
    folder = First(tmp_path)
    with pytest.raises(TrainingInterrupted):
        train(config, checkpoints=folder, sinks=[WhenSaved(0)], interval=0.001)
    checkpoint = load_checkpoint(tmp_path / "kept")
    assert checkpoint.version < find_checkpoint(tmp_path).version
    config = small(num_workers=4, max_steps=8 * (checkpoint.version + 100))
    result = train(config, resume=checkpoint, checkpoints=CheckpointFolder(tmp_path / "new"))
    assert_exact_counters(find_checkpoint(tmp_path / "new"))
    assert_equal_runs(replay(config, result.schedule), result)


def test_a_run_may_go_on_with_programs_compiled_in_another_way(tmp_path, monkeypatch):
    # The last bits differ from there on, and nothing else: the checkpoint knows nothing of it.
    checkpoint = cut_short(small(num_workers=2), 30, tmp_path / "first")
    is_plain = os.environ.get("A3C_JAX_PLAIN") == "1"
    monkeypatch.setenv("A3C_JAX_PLAIN", "0" if is_plain else "1")
    built = a3c_jax.build(small(num_workers=2), environment=WALK)
    assert type(built.step) is not type(program(small(), WALK).step)
    at_once = a3c_jax.train(built.replace(max_steps=8), resume=checkpoint)
    assert at_once.version == 30
    chex.assert_trees_all_equal(name_leaves(at_once.params), checkpoint.params)
    a3c_jax.train(built, resume=checkpoint, checkpoints=CheckpointFolder(tmp_path / "second"))
    after = find_checkpoint(tmp_path / "second")
    assert after.version == 50
    assert after.versions != checkpoint.versions
    assert_exact_counters(after)


# Budgets.


class Endless:
    """A sink that ends a run that goes on beyond an update."""

    def __init__(self, update):
        self.update = update

    def write(self, row, episodes):
        assert row["updates"] <= self.update, "the run goes on beyond its budget"

    def close(self):
        pass


@pytest.mark.parametrize("max_steps", [8, 392, 400])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_run_that_is_beyond_its_budget_already_makes_no_update(tmp_path, max_steps, num_workers):
    whole = train(small(num_workers=num_workers), checkpoints=CheckpointFolder(tmp_path))
    config = small(num_workers=num_workers, max_steps=max_steps)
    result = train(config, resume=find_checkpoint(tmp_path), sinks=[Endless(50)], interval=0.01)
    assert result.stop_reason == "max_steps"
    assert result.version == 50
    assert words(result.params) == words(whole.params)


def test_a_run_that_is_solved_or_out_of_episodes_already_makes_no_update(tmp_path):
    whole = train(small(), checkpoints=CheckpointFolder(tmp_path))
    for budget, reason in (
        ({"max_episodes": 3}, "max_episodes"),
        ({"solved_return": -100.0}, "solved"),
    ):
        config = small(max_steps=100_000, **budget)
        result = train(config, resume=find_checkpoint(tmp_path))
        assert (result.version, result.stop_reason) == (50, reason)
        assert words(result.params) == words(whole.params)


def test_the_best_stays_the_best_when_a_run_goes_on(tmp_path):
    first = cut_short(small(max_steps=4_000), 100, tmp_path)
    best = {name: array + 1 for name, array in first.best_params.items()}
    high = first._replace(best_mean_return=1e6, best_params=best)
    result = train(small(max_steps=4_000), resume=high)
    assert result.best_mean_return == 1e6
    chex.assert_trees_all_equal(name_leaves(result.best_params), best)


# Real processes.

TINY = ("--num-workers", "3", "--envs-per-worker", "2", "--t-max", "4", "--hidden-sizes", "8",
        "--evaluation-episodes", "1")  # fmt: skip
FOR_EVER = ("--max-steps", "None", "--max-episodes", "None", "--solved-return", "501")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "MPLBACKEND": "Agg",
}
DEADLINE = 120.0


DEFAULT_SIGNALS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(*arguments):
    # A shell that starts the tests in the background has them, and their children, ignore SIGINT.
    return subprocess.Popen(
        [sys.executable, "-c", DEFAULT_SIGNALS, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def cartpole(run_dir, *arguments):
    return start("-m", "experiments.cartpole", "--run-dir", str(run_dir), *TINY, *arguments)


def finish(process, timeout=DEADLINE):
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the process does not end")
    return process.returncode, output, errors


def await_updates(process, run_dir, updates=1):
    """Waits until the metrics show an update, and so the threads are running."""
    rows = run_dir / "metrics.jsonl"
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the process has ended: {process.communicate()}")
        lines = rows.read_text().split("\n")[:-1] if rows.exists() else []
        if lines and json.loads(lines[-1])["updates"] >= updates:
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail("no update is made")


def replayed(run_dir):
    code, output, errors = finish(start("-m", "experiments.replay", str(run_dir)))
    assert "Warning" not in errors
    return code, output, errors


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to a process on Windows")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_and_sigterm_stop_at_once_save_and_say_how_to_go_on(tmp_path, number, code):
    run_dir = tmp_path / "run"
    process = cartpole(run_dir, *FOR_EVER)
    await_updates(process, run_dir)
    begin = time.monotonic()
    process.send_signal(number)
    returncode, output, errors = finish(process)
    seconds = time.monotonic() - begin
    print(f"{seconds:.2f} s from signal {number} to the exit")
    assert returncode == code, errors
    assert "stopped (interrupted)" in output
    assert f"go on with: python -m experiments.cartpole --resume {run_dir}\n" in output
    assert "Traceback" not in errors
    checkpoint = find_checkpoint(run_dir)
    steps = re.search(r"after ([\d,]+) steps", output)
    assert int(steps[1].replace(",", "")) == checkpoint.environment_steps > 0
    assert_exact_cartpole(checkpoint)
    if number == signal.SIGINT:
        goes_on_as_it_said(run_dir, output)


def goes_on_as_it_said(run_dir, output):
    before = find_checkpoint(run_dir).environment_steps
    command = re.search(r"go on with: python (.+)\n", output)[1].split()
    budget = ["--max-steps", str(before + 800), "--evaluation-episodes", "1"]
    returncode, output, errors = finish(start(*command, *budget))
    assert returncode == 0, errors
    summary = json.loads((run_dir / "summary.json").read_text())
    assert before + 800 <= summary["environment_steps"] < before + 808
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["environment_steps"] for row in rows]
    assert steps == sorted(steps)
    returncode, output, errors = replayed(run_dir)
    assert (returncode, output[:10]) == (0, "identical:"), output + errors


IN_A_LONG_SEGMENT = """
import dataclasses, sys, time
from pathlib import Path

import a3c_jax
from experiments.run_folder import exit_if_cut_short, train_in_folder

def step(params, state):
    sys.stdout.write("a segment begins\\n")  # print would mix two threads' lines
    sys.stdout.flush()
    time.sleep(1000.0)

program = a3c_jax.build(a3c_jax.A3CConfig(num_workers=3, hidden_sizes=(8,)))
endless = dataclasses.replace(program, step=step, max_concurrent_calls=lambda *_: None)
folder = Path(sys.argv[1])
with exit_if_cut_short(folder, None):
    train_in_folder(endless, folder, a3c_jax.CheckpointFolder(folder / "checkpoints"))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to a process on Windows")
def test_a_second_ctrl_c_quits_at_once_whatever_the_workers_are_doing(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    process = start("-c", IN_A_LONG_SEGMENT, str(run_dir))
    assert process.stdout.readline() == "a segment begins\n"
    process.send_signal(signal.SIGINT)
    # Two signals at the same time are one, and nothing outside shows that the first was noted.
    time.sleep(3.0)
    assert process.poll() is None  # it waits for the segments, which do not end
    process.send_signal(signal.SIGINT)
    returncode, _, errors = finish(process, timeout=15.0)
    assert returncode in (130, -signal.SIGINT), errors
    assert find_checkpoint(run_dir).version == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL does not exist on Windows")
def test_a_run_killed_at_ten_random_moments_ends_as_if_it_had_not_been(tmp_path):
    rng = random.Random(11)
    run_dir, resumed, saving = tmp_path / "run", 0, 0
    save_often = ("--checkpoint-updates", "1", "--keep-checkpoints", "2", "--no-progress")
    versions = [0]
    for _ in range(10):
        if (run_dir / "checkpoints").is_dir() and list(run_dir.glob("checkpoints/*.checkpoint")):
            process = start(
                "-m", "experiments.cartpole", "--resume", str(run_dir),
                *FOR_EVER, *save_often, "--evaluation-episodes", "1",
            )  # fmt: skip
            resumed += 1
        else:
            run_dir = tmp_path / f"run-{len(versions)}"  # killed before it saved anything
            process = cartpole(run_dir, *FOR_EVER, *save_often)
        # Some moments lie in its start, the others while it trains and saves.
        if rng.random() < 0.2:
            threading.Event().wait(rng.uniform(0.0, 2.0))
        else:
            before = checkpoint_names(run_dir)
            end = time.monotonic() + DEADLINE
            while checkpoint_names(run_dir) <= before and time.monotonic() < end:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            if rng.random() < 0.5:  # the moment a file is being written
                wait_for_partial(run_dir, time.monotonic() + 2.0)
            else:
                threading.Event().wait(rng.uniform(0.0, 0.6))
        process.kill()
        process.communicate()
        saving += bool(list(run_dir.glob("checkpoints/.*.partial")))
        if checkpoint_names(run_dir):
            checkpoint = find_checkpoint(run_dir)  # always whole, whatever was being written
            assert_exact_cartpole(checkpoint)
            assert checkpoint.version >= versions[-1] or resumed == 0
            versions.append(checkpoint.version)
    assert resumed >= 8
    assert saving >= 1, "no kill fell into a save"
    assert versions[-1] > versions[1]

    more = find_checkpoint(run_dir).environment_steps + 4_000
    arguments = ("--resume", str(run_dir), "--max-steps", str(more), "--evaluation-episodes", "1")
    returncode, output, errors = finish(start("-m", "experiments.cartpole", *arguments))
    assert returncode == 0, errors
    last = find_checkpoint(run_dir)
    assert more <= last.environment_steps < more + 8
    assert_exact_cartpole(last)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["environment_steps"] == last.environment_steps
    assert summary["episodes"] == len(last.episodes.length)
    assert not list(run_dir.glob("checkpoints/.*.partial"))
    returncode, output, errors = replayed(run_dir)
    assert (returncode, output[:10]) == (0, "identical:"), output + errors


def checkpoint_names(run_dir):
    return {path.name for path in run_dir.glob("checkpoints/0*.checkpoint")}


def wait_for_partial(run_dir, end):
    while time.monotonic() < end and not list(run_dir.glob("checkpoints/.*.partial")):
        pass


def assert_exact_cartpole(checkpoint):
    assert_exact_counters(checkpoint)
    # CartPole-v1 pays 1 a step.
    np.testing.assert_array_equal(checkpoint.episodes.episode_return, checkpoint.episodes.length)


def test_an_error_of_a_worker_leaves_a_run_that_goes_on(tmp_path):
    config = small(max_steps=800)
    with pytest.raises(WorkerError, match="worker 0 failed with OSError: lost"):
        a3c_jax.train(
            fail_after(program(config, WALK), 38, OSError("lost")),
            checkpoints=CheckpointFolder(tmp_path),
        )
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.version == 38
    assert_equal_runs(train(config, resume=checkpoint), train(config))


def test_parameters_beside_a_checkpoint_are_refused(tmp_path):
    result = train(small(max_steps=16), checkpoints=CheckpointFolder(tmp_path))
    with pytest.raises(ValueError, match="params must not be given with resume"):
        a3c_jax.train(result.config, params=result.params, resume=find_checkpoint(tmp_path))


class Untouched(Walk):
    """An environment that nobody may play yet."""

    def reset(self, key, num_envs):
        raise AssertionError("something was built")


@pytest.mark.parametrize("call", ["train", "replay"])
def test_another_configuration_or_object_is_refused_before_anything_is_built(tmp_path, call):
    train(small(max_steps=16), checkpoints=CheckpointFolder(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    go_on = {
        "train": lambda config: a3c_jax.train(config, environment=Untouched(), resume=checkpoint),
        "replay": lambda config: a3c_jax.replay(
            config, checkpoint.schedule, environment=Untouched(), start=checkpoint
        ),
    }[call]
    with pytest.raises(ValueError, match=r"A3CConfig\.seed must be the checkpoint's 3"):
        go_on(small(max_steps=16, seed=5))
    with pytest.raises(
        ValueError, match=r"environment must be small_runs\.Walk.*, got .*Untouched"
    ):
        go_on(small(max_steps=16))


def test_a_program_with_another_configuration_is_refused(tmp_path):
    train(small(max_steps=16), checkpoints=CheckpointFolder(tmp_path))
    with pytest.raises(ValueError, match=r"A3CConfig\.seed must be the checkpoint's 3"):
        a3c_jax.train(program(small(seed=5), WALK), resume=find_checkpoint(tmp_path))
