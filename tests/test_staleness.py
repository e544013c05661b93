"""The measurement of staleness: a tiny run of the script, and and its choices by hand."""

import json

import numpy as np
import pytest
from small_runs import refused

from experiments.measurements import staleness
from experiments.measurements.staleness import Arguments, Line

TINY = [
    *("--optimizers", "momentum"),
    *("--delays", "2", "0"),
    *("--rates", "0.03", "0.01"),
    *("--seeds", "2"),
    *("--tuning-seeds", "1"),
    *("--max-steps", "2000"),
    *("--batch", "4"),
]


@pytest.mark.slow
def test_a_tiny_run_leaves_its_results_and_its_picture(tmp_path, capsys):
    folder = staleness.main([*TINY, "--run-dir", str(tmp_path / "run")])
    assert folder == tmp_path / "run"
    names = {"staleness.json", "staleness.png", "staleness.pdf", "scores.jsonl", "arguments.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "staleness.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "staleness.pdf").read_bytes().startswith(b"%PDF")

    results = json.loads((folder / "staleness.json").read_text())
    assert results["arguments"]["delays"] == [0, 2]
    assert results["config"]["max_steps"] == 2000
    assert results["tuning"]["momentum SGD"]["rates"] == [0.01, 0.03]
    tuned = results["tuning"]["momentum SGD"]["returns"]
    assert {delay: np.shape(scores) for delay, scores in tuned.items()} == {
        "0": (2, 1),
        "2": (2, 1),
    }

    points = results["points"]
    assert [(p["panel"], p["delay"]) for p in points] == [
        *(("fixed", 0), ("fixed", 2)),
        *(("own", 0), ("own", 2)),
    ]
    for point in points:
        # Returns of CartPole: 8 steps at least, and learning has hardly begun.
        assert len(point["returns"]) == 2 and 8 <= min(point["returns"]) < 200
        assert point["mean"] == pytest.approx(np.mean(point["returns"]))
        assert point["low"] is None and point["high"] is None  # two seeds are too few for it
    assert points[0]["returns"] == points[2]["returns"]  # the same delay with the same rate
    assert points[0]["returns"][0] != points[0]["returns"][1]

    printed = capsys.readouterr().out
    for word in ("without delay", "at each delay", "momentum", f"{points[1]['mean']:.1f}"):
        assert word in printed

    # The same command in the same folder finds all scores; another one is refused.
    before = (folder / "scores.jsonl").read_bytes()
    staleness.main([*TINY, "--run-dir", str(folder)])
    assert (folder / "scores.jsonl").read_bytes() == before
    assert json.loads((folder / "staleness.json").read_text()) == results
    with pytest.raises(SystemExit) as caught:
        staleness.main([*TINY, "--max-steps", "3000", "--run-dir", str(folder)])
    assert caught.value.code == 2
    assert "run_dir must be new" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "seeds must be >= 2, got 1"),
        (["--tuning-seeds", "0"], "tuning_seeds must be >= 1, got 0"),
        (["--delays", "0", "-1"], "delays must be >= 0, got -1"),
        (["--delays", "1", "1"], "delays must be one or more, each once, got (1, 1)"),
        (["--rates", "0.0"], "A3CConfig.learning_rate must be"),
        (["--max-steps", "0"], "A3CConfig.max_steps must be"),
        (["--environment", "CartPol-v1"], "did you mean CartPole-v1"),
        (["--optimizers", "adma"], "adam"),
        (["--algorithms", "a2c"], "A3CConfig.algorithm must be one of a3c"),
    ],
)
def test_wrong_options_end_with_their_reason_and_leave_no_folder(
    tmp_path, capsys, options, message
):
    folder = tmp_path / "run"
    assert message in refused(capsys, staleness, [*options, "--run-dir", str(folder)])
    assert not folder.exists()


ADAM = Line("adam", "a3c")


def test_a_line_is_called_by_what_it_differs_in_from_the_others():
    def names(**options):
        arguments = Arguments(**options)
        return [staleness.name_line(arguments, line) for line in arguments.lines]

    assert names(optimizers=("adam",)) == ["Adam"]
    assert names(optimizers=("adam", "momentum")) == ["Adam", "momentum SGD"]
    vtrace = "experiments.off_policy:vtrace"
    assert names(optimizers=("adam",), algorithms=("a3c", vtrace)) == ["a3c", "vtrace"]
    both = names(optimizers=("adam", "momentum"), algorithms=("a3c", vtrace))
    assert both == ["Adam, a3c", "Adam, vtrace", "momentum SGD, a3c", "momentum SGD, vtrace"]


def invented(runs):
    """Best at rate 0.1 without delay and at 0.01 with delay 8; seeds differ, the tuning ones by much less."""
    best = {0: 0.1, 8: 0.01}
    return np.array(
        [100.0 * (run.learning_rate == best[run.delay]) + run.delay + run.seed % 7 for run in runs]
    )


def test_rates_are_chosen_by_other_seeds_than_those_reported():
    arguments = Arguments(
        optimizers=("adam",), delays=(8, 0), rates=(0.1, 0.01), seeds=4, tuning_seeds=3
    )
    seen = []

    def score(runs):
        seen.append(runs)
        return invented(runs)

    tuning = staleness.tune(arguments, ADAM, score)
    # 1,000,000 leaves a remainder of 1 when divided by 7.
    np.testing.assert_array_equal(tuning[0], [[1, 2, 3], [101, 102, 103]])  # delay 0: 0.01, 0.1
    np.testing.assert_array_equal(tuning[1], [[109, 110, 111], [9, 10, 11]])  # delay 8

    points = staleness.evaluate(arguments, ADAM, score, tuning)
    chosen = {(p["panel"], p["delay"]): (p["learning_rate"], p["returns"]) for p in points}
    assert chosen == {
        ("fixed", 0): (0.1, [100, 101, 102, 103]),
        ("fixed", 8): (0.1, [8, 9, 10, 11]),
        ("own", 0): (0.1, [100, 101, 102, 103]),
        ("own", 8): (0.01, [108, 109, 110, 111]),
    }
    assert points[0]["mean"] == 101.5  # of 101 and 102
    tuned, reported = ({run.seed for run in runs} for runs in seen)
    assert len(tuned) == 3 and reported == {0, 1, 2, 3} and not tuned & reported
    assert len(seen[1]) == 3 * 4  # what both panels show is simulated once


@pytest.mark.parametrize(
    ("scores", "rate"),
    [
        ((500.0, 500.0), 0.01),
        ((496.0, 500.0), 0.01),
        ((494.0, 500.0), 0.1),
        ((500.0, 90.0), 0.01),
        ((-100.5, -100.0), 0.01),
        ((-102.0, -100.0), 0.1),
    ],
)
def test_the_smallest_rate_of_those_that_are_as_good_is_chosen(scores, rate):
    arguments = Arguments(delays=(0,), rates=(0.1, 0.01), seeds=2, tuning_seeds=1)
    points = staleness.evaluate(arguments, ADAM, invented, np.array(scores).reshape(1, 2, 1))
    assert {p["learning_rate"] for p in points} == {rate}
