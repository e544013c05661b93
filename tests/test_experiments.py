"""The experiments from their command lines, as a user types them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import a3c_jax
from a3c_jax.checkpoints import find
from experiments.plotting import running_mean

ROOT = Path(__file__).parent.parent
TINY = ["--max-steps", "2000", "--num-workers", "2", "--evaluation-episodes", "5"]


def run(*arguments, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_cartpole_leaves_everything_in_its_run_folder(tmp_path):
    folder = tmp_path / "run"
    done = run("experiments.cartpole", *TINY, "--run-dir", str(folder), "--seed", "7")
    assert done.returncode == 0, done.stderr
    for word in ("greedy", "sampled", "random", "stopped by max_steps", "steps/s", str(folder)):
        assert word in done.stdout
    for word in ("episodes", "mean of last 100", "updates", "staleness", "steps/s"):
        assert word in done.stderr  # the progress bar

    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "final.msgpack",
        "best.msgpack",
        "episodes.npz",
        "summary.json",
        "learning_curve.png",
        "checkpoints",
    }
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["000000000000.checkpoint", "000000000016.checkpoint"]  # 2,000 steps of 128
    config = a3c_jax.A3CConfig(**json.loads((folder / "config.json").read_text()))
    assert (config.seed, config.max_steps, config.solved_return) == (7, 2000, 475.0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert rows[-1]["environment_steps"] == summary["environment_steps"] >= 2000
    episodes = np.load(folder / "episodes.npz")
    assert len(episodes["episode_return"]) == summary["episodes"] == rows[-1]["episodes"]
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    network = a3c_jax.ActorCritic(num_actions=2)
    for name in ("final", "best"):
        params = serialization.msgpack_restore((folder / f"{name}.msgpack").read_bytes())
        assert network.apply(params, jnp.zeros(4))[1].shape == ()


def test_a_run_folder_that_exists_is_never_overwritten(tmp_path):
    (tmp_path / "kept").write_text("mine")
    done = run("experiments.cartpole", *TINY, "--run-dir", str(tmp_path))
    assert done.returncode == 2
    assert "run_dir must not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-workers", "0"], "A3CConfig.num_workers must be >= 1, got 0"),
        (["--environment", "CartPol-v1"], "did you mean CartPole-v1"),
        (["--preset", "pong"], "preset must be one of cartpole, got 'pong'"),
        (["--optimizer", "adma"], "adam"),
    ],
)
def test_bad_input_ends_with_its_reason_and_leaves_no_folder(tmp_path, arguments, message):
    folder = tmp_path / "run"
    done = run("experiments.cartpole", *arguments, "--run-dir", str(folder))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert not folder.exists()


def test_help_explains_every_field():
    done = run("experiments.cartpole", "--help")
    assert done.returncode == 0
    for field in a3c_jax.A3CConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in done.stdout
    assert "The discount factor gamma" in done.stdout


def test_the_article_prints_each_episode_once(tmp_path):
    arguments = ["--max-episodes", "30", "--evaluation-episodes", "5", "--no-progress"]
    done = run("experiments.article", *arguments, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("episode ")]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [int(line[1]) for line in lines] == list(range(1, summary["episodes"] + 1))
    returns = np.load(tmp_path / "run" / "episodes.npz")["episode_return"]
    assert [float(line[5]) for line in lines] == returns.tolist()


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to a process on Windows")
def test_ctrl_c_keeps_what_was_learnt(tmp_path):
    folder = tmp_path / "run"
    # A shell that starts the tests in the background has them, and their children, ignore SIGINT.
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('experiments.cartpole', run_name='__main__', alter_sys=True)"
    )
    endless = ["--max-steps", "None", "--solved-return", "501"]
    with subprocess.Popen(
        [sys.executable, "-c", program, "--run-dir", str(folder), *endless],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        seen = ""
        while "updates" not in seen:  # the progress bar's first row: the threads are running
            character = process.stderr.read(1)
            assert character, seen
            seen += character
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped by interrupted" in output
    assert f"go on with: python -m experiments.cartpole --resume {folder}" in output
    assert "Traceback" not in errors
    learnt = find(folder)
    assert f"after {learnt.environment_steps:,} steps" in output
    assert learnt.version > 0


def test_the_running_mean_is_that_of_the_last_values():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(running_mean(values, 2), [1.0, 2.0, 4.0, 6.0])
    np.testing.assert_allclose(running_mean(values, 10), [1.0, 2.0, 3.0, 4.0])
