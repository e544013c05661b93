"""The measurements of data efficiency and of ablations: their parts by hand, and a tiny run of each."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import refused

from a3c_jax.losses import a3c_loss
from a3c_jax.rollout import Trajectory
from experiments.measurements import ablations, data_efficiency, minatar_agents
from experiments.measurements.ablations import ABLATIONS
from experiments.measurements.data_efficiency import Point, Value


class Policy:
    """Two steps of a policy with these probabilities of the actions that were chosen."""

    def __init__(self, probability):
        self.probability = jnp.array(probability)

    def log_prob(self, action):
        return jnp.log(self.probability)

    def entropy(self):
        return jnp.full(2, 0.5)


def apply(params, trajectory):
    return Policy([0.5, 0.25]), jnp.array([1.0, 2.0]), jnp.array([2.0, 3.0])


def segment(terminated, truncated):
    zero = jnp.zeros(2)
    ends = jnp.array(terminated), jnp.array(truncated)
    return Trajectory(zero, zero.astype(int), jnp.array([1.0, 1.0]), *ends, zero, (), zero, ())


def test_the_articles_entropy_is_that_of_the_chosen_actions_and_is_added():
    played = segment([False, False], [False, False])
    plain, _ = a3c_loss(None, apply, played, entropy_cost=0.0)
    loss, _ = ablations.article_entropy_loss(None, apply, played)
    # -p log p: 0.5 log 2 = 0.3466 and 0.25 log 4 = 0.3466.
    np.testing.assert_allclose(loss - plain, 0.01 * 0.5 * np.log(2), rtol=1e-4)


def test_a_time_limit_as_death_bootstraps_nothing():
    limit, death = segment([False, False], [True, False]), segment([True, False], [False, False])
    loss, _ = ablations.death_at_time_limit_loss(None, apply, limit)
    assert loss == a3c_loss(None, apply, death)[0] != a3c_loss(None, apply, limit)[0]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_plays_as_many_steps_and_changes_one_thing(name):
    arguments = ablations.Arguments()
    for environment in arguments.environments:
        config = arguments.config(environment, ABLATIONS[name]).as_dict()
        baseline = arguments.config(environment, ABLATIONS["A3C"]).as_dict()
        changed = {field for field in config if config[field] != baseline[field]}
        assert config["max_steps"] == baseline["max_steps"]
        expected = {"no entropy bonus": {"entropy_cost"}, "shared torso": {"shared_torso"}}
        expected["synchronous (A2C)"] = {"num_workers", "envs_per_worker"}
        assert changed == expected.get(name, set())
        assert config["num_workers"] * config["envs_per_worker"] == 16


class Bar:
    def update(self, count):
        pass

    def set_description(self, text):
        pass


def test_an_ablation_reports_other_seeds_than_those_that_chose_its_rate():
    class Invented:
        """Best at 0.001; the loss and the delay are handed on."""

        def of(self, name, config, runs, done, **objects):
            assert objects == {"loss": ablations.article_entropy_loss}
            assert {run.delay for run in runs} == {15}
            seen.append({run.seed for run in runs})
            return np.array([(run.learning_rate == 1e-3) + run.seed % 10 for run in runs])

    seen = []
    arguments = ablations.Arguments(seeds=4)
    line = ablations.play(arguments, "Catch-bsuite", "the article's entropy", Invented(), Bar())
    assert (line.learning_rate, line.value) == (1e-3, 2.5)  # of 1, 2, 3, 4 the middle two
    assert line.interval[0] <= 2.5 <= line.interval[1]
    assert len(seen[0]) == 5 and seen[0].isdisjoint(seen[1]) and seen[1] == {0, 1, 2, 3}


def test_what_more_workers_bring_by_hand():
    one = Point("a3c", 1, 1e-3, [100.0] * 4, [90.0] * 4, [9.0] * 4)
    # The lowest and the highest seed do not count.
    four = Point("a3c", 4, 1e-3, [10.0, 50.0, 50.0, 900.0], [180.0] * 4, [6.0] * 4)
    other = Point("one_step_q", 1, 1e-3, [7.0] * 4, [7.0] * 4, [7.0] * 4)
    points = [other, one, four]
    simulated, threads = (data_efficiency.gain(points, four, kind) for kind in (False, True))
    assert [value.value for value in simulated] == [50.0, 2.0, 8.0]
    assert simulated.efficiency.low < 2.0 <= simulated.efficiency.high
    assert threads == (Value(180, 180, 180), Value(0.5, 0.5, 0.5), Value(1.5, 1.5, 1.5))


def test_two_seeds_have_a_value_and_no_interval():
    value = data_efficiency.quotient([2.0, 4.0], [1.0, 1.0])
    assert value.value == 3.0 and np.isnan(value.low) and np.isnan(value.high)


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (ablations, ["--ablations", "no noise"], "ablations must be among A3C, no entropy bonus"),
        (ablations, ["--environments", "CartPol-v1"], "did you mean CartPole-v1"),
        (ablations, ["--seeds", "1"], "seeds must be >= 2, got 1"),
        (minatar_agents, ["--games", "pong"], "games must be among breakout, asterix"),
        (minatar_agents, ["--agents", "ppo"], "python must name the Python of ppo, got None"),
        (data_efficiency, ["--workers", "0"], "A3CConfig.num_workers must be"),
        (data_efficiency, ["--methods", "a2c"], "A3CConfig.algorithm must be one of a3c"),
        (data_efficiency, ["--rates", "0.1", "0.1"], "rates must be one or more, each once"),
    ],
)
def test_wrong_options_end_with_their_reason_and_leave_no_folder(
    tmp_path, capsys, program, options, message
):
    folder = tmp_path / "run"
    assert message in refused(capsys, program, [*options, "--run-dir", str(folder)])
    assert not folder.exists()


@pytest.mark.slow
def test_a_tiny_comparison_of_ablations_leaves_its_results_and_its_picture(tmp_path, capsys):
    options = ["--environments", "Catch-bsuite", "--ablations", "A3C", "time limit as death"]
    options += ["--num-workers", "2", "--max-steps", "4000", "--rates", "0.001"]
    options += ["--seeds", "3", "--tuning-seeds", "1", "--batch", "4"]
    folder = ablations.main([*options, "--run-dir", str(tmp_path / "run")])
    assert (folder / "ablations.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "ablations.pdf").read_bytes().startswith(b"%PDF")
    first, second = json.loads((folder / "ablations.json").read_text())["lines"]
    assert (first["ablation"], second["ablation"]) == ("A3C", "time limit as death")
    # Catch has no time limit, so that nothing has changed but the compiled program.
    np.testing.assert_allclose(first["scores"], second["scores"], atol=0.05)
    assert f"{first['value']:.1f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tiny_run_of_data_efficiency_leaves_its_results_and_goes_on_after_a_kill(
    tmp_path, capsys
):
    options = ["--methods", "a3c", "one_step_q", "--workers", "1", "2", "--rates", "0.003"]
    options += ["--seeds", "2", "--tuning-seeds", "1", "--solved-return", "25"]
    options += ["--max-steps", "20000", "--batch", "3", "--run-dir", str(tmp_path / "run")]
    folder = data_efficiency.main(options)
    assert (folder / "data_efficiency.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((folder / "data_efficiency.json").read_text())["points"]
    assert [(p["method"], p["workers"]) for p in points] == [
        *(("a3c", 1), ("a3c", 2)),
        *(("one_step_q", 1), ("one_step_q", 2)),
    ]
    for p in points[:2]:  # A3C gets there soon
        assert all(500 < steps < 20_000 for steps in p["simulated"] + p["steps"])
        assert all(seconds > 0 for seconds in p["seconds"])
    assert "A3C" in capsys.readouterr().out

    threads = folder / "threads.jsonl"
    before = threads.read_bytes()
    threads.write_bytes(before[:-7])  # the last run is lost, and only that is made again
    data_efficiency.main(options)
    after = threads.read_bytes().splitlines()
    assert after[:-1] == before.splitlines()[:-1] and len(after) == len(before.splitlines())


@pytest.mark.slow
def test_a_tiny_comparison_of_agents_leaves_its_results_and_goes_on(tmp_path, capsys):
    options = ["--agents", "a3c", "--games", "breakout", "--seeds", "2", "--max-steps", "3000"]
    options += ["--run-dir", str(tmp_path / "run")]
    folder = minatar_agents.main(options)
    assert (folder / "minatar_agents.png").read_bytes().startswith(b"\x89PNG")
    (line,) = json.loads((folder / "minatar_agents.json").read_text())["lines"]
    evaluations = [
        json.loads((folder / f"breakout-a3c-seed{seed}" / "summary.json").read_text())["evaluation"]
        for seed in (0, 1)
    ]
    assert line["returns"] == [found["sampled"]["mean"] for found in evaluations]
    assert line["value"] == pytest.approx(np.mean(line["returns"])) and line["interval"] is None
    assert f"{line['value']:.1f}" in capsys.readouterr().out

    kept = folder / "returns.jsonl"
    rows = [["breakout", "a3c", seed, [7.0 + seed, 1.0]] for seed in (0, 1)]  # made up
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    minatar_agents.main(options)
    (line,) = json.loads((folder / "minatar_agents.json").read_text())["lines"]
    assert (line["returns"], line["seconds"]) == ([7.0, 8.0], 1.0)
