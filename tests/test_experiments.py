"""The experiments from their command lines, as a user types them."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from PIL import Image

import a3c_jax
from a3c_jax.agent import make_blueprint
from a3c_jax.checkpoints import find
from a3c_jax.metrics import EpisodeLog
from experiments import curves, runner, tasks  # noqa: F401  (registers its environments)
from experiments.plotting import _mean_in_intervals, running_mean

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


# Presets and pictures.

SCRIPTS = ["article", "cartpole", "memory", "minatar", "pendulum"]


def presets(script):
    module = importlib.import_module(f"experiments.{script}")
    return getattr(module, "PRESETS", None) or {script: module.DEFAULTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_preset_describes_an_agent(script):
    for config in presets(script).values():
        blueprint = make_blueprint(config)
        state = jax.eval_shape(blueprint.start, 0, 0)
        params = jax.eval_shape(blueprint.init, 0, state.observation)
        jax.eval_shape(blueprint.worker_step, params, state)


def test_a_preset_is_the_default_that_options_change(tmp_path, capsys):
    sizes = ["--envs-per-worker", "2", "--hidden-sizes", "4", "--max-steps", "40", "--no-progress"]
    rest = ["--evaluation-episodes", "1", "--run-dir", str(tmp_path / "run")]
    made = runner.main(
        "pendulum", "", presets("pendulum"), arguments=["--preset", "mountain-car", *sizes, *rest]
    )
    config = a3c_jax.A3CConfig(**json.loads((made / "config.json").read_text()))
    chosen = presets("pendulum")["mountain-car"]
    changed = {"envs_per_worker": 2, "hidden_sizes": (4,), "max_steps": 40}
    assert config == dataclasses.replace(chosen, **changed)
    with pytest.raises(SystemExit):
        runner.main("pendulum", "About it.", presets("pendulum"), arguments=["--help"])
    assert "Presets: pendulum, mountain-car." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("environment", "drawn"),
    [("Catch-bsuite", True), pytest.param("UmbrellaChain-bsuite", False, marks=pytest.mark.slow)],
)
def test_a_gif_of_the_policy_playing_where_gymnax_can_draw_it(tmp_path, capsys, environment, drawn):
    config = a3c_jax.A3CConfig(
        environment=environment, num_workers=1, envs_per_worker=2, hidden_sizes=(4,), max_steps=32
    )
    rest = ["--gif", "--no-progress", "--evaluation-episodes", "1"]
    made = runner.main(
        "test", "", {"test": config}, arguments=[*rest, "--run-dir", str(tmp_path / "run")]
    )
    assert (made / "summary.json").exists()
    assert (made / "play.gif").exists() == drawn
    if drawn:
        with Image.open(made / "play.gif") as gif:
            assert gif.n_frames == 9  # a ball that falls through ten rows
    else:
        assert "no GIF: " in capsys.readouterr().out


def test_the_curves_of_several_runs_in_one_picture(tmp_path, capsys, monkeypatch):
    for seed, environment in enumerate(["Catch-bsuite", "Catch-bsuite", "Breakout-MinAtar"]):
        log = EpisodeLog(
            worker=np.zeros(5, np.int32),
            episode_return=np.arange(5.0) + seed,
            length=np.ones(5, np.int32),
            environment_steps=100 * np.arange(1, 6),
            seconds=np.arange(5.0),
        )
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        np.savez(folder / "episodes.npz", **log._asdict())
        (folder / "config.json").write_text(json.dumps({"environment": environment}))
    picture = tmp_path / "curves.png"
    folders = [str(tmp_path / f"run{seed}") for seed in range(3)]
    monkeypatch.setattr(sys, "argv", ["curves", *folders, "--output", str(picture)])
    curves.main()
    assert "Catch-bsuite: mean return of the last 100 episodes: 2.0, 3.0" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_mean_in_each_interval_of_steps():
    log = EpisodeLog(*[np.zeros(4)] * 5)._replace(
        environment_steps=np.array([5, 10, 11, 40]), episode_return=np.array([1.0, 3.0, 7.0, 9.0])
    )
    means = _mean_in_intervals(log, np.array([0.0, 10.0, 20.0, 30.0, 40.0]))
    np.testing.assert_array_equal(means, [2.0, 7.0, 7.0, 9.0])
