"""Learning curves of many runs: which runs are grouped, what is said about a group, and what is drawn."""

import json
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
from small_runs import cut_short, small, train

import a3c_jax
from a3c_jax import CheckpointFolder
from experiments import aggregate, curves
from experiments.plotting import _draw_group, mean_in_intervals, running_mean


@pytest.fixture
def rliable():
    if aggregate.import_rliable() is None:
        pytest.skip("rliable cannot be imported")


needs_rliable = pytest.mark.usefixtures("rliable")


@pytest.fixture
def without_rliable(monkeypatch):
    monkeypatch.setitem(sys.modules, "rliable", None)
    aggregate.import_rliable.cache_clear()
    yield
    aggregate.import_rliable.cache_clear()


def episodes(steps, returns):
    none = np.zeros(len(steps))
    return a3c_jax.EpisodeLog(none, np.array(returns, float), none, np.array(steps), none)


def folder_of(path, log, **config):
    path.mkdir()
    np.savez(path / "episodes.npz", **log._asdict())
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def draw(runs, tmp_path, *arguments):
    picture = tmp_path / "curves.png"
    curves.main([*map(str, runs), "--output", str(picture), *arguments])
    assert picture.read_bytes().startswith(b"\x89PNG")


def refused(capsys, *arguments):
    """What is printed if the arguments are refused."""
    with pytest.raises(SystemExit) as caught:
        curves.main([*map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err


# What several runs reached together.


@pytest.mark.parametrize("num_runs", [1, 3, 4, 5, 7, 8, 20])
def test_the_interquartile_mean_is_scipys_trimmed_mean(num_runs):
    scores = np.random.default_rng(0).standard_normal((num_runs, 6))
    np.testing.assert_allclose(
        aggregate.interquartile_mean(scores), scipy.stats.trim_mean(scores, 0.25, axis=0)
    )


@needs_rliable
def test_the_interval_contains_the_interquartile_mean_and_shrinks_with_more_runs():
    scores = np.random.default_rng(0).standard_normal((40, 10))
    widths = []
    for num_runs in (5, 10, 40):
        name, value, (low, high) = aggregate.aggregate(scores[:num_runs])
        assert name == "IQM"
        np.testing.assert_allclose(value, aggregate.interquartile_mean(scores[:num_runs]))
        assert (low < value).all() and (value < high).all()
        widths.append((high - low).mean())
    # The interval shrinks by about the square root of the number of runs.
    assert widths[0] > 1.1 * widths[1] > 1.1 * 1.6 * widths[2]


@needs_rliable
def test_the_interval_of_three_runs_reaches_from_the_lowest_to_the_highest():
    scores = np.array([[1.0], [5.0], [2.0]])
    np.testing.assert_array_equal(aggregate.aggregate(scores).interval, [[1.0], [5.0]])


@needs_rliable
def test_the_same_runs_have_the_same_interval_and_nobody_elses_draws_change():
    scores = np.random.default_rng(0).standard_normal((6, 4))
    np.random.seed(3)
    expected = np.random.random(2)
    np.random.seed(3)
    first, drawn = aggregate.aggregate(scores), np.random.random()
    second = aggregate.aggregate(scores)
    np.testing.assert_array_equal(first.interval, second.interval)
    assert [drawn, np.random.random()] == expected.tolist()


@needs_rliable
def test_a_point_where_a_run_has_no_value_has_none_and_changes_no_other():
    scores = np.random.default_rng(0).standard_normal((5, 3))
    scores[2, 1] = np.nan
    _, value, interval = aggregate.aggregate(scores)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])
    np.testing.assert_array_equal(np.isnan(interval), [[False, True, False]] * 2)
    scores[:, 1] = np.nan
    np.testing.assert_array_equal(aggregate.aggregate(scores).interval, interval)
    assert np.isnan(aggregate.aggregate(scores * np.nan).interval).all()


def test_two_runs_have_a_mean_and_no_interval(without_rliable, capsys):
    name, value, interval = aggregate.aggregate(np.array([[1.0, np.nan], [3.0, 4.0]]))
    assert (name, interval) == ("mean", None)
    np.testing.assert_array_equal(value, [2.0, np.nan])
    assert capsys.readouterr().err == ""  # rliable is not asked for


@pytest.mark.parametrize(
    ("scores", "words"),
    [([], "-"), ([-0.12, 0.98], "mean 0.43"), ([-0.5, 12.0], "mean 5.8")],
)
def test_small_returns_are_shown_with_more_decimals(scores, words):
    assert aggregate.in_words(scores) == words


def test_without_rliable_there_are_means_and_it_is_said_once_how_to_install_it(
    without_rliable, capsys, tmp_path
):
    runs = [
        folder_of(tmp_path / f"{k}", episodes([9, 10], [k, k]), environment="Catch-bsuite", seed=k)
        for k in (0, 1, 2, 9)
    ]
    draw(runs, tmp_path)
    output = capsys.readouterr()
    assert output.err.count("rliable cannot be imported") == 1
    assert "run: pip install -e '.[rliable]'" in output.err
    assert "last 100 episodes: 0.00, 1.00, 2.00, 9.00; mean 3.00\n" in output.out


# Groups and their labels.


@pytest.fixture
def four_runs(tmp_path):
    log = episodes([100, 200, 300], [0.0, 1.0, 2.0])
    return [
        folder_of(tmp_path / "a", log, environment="Catch-bsuite", seed=0, core=None, t_max=5),
        folder_of(tmp_path / "b", log, environment="Catch-bsuite", seed=1, core=None, t_max=5),
        folder_of(tmp_path / "c", log, environment="Catch-bsuite", seed=0, core="lstm", t_max=5),
        folder_of(tmp_path / "d", log, environment="Breakout-MinAtar", seed=0, core=None, t_max=5),
    ]


def test_runs_are_grouped_by_environment_and_configuration(four_runs, tmp_path, capsys):
    draw(four_runs, tmp_path)
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "Catch-bsuite, core None",
        "  mean return of the last 100 episodes: 1.00, 1.00; mean 1.00",
        "Catch-bsuite, core lstm",
        "  mean return of the last 100 episodes: 1.00",
        "Breakout-MinAtar",
        "  mean return of the last 100 episodes: 1.00",
    ]


def test_groups_get_the_labels_that_are_given(four_runs, tmp_path, capsys):
    draw(four_runs, tmp_path, "--labels", "no memory", "memory", "A3C")
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert printed[:-1] == [
        "Catch-bsuite, no memory",
        "Catch-bsuite, memory",
        "Breakout-MinAtar, A3C",
    ]


@pytest.mark.parametrize("labels", [["memory"], ["A3C", "A3C", "memory"]], ids=["few", "equal"])
def test_other_than_one_label_for_each_group_is_refused(four_runs, capsys, labels):
    message = refused(capsys, *four_runs, "--labels", *labels)
    assert f"labels must be 3 different names, got {len(labels)}" in message
    assert "give one for each of: core None; core lstm; all runs." in message


def test_groups_that_are_called_the_same_in_two_panels_take_one_label():
    configs = [{"learning_rate": rate} for rate in (0.1, 0.2)]
    groups = [curves.Group(config, []) for config in configs]
    labelled = curves.label_groups({"A": groups, "B": groups[::-1]}, ["large", "larger"])
    assert labelled["A"] == {"large": groups[0], "larger": groups[1]}
    assert labelled["B"] == labelled["A"]
    assert list(labelled["B"]) == ["larger", "large"]


def test_runs_with_a_loss_of_their_own_are_another_group(tmp_path, capsys):
    checkpoint = cut_short(small(), 30, tmp_path / "a" / "checkpoints")._replace(logs=None)
    with_loss = checkpoint._replace(objects=checkpoint.objects | {"loss": "mine.clipped_loss"})
    CheckpointFolder(tmp_path / "b" / "checkpoints").save(with_loss)
    draw([tmp_path / "a", tmp_path / "b"], tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "small_runs.Walk, loss built-in"
    assert printed[2] == "small_runs.Walk, loss mine.clipped_loss"


# Which episodes a run has.


def test_a_run_that_was_cut_short_is_read_from_its_checkpoint(tmp_path):
    checkpoint = cut_short(small(), 30, tmp_path / "run" / "checkpoints")
    config, log = curves.read_run(tmp_path / "run")
    assert config == small().as_dict() | {"environment": "small_runs.Walk"}
    np.testing.assert_array_equal(log.episode_return, checkpoint.episodes.episode_return)
    draw([tmp_path / "run"], tmp_path)


def test_a_run_is_read_from_what_it_left_at_its_end_if_its_checkpoint_is_damaged(tmp_path):
    run = tmp_path / "run"
    cut_short(small(), 30, run / "checkpoints")
    log = episodes([8, 16], [0.25, 0.5])
    np.savez(run / "episodes.npz", **log._asdict())
    (run / "config.json").write_text(json.dumps(small(t_max=7).as_dict()))
    assert len(curves.read_run(run)[1].length) > 2  # the checkpoint goes first
    newest = max((run / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    config, found = curves.read_run(run)
    assert config == small(t_max=7).as_dict()
    np.testing.assert_array_equal(found.episode_return, log.episode_return)


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert "no run folder given; name one or more" in refused(capsys)
    message = refused(capsys, tmp_path)
    assert f"{tmp_path} has no run to draw: no checkpoint in {tmp_path}" in message
    cut_short(small(), 0, tmp_path / "checkpoints")
    assert f"no episode has ended in the run of {tmp_path}" in refused(capsys, tmp_path)


# Solved runs.


def test_a_run_is_solved_where_training_stops_for_it():
    best = train(small()).best_mean_return
    result = train(small(solved_return=best))
    assert result.stop_reason == "solved"
    steps = curves.steps_to_solved(result.episodes, best, 5)
    assert steps == result.environment_steps
    assert curves.steps_to_solved(result.episodes, best + 1e-6, 5) == np.inf


def test_episodes_of_one_update_are_judged_together():
    # The second update reports two episodes; only between them the mean of the last two is 4.
    log = episodes([8, 16, 16, 24], [0.0, 8.0, -2.0, 10.0])
    assert curves.steps_to_solved(log, 4.0, 2) == 24
    assert curves.steps_to_solved(log, 0.0, 2) == 16  # not 8: one episode is too few


def test_unsolved_runs_count_as_later_than_all_others(tmp_path, capsys):
    settings = {"environment": "Catch-bsuite", "solved_return": 1.0, "solved_window": 1}
    for k, steps in enumerate([10, 30, 20]):
        log = episodes([5, steps], [0.0, 1.0])
        folder_of(tmp_path / f"{k}", log, seed=k, **settings)
    folder_of(tmp_path / "3", episodes([5, 99], [0.0, 0.0]), seed=3, **settings)
    draw([tmp_path / k for k in "012"], tmp_path)
    assert "solved (mean return 1): 3 of 3, median after 20 steps\n" in capsys.readouterr().out
    draw([tmp_path / k for k in "0123"], tmp_path)
    assert "3 of 4, median after 25 steps\n" in capsys.readouterr().out
    draw([tmp_path / k for k in "13"], tmp_path)
    assert "1 of 2\n" in capsys.readouterr().out


# What is drawn.


@needs_rliable
def test_a_band_is_drawn_for_three_runs_and_the_legend_says_what_the_line_is():
    runs = [episodes([5, 15], [k, 2 * k]) for k in range(3)]
    figure, axes = plt.subplots()
    edges = np.array([0.0, 10.0, 20.0])
    for count, label in ((1, ""), (2, "A"), (3, "long words " * 6)):
        _draw_group(axes, label, runs[:count], edges, "tab:blue")
    assert len(axes.collections) == 1
    _, labels = axes.get_legend_handles_labels()
    assert labels[:2] == ["1 run", "A: mean of 2 runs (thin: each)"]
    first, *rest = labels[2].split("\n")
    assert first == "long words long words long words long words long"
    assert " ".join(rest).endswith(": IQM of 3 runs (thin: each), 95 % interval")
    plt.close(figure)


def test_a_line_ends_where_its_run_ends():
    # Episodes end at 15, 20 and 21 of the intervals to 10, 20, 30 and 40; none ends before 10 or after 30.
    log = episodes([15, 20, 21], [1.0, 3.0, 7.0])
    means = mean_in_intervals(log, np.array([0.0, 10.0, 20.0, 30.0, 40.0]))
    np.testing.assert_array_equal(means, [np.nan, 2.0, 7.0, np.nan])
    # Within the run, an interval without an episode has the mean of the one before.
    log = episodes([5, 10, 11, 40], [1.0, 3.0, 7.0, 9.0])
    means = mean_in_intervals(log, np.array([0.0, 10.0, 20.0, 30.0, 40.0]))
    np.testing.assert_array_equal(means, [2.0, 7.0, 7.0, 9.0])


def test_the_running_mean_is_that_of_the_last_values():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(running_mean(values, 2), [1.0, 2.0, 4.0, 6.0])
    np.testing.assert_allclose(running_mean(values, 10), [1.0, 2.0, 3.0, 4.0])
