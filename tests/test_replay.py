"""Replay: one thread does again what any number of workers did, bit for bit, and says where it cannot."""

import dataclasses
import json
import re
import threading

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from small_runs import (
    OPTIMIZERS,
    WALK,
    StopAt,
    Walk,
    assert_equal_runs,
    cut_short,
    fail_after,
    program,
    replay,
    small,
    train,
    train_together,
    words,
)

import a3c_jax
from a3c_jax import (
    CheckpointFolder,
    Schedule,
    Snapshot,
    WorkerError,
    _compiled,
    find_checkpoint,
    fixed_delay,
)
from a3c_jax.asynchrony.checkpoint_files import save_checkpoint
from a3c_jax.asynchrony.replaying import _Versions
from a3c_jax.asynchrony.run import Run
from experiments import replay as command
from experiments.run_folder import train_in_folder


@pytest.mark.parametrize(
    "num_workers", [1, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 16))]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_replay_is_the_run_bit_for_bit(optimizer, num_workers):
    config = small(num_workers=num_workers, optimizer=optimizer, max_steps=1_200)
    result = train(config)
    again = replay(config, result.schedule)
    assert_equal_runs(again, result)
    assert again.stop_reason == "replayed"
    assert result.best_mean_return is not None


@pytest.mark.slow
def test_a_replay_of_cartpole_with_many_environments_is_the_run_bit_for_bit():
    config = small(num_workers=3, envs_per_worker=8, t_max=5, max_steps=8_000)
    result = train_together(config)
    assert_equal_runs(replay(config, result.schedule, None), result)


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
    built = program(config, WALK)
    states = built.initial_states()
    store = a3c_jax.SharedParameters(built.initial_params(), built.updater, 2)
    versions = [store.pull().params]
    for worker, pulled in zip(*schedule, strict=True):
        gradients, states[worker], _ = built.step(versions[pulled], states[worker])
        store.apply(gradients, int(pulled), int(worker))
        versions.append(store.pull().params)
    result = replay(config, schedule)
    assert words(result.params) == words(_compiled.unpack(versions[-1]))
    assert words(result.opt_state) == words(store.optimizer_state)


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
        checkpoint = find_checkpoint(folder)
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


def all_apply_together(built):
    """The program with workers that end their first segments at the same time."""
    together, done = threading.Barrier(built.config.num_workers), threading.local()

    def step(params, state):
        played = built.step(params, state)
        if not hasattr(done, "first"):
            done.first = True
            together.wait(60)
        return played

    return dataclasses.replace(built, step=step, max_concurrent_calls=lambda *_: None)


def test_what_others_were_playing_when_a_run_ended_counts_for_the_best_as_in_the_replay(tmp_path):
    # One of the first segments ends the run, and the others are applied after it.
    budget = {"num_workers": 8, "solved_window": 1, "max_steps": None}
    for seed in range(30):  # until the best comes after the end
        folder = tmp_path / str(seed)
        built = program(small(seed=seed, max_episodes=1, **budget), WALK)
        result = a3c_jax.train(all_apply_together(built), checkpoints=CheckpointFolder(folder))
        steps, returns = result.episodes.environment_steps, result.episodes.episode_return
        if result.best_mean_return > returns[steps == steps[0]].max():
            break
    else:
        pytest.fail("the best never comes after the end")
    assert result.stop_reason == "max_episodes"
    later = small(seed=seed, max_episodes=200, **budget)
    assert_equal_runs(replay(later, result.schedule), result)
    checkpoint = find_checkpoint(folder)
    assert checkpoint.best_mean_return == result.best_mean_return
    went_on = train(later, resume=checkpoint)
    assert went_on.version > result.version
    assert_equal_runs(replay(later, went_on.schedule), went_on)


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
        assert jax.tree.structure(gradients) == jax.tree.structure(snapshot.params)
        flat = [np.asarray(ravel_pytree(tree)[0]) for tree in (snapshot.params, gradients)]
        seen.append((k, *flat, metrics))

    again = replay(config, result.schedule, on_update=on_update)
    assert [k for k, *_ in seen] == list(range(50))
    assert words(ravel_pytree(again.params)[0]) == words(seen[-1][1])
    for (_, before, _, _), (_, after, gradient, metrics) in zip(seen, seen[1:], strict=False):
        # Plain gradient descent, so that each update shows its gradients.
        np.testing.assert_allclose(
            after, before - config.learning_rate * gradient, rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-4)
        assert {"loss", "actor_loss", "critic_loss", "entropy"} <= metrics.keys()


# start


ENDLESS = {"max_steps": None, "max_episodes": 10**9}


def train_and_keep_all(config, folder):
    """A run's result and all of its checkpoints. It ends when three of them are of moments when workers played."""

    class Keeps(CheckpointFolder):
        in_the_middle = 0

        def save(self, checkpoint):
            self.in_the_middle += bool(checkpoint.in_flight)
            return super().save(checkpoint)

    class Enough(StopAt):
        def write(self, row, episodes):
            if folder.in_the_middle >= 3:
                super().write(row, episodes)

    folder = Keeps(folder, every_seconds=None, every_updates=1, keep=10**6)
    # More threads than cores, so that workers wait in the middle of a segment.
    built = dataclasses.replace(program(config, WALK), max_concurrent_calls=lambda *_: None)
    with pytest.raises(a3c_jax.TrainingInterrupted) as caught:
        a3c_jax.train(built, checkpoints=folder, sinks=[Enough(0)], interval=0.01)
    saved = [a3c_jax.load_checkpoint(path) for path in sorted(folder.path.glob("*.checkpoint"))]
    return caught.value.result, saved, [c for c in saved if c.in_flight]


@pytest.mark.parametrize(
    ("optimizer", "num_workers"),
    [
        ("adam", 3),
        pytest.param("rmsprop", 5, marks=pytest.mark.slow),
        pytest.param("momentum", 2, marks=pytest.mark.slow),
    ],
)
def test_a_replay_from_any_checkpoint_is_that_of_the_whole_run(tmp_path, optimizer, num_workers):
    config = small(num_workers=num_workers, optimizer=optimizer, **ENDLESS)
    result, saved, in_the_middle = train_and_keep_all(config, tmp_path)
    for checkpoint in [*in_the_middle[:: -(-len(in_the_middle) // 3)], saved[0], saved[-1]]:
        assert_equal_runs(replay(config, result.schedule, start=checkpoint), result)
    start, end, seen = in_the_middle[0], saved[-2], []
    part = replay(
        config,
        result.schedule,
        start=start,
        until=end.version,
        on_update=lambda k, *_: seen.append(k),
    )
    assert seen == list(range(start.version, end.version))
    assert_equal_runs(part, replay(config, result.schedule, until=end.version))


def test_a_start_that_the_schedule_does_not_lead_to_is_refused(tmp_path):
    config = small(num_workers=2)
    start = cut_short(config, 20, tmp_path)
    schedule = start.schedule
    other_workers = schedule._replace(worker=1 - schedule.worker)
    other_versions = schedule._replace(pulled_version=np.zeros_like(schedule.pulled_version))
    refused = "start must be a checkpoint of the run whose schedule"
    for other in (other_workers, other_versions):
        with pytest.raises(ValueError, match=refused):
            replay(config, other, start=start)
    with pytest.raises(ValueError, match="must not lie after the last update to replay, 10, got a"):
        replay(config, schedule, start=start, until=10)
    with pytest.raises(ValueError, match="params must not be given with start"):
        a3c_jax.replay(config, schedule, start=start, params={})


def test_a_start_without_the_parameters_that_are_needed_is_refused(tmp_path):
    config = small(num_workers=3)
    before = cut_short(config, 20, tmp_path)
    worker = np.append(before.schedule.worker, [0, 1]).astype(np.int32)
    pulled = np.append(before.schedule.pulled_version, [20, 18])
    with pytest.raises(
        ValueError, match="update 21 starts from the parameters of update 18, which"
    ):
        replay(config, Schedule(worker, pulled), start=before._replace(in_flight={}))


def test_a_replay_keeps_only_the_parameters_that_later_updates_start_from(tmp_path):
    class Watched(dict):
        largest = 0

        def __setitem__(self, version, params):
            super().__setitem__(version, params)
            Watched.largest = max(Watched.largest, len(self))

    config = small(num_workers=3)
    schedule = fixed_delay(4, 300, num_workers=3)
    run = Run(program(config))
    versions = _Versions(run, schedule, None)
    versions._params = Watched(versions._params)
    for k, _, pulled in versions.updates():
        params = versions.take(k, pulled)
        assert k <= 4 or params == k - 4
        versions.add(Snapshot(k + 1, k + 1))
    assert Watched.largest == 5
    assert not versions._params


def test_the_command_begins_at_a_checkpoint(run_replay, tmp_path):
    config = small(num_workers=3, **ENDLESS)
    result, saved, in_the_middle = train_and_keep_all(config, tmp_path / "checkpoints")
    start, end = in_the_middle[0], saved[-2]
    path = tmp_path / "checkpoints" / f"{start.version:012d}.checkpoint"
    code, output = run_replay(tmp_path, "--from", path, environment=WALK)
    assert (code, output[:10]) == (0, "identical:"), output
    code, output = run_replay(tmp_path, "--from", path, "--until", end.version, environment=WALK)
    assert code == 0 and "identical:" in output and f"update {end.version - 1:,}, by" in output
    code, output = run_replay(tmp_path, "--from", path, "--until", start.version, environment=WALK)
    assert code == 2
    assert "from must be a checkpoint before the last update" in output


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"worker": "zero"}',
        *(pytest.param(content, marks=pytest.mark.slow) for content in ("", "[]", "{}", "\0\0")),
    ],
)
def test_the_command_ignores_a_failure_that_it_cannot_understand(run_replay, tmp_path, content):
    train(small(), checkpoints=CheckpointFolder(tmp_path / "checkpoints"))
    (tmp_path / "failure.json").write_text(content)
    code, output = run_replay(tmp_path, environment=WALK)
    assert (code, "identical:" in output) == (0, True), output


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
    ours, theirs = ((e.report.metrics, e.report.episodes) for e in (again.value, error))
    assert words(ours) == words(theirs)
    assert len(words(ours)) > 5  # there is something to compare
    assert re.sub("version [0-9]+", "", str(again.value)) == re.sub(
        "version [0-9]+", "", str(error)
    )
    assert len(updates) == result.version
    assert words(updates[-1].params) == words(result.params)


# The command.


@pytest.fixture
def run_replay(capsys):
    """`python -m experiments.replay ...` in this process: its exit code and what it prints."""

    def run(*arguments, **objects):
        try:
            command.main([*map(str, arguments)], **objects)
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
    train_together(config, checkpoints=CheckpointFolder(path / "checkpoints"))
    return path


def altered(folder, path, change):
    """A copy of a run's last checkpoint, changed and checksummed again."""
    save_checkpoint(path, change(find_checkpoint(folder))._replace(logs=None))
    return path


def test_the_command_says_identical(run_replay, cartpole_run):
    code, output = run_replay(cartpole_run)
    assert code == 0
    count = len(find_checkpoint(cartpole_run).episodes.length)
    assert re.search(rf"identical: .*all {count} episodes of 250 updates by 3 workers", output)
    assert "note:" not in output


def test_the_command_reads_a_checkpoint_file_and_notes_other_libraries(
    run_replay, cartpole_run, tmp_path
):
    path = altered(
        cartpole_run,
        tmp_path / "a.checkpoint",
        lambda c: c._replace(versions=c.versions | {"jax": "0.0.1"}),
    )
    code, output = run_replay(path)
    assert code == 0
    assert "note: the run was made by" in output
    assert "'jax': '0.0.1'" in output
    assert "identical:" in output


def nudge(checkpoint, field, name, index):
    """One bit of one number."""
    arrays = dict(getattr(checkpoint, field))
    arrays[name] = arrays[name].copy()
    arrays[name].view(np.uint32).flat[index] ^= 1
    return checkpoint._replace(**{field: arrays})


def change_an_episode(checkpoint, name, index, value):
    column = getattr(checkpoint.episodes, name).copy()
    column[index] = value
    return checkpoint._replace(episodes=checkpoint.episodes._replace(**{name: column}))


def test_the_command_shows_what_differs(run_replay, cartpole_run, tmp_path):
    name = "params/value_head/bias"
    path = altered(cartpole_run, tmp_path / "a.checkpoint", lambda c: nudge(c, "params", name, 0))
    code, output = run_replay(path)
    assert code == 1
    assert f"different: the parameters {name}, at element 0: " in output


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


@pytest.fixture(scope="module")
def replayed(cartpole_run):
    """The run's checkpoint, and its replay."""
    checkpoint = find_checkpoint(cartpole_run)
    return checkpoint, replay(checkpoint.config, checkpoint.schedule, None)


@pytest.mark.parametrize(
    ("field", "name", "index", "message"),
    [
        ("params", "params/value_head/kernel", 5, "the parameters params/value_head/kernel, at element 5: "),
        ("params", "params/policy_head/bias", -1, "the parameters params/policy_head/bias, at element 1: "),
        ("best_params", "params/value_head/bias", 0, "the best parameters params/value_head/bias, at element 0: "),
        ("optimizer_state", "state/1/count", 0, "the optimizer's state state/1/count, at element 0: "),
    ],
)  # fmt: skip
def test_the_first_number_that_differs_is_named(replayed, field, name, index, message):
    checkpoint, result = replayed
    difference = command.first_difference(nudge(checkpoint, field, name, index), result)
    assert difference.startswith(message)


def test_a_single_bit_of_any_number_is_found(replayed):
    checkpoint, result = replayed
    assert command.first_difference(checkpoint, result) is None
    for field in ("params", "best_params", "optimizer_state"):
        for name, array in getattr(checkpoint, field).items():
            if array.dtype.itemsize == 4:
                changed = nudge(checkpoint, field, name, array.size // 2)
                assert name in command.first_difference(changed, result)


@pytest.mark.parametrize(
    ("name", "value"), [("episode_return", 7.5), ("length", 1234), ("worker", 99)]
)
def test_the_first_episode_that_differs_is_named(replayed, name, value):
    checkpoint, result = replayed
    update = checkpoint.episodes.environment_steps[4] // 8 - 1
    there = getattr(checkpoint.episodes, name)[4]
    changed = change_an_episode(checkpoint, name, 4, value)
    assert command.first_difference(changed, result) == (
        f"episode 4, reported by update {update}, has {name} {value} in the run and {there} in the "
        "replay"
    )


def test_an_episode_that_is_missing_is_named(replayed):
    checkpoint, result = replayed
    count = len(checkpoint.episodes.length)
    shorter = checkpoint.episodes._make(c[:-1] for c in checkpoint.episodes)
    assert command.first_difference(checkpoint._replace(episodes=shorter), result) == (
        f"{count - 1} episodes in the run, {count} in the replay"
    )


@pytest.mark.parametrize("until", [1, 100])
def test_the_command_shows_one_update(run_replay, cartpole_run, until):
    code, output = run_replay(cartpole_run, "--until", until)
    worker = find_checkpoint(cartpole_run).schedule.worker[until - 1]
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


def test_the_command_ends_with_a_reason_where_there_is_no_run(run_replay, tmp_path):
    code, output = run_replay(tmp_path)
    assert code == 2
    assert "error: no checkpoint in" in output


def test_the_command_finds_returns_that_are_no_numbers_equal(run_replay, tmp_path):
    environment = Walk(np.nan, bad_from=30, bad_count=20)
    config = small(nonfinite="skip", num_workers=2)
    result = train(config, environment, checkpoints=CheckpointFolder(tmp_path))
    assert np.isnan(result.episodes.episode_return).any()
    code, output = run_replay(tmp_path, environment=environment)
    assert (code, output[:10]) == (0, "identical:"), output


def failed_run(folder, built):
    """The run folder of a run that fails, and its failure."""
    folder.mkdir()
    with pytest.raises(WorkerError):
        train_in_folder(built, folder, CheckpointFolder(folder / "checkpoints"), progress=False)
    return json.loads((folder / "failure.json").read_text())


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_command_goes_on_to_the_update_that_failed(run_replay, tmp_path, num_workers):
    environment = Walk(np.nan, bad_from=60)
    config = small(num_workers=num_workers, max_steps=4_000)
    failure = failed_run(tmp_path / "run", program(config, environment))
    code, output = run_replay(tmp_path / "run", environment=environment)
    assert code == 0
    updates = find_checkpoint(tmp_path / "run").version
    assert failure["update"] == updates
    assert f"update {updates:,} fails as it did in the run: worker {failure['worker']} failed" in (
        output
    )
    # Every environment goes bad at its sixtieth step, in the worker's fifteenth segment.
    own = find_checkpoint(tmp_path / "run").schedule.worker == failure["worker"]
    assert own.sum() == 14


def test_the_command_finds_a_run_that_failed_for_another_reason_identical_up_to_there(
    run_replay, tmp_path
):
    # What failed was not the computation: the segment that was lost is good when it is played again.
    built = program(small(num_workers=2), WALK)
    failure = failed_run(tmp_path / "run", fail_after(built, 20, MemoryError("no more")))
    assert "no more" in failure["error"]
    code, output = run_replay(tmp_path / "run", environment=WALK)
    assert (code, "identical:" in output) == (0, True), output
    assert "does not fail when it is repeated" in output


def test_the_command_replays_a_run_that_failed_before_a_worker_had_pulled(run_replay, tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    train(small(), checkpoints=folder)
    failure = {"error": "no thread", "worker": 0, "pulled_version": None, "update": 50}
    (tmp_path / "failure.json").write_text(json.dumps(failure))
    code, output = run_replay(tmp_path, environment=WALK)
    assert (code, "identical:" in output) == (0, True), output
    assert "failed before its worker had pulled" in output
    assert "does not fail when it is repeated" not in output


def test_a_step_that_raises_fails_as_it_does_in_a_run():
    def broken(params, state):
        raise ArithmeticError("broken")

    built = dataclasses.replace(program(small()), step=broken)
    with pytest.raises(WorkerError, match="worker 0 failed with ArithmeticError: broken") as caught:
        a3c_jax.replay(built, a3c_jax.fixed_delay(0, num_updates=2))
    assert (caught.value.pulled_version, caught.value.result.version) == (0, 0)
