"""The measurements: what they count with, against numbers made by hand, and tiny runs of the programs themselves."""

import dataclasses
import json
import threading
import time

import chex
import jax
import matplotlib.image
import numpy as np
import pytest
from small_runs import refused

import a3c_jax
from a3c_jax import A3CConfig, _compiled
from a3c_jax.blueprint import make_blueprint
from a3c_jax.config import available_cores
from experiments.measurements import (
    breakdown,
    convolutions,
    host_throughput,
    networks,
    reproduction,
    scaling,
    simulation_speed,
    soak,
    synchronous,
    throughput,
    timing,
)

SMALL = A3CConfig(num_workers=1, envs_per_worker=4, t_max=5, hidden_sizes=(16,))
TINY = ["--num-workers", "2", "--envs-per-worker", "2", "--t-max", "4", "--hidden-sizes", "4"]


def check_picture(path):
    image = matplotlib.image.imread(path)[..., :3]
    assert min(image.shape[:2]) > 200
    assert np.mean(np.any(image < 0.9, axis=-1)) > 0.01, "it is blank"


# The synchronous loop.


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"optimizer": "rmsprop"}, id="rmsprop", marks=pytest.mark.slow),
        pytest.param(
            {"normalize_rewards": True, "normalize_observations": True},
            id="normalized",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_synchronous_updates_are_those_of_train_with_one_worker(options):
    updates = 12
    config = dataclasses.replace(SMALL, max_steps=updates * SMALL.steps_per_update, **options)
    program = a3c_jax.build(config)
    wanted = a3c_jax.train(program)
    run = synchronous.make_run(config, program.blueprint, updates)
    state, progress = jax.jit(run)(synchronous.start(config, program.blueprint))
    chex.assert_trees_all_close(state.params, wanted.params, rtol=1e-3, atol=1e-5)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state.params, program.initial_params(), atol=1e-3)
    assert progress.num_episodes.shape == (updates,)
    assert progress.num_episodes.sum() == len(wanted.episodes.episode_return) > 0
    returns = wanted.episodes.episode_return
    np.testing.assert_allclose(progress.total_return.sum(), returns.sum(), rtol=1e-6)


@pytest.mark.slow
def test_the_synchronous_program_solves_cartpole(capsys):
    trained = synchronous.main(["--num-workers", "2"])
    assert trained.stop_reason == "solved" and trained.mean_return >= 475
    output = capsys.readouterr().out
    assert "16 environments: stopped (solved)" in output
    assert float(output.split("greedy evaluation: mean ")[1].split(",")[0]) >= 475


@pytest.mark.slow  # as is the comparison with `train` above, which needs it
def test_the_synchronous_program_normalizes_rewards(capsys):
    trained = synchronous.main([*TINY, "--max-steps", "400", "--normalize-rewards"])
    assert (trained.stop_reason, trained.environment_steps) == ("max_steps", 800)  # 50 of 16
    assert "greedy evaluation: mean " in capsys.readouterr().out


def test_the_synchronous_run_ends_with_its_budget():
    config = dataclasses.replace(SMALL, max_steps=None, max_episodes=1)
    trained = synchronous.train(config, make_blueprint(config), updates_per_call=5)
    assert trained.stop_reason == "max_episodes" and trained.episodes >= 1
    assert trained.environment_steps % 100 == 0  # whole calls: 5 updates of 20 steps each


def test_the_recent_return_is_that_of_the_last_updates_with_enough_episodes():
    progress = synchronous.Progress(np.array([9, 2, 0, 2]), np.array([9.0, 20.0, 0.0, 80.0]))
    assert synchronous.recent_return(progress, 2) == 80 / 2
    assert synchronous.recent_return(progress, 3) == (20 + 80) / 4
    assert synchronous.recent_return(progress, 13) == (9 + 20 + 80) / 13
    assert synchronous.recent_return(progress, 14) is None


def test_the_synchronous_loop_plays_the_environments_of_all_workers():
    config = dataclasses.replace(SMALL, num_workers=3)
    with pytest.raises(ValueError, match=r"has one worker, got num_workers 3; give"):
        synchronous.make_run(config, make_blueprint(config), 1)
    config = synchronous.synchronous_config(config)
    state = synchronous.start(config, make_blueprint(config))
    assert state.rollout.observation.shape == (12, 4)


# What they measure with.


@pytest.fixture(scope="module")
def small_program():
    return a3c_jax.build(SMALL).replace(num_workers=2)


@pytest.mark.slow
def test_a_measurement_is_as_long_as_asked_and_counts_what_was_done(small_program):
    measure = timing.asynchronous(small_program)
    short, long = measure(0.1), measure(1.0)
    assert 3 < long.environment_steps / short.environment_steps < 30
    assert long.environment_steps == 20 * long.updates
    assert long.seconds > short.seconds > 0
    assert long.cpu_seconds > 0
    assert long.staleness > 0 or available_cores() == 1  # two workers
    assert long.steps_per_second == long.environment_steps / long.seconds


@pytest.mark.slow
def test_the_synchronous_measurement_counts_what_was_done():
    measured = timing.synchronous_loop(dataclasses.replace(SMALL, num_workers=2))(0.05)
    assert measured.seconds >= 0.05 and measured.staleness == 0
    assert measured.environment_steps == 40 * measured.updates > 0


def test_every_round_measures_everything_once_forwards_and_backwards():
    order = []

    def measure(name):
        def run(seconds):
            order.append(name)
            return timing.Measurement(seconds, 100 * len(order), 10, 0.0, 1.0, 0)

        return run

    measured = timing.interleave({"a": measure("a"), "b": measure("b")}, 2, 0.5)
    assert order == ["a", "b", "b", "a"]
    steps = {name: [m.environment_steps for m in rounds] for name, rounds in measured.items()}
    assert steps == {"a": [100, 400], "b": [200, 300]}
    summary = timing.summarize(measured["a"])
    assert summary["steps_per_second"] == {"median": 500.0, "min": 200.0, "max": 800.0}
    assert summary["cores_used"] == 2.0 and summary["updates_per_second"]["median"] == 20.0
    # Of the rounds' own ratios: 100 / 200 and 400 / 300.
    assert timing.ratio(measured["a"], measured["b"]) == pytest.approx((0.5 + 4 / 3) / 2)


@pytest.mark.slow
def test_programs_that_differ_in_the_number_of_workers_share_one_compilation():
    one, two = (timing.program(w, 2, 3, hidden_sizes=(4,)) for w in (1, 2))
    assert one.step is two.step
    assert (one.config.num_workers, two.config.num_workers) == (1, 2)
    assert (two.config.envs_per_worker, two.config.t_max, two.config.hidden_sizes) == (2, 3, (4,))


# Where the time goes.


def test_the_shares_of_a_workers_time():
    # In nanoseconds, from 100 to 300: 90 in the step, 60 in updates, one of them computed twice.
    calls = {"step": [(100, 150), (220, 260)], "update": [(155, 175), (180, 200), (280, 300)]}
    assert breakdown.shares(calls) == {"step": 0.45, "update": 0.3, "between": pytest.approx(0.25)}


def test_a_trace_has_every_call_of_every_worker(small_program):
    trace = breakdown.Trace()
    program = trace.program(small_program).replace(max_steps=20 * 500)
    result = a3c_jax.train(program)
    # One worker may have made all updates before the other one began.
    updates = np.bincount(result.schedule.worker, minlength=2).tolist()
    steps = {name: len(calls["step"]) for name, calls in trace.workers.items()}
    assert steps == {f"a3c-worker-{w}": count for w, count in enumerate(updates) if count}
    assert sum(updates) == 500
    assert sum(len(calls["update"]) for calls in trace.workers.values()) >= 500
    for calls in trace.workers.values():
        spans = sorted(span for name in calls for span in calls[name])
        assert all(begin < end for begin, end in spans)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_calls_in_other_threads_are_not_stamped():
    trace = breakdown.Trace()
    sleep = trace.stamp("step", time.sleep)
    sleep(0)
    thread = threading.Thread(target=sleep, args=(0.01,), name="a3c-worker-7")
    thread.start()
    thread.join()
    assert list(trace.workers) == ["a3c-worker-7"]
    ((begin, end),) = trace.workers["a3c-worker-7"]["step"]
    assert end - begin >= 0.01 * 1e9


# The programs.


@pytest.mark.slow
def test_the_throughput_leaves_everything_in_its_run_folder(tmp_path, capsys):
    sizes = ["--workers", "1", "2", "--envs", "1", "--t-max", "2", "--breakdown", "1x2"]
    short = ["--rounds", "1", "--seconds", "0.05", "--run-dir", str(tmp_path / "run")]
    folder = throughput.main([*sizes, *short])
    assert {p.name for p in folder.iterdir()} == {"throughput.json", "timeline.png"}
    check_picture(folder / "timeline.png")

    results = json.loads((folder / "throughput.json").read_text())
    assert {"python", "jax", "jaxlib", "cores", "load_average"} <= set(results["surroundings"])
    assert [row["case"] for row in results["throughput"]] == [[1, 1, 2], [2, 1, 2]]
    for row in results["throughput"]:
        for kind, envs in (("asynchronous", 1), ("synchronous", row["case"][0])):
            (one,) = row[kind]["rounds"]
            assert one["environment_steps"] == 2 * envs * one["updates"] > 0
            rate = row[kind]["steps_per_second"]["median"]
            assert rate == pytest.approx(one["environment_steps"] / one["seconds"])
        ratio = [row[k]["steps_per_second"]["median"] for k in ("asynchronous", "synchronous")]
        assert row["ratio_to_synchronous"] == pytest.approx(ratio[0] / ratio[1])
    assert results["throughput"][0]["ratio_to_one_worker"] == 1
    assert [row["quoted_steps_per_second"] for row in results["article"]] == [265, 128]
    assert [row["case"][0] for row in results["breakdown"]] == [1, 2]
    for row in results["breakdown"]:
        # In such a short run a worker may not have had a turn.
        assert 1 <= len(row["shares"]) <= row["case"][0] and row["computed_twice"] >= 0
        for parts in row["shares"].values():
            assert min(parts.values()) > 0 and sum(parts.values()) == pytest.approx(1)

    output = capsys.readouterr().out
    for word in ("A3C/synchronous", "not in this run", "between", str(folder)):
        assert word in output


@pytest.mark.slow
def test_the_scaling_leaves_everything_in_its_run_folder(tmp_path, capsys):
    sizes = ["--workers", "1", "2", "--segments", "8x2", "--width", "8", "--envs", "4", "8"]
    short = ["--t-max", "2", "--rounds", "1", "--seconds", "0.05"]
    folder = scaling.main([*sizes, *short, "--run-dir", str(tmp_path / "run")])
    assert {path.name for path in folder.iterdir()} == {"scaling.json", "scaling.png"}
    check_picture(folder / "scaling.png")
    points = json.loads((folder / "scaling.json").read_text())["points"]
    measured = {(p["workers"], p["envs_per_worker"], p["t_max"], p["width"]) for p in points}
    sweeps = {(8, 2, 128), (4, 16, 128), (8, 16, 128), (8, 16, 8)}  # envs, t_max and width
    assert measured == {(workers, *point) for workers in (1, 2) for point in sweeps}
    assert min(p["steps_per_second"]["median"] for p in points) > 0
    output = capsys.readouterr().out
    for word in ("envs", "t_max", "width", "2 workers", str(folder)):
        assert word in output


@pytest.mark.slow
def test_the_speed_on_the_host_is_counted_from_the_first_steps_on(tmp_path, capsys):
    game = ["--environment", "gymnasium:CartPole-v1", "--torso", "mlp"]
    short = ["--workers", "1", "3", "--rounds", "1", "--seconds", "0.6"]
    folder = host_throughput.main([*TINY, *game, *short, "--run-dir", str(tmp_path / "run")])
    check_picture(folder / "timeline.png")
    found = json.loads((folder / "host_throughput.json").read_text())
    parts = [found["parts"][name]["median"] for name in host_throughput.PARTS]
    assert min(parts) > 0 and found["processor_time"]["median"] > 0.5 * sum(parts)
    assert {workers: len(shares) for workers, shares in found["shares"].items()} == {"1": 1, "3": 3}
    for run in found["runs"].values():
        (one,) = run["rounds"]
        assert 0.6 < one["seconds"] < 60
        assert one["environment_steps"] == 8 * one["updates"]  # 2 environments x 4 steps
        assert 0 < one["cpu_seconds"] <= 1.1 * timing.available_cores() * one["seconds"]
        bound = timing.available_cores() * 1e6 / found["processor_time"]["median"]
        share = one["environment_steps"] / one["seconds"] / bound
        assert np.isclose(run["share_of_bound"]["median"], share)
    assert "3 workers: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(soak.os, "sysconf"), reason="it reads /proc")
def test_a_soak_that_its_budget_ends_keeps_its_whole_configuration(capsys):
    options = ["--environment", "Pendulum-v1", "--action-bounds", "tanh", "--max-steps", "4000"]
    result = soak.main([*TINY, *options, "--max-episodes", "None"])
    assert (result.stop_reason, result.environment_steps) == ("max_steps", 4000)
    output = capsys.readouterr().out
    assert "the counters agree" in output and "last checkpoint: update 500, " in output
    # An action of 0.5 is half the bound if actions are clipped, and tanh(0.5) of it if they are squashed.
    rewards = {}
    for bounds in ("clip", "tanh"):
        environment = a3c_jax.make("Pendulum-v1", action_bounds=bounds)
        rewards[bounds] = reward_of_half_an_action(environment)
    assert reward_of_half_an_action(result.environment) == rewards["tanh"] != rewards["clip"]


def reward_of_half_an_action(environment):
    key = jax.random.key(0)
    _, state = environment.reset(key, 1)
    return float(environment.step(key, state, np.full((1, 1), 0.5, np.float32)).reward[0])


def test_a_soak_ends_when_its_time_is_up_or_its_budget_is_spent(tmp_path):
    program = a3c_jax.build(dataclasses.replace(SMALL, max_steps=None, max_episodes=2**60))
    samples = soak.Samples()
    began = time.monotonic()
    result = soak.train_for(2.5, program, samples, a3c_jax.CheckpointFolder(tmp_path))
    assert time.monotonic() - began > 2.4
    assert result.stop_reason == "interrupted" and 0.0 < result.wall_clock["train"] < 30
    assert len(samples.rows) >= 1
    checkpoint = a3c_jax.find_checkpoint(tmp_path)
    assert soak.compare_counters(checkpoint, result)
    one_less = checkpoint._replace(
        episodes=checkpoint.episodes._make(c[:-1] for c in checkpoint.episodes)
    )
    assert not soak.compare_counters(one_less, result)


@pytest.mark.slow
def test_the_speed_of_simulations_is_that_of_all_their_updates(tmp_path, capsys):
    sizes = ["--workers", "3", "--segment", "2x4", "--runs", "2", "--rounds", "1"]
    options = [*sizes, "--seconds", "0.02", "--run-dir", str(tmp_path / "run")]
    folder = simulation_speed.main(options)
    rows = json.loads((folder / "simulation_speed.json").read_text())["rows"]
    output = capsys.readouterr().out
    assert len(rows) == 8
    for name, row in rows.items():
        (one,) = row["rounds"]
        together = 3 if name == "synchronous, all workers' environments" else 1
        assert one["environment_steps"] == 8 * together * one["updates"] > 0
        assert f"{row['steps_per_second']['median']:,.0f}" in output
    # 80,000 steps are 10,000 updates, and 9,999 are those of three workers equally often.
    assert rows["2 such runs at once"]["rounds"][0]["updates"] % (2 * 9_999) == 0
    assert rows["simulated, side by side"]["rounds"][0]["updates"] % 9_999 == 0


@pytest.mark.slow
def test_the_reproduction_runs_each_seed_in_a_process(tmp_path):
    options = [*TINY, "--max-steps", "200", "--evaluation-episodes", "2"]
    row = reproduction.run_seed("cartpole", 3, tmp_path / "seed3", options)
    assert set(reproduction.COLUMNS) <= set(row)
    assert (row["seed"], row["solved"], row["steps"]) == (3, False, 200)
    assert row["prompt"] > row["seconds"] > row["import"] + row["compile"] > 0


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (throughput, ["--workers", "0"], "A3CConfig.num_workers must be an integer >= 1, got 0"),
        (throughput, ["--seconds", "-1"], "rounds and seconds must be positive, got 5 and -1.0"),
        (throughput, ["--envs"], "workers, envs and t_max must not be empty"),
        (throughput, ["--breakdown", "8by5"], "breakdown must be environments x t_max, got '8by5'; give 8x5."),
        (scaling, ["--segments", "0x5"], "segments must be environments x t_max, got '0x5'; give 8x5."),
        (scaling, ["--rounds", "0"], "rounds and seconds must be positive, got 0 and 1.0"),
        (scaling, ["--t-max"], "must not be empty"),
        (simulation_speed, ["--workers", "1"], "workers must be >= 2 and runs >= 1, got 1 and 10"),
    ],
)  # fmt: skip
def test_bad_options_end_with_their_reason_and_leave_no_folder(
    tmp_path, capsys, program, arguments, message
):
    folder = tmp_path / "run"
    assert message in refused(capsys, program, [*arguments, "--run-dir", str(folder)])
    assert not folder.exists()


def test_bad_options_of_the_synchronous_program(capsys):
    for arguments, message in (
        (["--updates-per-call", "0"], "updates_per_call must be >= 1, got 0"),
        (["--environment", "CartPol-v1"], "did you mean CartPole-v1"),
    ):
        assert message in refused(capsys, synchronous, arguments)


@pytest.mark.parametrize("program", [throughput, scaling])
def test_a_run_folder_that_exists_is_never_written_to(tmp_path, capsys, program):
    assert "run_dir must not exist" in refused(capsys, program, ["--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# The networks as users write them.


@pytest.mark.slow
def test_a_network_is_measured_in_all_its_forms(capsys):
    tiny = ["--environments", "2", "--t-max", "2", "--rounds", "1", "--seconds", "0.001"]
    networks.main(["--networks", "16", "lstm of 32", *tiny])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 16", "| lstm of 32"]
    for _, plain, jit, chosen, _ in rows:
        assert float(plain) > 0 and float(jit) > 0
        assert chosen in ("single kernel", "plain")


def test_a_network_that_is_not_in_the_table_is_refused(capsys):
    assert "networks must be among" in refused(capsys, networks, ["--networks", "resnet"])


# Convolutions.


@pytest.mark.slow
def test_convolutions_are_compared_in_all_forms(capsys):
    tiny = [
        "--size",
        "36",
        "--segments",
        "2x3",
        "--rounds",
        "1",
        "--seconds",
        "0.001",
        "--threads",
        "1",
    ]
    convolutions.main([*tiny, "--parts", "torso", "step", "--games", "breakout"])
    lines = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | 1 | " in line
    ]
    rows = {line[0].strip("| "): line[2:] for line in lines}
    assert set(rows) == {
        "forward, 1", "forward, 8", "forward, 16", "forward, 32", "gradient, 2x3", "step, frames 2x3",
        "step, breakout",
    }  # fmt: skip
    for name, numbers in rows.items():
        assert len(numbers) == (2 if name.startswith("step") else 3)
        assert all(float(number.strip("| ")) > 0 for number in numbers)


@pytest.mark.slow
def test_the_compared_networks_compute_the_same():
    """Otherwise the comparison would be of different networks."""
    calls = convolutions.torso_calls(40, 36, gradient=True).values()
    first, *others = [_compiled.unpack(call()) for call in calls]
    for other in others:
        chex.assert_trees_all_close(other, first, rtol=1e-3, atol=1e-5)


def test_options_with_which_no_convolution_can_be_measured_are_refused(capsys):
    for arguments, message in (
        (["--games", "pong"], "games must be among breakout, asterix"),
        (["--segments", "8by5"], "segments must be environments x t_max, got '8by5'; give 8x5."),
        (["--threads", "0"], "A3CConfig.num_workers must be an integer >= 1, got 0"),
        (["--rounds", "0"], "rounds and seconds must be positive, got 0 and 0.3"),
    ):
        assert message in refused(capsys, convolutions, arguments)
