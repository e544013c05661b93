"""Replay: one thread does again what any number of workers did, bit for bit, and says where it cannot."""

import json
import re
import sys
import threading

import numpy as np
import pytest
from small_runs import (
    OPTIMIZERS,
    WALK,
    Walk,
    assert_equal_runs,
    cut_short,
    replay,
    shared_programs,  # noqa: F401
    small,
    train,
    train_together,
    words,
)

import a3c_jax
from a3c_jax import CheckpointFolder, Schedule, WorkerError, environments, training
from a3c_jax.checkpoints import find, save
from a3c_jax.worker import PackedWorkerStep
from experiments import replay as command
from experiments import runner


@pytest.mark.parametrize("num_workers", [1, 2, 5, 16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_replay_is_the_run_bit_for_bit(optimizer, num_workers):
    config = small(num_workers=num_workers, optimizer=optimizer, max_steps=1_200)
    result = train(config)
    again = replay(config, result.schedule)
    assert_equal_runs(again, result)
    assert again.stop_reason == "replayed"
    assert result.best_mean_return is not None


def test_a_replay_of_cartpole_with_many_environments_is_the_run_bit_for_bit():
    config = small(num_workers=3, envs_per_worker=8, t_max=5, max_steps=8_000)
    result = train_together(config)
    assert_equal_runs(a3c_jax.replay(config, result.schedule), result)


def test_it_is_the_schedule_that_does_it():
    config = small(num_workers=4)
    # Workers in turn, once with what they had pulled a round ago, once with the newest.
    turns = np.arange(40, dtype=np.int32) % 4
    newest = np.arange(40)
    stale = np.maximum(newest - 3, 0)
    a, b = (replay(config, Schedule(turns, pulled)) for pulled in (stale, newest))
    assert words(a.params) != words(b.params)
    np.testing.assert_array_equal(a.schedule.staleness, np.minimum(newest, 3))
    np.testing.assert_array_equal(b.schedule.staleness, 0)
    other = replay(config, Schedule(turns[::-1].copy(), newest))
    assert words(other.params) != words(b.params)


def test_a_schedule_without_delay_of_one_worker_is_plain_training():
    config = small(learning_rate_schedule="linear")
    by_hand = Schedule(np.zeros(50, np.int32), np.arange(50))
    assert_equal_runs(replay(config, by_hand), train(config))


def test_a_schedule_with_a_delay_is_what_one_gets_by_hand():
    # Two workers and a delay of one, with the store and the step driven here.
    config = small(num_workers=2, optimizer="momentum")
    schedule = Schedule(np.array([0, 1, 1, 0, 1], np.int32), np.array([0, 0, 1, 2, 4]))
    start = a3c_jax.agent.make_agent(config, environment=WALK)
    step = PackedWorkerStep(start.worker_step, start.params, start.states[0])
    states = [step.pack_state(state) for state in start.states]
    store = a3c_jax.SharedParameters(step.flatten(start.params), start.optimizer, 2)
    versions = [store.pull().params]
    for worker, pulled in zip(*schedule, strict=True):
        gradients, states[worker], _ = step(versions[pulled], states[worker])
        store.apply(gradients, int(pulled), int(worker))
        versions.append(store.pull().params)
    result = replay(config, schedule)
    assert words(PackedWorkerStep.flatten(result.params)) == words(versions[-1])


@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_run_that_was_interrupted_and_went_on_replays_from_its_first_update(
    tmp_path, num_workers
):
    config = small(num_workers=num_workers, max_steps=1_200, optimizer="rmsprop")
    checkpoint = None
    for updates in (33, 50):
        checkpoint = cut_short(config, updates, tmp_path, resume=checkpoint)
    result = train(config, resume=checkpoint)
    assert result.version == 150
    assert_equal_runs(replay(config, result.schedule), result)


@pytest.mark.parametrize("budget", ["max_episodes", "solved_return"])
@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_run_that_went_on_under_another_budget_replays_with_its_best_too(
    tmp_path, budget, num_workers
):
    # The mean return rises and falls: a budget met long ago, in the middle of the run.
    config = small(num_workers=num_workers, max_steps=1_600)
    for attempt in range(20):  # threads are not two times the same: one may end at its best
        folder = tmp_path / str(attempt)
        first = train(config, checkpoints=CheckpointFolder(folder))
        checkpoint = find(folder)
        if checkpoint.mean_return < first.best_mean_return:
            break
    assert checkpoint.mean_return < first.best_mean_return
    budgets = {
        "max_episodes": {"max_episodes": len(first.episodes.length) + 20},
        "solved_return": {"solved_return": (checkpoint.mean_return + first.best_mean_return) / 2},
    }
    later = small(num_workers=num_workers, max_steps=2_400, **budgets[budget])
    result = train(later, resume=checkpoint)
    assert result.version > checkpoint.version
    assert_equal_runs(replay(later, result.schedule), result)


def test_what_others_were_playing_when_a_run_ended_counts_for_the_best_as_in_the_replay(
    tmp_path, monkeypatch
):
    # Workers report once more after the update that ends a run. Here it is one worker, and many times.
    class Late(training.WorkerThreads):
        def stop(self):
            pass

    budget = {"max_steps": 4_000, "solved_window": 2}
    monkeypatch.setattr(training, "WorkerThreads", Late)
    train(small(max_episodes=10, **budget), checkpoints=CheckpointFolder(tmp_path))
    monkeypatch.undo()
    checkpoint = find(tmp_path)
    assert checkpoint.version == 500
    returns = checkpoint.episodes.episode_return
    assert (returns[1:] + returns[:-1]).argmax() > 20  # the best is yet to come at the tenth
    later = small(**budget | {"max_steps": 4_400})
    result = train(later, resume=checkpoint)
    assert_equal_runs(replay(later, result.schedule), result)


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_a_run_that_skipped_updates_replays_bit_for_bit(where):
    environment = Walk(np.nan, bad_from=30, where=where, bad_count=20)
    config = small(num_workers=3, nonfinite="skip", max_steps=2_400)
    result = train(config, environment)
    assert result.skipped >= 3
    again = replay(config, result.schedule, environment)
    np.testing.assert_array_equal(
        again.episodes.episode_return, result.episodes.episode_return
    )  # NaNs too
    assert_equal_runs(again, result)


# until and on_update


@pytest.mark.parametrize("until", [0, 1, 25, 50, 60])
def test_until_makes_so_many_updates_and_no_more(until):
    config = small(learning_rate_schedule="linear")
    result = train(config)
    part = replay(config, result.schedule, until=until)
    assert part.version == min(until, 50)
    np.testing.assert_array_equal(part.schedule.worker, result.schedule.worker[:until])
    by_hand = Schedule(*(column[:until] for column in result.schedule))
    assert_equal_runs(part, replay(config, by_hand))


def test_until_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="until must be >= 0, got -1"):
        replay(small(), Schedule(np.zeros(5, np.int32), np.arange(5)), until=-1)


def test_on_update_sees_each_update_the_parameters_it_led_to_its_gradients_and_metrics():
    config = small(num_workers=2, optimizer="momentum", momentum=0.0, max_gradient_norm=None)
    result = train(config)
    seen = []

    def on_update(k, snapshot, gradients, metrics):
        assert snapshot.version == k + 1
        flat = [PackedWorkerStep.flatten(tree) for tree in (snapshot.params, gradients)]
        seen.append((k, *map(np.asarray, flat), metrics))

    again = replay(config, result.schedule, on_update=on_update)
    assert [k for k, *_ in seen] == list(range(50))
    assert words(PackedWorkerStep.flatten(again.params)) == words(seen[-1][1])
    for (_, before, _, _), (_, after, gradient, metrics) in zip(seen, seen[1:], strict=False):
        # Plain gradient descent, so that each update shows its gradients.
        np.testing.assert_allclose(
            after, before - config.learning_rate * gradient, rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-4)
        assert {"loss", "actor_loss", "critic_loss", "entropy"} <= metrics.keys()


# Schedules that cannot be.


@pytest.mark.parametrize(
    ("workers", "pulled", "message"),
    [
        ([0, 2], [0, 0], r"schedule\.worker must lie in \[0, 1\], got 0 to 2"),
        ([-1, 0], [0, 0], r"schedule\.worker must lie in \[0, 1\], got -1 to 0"),
        ([0, 1], [0, 2], r"schedule\.pulled_version must name a version that exists"),
        ([0, 1], [1, 0], r"schedule\.pulled_version must name a version that exists"),
        ([0, 1], [0, -1], r"schedule\.pulled_version must name a version that exists"),
        ([0, 1, 0], [0], r"schedule"),
        ([0], [0, 1, 2], r"schedule"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(workers, pulled, message):
    with pytest.raises(ValueError, match=message):
        replay(small(num_workers=2), Schedule(np.array(workers, np.int32), np.array(pulled)))


def test_the_end_of_a_schedule_alone_is_refused():
    config = small(num_workers=3)
    schedule = train(config).schedule
    with pytest.raises(ValueError, match="from the run's first update on"):
        replay(config, Schedule(*(column[10:] for column in schedule)))


# A run that failed.


def failing(num_workers, **changes):
    environment = Walk(np.nan, bad_from=42)
    config = small(num_workers=num_workers, max_steps=None, max_episodes=10**6, **changes)
    return environment, config


def extended(result, error):
    """The schedule with the update that failed as its last."""
    return Schedule(
        np.append(result.schedule.worker, np.int32(error.worker)),
        np.append(result.schedule.pulled_version, error.pulled_version),
    )


@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_run_that_failed_replays_to_the_very_update_that_did(num_workers):
    environment, config = failing(num_workers)
    with pytest.raises(WorkerError) as caught:
        train(config, environment)
    error, result = caught.value, caught.value.result
    updates = []
    with pytest.raises(WorkerError) as again:
        replay(
            config,
            extended(result, error),
            environment,
            on_update=lambda k, snapshot, *_: updates.append(snapshot),
        )
    assert (again.value.worker, again.value.pulled_version) == (error.worker, error.pulled_version)
    for ours, theirs in zip(again.value.record, error.record, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(updates) == result.version
    assert words(updates[-1].params) == words(result.params)


# The command.


@pytest.fixture
def run_replay(monkeypatch, capsys):
    """`python -m experiments.replay ...` in this process: its exit code and what it prints."""

    def run(*arguments, environment=None):
        monkeypatch.setattr(sys, "argv", ["replay", *map(str, arguments)])
        if environment is not None:
            monkeypatch.setattr(environments, "make", lambda name, **_: environment)
        try:
            command.main()
            code = 0
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        return code, output.out + ("" if code in (0, 1) else output.err)

    return run


@pytest.fixture(scope="module")
def cartpole_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    config = small(num_workers=3, max_steps=2_000)
    a3c_jax.train(config, checkpoints=CheckpointFolder(path / "checkpoints"))
    return path


def altered(folder, path, change):
    """A copy of a run's last checkpoint, changed and checksummed again."""
    save(path, change(find(folder)))
    return path


def test_the_command_says_identical(run_replay, cartpole_run):
    code, output = run_replay(cartpole_run)
    assert code == 0
    count = len(find(cartpole_run).episodes.length)
    assert re.search(rf"identical: .*all {count} episodes of 250 updates by 3 workers", output)
    checkpoint = sorted((cartpole_run / "checkpoints").iterdir())[-1]
    assert run_replay(checkpoint)[0] == 0


def nudge(checkpoint, name, index):
    """One bit of one number."""
    values = getattr(checkpoint, name).copy()
    values.view(np.uint32)[index] ^= 1
    return checkpoint._replace(**{name: values})


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("params", 5, "the parameters, at word 5: "),
        ("params", -1, "the parameters, at word "),
        ("best_params", 0, "the best parameters, at word 0: "),
        ("opt_state", 7, "the optimizer's state, at word 7: "),
    ],
)
def test_the_command_shows_the_first_word_that_differs(
    run_replay, cartpole_run, tmp_path, name, index, message
):
    path = altered(cartpole_run, tmp_path / "a.checkpoint", lambda c: nudge(c, name, index))
    code, output = run_replay(path)
    assert code == 1
    assert f"different: {message}" in output


def change_an_episode(checkpoint, name, index, value):
    column = getattr(checkpoint.episodes, name).copy()
    column[index] = value
    return checkpoint._replace(episodes=checkpoint.episodes._replace(**{name: column}))


@pytest.mark.parametrize(
    ("name", "value"), [("episode_return", 7.5), ("length", 1234), ("worker", 99)]
)
def test_the_command_shows_the_first_episode_that_differs(
    run_replay, cartpole_run, tmp_path, name, value
):
    episodes = find(cartpole_run).episodes
    update = episodes.environment_steps[4] // 8 - 1
    path = altered(
        cartpole_run, tmp_path / "a.checkpoint", lambda c: change_an_episode(c, name, 4, value)
    )
    code, output = run_replay(path)
    assert code == 1
    there = getattr(episodes, name)[4]
    expected = (
        f"episode 4, reported by update {update}, has {name} {value} in the run and {there} in the"
    )
    assert f"different: {expected} replay" in output


def test_the_command_shows_an_episode_that_is_missing(run_replay, cartpole_run, tmp_path):
    def drop_the_last(checkpoint):
        return checkpoint._replace(
            episodes=checkpoint.episodes._make(c[:-1] for c in checkpoint.episodes)
        )

    count = len(find(cartpole_run).episodes.length)
    code, output = run_replay(altered(cartpole_run, tmp_path / "a.checkpoint", drop_the_last))
    assert code == 1
    assert f"different: {count - 1} episodes in the run, {count} in the replay" in output


def test_the_command_shows_an_update_made_from_what_was_not_there(
    run_replay, cartpole_run, tmp_path
):
    # Another schedule leads elsewhere.
    def turn(checkpoint):
        workers = checkpoint.schedule.worker.copy()
        workers[[3, -1]] = (workers[[3, -1]] + 1) % 3
        return checkpoint._replace(schedule=checkpoint.schedule._replace(worker=workers))

    code, output = run_replay(altered(cartpole_run, tmp_path / "a.checkpoint", turn))
    assert (code, output.split()[0]) == (1, "different:")


@pytest.mark.parametrize("until", [1, 100])
def test_the_command_shows_one_update(run_replay, cartpole_run, until):
    code, output = run_replay(cartpole_run, "--until", until)
    worker = find(cartpole_run).schedule.worker[until - 1]
    assert code == 0
    assert f"update {until - 1}, by worker {worker}:" in output
    assert "gradient_norm" in output


@pytest.mark.parametrize("until", [0, -1])
def test_the_command_refuses_to_show_an_update_that_there_cannot_be(
    run_replay, cartpole_run, until
):
    code, output = run_replay(cartpole_run, "--until", until)
    assert code == 2
    assert "until" in output


def test_the_command_notes_other_libraries(run_replay, cartpole_run, tmp_path):
    path = altered(
        cartpole_run,
        tmp_path / "a.checkpoint",
        lambda c: c._replace(versions=c.versions | {"jax": "0.0.1"}),
    )
    code, output = run_replay(path)
    assert code == 0
    assert "note: the run was made by" in output
    assert "'jax': '0.0.1'" in output


def test_the_command_ends_with_a_reason_where_there_is_no_run(run_replay, tmp_path):
    code, output = run_replay(tmp_path)
    assert code == 2
    assert "error: no checkpoint in" in output


def test_the_command_finds_returns_that_are_no_numbers_equal(run_replay, tmp_path):
    environment = Walk(np.nan, bad_from=30, bad_count=20)
    config = small(environment="Walk-skips", nonfinite="skip", num_workers=2)
    train(config, environment, checkpoints=CheckpointFolder(tmp_path))
    code, output = run_replay(tmp_path, environment=environment)
    assert (code, output[:10]) == (0, "identical:"), output


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_command_goes_on_to_the_update_that_failed(run_replay, tmp_path, num_workers):
    environment = Walk(np.nan, bad_from=60)
    config = small(environment=f"Walk-fails-{num_workers}", num_workers=num_workers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environments, "make", lambda name, **_: environment)
        with pytest.raises(SystemExit) as caught:
            runner.main(
                "walk",
                "",
                {"walk": config},
                arguments=["--run-dir", str(tmp_path / "run"), "--no-progress"],
            )
    assert caught.value.code == 1
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    code, output = run_replay(tmp_path / "run", environment=environment)
    assert code == 0
    updates = find(tmp_path / "run").version
    assert failure["update"] == updates
    assert f"update {updates:,} fails as it did in the run: worker {failure['worker']} failed" in (
        output
    )
    # Every environment goes bad at its sixtieth step, in the worker's fifteenth segment.
    own = find(tmp_path / "run").schedule.worker == failure["worker"]
    assert own.sum() == 14


def test_the_command_finds_a_run_that_failed_for_another_reason_identical_up_to_there(
    run_replay, tmp_path, monkeypatch
):
    # What failed was not the computation: the segment that was lost is good when it is played again.
    step, played = PackedWorkerStep.__call__, []

    def fail(self, params, state):
        if threading.current_thread().name.startswith("a3c-worker"):
            played.append(None)
            if len(played) == 20:
                raise MemoryError("no more")
        return step(self, params, state)

    monkeypatch.setattr(PackedWorkerStep, "__call__", fail)
    config = small(environment="Walk-lost", num_workers=2)
    monkeypatch.setattr(environments, "make", lambda name, **_: WALK)
    with pytest.raises(SystemExit):
        runner.main(
            "walk",
            "",
            {"walk": config},
            arguments=["--run-dir", str(tmp_path / "run"), "--no-progress"],
        )
    code, output = run_replay(tmp_path / "run")
    assert (code, "identical:" in output) == (0, True), output
