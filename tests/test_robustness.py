"""The measurement of robustness, and the scores of simulated runs that it shares with others."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import refused

from a3c_jax import SimulationResult
from a3c_jax.config import A3CConfig
from experiments.measurements import robustness
from experiments.measurements.robustness import Arguments
from experiments.measurements.simulated import Run, Scores

CONFIG = A3CConfig(num_workers=1, hidden_sizes=(8,), max_steps=2000, nonfinite="skip")
RUNS = [Run(delay, rate, seed) for rate in (0.01, 0.03) for seed in (0, 1) for delay in (0, 2)]


def test_a_run_is_scored_by_its_last_tenth_or_its_last_hundred_episodes():
    # Twenty updates: the last tenth are two. In the first run 100 episodes and more end there; in the second only
    # 20 do, and the update before them counts as well; in the third none do at all.
    count, value = np.zeros((3, 20), np.int32), np.full((3, 20), -99.0, np.float32)
    count[:, 3], count[0, 17:], count[1, 17:], value[:, 17:] = (
        7,
        [50, 60, 40],
        [85, 20, 0],
        [1, 2, 3],
    )
    count[2] = 0
    result = SimulationResult(None, jnp.array(count), jnp.array(value), {}, None)
    scores = np.asarray(result.final_return(least_episodes=100))
    np.testing.assert_allclose(scores[:2], [(120 + 120) / 100, (85 + 40) / 105], rtol=1e-6)
    assert np.isnan(scores[2])


def ignore(count):
    pass


@pytest.mark.slow
def test_batches_are_filled_up_and_cut_again(tmp_path):
    # Five runs in batches of four: the second batch repeats the fifth run, which is counted once.
    done = []
    scores = Scores(tmp_path / "a", 4).of("x", CONFIG, RUNS[:5], done.append)
    assert scores.shape == (5,) and sorted(done) == [0, 1, 4]
    assert len(set(scores.tolist())) == 5  # different runs, each with its delay, rate and seed
    others = Scores(tmp_path / "b", 3).of("x", CONFIG, RUNS, ignore)
    np.testing.assert_allclose(scores, others[:5], rtol=1e-5)


@pytest.mark.slow
def test_what_the_file_holds_is_not_simulated_again(tmp_path):
    path = tmp_path / "scores.jsonl"
    first = Scores(path, 2).of("x", CONFIG, RUNS[:2], ignore)
    assert [json.loads(line)[:4] for line in path.read_text().splitlines()] == [
        ["x", *run] for run in RUNS[:2]
    ]
    # A killed process leaves a torn line. Made-up scores show that they are read.
    rows = [["x", *RUNS[0], 7.5], ["y", *RUNS[1], 9.0]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '["x", 0, 0.0')
    done = []
    again = Scores(path, 2).of("x", CONFIG, [*RUNS[:2], RUNS[0]], done.append)
    assert again.tolist() == [7.5, first[1], 7.5]
    assert done == [2, 1]  # two of the three were known
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *rows,
        ["x", *RUNS[1], first[1]],
    ]


def test_a_draw_is_good_within_a_tenth_of_the_best():
    # Doing nothing scores -500, the best draw of both optimizers -100: good from -140 on.
    invented = {
        "adam": [-100.0, -139.0, -141.0, -500.0],
        "momentum": [-200.0, -130.0, -400.0, -500.0],
    }

    class Invented:
        def of(self, name, config, runs, done):
            assert {run.delay for run in runs} == {2} and config.num_workers == 3
            done(len(runs))
            if runs[0].learning_rate == robustness.NOTHING:
                return np.full(len(runs), -500.0)
            assert [run.seed for run in runs] == [0, 1, 2, 3]
            return np.array(invented[config.optimizer])

    class Bar:
        update = staticmethod(ignore)
        set_description = staticmethod(ignore)

    arguments = Arguments(
        optimizers=("adam", "momentum"), draws=4, num_workers=3, rmsprop_epsilon=1e-7
    )
    assert arguments.config("Acrobot-v1", "rmsprop").rmsprop_epsilon == 1e-7
    adam, momentum = robustness.play(arguments, "Acrobot-v1", Invented(), Bar())
    assert adam.threshold == momentum.threshold == pytest.approx(-140.0)
    assert (adam.share, momentum.share) == (0.5, 0.25)
    assert adam.interval[0] <= 0.5 <= adam.interval[1] and adam.interval[0] < adam.interval[1]
    np.testing.assert_allclose(momentum.rates, 10 * np.array(adam.rates))
    assert 1e-5 <= min(adam.rates) < max(adam.rates) <= 1e-1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draws", "2"], "draws must be >= 3, got 2"),
        (["--low", "0.1"], "low the smaller one, got 0.1 and 0.1"),
        (["--optimizers", "adam", "adam"], "optimizers must be one or more, each once"),
        (["--environments", "CartPol-v1"], "did you mean CartPole-v1"),
        (["--num-workers", "0"], "A3CConfig.num_workers must be"),
    ],
)
def test_wrong_options_end_with_their_reason_and_leave_no_folder(
    tmp_path, capsys, options, message
):
    folder = tmp_path / "run"
    assert message in refused(capsys, robustness, [*options, "--run-dir", str(folder)])
    assert not folder.exists()


@pytest.mark.slow
def test_a_tiny_run_leaves_its_results_and_its_picture(tmp_path, capsys):
    options = ["--environments", "Catch-bsuite", "--optimizers", "adam", "--draws", "3"]
    options += ["--num-workers", "2", "--max-steps", "4000", "--batch", "3"]
    folder = robustness.main([*options, "--run-dir", str(tmp_path / "run")])
    assert (folder / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "robustness.pdf").read_bytes().startswith(b"%PDF")
    (found,) = json.loads((folder / "robustness.json").read_text())["found"]
    assert len(found["rates"]) == len(found["scores"]) == 3
    assert all(-1 <= score <= 1 for score in found["scores"])
    assert f"{found['share']:.2f}" in capsys.readouterr().out
