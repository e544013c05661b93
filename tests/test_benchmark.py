"""The benchmarks: what they measure with, against numbers made by hand, and tiny runs of the programs themselves."""

import dataclasses
import json
import threading

import chex
import matplotlib.image
import numpy as np
import pytest

from a3c_jax import A3CConfig, train
from a3c_jax.agent import make_agent
from experiments import benchmark, measure, plotting, scaling, synchronous

SMALL = A3CConfig(num_workers=1, envs_per_worker=4, t_max=5, hidden_sizes=(16,))
TINY_BENCHMARK = [
    *("--workers", "1", "2", "--envs", "1", "--t-max", "2", "--breakdown", "1x2"),
    *("--rounds", "1", "--seconds", "0.05"),
]
TINY_SCALING = [
    *("--workers", "1", "2", "--segments", "8x2", "--width", "8", "--envs", "8"),
    *("--t-max", "2", "--rounds", "1", "--seconds", "0.05"),
]


def check_picture(path):
    image = matplotlib.image.imread(path)[..., :3]
    assert min(image.shape[:2]) > 200
    assert np.mean(np.any(image < 0.9, axis=-1)) > 0.01, "it is blank"


# The synchronous loop.


def test_synchronous_updates_are_those_of_train_with_one_worker():
    updates = 12
    config = dataclasses.replace(
        SMALL, optimizer="rmsprop", max_steps=updates * SMALL.steps_per_update
    )
    wanted = train(config)
    agent = make_agent(config)
    state, progress = synchronous.make_run(agent, updates)(synchronous.start(agent))
    chex.assert_trees_all_close(state.params, wanted.params, rtol=1e-3, atol=1e-5)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state.params, agent.params, atol=1e-3)
    assert progress.episodes.shape == (updates,)
    assert progress.episodes.sum() == len(wanted.episodes.episode_return) > 0
    np.testing.assert_allclose(
        np.sum(progress.episodes * progress.mean_return),
        wanted.episodes.episode_return.sum(),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        np.sum(progress.episodes * progress.mean_length), wanted.episodes.length.sum(), rtol=1e-6
    )


def test_the_synchronous_program_solves_cartpole(capsys):
    synchronous.main(["--num-workers", "2", "--no-progress"])
    output = capsys.readouterr().out
    assert "16 environments: stopped by solved" in output
    assert float(output.split("greedy evaluation: mean ")[1].split(",")[0]) >= 475


@pytest.mark.parametrize(
    ("budget", "stop_reason"),
    [({"max_steps": 150}, "max_steps"), ({"max_episodes": 1}, "max_episodes")],
)
def test_the_synchronous_run_ends_with_its_budget(budget, stop_reason):
    agent = make_agent(dataclasses.replace(SMALL, **{"max_steps": None, **budget}))
    trained = synchronous.train(agent, updates_per_call=5)
    assert trained.stop_reason == stop_reason
    assert trained.environment_steps % 100 == 0
    if stop_reason == "max_steps":
        assert trained.environment_steps == 200  # whole calls: 5 updates of 20 steps each
    else:
        assert trained.episodes >= 1


def test_the_recent_return_is_that_of_the_last_updates_with_enough_episodes():
    def chunk(episodes, returns):
        return synchronous.Progress(np.array(episodes), np.array(returns), None)

    history = [chunk([9, 2], [1.0, 10.0]), chunk([0, 2], [0.0, 40.0])]
    assert synchronous.recent_return(history, 2) == 40.0
    assert synchronous.recent_return(history, 3) == (2 * 10 + 2 * 40) / 4
    assert synchronous.recent_return(history, 13) == (9 * 1 + 2 * 10 + 2 * 40) / 13
    assert synchronous.recent_return(history, 14) is None


def test_the_synchronous_loop_plays_the_environments_of_all_workers():
    config = dataclasses.replace(SMALL, num_workers=3)
    with pytest.raises(ValueError, match=r"plays for one worker, got num_workers 3; build"):
        synchronous.make_run(make_agent(config), 1)
    agent = make_agent(synchronous.synchronous_config(config))
    assert synchronous.start(agent).rollout.observation.shape == (12, 4)


# What they measure with.


def test_the_parts_of_a_workers_time_add_up():
    # In microseconds: pull, pulled, call, returned, wanted, held, released; two updates.
    stamps = 1000 * np.array([[0, 1, 3, 43, 47, 55, 65], [81, 83, 86, 126, 131, 151, 161]])
    parts = {name: round(1e6 * s) for name, s in measure.parts(stamps, 10e-6).items()}
    assert parts == {
        "pull": 1 + 2,
        "dispatch": 10 + 10,
        "compute": 30 + 30,
        "update": 4 + 5,
        "lock wait": 8 + 20,
        "lock held": 10 + 10,
        "bookkeeping": 2 + 16 + 3,
    }
    assert tuple(parts) == measure.PARTS
    assert sum(parts.values()) == 161
    intervals = measure.intervals(stamps)
    assert set(intervals) == set(plotting.COLOURS)
    lengths = {name: np.diff(spans, axis=1).sum() / 1000 for name, spans in intervals.items()}
    assert lengths["step call"] == parts["dispatch"] + parts["compute"]
    assert lengths["bookkeeping"] == parts["bookkeeping"]
    assert sum(lengths.values()) == 161


def test_a_dispatch_longer_than_the_calls_leaves_no_compute():
    stamps = 1000 * np.arange(7)[None]
    parts = measure.parts(stamps, 1.0)
    assert parts["compute"] == 0 and sum(parts.values()) == pytest.approx(6e-6)


def test_the_stamped_lock_knows_who_waited():
    trace = measure.Trace()
    inside, stamps = threading.Event(), {}

    def second():
        inside.set()
        with trace.lock:
            pass
        stamps["second"] = list(trace.own.stamps)

    with trace.lock:
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait()
        while len(trace.own.stamps) < 2 or not thread.is_alive():
            pass
        threading.Event().wait(0.05)  # the second thread waits meanwhile
    thread.join()
    _, _, released = trace.own.stamps
    wanted, held, second_released = stamps["second"]
    assert wanted < released and held - wanted > 20e6
    assert held <= second_released


def test_a_traced_run_has_a_row_for_every_update_of_every_worker():
    trace = measure.Trace()
    run = measure.Asynchronous(dataclasses.replace(SMALL, num_workers=2), trace)
    for _ in range(2):  # each measurement begins anew
        measured = run.measure(0.1)
        stamps = trace.stamps()
        assert sum(len(rows) for rows in stamps.values()) == measured.updates
        assert run.store.pull().version == measured.updates
        assert measured.environment_steps == 20 * measured.updates
        for rows in stamps.values():
            assert np.all(np.diff(rows.ravel()) >= 0)
        held = np.concatenate([rows[:, [trace.HELD, trace.RELEASED]] for rows in stamps.values()])
        held = held[np.argsort(held[:, 0])]
        # A thread notes the release after it, so that the next may have the lock a moment before.
        assert np.mean(held[1:, 0] >= held[:-1, 0]) == 1
        updates = np.concatenate(
            [rows[:, [trace.RETURNED, trace.WANTED]] for rows in stamps.values()]
        )
        assert np.median(np.diff(updates, axis=1)) > np.median(np.diff(held, axis=1))


def test_interleaving_measures_each_run_once_a_round_forwards_and_backwards():
    order = []

    class Run:
        def __init__(self, name):
            self.name = name

        def measure(self, seconds):
            order.append(self.name)
            return seconds

    measured = measure.interleave({"a": Run("a"), "b": Run("b")}, 3, 0.5)
    assert "".join(order) == "abbaab"
    assert measured == {"a": [0.5] * 3, "b": [0.5] * 3}


def test_a_busy_machine_is_said_to_be_one():
    about = {**measure.surroundings(), "cores": 2}
    assert "not to be quoted" in measure.describe({**about, "load_average": [1.1, 0, 0]})
    assert "not to be quoted" not in measure.describe({**about, "load_average": [0.9, 9, 9]})


# The model.


def test_the_line_minimises_relative_errors():
    a, b, error = scaling.fit_line([1, 10, 1000], [7, 25, 2005])
    assert (a, b, error) == pytest.approx((5, 2, 0))
    # Without a constant to fit (equal work) the best value of 1 and 3 in relative error is 1.2:
    # (c - 1)^2 + (c / 3 - 1)^2 is smallest where c - 1 + (c / 3 - 1) / 3 = 0.
    a, b, error = scaling.fit_line([1, 1], [1, 3])
    assert a + b == pytest.approx(1.2)
    assert error == pytest.approx(0.6)


def test_the_queue_worked_by_hand():
    # Think 3, serve 1. One: 1 / 4, and a quarter of the time at the server.
    assert scaling.predict(1, 1, 3.0, 1.0) == pytest.approx(1 / 4)
    # Two: the server takes 1 * (1 + 1/4), so 2 / (3 + 5/4).
    assert scaling.predict(2, 2, 3.0, 1.0) == pytest.approx(2 / (3 + 5 / 4))
    assert scaling.predict(16, 2, 3.0, 1.0) == scaling.predict(2, 2, 3.0, 1.0)
    assert scaling.predict(200, 200, 3.0, 1.0) == pytest.approx(1.0)  # the server is never idle


def test_a_segments_prediction_uses_its_own_times():
    alone = scaling.Alone(update=4.0, segment=3.0, lock_held=0.5, interpreter_held=1.0)
    assert scaling.predict_segment(1, 8, alone, serial=2.0) == 1 / 4
    assert scaling.predict_segment(8, 1, alone, serial=2.0) == 1 / 4
    assert scaling.predict_segment(100, 100, alone, serial=2.0) == pytest.approx(1 / 2)
    assert scaling.predict_segment(100, 100, alone) == pytest.approx(1.0)
    slow_lock = alone._replace(lock_held=4.0)
    assert scaling.predict_segment(100, 100, slow_lock, serial=2.0) == pytest.approx(1 / 4)
    assert scaling.predict_segment(100, 100, slow_lock) == pytest.approx(1 / 4)
    short = alone._replace(segment=50e-6)  # of which two are played at the same time
    expected = scaling.predict(2, 2, 3.0, serial=2.0)
    assert scaling.predict_segment(100, 100, short, serial=2.0) == expected
    assert scaling.predict_segment(100, 100, alone, serial=2.0) > expected


# The programs.


@pytest.mark.slow
def test_the_benchmark_leaves_everything_in_its_run_folder(tmp_path, monkeypatch, capsys):
    name, kind, config = benchmark.PROCESSES[-1]
    monkeypatch.setattr(
        benchmark, "PROCESSES", ((name, kind, dataclasses.replace(config, max_steps=1000)),)
    )
    monkeypatch.setattr(benchmark, "QUOTED", {1: 265.0})  # one program less to compile
    folder = benchmark.main([*TINY_BENCHMARK, "--run-dir", str(tmp_path / "run")])
    assert folder == tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "benchmark.json",
        "throughput.png",
        "timeline.png",
    }
    for name in ("throughput.png", "timeline.png"):
        check_picture(folder / name)

    results = json.loads((folder / "benchmark.json").read_text())
    assert {"python", "jax", "jaxlib", "cores", "load_average"} <= set(results["surroundings"])
    cases = [(r["workers"], r["envs_per_worker"], r["t_max"]) for r in results["throughput"]]
    assert cases == [(1, 1, 2), (2, 1, 2)]
    for row in results["throughput"]:
        for kind in ("asynchronous", "synchronous"):
            (one,) = row[kind]["rounds"]
            assert one["updates"] > 0
            rate = row[kind]["steps_per_second"]
            assert rate["min"] <= rate["median"] <= rate["max"]
            assert rate["median"] == pytest.approx(one["environment_steps"] / one["seconds"])
            each = row["envs_per_worker"] * row["t_max"]
            each *= row["workers"] if kind == "synchronous" else 1
            assert one["environment_steps"] == each * one["updates"]
        ratio = [row[k]["steps_per_second"]["median"] for k in ("asynchronous", "synchronous")]
        assert row["ratio_to_synchronous"] == pytest.approx(ratio[0] / ratio[1])
    assert results["throughput"][0]["ratio_to_one_worker"] == 1
    assert [row["quoted_steps_per_second"] for row in results["article"]] == [265]

    assert [row["workers"] for row in results["breakdown"]] == [1, 2]
    for row in results["breakdown"]:
        assert row["untraced_updates_per_second"] > 0
        assert 0 < row["lock_held_share"] < 1 and 0 <= row["lock_waited_share"] < row["workers"]
        for worker in row["by_worker"]:
            shares = worker["shares"]
            assert set(shares) == set(measure.PARTS)
            assert min(shares.values()) >= 0
            assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
            assert shares["compute"] > 0 and shares["update"] > 0 and shares["lock held"] > 0
    (process,) = results["processes"]
    assert process["peak_megabytes"] > 50
    assert min(process[part] for part in ("import", "setup", "compile", "train")) > 0

    output = capsys.readouterr().out
    for word in ("A3C/synchronous", "not measured in this run", "lock wait", "peak memory", str(folder)):  # fmt: skip
        assert word in output


@pytest.mark.slow
def test_the_scaling_leaves_everything_in_its_run_folder(tmp_path, capsys):
    folder = scaling.main([*TINY_SCALING, "--run-dir", str(tmp_path / "run")])
    assert {path.name for path in folder.iterdir()} == {"scaling.json", "scaling.png"}
    check_picture(folder / "scaling.png")
    results = json.loads((folder / "scaling.json").read_text())
    points = {
        (p["workers"], p["envs_per_worker"], p["t_max"], p["width"]) for p in results["points"]
    }
    assert len(points) == len(results["points"])
    sweeps = {(8, 2, 128), (8, 16, 128), (8, 16, 8)}  # workers and t_max; environments; width
    assert points == {(workers, *point) for workers in (1, 2) for point in sweeps}
    assert results["constants"]["c_serial"] > 0 and results["constants"]["c_step"] != 0
    predicted = {(r["workers"], r["cores"]): r for r in results["predictions"]}
    assert min(predicted[cores, cores]["predicted"] for cores in scaling.CORES) > 0
    one = predicted[1, results["surroundings"]["cores"]]
    assert one["predicted"] == pytest.approx(one["measured"])
    for alone in results["alone"]:
        assert 0 < alone["lock_held"] < alone["update"] * 3 and alone["interpreter_held"] > 0
    output = capsys.readouterr().out
    for word in ("envs_per_worker", "predicted/measured", "c_serial", "Assumed", str(folder)):
        assert word in output


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (benchmark, ["--workers", "0"], "workers must be positive, got 0; give 1 2."),
        (benchmark, ["--seconds", "-1"], "seconds must be positive, got -1.0; give 1.5."),
        (benchmark, ["--rounds", "0"], "rounds must be positive, got 0; give 5."),
        (benchmark, ["--envs"], "envs must not be empty; give 1 8."),
        (benchmark, ["--breakdown", "8by5"], "breakdown must be environments x t_max, got '8by5'; give 8x5."),
        (scaling, ["--segments", "0x5"], "segments must be environments x t_max, got '0x5'; give 8x5."),
        (scaling, ["--workers", "2", "4"], "workers must hold 1 and a larger number, got (2, 4); give 1 2."),
        (scaling, ["--width", "0"], "width must be positive, got 0; give 64 128."),
        (synchronous, ["--updates-per-call", "0"], "updates_per_call must be >= 1, got 0"),
        (synchronous, ["--environment", "CartPol-v1"], "did you mean CartPole-v1"),
    ],
)  # fmt: skip
def test_bad_options_end_with_their_reason_and_leave_no_folder(
    tmp_path, capsys, program, arguments, message
):
    folder = tmp_path / "run"
    where = [] if program is synchronous else ["--run-dir", str(folder)]
    with pytest.raises(SystemExit) as exit:
        program.main([*arguments, *where])
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not folder.exists()


@pytest.mark.parametrize("program", [benchmark, scaling])
def test_a_run_folder_that_exists_is_never_written_to(tmp_path, capsys, program):
    with pytest.raises(SystemExit):
        program.main(["--run-dir", str(tmp_path)])
    assert "run_dir must not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
