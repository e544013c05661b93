"""The measurements of data efficiency and of ablations: their parts by hand, and a tiny run of each."""

import dataclasses
import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import refused

from a3c_jax import A3CConfig, SimulationResult
from a3c_jax.environments import make
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
    return Trajectory(zero, zero.astype(int), jnp.array([1.0, 1.0]), *ends, zero, (), zero)


def test_the_articles_entropy_is_that_of_the_chosen_actions_and_is_added():
    played = segment([False, False], [False, False])
    plain, _ = a3c_loss(None, apply, played, entropy_cost=0.0)
    loss, _ = ablations.article_entropy(A3CConfig(entropy_cost=0.01))(None, apply, played)
    # -p log p: 0.5 log 2 = 0.3466 and 0.25 log 4 = 0.3466.
    np.testing.assert_allclose(loss - plain, 0.01 * 0.5 * np.log(2), rtol=1e-4)


def test_a_time_limit_as_death_bootstraps_nothing():
    limit, death = segment([False, False], [True, False]), segment([True, False], [False, False])
    config = A3CConfig(discount=0.5, critic_cost=0.25, entropy_cost=0.125)
    own = {"discount": 0.5, "critic_cost": 0.25, "entropy_cost": 0.125}
    loss, _ = ablations.death_at_time_limit(config)(None, apply, limit)
    assert loss == a3c_loss(None, apply, death, **own)[0] != a3c_loss(None, apply, limit, **own)[0]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_plays_as_many_steps_and_changes_one_thing(name):
    arguments = ablations.Arguments()
    for environment in arguments.environments:
        config = arguments.config(environment, ABLATIONS[name]).as_dict()
        baseline = arguments.config(environment, ABLATIONS["nothing changed"]).as_dict()
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


def test_an_ablation_reports_other_seeds_than_those_that_chose_its_rate(monkeypatch):
    class Invented:
        """Best at 0.001 during training, and at 0.01 at the end."""

        def __init__(self, path, batch, measure):
            pass

        def of(self, name, config, runs, done, **objects):
            assert list(objects) == ["loss"] and {run.delay for run in runs} == {15}
            seen.append({run.seed for run in runs})
            during = {1e-3: 60.0, 3e-3: 50.0}
            return np.array(
                [(during.get(r.learning_rate, 9.0) + r.seed % 10, r.learning_rate) for r in runs]
            )

    seen = []
    monkeypatch.setattr(ablations, "Scores", Invented)
    arguments = ablations.Arguments(seeds=4)
    line = ablations.play(arguments, "Catch-bsuite", "the article's entropy", "path", Bar())
    assert (line.learning_rate, line.during.value) == (1e-3, 61.5)  # of 60 to 63 the middle two
    assert line.during.seeds == [60, 61, 62, 63] and line.at_end.seeds == [1e-3] * 4
    assert line.during.interval[0] <= 61.5 <= line.during.interval[1]
    assert len(seen[0]) == 5 and seen[0].isdisjoint(seen[1]) and seen[1] == {0, 1, 2, 3}


def test_simulated_workers_are_one_turn_late_and_tuned_in_the_middle(monkeypatch, tmp_path):
    class Invented:
        """Best at 0.003; a run with one worker is never solved."""

        def __init__(self, path, batch, measure):
            # Ten episodes end in each update: a hundred after ten updates of 2 x 3 steps.
            result = SimulationResult(
                None, jnp.full(20, 10), jnp.full(20, 200.0), {}, jnp.ones(20, bool)
            )
            assert measure(result) == 60

        def of(self, name, config, runs, done):
            assert {run.delay for run in runs} == {config.num_workers - 1}
            seen.append((config.num_workers, {run.seed for run in runs}))
            far = np.array([1_000.0 / run.learning_rate for run in runs])
            return np.full(len(runs), np.inf) if config.num_workers == 1 else far

    seen = []
    monkeypatch.setattr(data_efficiency, "Scores", Invented)
    arguments = data_efficiency.Arguments(
        methods=("a3c",), workers=(8, 1, 4), envs_per_worker=2, t_max=3, seeds=3, tuning_seeds=2
    )
    rates, found = data_efficiency.simulate(arguments, tmp_path)
    assert rates == {"a3c": 3e-3}
    assert [workers for workers, _ in seen] == [4, 1, 4, 8]
    assert seen[0][1].isdisjoint(seen[1][1]) and seen[1][1] == {0, 1, 2}
    assert found["a3c", 1].tolist() == [500_000] * 3  # counts as if it were solved at its end
    with pytest.raises(SystemExit, match="A3C was solved with no learning rate"):
        data_efficiency.simulate(dataclasses.replace(arguments, workers=(1,)), tmp_path)


def test_what_more_workers_bring_by_hand():
    one = Point("a3c", 1, 1e-3, [90.0, 100.0, 100.0, 110.0], [90.0] * 4, [9.0] * 4, [0.0] * 4)
    # The lowest and the highest seed do not count.
    four = Point("a3c", 4, 1e-3, [10.0, 50.0, 50.0, 900.0], [180.0] * 4, [6.0] * 4, [3.0] * 4)
    other = Point("one_step_q", 1, 1e-3, [7.0] * 4, [7.0] * 4, [7.0] * 4, [0.0] * 4)
    points = [other, one, four]
    simulated, threads = (data_efficiency.gain(points, four, kind) for kind in (False, True))
    assert [value.value for value in simulated] == [50.0, 2.0, 8.0]
    assert simulated.efficiency.low < 2.0 <= simulated.efficiency.high
    same = Value(1.0, 1.0, 1.0)
    assert data_efficiency.gain(points, one, False)[1:] == (same, same)
    assert threads == (Value(180, 180, 180), Value(0.5, 0.5, 0.5), Value(1.5, 1.5, 1.5))


def test_two_seeds_have_a_value_and_no_interval():
    value = data_efficiency.quotient([2.0, 4.0], [1.0, 1.0])
    assert value.value == 3.0 and np.isnan(value.low) and np.isnan(value.high)


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (
            ablations,
            ["--ablations", "no noise"],
            "ablations must be among nothing changed, no entropy bonus",
        ),
        (ablations, ["--environments", "CartPole-v1"], "environments must be among CartPole-v0"),
        (ablations, ["--seeds", "1"], "seeds must be >= 2, got 1"),
        (minatar_agents, ["--games", "pong"], "games must be among breakout, asterix"),
        (
            minatar_agents,
            ["--rules", "original", "--agents", "pqn", "--python", sys.executable],
            "rules must be gymnax for pqn, got original",
        ),
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
    names = ["nothing changed", "time limit as death", "the article's entropy"]
    options = ["--environments", "Catch-bsuite", "--ablations", *names]
    options += ["--num-workers", "2", "--max-steps", "4000", "--rates", "0.001"]
    options += ["--seeds", "3", "--tuning-seeds", "1", "--batch", "4"]
    folder = ablations.main([*options, "--run-dir", str(tmp_path / "run")])
    assert (folder / "ablations.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "ablations.pdf").read_bytes().startswith(b"%PDF")
    plain, death, entropy = json.loads((folder / "ablations.json").read_text())["lines"]
    assert [line["ablation"] for line in (plain, death, entropy)] == names
    # Catch has no time limit, so that nothing has changed but the compiled program. Another loss is another run.
    returns = [line["at_end"]["seeds"] for line in (plain, death, entropy)]
    np.testing.assert_allclose(returns[0], returns[1], atol=0.05)
    assert returns[0] != returns[2]
    assert "during training" in capsys.readouterr().out


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


@pytest.mark.parametrize("game", minatar_agents.ORIGINAL)
def test_agents_play_by_the_rules_and_with_the_workers_that_were_asked_for(game):
    command = minatar_agents.own_command(
        minatar_agents.Arguments(rules="original"), game, "a3c-lstm", 21
    )
    environment = make(command[command.index("--environment") + 1])
    assert environment.name.startswith(minatar_agents.minatar.PRESETS[game].environment)
    assert environment.gymnax._sticky_action_prob == 0.1
    limit = environment.params.max_steps_in_episode
    assert limit == (2_500 if game == "freeway" else 10_000)
    plain = minatar_agents.own_command(minatar_agents.Arguments(), game, "a3c", 21)
    assert "--environment" not in plain
    for option, value in {"--seed": "21", "--max-steps": "5000000", "--num-workers": "2"}.items():
        assert plain[plain.index(option) + 1] == value


@pytest.mark.slow
def test_a_tiny_comparison_of_agents_leaves_its_results_and_goes_on(tmp_path, capsys):
    options = ["--agents", "a3c", "--games", "breakout", "--seeds", "2", "--max-steps", "3000"]
    options += ["--run-dir", str(tmp_path / "run")]
    folder = minatar_agents.main(options)
    assert (folder / "minatar_agents.png").read_bytes().startswith(b"\x89PNG")
    (line,) = json.loads((folder / "minatar_agents.json").read_text())["lines"]
    evaluations = [
        json.loads((folder / f"breakout-a3c-seed{seed}" / "summary.json").read_text())["evaluation"]
        for seed in (20, 21)
    ]
    assert line["returns"] == [found["sampled"]["mean"] for found in evaluations]
    assert line["value"] == pytest.approx(np.mean(line["returns"])) and line["interval"] is None
    assert f"{line['value']:.1f}" in capsys.readouterr().out

    (folder / "returns.jsonl").unlink()  # as if it had been killed behind the first run
    shutil.rmtree(folder / "breakout-a3c-seed21")
    minatar_agents.main(options)
    (again,) = json.loads((folder / "minatar_agents.json").read_text())["lines"]
    assert len(again["returns"]) == 2

    kept = folder / "returns.jsonl"
    rows = [["breakout", "a3c", seed, [seed, 1.0]] for seed in (20, 21)]  # made up
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    minatar_agents.main(options)
    (line,) = json.loads((folder / "minatar_agents.json").read_text())["lines"]
    assert (line["returns"], line["seconds"]) == ([20.0, 21.0], 1.0)
