"""The examples and the tools for their run folders, as a user types them."""

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
from a3c_jax.blueprint import make_blueprint
from experiments import command_line, replay, run_folder, tasks  # noqa: F401

ROOT = Path(__file__).parent.parent
EXAMPLES = ["article", "cartpole", "memory", "minatar", "pendulum"]
TOOLS = ["curves", "replay", "sweep"] + [
    f"measurements.{name}"
    for name in (
        *(
            "ablations",
            "atari_games",
            "data_efficiency",
            "minatar_agents",
            "reproduction",
            "robustness",
            "scaling",
        ),
        *("simulation_speed", "soak", "staleness", "synchronous", "throughput"),
    )
]
SMALL = [
    *("--num-workers", "2", "--envs-per-worker", "2", "--t-max", "4", "--hidden-sizes", "4"),
    *("--max-steps", "400", "--evaluation-episodes", "2", "--no-progress"),
]


def run(*arguments, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def presets(name):
    module = importlib.import_module(f"experiments.{name}")
    return getattr(module, "PRESETS", None) or {name: module.DEFAULTS}


def example(name, folder, *arguments):
    """Runs an example in this process; returns its run folder."""
    given = [*SMALL, "--run-dir", str(folder), *arguments]
    return command_line.main(name, "About it.", presets(name), arguments=given)


def refused(capsys, function, *arguments):
    """What a program prints that refuses its input."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    assert caught.value.code == 2
    errors = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in errors
    return errors


# The command line.


def test_cartpole_leaves_everything_in_its_run_folder(tmp_path):
    folder = tmp_path / "run"
    tiny = ["--max-steps", "2000", "--num-workers", "2", "--evaluation-episodes", "5"]
    done = run("experiments.cartpole", *tiny, "--run-dir", str(folder), "--seed", "7")
    assert done.returncode == 0, done.stderr
    for word in ("greedy", "sampled", "random", "stopped (max_steps)", "steps/s", str(folder)):
        assert word in done.stdout
    for word in ("episodes", "mean of last 100", "updates", "staleness", "steps/s"):
        assert word in done.stderr  # the progress bar

    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "metrics.jsonl", "final.msgpack", "best.msgpack"),
        *("summary.json", "learning_curve.png", "checkpoints"),
    }
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == [
        *(".lock", "000000000000.checkpoint", "000000000016.checkpoint"),  # 2,000 steps of 128
        *("episodes.bin", "schedule.bin"),
    ]
    config = a3c_jax.A3CConfig(**json.loads((folder / "config.json").read_text()))
    assert (config.seed, config.max_steps, config.solved_return) == (7, 2000, 475.0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert rows[-1]["environment_steps"] == summary["environment_steps"] == 2048
    assert set(summary["seconds"]) == {"import", "setup", "compile", "train", "until_trained"}
    episodes = a3c_jax.find_checkpoint(folder).episodes
    assert len(episodes.episode_return) == summary["episodes"] == rows[-1]["episodes"]
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    network = a3c_jax.ActorCritic(num_actions=2)
    for name in ("final", "best"):
        params = serialization.msgpack_restore((folder / f"{name}.msgpack").read_bytes())
        assert network.apply(params, jnp.zeros(4))[1].shape == ()


def test_a_run_folder_that_exists_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    assert "run_dir must not exist" in refused(capsys, example, "cartpole", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-workers", "0"], "A3CConfig.num_workers must be an integer >= 1, got 0"),
        (["--environment", "CartPol-v1"], "did you mean CartPole-v1"),
        (["--preset", "pong"], "preset must be one of cartpole, got 'pong'"),
        (["--optimizer", "adma"], "adam"),
        (["--evaluation-episodes", "0"], "evaluation_episodes must be > 0, got 0"),
        (["--keep-checkpoints", "0"], "keep_checkpoints must be > 0, got 0"),
        (["--resume", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_bad_input_ends_with_its_reason_and_leaves_no_folder(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, example, "cartpole", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cartpole", *TOOLS])
def test_help_answers_without_loading_jax(name):
    program = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_module('experiments.{name}', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    print('jax loaded:', 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m experiments.{name}" in done.stdout
    assert "jax loaded: False" in done.stdout
    if name == "cartpole":
        assert "gamma" in done.stdout
        for field in a3c_jax.A3CConfig.__dataclass_fields__:
            assert f"--{field.replace('_', '-')}" in done.stdout


def test_a_run_goes_on_in_its_folder_with_its_own_configuration(tmp_path, capsys):
    folder = example("cartpole", tmp_path / "run", "--seed", "5")
    before = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "failure.json").write_text("{}")
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write('{"environment_steps": 9999}\n{"environment_st')  # of a process that was killed
    more = ["--resume", str(folder), "--max-steps", "800", *SMALL[-3:]]
    again = command_line.main("cartpole", "", presets("cartpole"), arguments=more)
    assert again == folder and not (folder / "failure.json").exists()
    config = json.loads((folder / "config.json").read_text())
    assert (config["seed"], config["t_max"], config["max_steps"]) == (5, 4, 800)
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert rows[: len(before)] == before
    assert json.loads(rows[-1])["environment_steps"] == 800
    assert 9999 not in [json.loads(row)["environment_steps"] for row in rows]

    other = ["--resume", str(folder), "--t-max", "8"]
    errors = refused(capsys, example, "cartpole", tmp_path / "other", *other)
    assert "t_max" in errors and not (tmp_path / "other").exists()


def test_a_worker_that_fails_leaves_its_reason_in_the_run_folder(tmp_path, capsys):
    config = a3c_jax.A3CConfig(num_workers=1, envs_per_worker=2, t_max=4, hidden_sizes=(4,))
    program, calls = a3c_jax.build(config), []

    def fail(params, state):
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError("no more")
        return program.step(params, state)

    checkpoints = a3c_jax.CheckpointFolder(tmp_path / "checkpoints")
    failing = dataclasses.replace(program, step=fail)
    with pytest.raises(SystemExit) as caught, run_folder.exit_if_cut_short(tmp_path, None):
        run_folder.train_in_folder(failing, tmp_path, checkpoints, progress=False)
    assert caught.value.code == 1
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["worker"], failure["update"], failure["pulled_version"]) == (0, 2, 2)
    assert f"experiments.replay {tmp_path}" in capsys.readouterr().err
    replay.main([str(tmp_path)])  # it was not the computation that failed
    output = capsys.readouterr().out
    assert "does not fail when it is repeated" in output and "identical: " in output


def test_the_command_to_go_on_with_has_the_options_of_ray(tmp_path, capsys):
    from experiments.command_line import Options, _ray_words

    words = _ray_words(Options(ray="auto", workers_per_process=2))
    assert _ray_words(Options()) == []
    with pytest.raises(SystemExit), run_folder.exit_if_cut_short(tmp_path, None, words):
        raise a3c_jax.SinkError("full")
    command = f"--resume {tmp_path} --ray auto --workers-per-process 2\n"
    assert capsys.readouterr().err.endswith(command)


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
    assert "stopped (interrupted)" in output
    assert f"go on with: python -m experiments.cartpole --resume {folder}" in output
    assert "Traceback" not in errors
    learnt = a3c_jax.find_checkpoint(folder)
    assert f"after {learnt.environment_steps:,} steps" in output
    assert learnt.version > 0


# The examples.


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_preset_describes_a_program(name):
    for config in presets(name).values():
        blueprint = make_blueprint(config)
        state = jax.eval_shape(blueprint.start, 0, 0)
        params = jax.eval_shape(blueprint.init, 0, state.observation)
        jax.eval_shape(blueprint.worker_step, params, state)


@pytest.mark.slow
def test_a_preset_is_the_default_that_options_change(tmp_path, capsys):
    made = example("pendulum", tmp_path / "run", "--preset", "mountain-car", "--max-steps", "40")
    config = a3c_jax.A3CConfig(**json.loads((made / "config.json").read_text()))
    changed = {"num_workers": 2, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (4,)}
    chosen = presets("pendulum")["mountain-car"]
    assert config == dataclasses.replace(chosen, max_steps=40, **changed)
    with pytest.raises(SystemExit):
        example("pendulum", tmp_path / "help", "--help")
    assert "Presets: pendulum, mountain-car." in " ".join(capsys.readouterr().out.split())


def test_the_article_prints_each_episode_once(capsys):
    from experiments.article import DEFAULTS, EpisodePrinter

    config = dataclasses.replace(DEFAULTS, max_episodes=30, hidden_sizes=(4,))
    result = a3c_jax.train(config, sinks=[EpisodePrinter()], interval=0.01)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(line[1]) for line in lines] == list(range(1, len(result.episodes.worker) + 1))
    assert [float(line[5]) for line in lines] == result.episodes.episode_return.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "drawn"),
    [
        ("Catch-bsuite", True),
        ("Catch-bsuite?sticky_action_prob=0.5", True),
        ("UmbrellaChain-bsuite", False),
    ],
)
def test_a_gif_of_the_policy_playing_if_gymnax_can_draw_it(tmp_path, capsys, environment, drawn):
    made = example("cartpole", tmp_path / "run", "--environment", environment, "--gif")
    assert (made / "summary.json").exists()
    assert (made / "play.gif").exists() == drawn
    if drawn:
        with Image.open(made / "play.gif") as gif:
            assert gif.n_frames == 9  # a ball that falls through ten rows
    else:
        assert "no GIF: " in capsys.readouterr().out


# Replay.


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return example("cartpole", tmp_path_factory.mktemp("runs") / "run", "--max-steps", "1600")


@pytest.mark.slow
def test_a_replay_is_identical(finished_run, capsys):
    replay.main([str(finished_run)])
    count = len(a3c_jax.find_checkpoint(finished_run).episodes.length)
    output = capsys.readouterr().out
    assert f"identical: parameters, best parameters, optimizer state and all {count} epi" in output
    assert "of 200 updates by 2 workers" in output
    replay.main([str(finished_run), "--until", "7"])
    output = capsys.readouterr().out
    worker = a3c_jax.find_checkpoint(finished_run).schedule.worker[6]
    assert f"update 6, by worker {worker}:" in output and "gradient_norm" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("params", "the parameters params/"),
        ("best_params", "the best parameters params/"),
        ("optimizer_state", "the optimizer's state state/"),
    ],
)
def test_a_replay_names_the_first_number_that_differs(finished_run, field, words):
    checkpoint = a3c_jax.find_checkpoint(finished_run)
    result = a3c_jax.replay(checkpoint.config, checkpoint.schedule)
    assert replay.first_difference(checkpoint, result) is None
    arrays = getattr(checkpoint, field)
    name = [n for n in arrays if arrays[n].size > 2 and arrays[n].dtype == np.float32][0]
    changed = arrays[name].copy()
    changed.ravel().view(np.uint32)[2] ^= 1  # the last bit of one number
    altered = checkpoint._replace(**{field: {**arrays, name: changed}})
    difference = replay.first_difference(altered, result)
    assert difference.startswith(words) and f"{name}, at element 2: " in difference


def test_a_replay_names_the_first_episode_that_differs(finished_run):
    checkpoint = a3c_jax.find_checkpoint(finished_run)
    result = a3c_jax.replay(checkpoint.config, checkpoint.schedule)
    lengths = checkpoint.episodes.length.copy()
    lengths[4] += 1
    altered = checkpoint._replace(episodes=checkpoint.episodes._replace(length=lengths))
    update = checkpoint.episodes.environment_steps[4] // 8 - 1
    difference = replay.first_difference(altered, result)
    assert difference.startswith(f"episode 4, reported by update {update}, has length {lengths[4]}")
    fewer = checkpoint.episodes._make(column[:-1] for column in checkpoint.episodes)
    count = len(fewer.length)
    difference = replay.first_difference(checkpoint._replace(episodes=fewer), result)
    assert difference == f"{count} episodes in the run, {count + 1} in the replay"


def test_a_replay_refuses_what_it_cannot_do(finished_run, tmp_path, capsys):
    message = refused(capsys, replay.main, [str(finished_run), "--until", "0"])
    assert "until must be >= 1, got 0" in message
    assert "no checkpoint in" in refused(capsys, replay.main, [str(tmp_path)])
