"""Checkpoints of format 1 are still read, and their runs go on where they stood.

`data/format1` holds three runs that the last version before format 2 made: each with a checkpoint at update
120, and one at update 130 to which it came when it went on from there.
"""

import functools
from pathlib import Path

import chex
import numpy as np
import pytest
from small_runs import assert_exact_counters, words

import a3c_jax
from a3c_jax import (
    CheckpointError,
    CheckpointFolder,
    _compiled,
    find_checkpoint,
    load_checkpoint,
)
from a3c_jax.asynchrony.metrics import Report
from a3c_jax.asynchrony.run import Run

DATA = Path(__file__).parent / "data" / "format1"
NAMES = ["cartpole", "normalized", "lstm"]
VECTORS = ["params", "optimizer_state", "best_params"]


@functools.cache
def build(name):
    """The program of an old run, and its two checkpoints."""
    folder = DATA / name / "checkpoints"
    start, end = (load_checkpoint(folder / f"{k:012d}.checkpoint") for k in (120, 130))
    return a3c_jax.build(start.config), start, end


@pytest.fixture(
    params=[
        "cartpole",
        pytest.param("normalized", marks=pytest.mark.slow),
        pytest.param("lstm", marks=pytest.mark.slow),
    ]
)
def old(request):
    return build(request.param)


def restored(program, checkpoint):
    run = Run(program)
    run.restore(checkpoint)
    return run


def as_vector(named):
    """Arrays as format 1 held them: one vector of their elements, 32 bits each."""
    elements = [x.astype(np.uint32) if x.dtype == bool else x.view(np.uint32) for x in named]
    return np.concatenate([np.ravel(x) for x in elements])


def test_a_folder_of_format_1_is_found(old):
    _, start, end = old
    assert (start.version, end.version) == (120, 130)
    assert start.params.dtype == np.float32
    assert start.params.ndim == 1
    assert start.states.shape[0] == start.config.num_workers
    assert len(start.episodes.length) >= 3
    start.schedule.check(start.config.num_workers)


@pytest.mark.parametrize("name", NAMES)
def test_find_takes_the_last(name):
    assert find_checkpoint(DATA / name).version == 130


def test_what_is_restored_is_what_the_old_version_saved_bit_for_bit(old):
    program, start, _ = old
    run = restored(program, start)
    now = run.checkpoint()
    for field in VECTORS:
        assert as_vector(getattr(now, field).values()).tobytes() == getattr(start, field).tobytes()
    for worker, row in enumerate(start.states):
        state = [array[worker] for array in now.states.values()]
        assert as_vector(state).tobytes() == row.tobytes()
    assert words(now.schedule) == words(start.schedule)
    assert words(now.episodes) == words(start.episodes)
    assert (now.version, now.skipped, now.best_mean_return) == (
        120, start.skipped, start.best_mean_return,
    )  # fmt: skip
    assert now.seconds >= start.seconds
    assert_exact_counters(now)


def test_every_array_comes_back_under_the_name_of_what_it_is(old):
    program, start, _ = old
    run = restored(program, start)
    before, now = Run(program).checkpoint(), run.checkpoint()
    for field in (*VECTORS, "states"):
        a, b = getattr(before, field), getattr(now, field)
        assert {k: (x.shape, x.dtype) for k, x in a.items()} == {
            k: (x.shape, x.dtype) for k, x in b.items()
        }
    # Numbers whose place tells what they are.
    counts = [x for name, x in now.optimizer_state.items() if name.endswith("count")]
    assert all(count == 120 for count in counts)
    assert now.optimizer_state["finite"]
    assert now.states["episode_length"].dtype == np.int32
    if start.config.normalize_observations:
        statistics = _compiled.unpack(run.store.pull().params)["statistics"]
        for name in ("observation", "reward"):
            number, *_ = statistics[name]
            assert number == 120 * start.config.steps_per_update


def go_on(run, schedule):
    """Makes the updates of a schedule after the run's own, as its workers' threads would."""
    begin = run.version
    versions = {begin: run.store.pull().params}
    run.start_clock()
    for k in range(begin, len(schedule.worker)):
        worker, pulled = int(schedule.worker[k]), int(schedule.pulled_version[k])
        gradients, state, report = run.program.step(versions[pulled], run.states[worker])
        with run.store.applying(gradients, pulled, worker) as update:
            run.on_update(update, Report(report))
            run.states[worker] = state
        versions[k + 1] = run.store.pull().params
    return run.checkpoint()


def test_it_goes_on_to_where_the_old_version_came(old):
    # The last bits depend on the processor and on how the programs are compiled, so that the numbers are
    # compared closely and the counters exactly.
    program, start, end = old
    now = go_on(restored(program, start), end.schedule)
    again = restored(program, end).checkpoint()
    assert words(now.schedule) == words(end.schedule)
    assert now.episodes.worker.tolist() == end.episodes.worker.tolist()
    assert now.episodes.length.tolist() == end.episodes.length.tolist()
    np.testing.assert_allclose(now.episodes.episode_return, end.episodes.episode_return, rtol=1e-5)
    assert_exact_counters(now)
    for field in (*VECTORS, "states"):
        chex.assert_trees_all_close(
            getattr(now, field), getattr(again, field), rtol=1e-3, atol=1e-5
        )


def test_written_anew_in_the_new_format_it_goes_on_just_the_same(old, tmp_path):
    program, start, end = old
    run = restored(program, start)
    folder = CheckpointFolder(tmp_path)
    anew = load_checkpoint(folder.save(run.checkpoint()))
    assert isinstance(anew.params, dict)
    a, b = (go_on(restored(program, c), end.schedule) for c in (start, anew))
    for field in (*VECTORS, "states"):
        chex.assert_trees_all_equal(getattr(a, field), getattr(b, field))


def test_train_goes_on_from_it(old, tmp_path):
    program, start, _ = old
    result = a3c_jax.train(
        program.replace(max_steps=8 * 150), resume=start, checkpoints=CheckpointFolder(tmp_path)
    )
    assert result.version == 150
    assert words([column[:120] for column in result.schedule]) == words(list(start.schedule))
    assert words([c[: len(start.episodes.length)] for c in result.episodes]) == words(
        list(start.episodes)
    )
    assert_exact_counters(find_checkpoint(tmp_path))


@pytest.mark.parametrize("field", [*VECTORS, "states"])
@pytest.mark.parametrize("change", ["shorter", "longer", "wider"])
def test_vectors_that_do_not_fit_are_refused(field, change):
    program, checkpoint, _ = build("cartpole")
    changed = {
        "shorter": lambda x: x[..., :-1],
        "longer": lambda x: np.concatenate([x, x], axis=-1),
        "wider": lambda x: x.astype(np.uint64),
    }[change](getattr(checkpoint, field))
    with pytest.raises(CheckpointError, match=f"does not fit: {field} is .*, but this run needs"):
        restored(program, checkpoint._replace(**{field: changed}))


def test_vectors_of_another_number_of_workers_are_refused():
    program, checkpoint, _ = build("cartpole")
    with pytest.raises(CheckpointError, match="this run has 2 workers"):
        restored(program, checkpoint._replace(states=checkpoint.states[:1]))
