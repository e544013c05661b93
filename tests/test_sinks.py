"""Where rows go: every so many updates, to a function, and to the real TensorBoard, W&B and trackio libraries."""

import contextlib
import glob
import json
import os
import sqlite3
import struct
import subprocess
import sys

import numpy as np
import pytest
from small_runs import program, small

import a3c_jax
from a3c_jax.asynchrony.metrics import Report
from a3c_jax.asynchrony.reporting import Outlets, Progress
from a3c_jax.asynchrony.run import Run
from experiments import cartpole
from experiments.command_line import main

CONFIG = small(max_steps=8 * 25, num_workers=1)


class Recorder:
    def __init__(self):
        self.rows, self.episodes, self.closed = [], [], 0

    def write(self, row, episodes):
        self.rows.append(row)
        self.episodes.append(episodes)

    def close(self):
        self.closed += 1


def test_there_is_a_row_for_every_so_many_updates_and_one_for_the_last():
    recorder, seen = Recorder(), []
    result = a3c_jax.train(
        program(CONFIG), sinks=[recorder], on_progress=seen.append, updates_per_row=10
    )
    assert [row["updates"] for row in recorder.rows] == [10, 20, 25]
    assert seen == recorder.rows
    assert all("loss" in row for row in recorder.rows)
    together = np.concatenate([log.episode_return for log in recorder.episodes])
    np.testing.assert_array_equal(together, result.episodes.episode_return)
    for row, log in zip(recorder.rows, recorder.episodes, strict=True):
        assert (log.environment_steps <= row["environment_steps"]).all()


def test_the_last_row_is_not_sent_twice():
    recorder = Recorder()
    a3c_jax.train(program(CONFIG), sinks=[recorder], updates_per_row=5)
    assert [row["updates"] for row in recorder.rows] == [5, 10, 15, 20, 25]


def test_by_seconds_a_short_run_has_one_row():
    recorder = Recorder()
    a3c_jax.train(program(CONFIG), sinks=[recorder], interval=1e6)
    assert [row["updates"] for row in recorder.rows] == [25]


def test_without_a_sink_no_rows_pile_up():
    run = Run(program(CONFIG), updates_per_row=1)
    params, version = run.store.pull()
    gradients, _, statistics = run.program.step(params, run.states[0])
    with run.store.applying(gradients, version) as update:
        run.on_update(update, Report(statistics))
    Progress(run, Outlets(()), None).tick()
    assert run.counters.take_moments() == []


@pytest.mark.parametrize(
    ("updates_per_row", "message"),
    [
        (0, "updates_per_row must be >= 1, got 0; use 1 or more"),
        (1.5, "updates_per_row must be an integer >= 1, got 1.5; use 1"),
        (1e2, "updates_per_row must be an integer >= 1, got 100.0; use 100"),
    ],
)
def test_a_wrong_number_of_updates_for_a_row_is_refused_and_sinks_are_closed(
    updates_per_row, message
):
    recorder = Recorder()
    with pytest.raises((ValueError, TypeError), match=message):
        a3c_jax.train(CONFIG, sinks=[recorder], updates_per_row=updates_per_row)
    assert recorder.closed == 1


@pytest.mark.parametrize("sinks", [Recorder(), None, [print]], ids=["one", "none", "a function"])
def test_what_is_no_list_of_sinks_is_refused_before_anything_starts(sinks):
    message = (
        r"sinks must be a list of objects with write and close, got .*; put a single sink into"
    )
    with pytest.raises(TypeError, match=message):
        a3c_jax.train(CONFIG, sinks=sinks)


def test_tensorboard_gets_every_value(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    recorder = Recorder()
    sinks = [a3c_jax.TensorBoard(tmp_path), recorder]
    a3c_jax.train(program(CONFIG), sinks=sinks, updates_per_row=10)
    (path,) = glob.glob(f"{tmp_path}/events*")
    found = {}
    with open(path, "rb") as file:
        while header := file.read(12):  # a length and its checksum, then the event and its checksum
            event = Event.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
            file.read(4)
            for value in event.summary.value:
                found[event.step, value.tag] = value.simple_value
    for row in recorder.rows:
        for name, value in row.items():
            assert found[row["environment_steps"], name] == pytest.approx(
                value, rel=1e-5, nan_ok=True
            )


def test_weights_and_biases_gets_every_row_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = a3c_jax.WeightsAndBiases(mode="offline", project="test", dir=tmp_path)
    keeps_open = Recorder()
    keeps_open.write = sink.write
    a3c_jax.train(program(CONFIG), sinks=[keeps_open], updates_per_row=10)
    sink._run.log({}, step=201)  # a row is kept back until the step after it
    summary = sink._run.summary
    assert (summary["updates"], summary["environment_steps"]) == (25, 200)
    sink.close()
    assert glob.glob(f"{tmp_path}/wandb/offline-run-*/*.wandb")


TRACKIO = """
import a3c_jax
sink = a3c_jax.Trackio(project="test", name="run", auto_log_cpu=False)
config = a3c_jax.A3CConfig(num_workers=1, envs_per_worker=2, t_max=4, hidden_sizes=(8,), max_steps=200)
a3c_jax.train(config, sinks=[sink], updates_per_row=10)
"""


@pytest.mark.slow
def test_trackio_gets_every_row_offline(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO],
        env={
            **os.environ, "TRACKIO_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db")) as database:
        rows = [
            (step, json.loads(bytes(metrics))["updates"])
            for step, metrics in database.execute("select step, metrics from metrics order by step")
        ]
    assert rows == [(80, 10), (160, 20), (200, 25)]


@pytest.mark.parametrize(
    ("sink", "module", "extra"),
    [
        (lambda: a3c_jax.TensorBoard("x"), "tensorboardX", "tensorboard"),
        (lambda: a3c_jax.WeightsAndBiases(), "wandb", "wandb"),
        (lambda: a3c_jax.Trackio(project="x"), "trackio", "trackio"),
    ],
)
def test_a_library_that_is_not_there_is_named_with_the_command_that_installs_it(
    sink, module, extra, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install -e '.\[{extra}\]'"):
        sink()


def test_the_command_line_logs_to_tensorboard_and_leaves_a_curve(tmp_path):
    options = [
        "--max-steps",
        "400",
        "--envs-per-worker",
        "2",
        "--t-max",
        "4",
        "--hidden-sizes",
        "4",
    ]
    options += ["--num-workers", "1", "--evaluation-episodes", "2", "--no-progress"]
    options += ["--log-to", "tensorboard", "--updates-per-row", "10"]
    options += ["--run-dir", str(tmp_path / "run")]
    main("cartpole", "A test.", {"cartpole": cartpole.DEFAULTS}, arguments=options)
    assert os.listdir(tmp_path / "run" / "tensorboard")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row)["updates"] for row in rows] == [10, 20, 30, 40, 50]
