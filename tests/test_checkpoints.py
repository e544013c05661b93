"""Checkpoints: one consistent moment, written whole or not at all, and nothing believed that was not checked."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import (
    WALK,
    StopAt,
    Walk,
    assert_equal_runs,
    assert_exact_counters,
    cut_short,
    program,
    replay,
    small,
    train,
    words,
)

import a3c_jax
from a3c_jax import (
    A3CConfig,
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    EpisodeLog,
    Schedule,
    TrainingInterrupted,
    find_checkpoint,
    load_checkpoint,
)
from a3c_jax.asynchrony.checkpoint_files import save_checkpoint
from a3c_jax.asynchrony.checkpoints import check_same_run
from a3c_jax.asynchrony.trees import name_leaves
from a3c_jax.distributions import Categorical


def make_checkpoint(version=6, returns=(1.0, 2.0, 3.0, 4.0, 5.0), seed=0):
    """A checkpoint of no run at all."""
    rng, count = np.random.default_rng(seed), len(returns)
    return Checkpoint(
        config=small(num_workers=2),
        params={
            "params/a/bias": rng.normal(size=2).astype(np.float32),
            "params/a/kernel": rng.normal(size=(3, 2)).astype(np.float32),
        },
        optimizer_state={"count": np.int32(6), "mu": rng.normal(size=8), "finite": np.bool_(True)},
        schedule=Schedule(
            rng.integers(2, size=version).astype(np.int32), np.arange(version, dtype=np.int64)
        ),
        skipped=1,
        states={
            "key": rng.integers(2**32, size=(2, 2), dtype=np.uint32),
            "episode_length": np.ones((2, 3)),
        },
        episodes=EpisodeLog(
            np.arange(count, dtype=np.int32) % 2,
            np.array(returns, np.float64),
            np.full(count, 4, np.int32),
            np.full(count, 8, np.int64),
            np.linspace(0.0, 1.0, count),
        ),
        best_params={"params/a/bias": np.zeros(2, np.float32)},
        best_mean_return=3.25,
        seconds=1.5,
        versions={"python": "3"},
    )


def assert_equal_checkpoints(a, b):
    assert a.config == b.config
    assert (a.skipped, repr(a.best_mean_return), a.seconds, a.versions) == (
        b.skipped, repr(b.best_mean_return), b.seconds, b.versions,
    )  # fmt: skip
    for name in ("params", "optimizer_state", "schedule", "states", "episodes", "best_params"):
        x, y = getattr(a, name), getattr(b, name)
        assert words(x) == words(y), name
        if isinstance(x, dict):
            assert {k: (v.shape, v.dtype) for k, v in x.items()} == {
                k: (v.shape, v.dtype) for k, v in y.items()
            }, name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def file_name(version):
    return f"{version:012d}.checkpoint"


def test_what_is_saved_is_what_is_loaded(tmp_path):
    checkpoint = make_checkpoint()
    save_checkpoint(tmp_path / "a.checkpoint", checkpoint)
    assert_equal_checkpoints(load_checkpoint(tmp_path / "a.checkpoint"), checkpoint)
    assert names(tmp_path) == ["a.checkpoint"]


@pytest.mark.parametrize("best", [None, float("nan"), float("-inf"), 0.1 + 0.2])
def test_any_mean_survives(tmp_path, best):
    checkpoint = make_checkpoint(returns=(best or 0.0,) * 5)._replace(best_mean_return=best)
    save_checkpoint(tmp_path / "a.checkpoint", checkpoint)
    assert_equal_checkpoints(load_checkpoint(tmp_path / "a.checkpoint"), checkpoint)


def test_a_run_before_its_first_update_survives(tmp_path):
    checkpoint = make_checkpoint(version=0, returns=())._replace(best_mean_return=None)
    save_checkpoint(tmp_path / "a.checkpoint", checkpoint)
    again = load_checkpoint(tmp_path / "a.checkpoint")
    assert_equal_checkpoints(again, checkpoint)
    assert (again.version, again.environment_steps, again.mean_return) == (0, 0, None)


def test_the_first_line_tells_a_reader_what_the_file_is(tmp_path):
    save_checkpoint(tmp_path / "a.checkpoint", make_checkpoint())
    header = json.loads((tmp_path / "a.checkpoint").read_bytes().partition(b"\n")[0])
    assert (header["what"], header["format"]) == ("a3c_jax checkpoint", 3)
    assert header["run"]["version"] == 6
    assert header["run"]["mean_return"] == 3.0  # of 1 to 5
    assert A3CConfig(**header["run"]["config"]) == small(num_workers=2)


def test_the_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_save_returns(
    tmp_path, monkeypatch
):
    path, events, real = tmp_path / "a.checkpoint", [], (os.fsync, os.replace)

    def fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real[0](descriptor)

    def replace(source, target):
        size = os.stat(source).st_size
        real[1](source, target)
        events.append((str(target), size))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_checkpoint(path, make_checkpoint())
    (written, renamed, folder) = events
    assert written != str(path)
    assert os.path.dirname(written) == str(tmp_path)  # a rename works within one file system only
    assert renamed == (str(path), path.stat().st_size)
    assert folder == str(tmp_path)


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_next_save(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(make_checkpoint(version=3))
    whole = (tmp_path / file_name(3)).read_bytes()
    (tmp_path / f".{file_name(4)}.12345.partial").write_bytes(whole[:-10])
    assert find_checkpoint(tmp_path).version == 3
    folder.save(make_checkpoint(version=5))
    assert names(tmp_path) == [file_name(3), file_name(5)]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_and_the_best_are_kept(tmp_path, keep):
    folder = CheckpointFolder(tmp_path, keep=keep)
    for version, mean in enumerate([None, 1.0, 9.0, 9.0, 4.0, 5.0, 6.0, 7.0], start=1):
        folder.save(make_checkpoint(version, () if mean is None else (mean,) * 5))
    # The best twice: the later one counts.
    kept = {1: [4, 8], 3: [4, 6, 7, 8]}[keep]
    assert names(tmp_path) == [file_name(version) for version in kept]


def test_a_damaged_file_is_never_taken_for_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(make_checkpoint(1, (99.0,) * 5))
    (tmp_path / file_name(1)).write_bytes(b"not a checkpoint")
    folder.save(make_checkpoint(2, (3.0,) * 5))
    folder.save(make_checkpoint(3, (2.0,) * 5))
    assert names(tmp_path) == [file_name(2), file_name(3)]


def test_a_mean_that_is_no_number_is_never_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    for version, mean in enumerate([float("nan"), 5.0, 3.0, float("nan"), 2.0], start=1):
        folder.save(make_checkpoint(version, (mean,) * 5))
    assert names(tmp_path) == [file_name(2), file_name(5)]


def test_a_save_is_due_by_time_or_by_updates_or_never(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    by_time = CheckpointFolder(tmp_path, every_seconds=30.0)
    by_updates = CheckpointFolder(tmp_path, every_seconds=None, every_updates=10)
    never = CheckpointFolder(tmp_path, every_seconds=None)
    assert not by_time.due(10**6)
    assert [by_updates.due(version) for version in (0, 9, 10)] == [False, False, True]
    now[0] += 29.9
    assert not by_time.due(0)
    now[0] += 0.2
    assert by_time.due(0)
    for folder in (by_time, by_updates):
        folder.save(make_checkpoint(version=10))
    assert not by_time.due(11)
    assert [by_updates.due(version) for version in (19, 20)] == [False, True]
    now[0] += 1e9
    assert not never.due(10**9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_seconds": 0.0}, "every_seconds must be > 0, got 0.0; use None"),
        ({"every_seconds": float("nan")}, "every_seconds must be > 0, got nan"),
        ({"every_updates": -1}, "every_updates must be > 0, got -1; use None"),
        ({"keep": 0}, "keep must be >= 1, got 0; use 1"),
        ({"keep": 1.5}, "keep must be an integer >= 1, got 1.5; use 1."),
    ],
)
def test_a_folder_of_nonsense_is_refused(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        CheckpointFolder(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# What a reader refuses.


def truncate(content):
    return content[:-10]


def flip(content):
    middle = len(content) * 3 // 4
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def change_the_run(content):
    return content.replace(b'"skipped": 1', b'"skipped": 0', 1)


def newer(content):
    return content.replace(b'"format": 3', b'"format": 4', 1)


def no_format(content):
    return content.replace(b'"format": 3', b'"format": true', 1)


DAMAGE = [
    (truncate, "is damaged: its checksum does not match"),
    (flip, "is damaged: its checksum does not match"),
    (lambda content: content + b"\0", "is damaged: its checksum does not match"),
    (change_the_run, "is damaged: its checksum does not match"),
    (lambda content: content[:40], "first line is damaged"),
    (lambda content: b"", "is no a3c_jax checkpoint"),
    (lambda content: b"\0" * len(content), "is no a3c_jax checkpoint"),
    (lambda content: b"\x93NUMPY\x01\x00v\x00", "is no a3c_jax checkpoint"),
    (lambda content: b"[1, 2]\n", "is no a3c_jax checkpoint"),
    (lambda content: b"[" * 60_000 + b"\n", "is no a3c_jax checkpoint"),
    (newer, r"has format 4, but this version of a3c_jax reads up to 3; use the version that wrote"),
    (no_format, "its first line is not complete"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_file_is_refused_and_the_good_one_before_it_named(tmp_path, damage, message):
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", keep=3)
    for version in (1, 2, 3):
        folder.save(make_checkpoint(version))
    newest = folder.path / file_name(3)
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(newest)
    assert str(newest) in str(caught.value)
    before = folder.path / file_name(2)
    for path in (tmp_path / "run", folder.path):
        with pytest.raises(CheckpointError, match=message) as caught:
            find_checkpoint(path)
        assert f"The one before it, {before}, is good (update 2)" in str(caught.value)
    assert find_checkpoint(before).version == 2


def test_the_good_one_may_be_further_back_or_there_may_be_none(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for version in (1, 2, 3):
        folder.save(make_checkpoint(version))
    for version in (2, 3):
        (tmp_path / file_name(version)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{file_name(3)}.*{file_name(1)}, is good"):
        find_checkpoint(tmp_path)
    (tmp_path / file_name(1)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=file_name(3)) as caught:
        find_checkpoint(tmp_path)
    assert "is good" not in str(caught.value)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_may_be_a_string(tmp_path, kind):
    run = kind(tmp_path / "run")
    folder = CheckpointFolder(kind(tmp_path / "run" / "checkpoints"))
    path = folder.save(make_checkpoint(3))
    for where in (run, kind(folder.path), kind(path)):
        assert find_checkpoint(where).version == 3
    save_checkpoint(kind(tmp_path / "other"), make_checkpoint(4))
    assert load_checkpoint(kind(tmp_path / "other")).version == 4


def test_copies_under_names_of_their_own_are_neither_taken_nor_removed(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    first = folder.save(make_checkpoint(version=1))
    copies = [tmp_path / "0-keep-me.checkpoint", tmp_path / "start.checkpoint"]
    for copy in copies:
        copy.write_bytes(first.read_bytes())
    folder.save(make_checkpoint(version=20))
    assert find_checkpoint(tmp_path).version == 20
    assert all(find_checkpoint(copy).version == 1 for copy in copies)


def test_a_folder_without_a_checkpoint_and_a_file_that_is_not_there_are_errors(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            find_checkpoint(path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path)


# Which runs may go on from which.

OTHER_VALUES = {
    "environment": "Acrobot-v1",
    "seed": 4,
    "num_workers": 2,
    "envs_per_worker": 3,
    "t_max": 5,
    "discount": 0.5,
    "gae_lambda": 0.5,
    "normalize_observations": True,
    "normalize_rewards": True,
    "reward_clip": 1.0,
    "torso": "mlp",
    "core": "lstm",
    "core_size": 3,
    "forget_bias": 2.0,
    "action_bounds": "tanh",
    "state_dependent_scale": False,
    "critic_cost": 0.1,
    "entropy_cost": 0.1,
    "terminal_reward": -1.0,
    "algorithm": "n_step_q",
    "optimizer": "momentum",
    "learning_rate": 0.5,
    "learning_rate_schedule": "linear",
    "adam_epsilon": 0.5,
    "momentum": 0.5,
    "rmsprop_decay": 0.5,
    "rmsprop_epsilon": 0.5,
    "max_gradient_norm": None,
    "nonfinite": "skip",
    "hidden_sizes": (9,),
    "activation": "relu",
    "shared_torso": True,
    "solved_window": 6,
}
BUDGETS = {
    "max_steps": 1_000,
    "max_episodes": 5,
    "solved_return": 1.0,
    "max_concurrent_workers": 3,
}


def test_the_fields_below_are_all_there_are():
    fields = {field.name for field in dataclasses.fields(A3CConfig)}
    assert fields == OTHER_VALUES.keys() | BUDGETS.keys()


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_run_does_not_go_on_with_another_value_and_the_field_is_named(name):
    with pytest.raises(ValueError, match=rf"A3CConfig\.{name} must be the checkpoint's"):
        check_same_run(small(), small(**{name: OTHER_VALUES[name]}))


@pytest.mark.parametrize("name", BUDGETS)
def test_a_run_may_go_on_with_another_budget(name):
    check_same_run(small(), small(**{name: BUDGETS[name]}))


def test_the_steps_may_not_change_where_the_learning_rate_depends_on_them():
    linear = small(learning_rate_schedule="linear")
    check_same_run(linear, dataclasses.replace(linear, solved_return=1.0))
    with pytest.raises(
        ValueError, match=r"A3CConfig\.max_steps must be .* only max_concurrent_workers, "
    ):
        check_same_run(linear, dataclasses.replace(linear, max_steps=1_000))


@pytest.mark.slow
def test_train_refuses_another_configuration_before_anything_else(tmp_path):
    checkpoint = cut_short(small(), 3, tmp_path)
    with pytest.raises(ValueError, match=r"A3CConfig\.seed must be the checkpoint's 3"):
        train(small(seed=5), resume=checkpoint)


# Which arrays fit.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cut_short(small(num_workers=2), 12, tmp_path_factory.mktemp("run"))


def changed(checkpoint, field, change):
    arrays = dict(getattr(checkpoint, field))
    change(arrays)
    return checkpoint._replace(**{field: arrays})


FIELDS = ["params", "optimizer_state", "states", "best_params"]


@pytest.mark.parametrize("field", FIELDS)
def test_an_array_is_known_by_its_name_and_not_by_its_place(checkpoint, field):
    def turn_around(arrays):
        turned = dict(reversed(arrays.items()))
        arrays.clear()
        arrays.update(turned)

    other = changed(checkpoint, field, turn_around)
    config = small(num_workers=2, max_steps=8)  # no update is made
    assert_equal_runs(train(config, resume=other), train(config, resume=checkpoint))


def rename(arrays):
    name = next(iter(arrays))
    arrays[name + "_too"] = arrays.pop(name)


def remove(arrays):
    arrays.popitem()


def add(arrays):
    arrays["surplus"] = np.zeros((2, 3), np.float32)


def widen(arrays):
    name = max(arrays, key=lambda name: arrays[name].ndim)
    arrays[name] = np.concatenate([arrays[name]] * 2, axis=-1)


def retype(arrays):
    name = max(arrays, key=lambda name: arrays[name].ndim)
    arrays[name] = arrays[name].astype(np.float16)


REFUSED = [
    (rename, r"'.+' is missing, but this run needs \w+\[.*\]; give the environment, the network"),
    (remove, r"'.+' is missing, but this run needs"),
    (add, r"'surplus' is float32\[.*3\], but this run needs no such array"),
    (widen, r"'.+' is \w+\[.*\], but this run needs \w+\[.*\]"),
    (retype, r"'.+' is float16\[.*\], but this run needs"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
@pytest.mark.parametrize("field", FIELDS)
def test_arrays_that_do_not_fit_are_refused_by_name(checkpoint, field, change, message):
    other = changed(checkpoint, field, change)
    with pytest.raises(CheckpointError, match=f"the checkpoint does not fit: {field} {message}"):
        train(small(num_workers=2), resume=other)


@pytest.mark.parametrize("count", [1, 3])
def test_the_states_of_fewer_or_more_workers_are_refused(checkpoint, count):
    def resize(arrays):
        arrays.update({name: np.resize(x, (count, *x.shape[1:])) for name, x in arrays.items()})

    other = changed(checkpoint, "states", resize)
    with pytest.raises(CheckpointError, match=rf"states '.+' has the shape \[{count}\b.*2 workers"):
        train(small(num_workers=2), resume=other)


class Named(nn.Module):
    """Two layers of the same shapes under names of one's choice."""

    logits: str
    values: str

    @nn.compact
    def __call__(self, observation):
        actor, critic = nn.Dense(2, name=self.logits), nn.Dense(2, name=self.values)
        return Categorical(actor(observation)), critic(observation).sum(-1)

    def actor(self, observation):
        return self(observation)[0]

    def critic(self, observation):
        return self(observation)[1]


@pytest.mark.slow
def test_another_network_with_arrays_of_the_same_shapes_is_refused(tmp_path):
    config, network = small(max_steps=80, hidden_sizes=(128,)), Named("logits", "values")
    a3c_jax.train(program(config, WALK, network), checkpoints=CheckpointFolder(tmp_path))
    saved = find_checkpoint(tmp_path)
    assert sorted(saved.params) == [
        f"params/{layer}/{array}" for layer in ("logits", "values") for array in ("bias", "kernel")
    ]
    # The same layers under exchanged names are of the same shapes, and the same network.
    for other in (Named("values", "logits"), network):
        assert a3c_jax.train(program(config, WALK, other), resume=saved).version == 10
    with pytest.raises(CheckpointError, match="params 'params/policy/bias' is missing"):
        a3c_jax.train(program(config, WALK, Named("policy", "values")), resume=saved)


def test_another_optimizer_with_arrays_of_the_same_shapes_is_refused(tmp_path):
    saved = cut_short(small(optimizer="momentum"), 3, tmp_path)
    config = small(optimizer="shared_rmsprop")
    claimed = saved._replace(config=config)
    with pytest.raises(CheckpointError, match=r"optimizer_state 'state/.*nu' is missing"):
        train(config, resume=claimed)
    nu = train(config).opt_state[1].nu
    (trace,) = (x for x in saved.optimizer_state.values() if x.dtype == np.float32)
    assert (trace.shape, trace.dtype) == (nu.shape, nu.dtype)


@pytest.mark.slow
def test_another_environment_is_refused(checkpoint):
    class Wider(Walk):
        observation_shape = (4,)

        def _observe(self, state):
            return jnp.pad(super()._observe(state), ((0, 0), (0, 1)))

    wider = Wider()
    with pytest.raises(ValueError, match=r"environment must be small_runs\.Walk, as in the run"):
        train(small(num_workers=2), wider, resume=checkpoint)
    unnamed = checkpoint._replace(objects=None)  # as in files of earlier versions
    with pytest.raises(CheckpointError, match=r"params 'params/.*kernel' is float32\[3, 8\]"):
        train(small(num_workers=2), wider, resume=unnamed)


# What `train` saves.


def test_a_run_saves_its_start_and_its_end(tmp_path):
    result = train(small(), checkpoints=CheckpointFolder(tmp_path))
    assert names(tmp_path) == [".lock", file_name(0), file_name(50), "episodes.bin", "schedule.bin"]
    start, end = (load_checkpoint(tmp_path / file_name(version)) for version in (0, 50))
    assert start.version == len(start.episodes.length) == 0
    assert words(start.params) != words(end.params)
    chex.assert_trees_all_equal(end.params, name_leaves(result.params))
    chex.assert_trees_all_equal(end.best_params, name_leaves(result.best_params))
    bias = result.params["params"]["value_head"]["bias"]
    np.testing.assert_array_equal(end.params["params/value_head/bias"], bias)
    assert words(end.episodes) == words(result.episodes)
    assert words(end.schedule) == words(result.schedule)
    assert end.best_mean_return == result.best_mean_return
    assert end.config == result.config == small()
    assert_exact_counters(end)


class KeepAll(CheckpointFolder):
    """Keeps all it is given, as often as it can."""

    def __init__(self, path):
        super().__init__(path, every_seconds=None, every_updates=1, keep=10**6)


class StopsAfter(StopAt):
    """Stops the run when there are so many checkpoints."""

    def __init__(self, path, count):
        super().__init__(0)
        self.path, self.count = path, count

    def write(self, row, episodes):
        if len(list(self.path.glob("*.checkpoint"))) >= self.count:
            super().write(row, episodes)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_every_checkpoint_of_a_run_is_one_moment_between_two_updates(
    tmp_path, num_workers, optimizer
):
    config = small(num_workers=num_workers, optimizer=optimizer, max_steps=None, max_episodes=10**9)
    with pytest.raises(TrainingInterrupted) as caught:
        train(
            config, checkpoints=KeepAll(tmp_path), sinks=[StopsAfter(tmp_path, 6)], interval=0.003
        )
    result, paths = caught.value.result, sorted(tmp_path.glob("*.checkpoint"))
    saved = [load_checkpoint(path) for path in paths[:: max(1, len(paths) // 6)]]
    for checkpoint in saved:
        assert_exact_counters(checkpoint)
        for name in ("worker", "pulled_version"):
            np.testing.assert_array_equal(
                getattr(checkpoint.schedule, name),
                getattr(result.schedule, name)[: checkpoint.version],
            )
    # Parameters, optimizer and best belong to that very version: as one thread gets there.
    by_version = {checkpoint.version: checkpoint for checkpoint in saved}
    for version in sorted(by_version)[1:-1:2]:
        again, saved = replay(config, result.schedule, until=version), by_version[version]
        chex.assert_trees_all_equal(name_leaves(again.params), saved.params)
        chex.assert_trees_all_equal(name_leaves(again.best_params), saved.best_params)
        assert again.episodes.length.tolist() == saved.episodes.length.tolist()
        state = {f"state/{k}": v for k, v in name_leaves(again.opt_state).items()}
        chex.assert_trees_all_equal(state | {"finite": np.bool_(True)}, saved.optimizer_state)


def test_the_clock_goes_on_where_it_was(tmp_path):
    first = cut_short(small(), 20, tmp_path)
    before = first._replace(seconds=1000.0)
    train(small(), WALK, resume=before, checkpoints=CheckpointFolder(tmp_path))
    after = find_checkpoint(tmp_path)
    assert 1000.0 < after.seconds < 1100.0
    new = after.episodes.seconds[len(first.episodes.seconds) :]
    assert len(new)
    assert (new > 1000.0).all()


# The logs beside the checkpoints, and who may use a folder.


def test_a_checkpoint_is_as_large_after_a_long_run_as_after_a_short_one(tmp_path):
    sizes = []
    for max_steps in (400, 16_000):
        folder = tmp_path / str(max_steps)
        result = train(small(max_steps=max_steps), checkpoints=CheckpointFolder(folder))
        sizes.append((folder / file_name(result.version)).stat().st_size)
        assert (folder / "schedule.bin").stat().st_size == 12 * result.version
        assert (folder / "episodes.bin").stat().st_size == 32 * len(result.episodes.length)
    assert abs(sizes[1] - sizes[0]) < 200  # a few digits more


def test_what_a_result_holds_is_mapped_and_outlives_the_files(tmp_path):
    folder = CheckpointFolder(tmp_path / "run")
    result = train(small(), checkpoints=folder)
    again = find_checkpoint(folder.path)
    assert np.may_share_memory(*result.schedule)  # rows of a file
    assert words(again.schedule) == words(result.schedule)
    shutil.rmtree(folder.path)
    assert words(again.episodes) == words(result.episodes)
    assert words(pickle.loads(pickle.dumps(result)).schedule) == words(result.schedule)


@pytest.mark.parametrize("name", ["schedule.bin", "episodes.bin"])
def test_a_damaged_log_is_refused_and_left_as_it_is(tmp_path, name):
    train(small(), checkpoints=CheckpointFolder(tmp_path))
    content = bytearray((tmp_path / name).read_bytes())
    content[12 * 11 + 4] ^= 1  # the 11 of row 11 becomes a 10, which is possible as well
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: the checksum of its first"):
        train(
            small(max_steps=800),
            resume=find_checkpoint(tmp_path),
            checkpoints=CheckpointFolder(tmp_path),
        )
    assert (tmp_path / name).read_bytes() == content
    with open(tmp_path / name, "r+b") as file:
        file.truncate(len(content) - 1)
    with pytest.raises(CheckpointError, match=rf"{name} must have .*keep or copy the folder"):
        find_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"No such file.*{name}"):
        find_checkpoint(tmp_path)


def test_a_schedule_that_cannot_be_is_not_restored(tmp_path):
    train(small(), checkpoints=CheckpointFolder(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    for column, value in [("worker", 99), ("pulled_version", 10**6)]:
        changed = getattr(checkpoint.schedule, column).copy()
        changed[7] = value
        wrong = checkpoint._replace(
            schedule=checkpoint.schedule._replace(**{column: changed}), logs=None
        )
        with pytest.raises(CheckpointError, match=rf"does not fit: schedule\.{column} must"):
            train(small(max_steps=800), resume=wrong)


def test_a_checkpoint_without_its_folder_can_be_made_to_hold_everything(tmp_path):
    config = small(max_steps=800)
    train(small(), checkpoints=CheckpointFolder(tmp_path / "run"))
    checkpoint = find_checkpoint(tmp_path / "run")
    save_checkpoint(tmp_path / "alone", checkpoint._replace(logs=None))
    shutil.rmtree(tmp_path / "run")
    alone = load_checkpoint(tmp_path / "alone")
    assert alone.logs is None
    result = train(config, resume=alone, checkpoints=CheckpointFolder(tmp_path / "new"))
    assert_equal_runs(result, train(config))
    assert words(find_checkpoint(tmp_path / "new").schedule) == words(result.schedule)


HOLDS_A_FOLDER = """
import sys
from a3c_jax.asynchrony.checkpoints import CheckpointFolder

with CheckpointFolder(sys.argv[1]).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_by_another_process_is_refused_until_that_is_gone(tmp_path):
    train(small(), checkpoints=CheckpointFolder(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_FOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(a3c_jax.__file__).parent.parent)},
    )
    try:
        assert other.stdout.readline() == "locked\n"
        resume, closed = find_checkpoint(tmp_path), []

        class Sink:
            def write(self, row, episodes):
                pass

            def close(self):
                closed.append(True)

        def go_on(**options):
            return train(
                small(max_steps=800),
                resume=resume,
                checkpoints=CheckpointFolder(tmp_path),
                **options,
            )

        with pytest.raises(
            CheckpointError, match="must not be in use, got .*, where a run goes on"
        ):
            go_on(sinks=[Sink()])
        assert closed == [True]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    finally:
        other.kill()  # which leaves nothing behind that locks
        other.communicate()
    assert_equal_runs(go_on(), train(small(max_steps=800)))


def test_no_run_may_make_the_checkpoints_of_a_folder_useless(tmp_path):
    train(small(), checkpoints=CheckpointFolder(tmp_path / "a"))
    train(small(seed=9), checkpoints=CheckpointFolder(tmp_path / "b"))
    first = load_checkpoint(tmp_path / "a" / file_name(0))
    for resume, message in [
        (None, "a new run's folder of checkpoints must have none, got .* with one of update 50"),
        (first, "go on from the latest checkpoint .* got update 0, but .* has one of update 50"),
        (find_checkpoint(tmp_path / "b"), "must not save to the folder of another run"),
    ]:
        config = small() if resume is None else resume.config
        with pytest.raises(CheckpointError, match=message):
            train(config, resume=resume, checkpoints=CheckpointFolder(tmp_path / "a"))
    # An earlier one can be gone on from in another folder.
    result = train(small(), resume=first, checkpoints=CheckpointFolder(tmp_path / "c"))
    assert_equal_runs(result, train(small()))
