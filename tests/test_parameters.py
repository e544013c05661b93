"""The shared parameters: no update lost, torn or misattributed, whatever threads do meanwhile."""

import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a3c_jax import _compiled
from a3c_jax.asynchrony.parameters import NonFiniteError, Schedule, SharedParameters
from a3c_jax.asynchrony.program import compile_updater
from a3c_jax.optimizers import Updater, make_optimizer, make_updater

pytestmark = pytest.mark.usefixtures("switching_often")

TIMEOUT = 30.0
TREE = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.array([0.5, -0.5, 1.0])}}
SGD = Updater(*map(jax.jit, make_updater(optax.sgd(1.0))))  # compiled once for all tests


def adam():
    return make_optimizer("adam", learning_rate=0.1)


def run_threads(*targets):
    """Runs the functions in threads of their own; raises what they raised, or if one hangs."""
    errors = []

    def guarded(target):
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(t,), daemon=True) for t in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def contents(store):
    """Everything in a store."""
    return store.freeze(lambda: None)[0]


def is_held(store):
    """Whether another thread would have to wait for the store's lock."""
    free = []

    def acquire():
        free.append(store._lock.acquire(blocking=False))
        if free[0]:
            store._lock.release()

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join(TIMEOUT)
    return not free[0]


def assert_is_free(store):
    assert not is_held(store), "the lock must be free again"


def test_a_pull_gives_the_initial_parameters_at_version_zero_and_no_copy():
    store = SharedParameters(TREE, SGD)
    params, version = store.pull()
    assert version == 0
    chex.assert_trees_all_equal(params, TREE)
    assert params["dense"]["kernel"] is store.pull().params["dense"]["kernel"]


def test_a_pull_needs_no_lock():
    store = SharedParameters(TREE, SGD)
    with store._lock:
        run_threads(store.pull)


def test_n_applies_give_version_n_and_optimizer_count_n():
    store = SharedParameters(jnp.zeros(3), adam())
    for n in range(7):
        assert store.pull().version == n
        store.apply(jnp.ones(3), pulled_version=n)
    assert store.pull().version == 7
    assert int(optax.tree.get(store.optimizer_state, "count")) == 7
    assert len(store.schedule.worker) == 7


def test_apply_returns_the_staleness_and_the_schedule_holds_it_with_the_worker():
    store = SharedParameters(jnp.zeros(2), SGD)
    updates = [(3, 0), (1, 0), (3, 2), (0, 1), (2, 4)]  # worker, pulled version
    staleness = [store.apply(jnp.ones(2), pulled, worker) for worker, pulled in updates]
    assert staleness == [0, 1, 0, 2, 0]  # the k-th was applied to version k
    schedule = store.schedule
    np.testing.assert_array_equal(schedule.worker, [3, 1, 3, 0, 2])
    np.testing.assert_array_equal(schedule.pulled_version, [0, 0, 2, 1, 4])
    np.testing.assert_array_equal(schedule.staleness, staleness)
    assert (schedule.worker.dtype, schedule.pulled_version.dtype) == (np.int32, np.int64)


def test_later_updates_do_not_touch_a_schedule_that_was_read():
    store = SharedParameters(jnp.zeros(2), SGD)
    store.apply(jnp.ones(2), 0)
    schedule = store.schedule
    store.apply(jnp.ones(2), 1)
    assert len(schedule.worker) == len(schedule.pulled_version) == 1


@pytest.mark.parametrize("pulled_version", [-1, 2, 100])
def test_a_version_that_never_was_is_refused_and_changes_nothing(pulled_version):
    store = SharedParameters(jnp.zeros(2), SGD)
    store.apply(jnp.ones(2), 0)
    before = store.pull()
    message = rf"pulled_version must lie in \[0, 1\], .*, got {pulled_version}; pass the version"
    with pytest.raises(ValueError, match=message):
        store.apply(jnp.ones(2), pulled_version)
    assert store.pull() is before
    assert len(store.schedule.worker) == 1
    assert store.apply(jnp.ones(2), 1) == 0  # the lock was released


@pytest.mark.parametrize("worker", [-1, 2])
def test_a_worker_that_the_store_does_not_know_is_refused(worker):
    store = SharedParameters(jnp.zeros(2), SGD, 2)
    with pytest.raises(ValueError, match=rf"worker must lie in \[0, 1\], got {worker}"):
        store.apply(jnp.ones(2), 0, worker)
    assert store.pull().version == 0


def test_old_snapshots_gradients_and_optimizer_states_stay_valid_and_unchanged():
    store = SharedParameters(TREE, adam())
    gradients = jax.tree.map(jnp.ones_like, TREE)
    held = [(store.pull().params, store.optimizer_state, gradients)]
    copies = [jax.tree.map(np.array, held[0])]
    for n in range(3):
        store.apply(gradients, n)
        held.append((store.pull().params, store.optimizer_state, gradients))
        copies.append(jax.tree.map(np.array, held[-1]))
    for kept, copy in zip(held, copies, strict=True):
        assert not any(x.is_deleted() for x in jax.tree.leaves(kept))
        chex.assert_trees_all_equal(kept, copy)
    assert int(optax.tree.get(held[0][1], "count")) == 0


def test_the_update_is_compiled_once_whoever_sends():
    optimizer, traces = make_optimizer("rmsprop", learning_rate=1.0, num_workers=3), []

    def update(*arguments, **options):
        traces.append(options)
        return optimizer.update(*arguments, **options)

    counted = optax.GradientTransformationExtraArgs(optimizer.init, update)
    store = SharedParameters(TREE, counted)
    assert not any(np.any(x) for x in jax.tree.leaves(store.optimizer_state))
    for n in range(6):
        store.apply(jax.tree.map(jnp.ones_like, TREE), n, worker=n % 3)
    assert len(traces) == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_parameters_and_optimizer_state_can_be_read_as_optax_keeps_them(compiled, name):
    optimizer = make_optimizer(name, learning_rate=0.1, anneal_over=9, num_workers=2)
    updater = compile_updater(make_updater(optimizer), TREE, TREE) if compiled else optimizer
    store = SharedParameters(TREE, updater, 2)
    chex.assert_trees_all_equal(store.optimizer_state, optimizer.init(TREE))
    expected, params = optimizer.init(TREE), TREE
    gradients = jax.tree.map(jnp.cos, TREE)
    for n, worker in enumerate([0, 1, 1]):
        store.apply(gradients, n, worker)
        updates, expected = optimizer.update(gradients, expected, params, worker=worker)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_structs(store.optimizer_state, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(store.optimizer_state, expected)
    chex.assert_trees_all_close(store.optimizer_state, expected, rtol=1e-5, atol=1e-7)
    pulled = _compiled.unpack(store.pull().params)
    chex.assert_trees_all_close(pulled, params, rtol=1e-5, atol=1e-7)


# The lock. Updates add one, so that the sum of a run is known exactly.


def test_many_threads_together_apply_every_one_of_their_updates():
    num_threads, updates_each = 6, 300
    store = SharedParameters(jnp.zeros(4), SGD)
    barrier = threading.Barrier(num_threads)

    def work(worker):
        gradients = -jnp.eye(4)[worker % 4]
        barrier.wait(TIMEOUT)
        for _ in range(updates_each):
            params, version = store.pull()
            assert float(params.sum()) == version, "a torn snapshot"
            store.apply(gradients, version, worker)

    run_threads(*(lambda w=w: work(w) for w in range(num_threads)))
    params, version = store.pull()
    assert version == num_threads * updates_each
    np.testing.assert_array_equal(params, [600, 600, 300, 300])
    schedule = store.schedule
    np.testing.assert_array_equal(np.bincount(schedule.worker), [updates_each] * num_threads)
    assert (schedule.staleness >= 0).all()


def test_an_update_is_computed_without_the_lock():
    held = []

    def update(*arguments):
        held.append(is_held(store))
        return SGD.update(*arguments)

    store = SharedParameters(jnp.zeros(2), Updater(SGD.init, update))
    for n in range(3):
        store.apply(jnp.ones(2), n)
    assert held == [False] * 3


def test_an_update_that_another_one_overtakes_is_computed_again_under_the_lock():
    computed = []

    def double(gradients, optimizer_state, params, worker):
        computed.append((worker, float(params), is_held(store)))
        if len(computed) == 1:  # worker 7 has begun, and worker 8 comes in between
            assert store.apply(jnp.float32(-10.0), 0, worker=8) == 0
        return SGD.update(gradients * params, optimizer_state, params, worker)

    store = SharedParameters(jnp.float32(1.0), Updater(SGD.init, double))
    assert store.apply(jnp.float32(-1.0), 0, worker=7) == 1
    assert computed == [(7, 1.0, False), (8, 1.0, False), (7, 11.0, True)]
    assert store.pull().version == 2
    assert float(store.pull().params) == 22.0  # 1, 1 + 10 * 1, 11 + 1 * 11
    schedule = store.schedule
    np.testing.assert_array_equal(schedule.worker, [8, 7])
    np.testing.assert_array_equal(schedule.pulled_version, [0, 0])


def test_the_optimizers_state_of_an_overtaken_update_is_not_lost_either():
    updater, overtaken = make_updater(adam()), []

    def overtake(*arguments):
        if not overtaken:
            overtaken.append(True)
            store.apply(jnp.ones(2), 0)
        return updater.update(*arguments)

    store = SharedParameters(jnp.zeros(2), Updater(updater.init, overtake))
    store.apply(jnp.ones(2), 0)
    assert int(optax.tree.get(store.optimizer_state, "count")) == store.pull().version == 2


# The block that is part of an update.


def test_the_block_runs_under_the_lock_just_before_the_update_becomes_visible():
    store = SharedParameters(jnp.zeros(2), SGD)
    store.apply(-jnp.ones(2), 0)
    with store.applying(-jnp.ones(2), 0, worker=4) as update:
        assert is_held(store)
        assert store.pull().version == len(store.schedule.worker) == 1
        assert (update.worker, update.staleness, update.snapshot.version) == (4, 1, 2)
        np.testing.assert_array_equal(update.snapshot.params, [2, 2])
    assert_is_free(store)
    assert store.pull() is update.snapshot
    assert store.schedule.worker.tolist() == [0, 4]


def test_two_blocks_never_overlap():
    store, barrier, inside, versions = (
        SharedParameters(jnp.zeros(()), SGD),
        threading.Barrier(4),
        [],
        [],
    )

    def work():
        barrier.wait(TIMEOUT)
        for _ in range(100):
            with store.applying(jnp.float32(-1.0), store.pull().version) as update:
                inside.append(threading.get_ident())
                versions.append(update.snapshot.version)
                float(update.snapshot.params.sum())  # gives another thread the chance to come in
                assert inside == [threading.get_ident()]
                inside.clear()

    run_threads(*[work] * 4)
    assert versions == list(range(1, 401))


def test_each_store_has_a_lock_of_its_own():
    first, second = (SharedParameters(jnp.zeros(2), SGD) for _ in range(2))

    def nested():
        with first.applying(jnp.ones(2), 0):
            second.apply(jnp.ones(2), 0)  # would wait for ever, were there one lock for both

    run_threads(nested)
    assert first.pull().version == second.pull().version == 1


@pytest.mark.parametrize("kind", [RuntimeError, StopIteration, GeneratorExit, KeyboardInterrupt])
def test_a_block_that_raises_makes_no_update_and_releases_the_lock(kind):
    store = SharedParameters(jnp.zeros(2), adam())
    store.apply(jnp.ones(2), 0)
    before = contents(store)
    with pytest.raises(kind, match="from the block"), store.applying(jnp.ones(2), 1):
        raise kind("from the block")
    assert_is_free(store)
    chex.assert_trees_all_equal(contents(store), before)
    assert store.apply(jnp.ones(2), 1) == 0


# What is not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused_and_changes_nothing(bad):
    store = SharedParameters(jnp.zeros(2), adam())
    store.apply(jnp.ones(2), 0)
    before = contents(store)
    with pytest.raises(NonFiniteError, match="update of version 1 by worker 5 has a NaN"):
        store.apply(jnp.array([1.0, bad]), 1, worker=5)
    assert_is_free(store)
    chex.assert_trees_all_equal(contents(store), before)
    assert store.apply(jnp.ones(2), 1) == 0


def test_an_update_that_is_not_finite_is_counted_and_changes_nothing_if_it_may_be_skipped():
    store = SharedParameters(jnp.zeros(2), adam(), skip_nonfinite=True)
    store.apply(jnp.ones(2), 0)
    params, state = store.pull().params, store.optimizer_state
    with store.applying(jnp.array([np.nan, 1.0]), 0, worker=2) as update:
        np.testing.assert_array_equal(update.snapshot.params, params)
    assert (update.staleness, store.pull().version, contents(store).skipped) == (1, 2, 1)
    np.testing.assert_array_equal(store.pull().params, params)
    chex.assert_trees_all_equal(store.optimizer_state, state)
    assert store.schedule.worker.tolist() == [0, 2]
    store.apply(jnp.ones(2), 2)
    assert contents(store).skipped == 1


def test_a_huge_step_that_makes_a_parameter_infinite_is_refused():
    store = SharedParameters(jnp.full(1, 3e38), optax.sgd(1e30))
    with pytest.raises(NonFiniteError, match="makes a NaN or an infinity of the parameters"):
        store.apply(jnp.full(1, -3e8), 0)


# What workers have pulled and not yet applied.


def in_flight(store):
    return {worker: snapshot.version for worker, snapshot in contents(store).in_flight.items()}


def test_what_a_worker_has_pulled_is_known_until_it_applies_its_gradients():
    store = SharedParameters(jnp.zeros(1), SGD)
    assert in_flight(store) == {}
    store.pull()
    assert in_flight(store) == {}
    first = store.pull(3)
    store.apply(jnp.ones(1), 0, 0)
    second = store.pull(5)
    assert in_flight(store) == {3: 0, 5: 1}
    assert contents(store).in_flight[3] is first
    store.apply(jnp.ones(1), second.version, 5)
    assert in_flight(store) == {3: 0}
    store.apply(jnp.ones(1), first.version, 3)
    assert in_flight(store) == {}


def test_an_update_between_a_pull_and_its_note_makes_the_worker_pull_again():
    """A checkpoint of that very update does not see the note, so it would lack what the worker started from."""
    store, left = SharedParameters(jnp.zeros(1), SGD), [2]

    class UpdatedMeanwhile(dict):
        def __setitem__(self, worker, snapshot):
            if left[0]:
                left[0] -= 1
                store.apply(jnp.ones(1), snapshot.version, 1)
            super().__setitem__(worker, snapshot)

    store._in_flight = UpdatedMeanwhile()
    assert store.pull(0).version == 2
    assert in_flight(store) == {0: 2}


# To save a store, and to go on.


def test_what_is_frozen_is_of_one_moment_between_two_updates():
    store, told, frozen = SharedParameters(jnp.zeros(()), SGD), [], []
    reader = threading.Thread(
        target=lambda: frozen.append(store.freeze(lambda: (len(told), store.log.seal()))),
        daemon=True,
    )
    with store.applying(jnp.float32(-1.0), 0):
        reader.start()
        time.sleep(0.1)
        told.append("in the middle of an update")
    reader.join(TIMEOUT)
    ((state, (count, updates)),) = frozen
    assert state.snapshot.version == float(state.snapshot.params) == updates == 1
    assert count == 1


def test_a_store_goes_on_from_what_was_frozen_as_if_nothing_had_been():
    def gradients(n):
        return jnp.array([np.nan if n == 2 else 1.0, float(n)])

    def make():
        return SharedParameters(jnp.zeros(2), adam(), skip_nonfinite=True)

    whole, first = make(), make()
    for n in range(5):
        whole.apply(gradients(n), max(0, n - 1), n)
    for n in range(3):
        first.apply(gradients(n), max(0, n - 1), n)
    middle, schedule = contents(first), first.schedule
    first.apply(gradients(7), 0)  # does not disturb what was frozen

    second = make()
    second.restore(middle, schedule)
    assert second.pull() is middle.snapshot
    for n in range(3, 5):
        second.apply(gradients(n), max(0, n - 1), n)
    chex.assert_trees_all_equal(contents(second), contents(whole))
    chex.assert_trees_all_equal(second.schedule, whole.schedule)
    assert contents(second).skipped == 1


@pytest.mark.parametrize(
    ("worker", "pulled", "message"),
    [
        (
            [0, 2],
            [0, 1],
            r"schedule\.worker must lie in \[0, 1\], got 0 to 2; give the num_workers",
        ),
        ([-1, 0], [0, 1], r"schedule\.worker must lie in \[0, 1\], got -1 to 0"),
        ([0, 0], [0, 2], r"schedule\.pulled_version must name a version that exists"),
        ([0, 0], [-1, 0], r"schedule\.pulled_version must name a version that exists"),
        ([0, 0], [0], r"two vectors of equal length, got \(2,\) and \(1,\)"),
        ([[0]], [[0]], r"two vectors of equal length, got \(1, 1\) and \(1, 1\)"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(worker, pulled, message):
    with pytest.raises(ValueError, match=message):
        Schedule(np.array(worker), np.array(pulled)).check(num_workers=2)


def test_a_schedule_that_can_be_passes_and_may_be_empty():
    Schedule(np.array([0, 1, 1]), np.array([0, 0, 2])).check(num_workers=2)
    Schedule(np.zeros(0), np.zeros(0)).check(num_workers=2)
