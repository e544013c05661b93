"""The shared parameters: no update lost, torn or misattributed; the optimizers' arithmetic."""

import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a3c_jax.parameters import SharedParameters, make_optimizer, per_worker

TIMEOUT = 30.0
TREE = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.array([0.5, -0.5, 1.0])}}


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


def test_a_pull_gives_the_initial_parameters_at_version_zero():
    params, version = SharedParameters(TREE, optax.sgd(1.0)).pull()
    assert version == 0
    chex.assert_trees_all_equal(params, TREE)


def test_a_pull_is_a_reference_and_not_a_copy():
    store = SharedParameters(TREE, optax.sgd(1.0))
    first, second = store.pull(), store.pull()
    assert first.params["dense"]["kernel"] is second.params["dense"]["kernel"]


def test_n_applies_give_version_n_and_optimizer_count_n():
    store = SharedParameters(jnp.zeros(3), make_optimizer("adam", learning_rate=0.1))
    for n in range(7):
        assert store.pull().version == n
        store.apply(jnp.ones(3), pulled_version=n)
    assert store.pull().version == 7
    assert int(optax.tree.get(store.opt_state, "count")) == 7
    assert len(store.schedule.worker) == 7


def test_apply_returns_the_staleness_and_the_schedule_records_it_with_the_worker():
    store = SharedParameters(jnp.zeros(2), optax.sgd(1.0))
    updates = [(3, 0), (1, 0), (3, 2), (0, 1), (2, 4)]  # worker, pulled version
    staleness = [store.apply(jnp.ones(2), pulled, worker) for worker, pulled in updates]
    assert staleness == [0, 1, 0, 2, 0]  # the k-th was applied to version k
    schedule = store.schedule
    np.testing.assert_array_equal(schedule.worker, [3, 1, 3, 0, 2])
    np.testing.assert_array_equal(schedule.pulled_version, [0, 0, 2, 1, 4])
    np.testing.assert_array_equal(schedule.staleness, staleness)
    assert (schedule.worker.dtype, schedule.pulled_version.dtype) == (np.int32, np.int64)


def test_the_schedule_is_a_copy_that_later_updates_do_not_touch():
    store = SharedParameters(jnp.zeros(2), optax.sgd(1.0))
    store.apply(jnp.ones(2), 0)
    schedule = store.schedule
    store.apply(jnp.ones(2), 1)
    assert len(schedule.worker) == len(schedule.pulled_version) == 1


@pytest.mark.parametrize("pulled_version", [-1, 2, 100])
def test_a_version_that_never_was_is_refused_and_changes_nothing(pulled_version):
    store = SharedParameters(jnp.zeros(2), optax.sgd(1.0))
    store.apply(jnp.ones(2), 0)
    before = store.pull()
    message = rf"pulled_version must lie in \[0, 1\], .*, got {pulled_version}; pass the version"
    with pytest.raises(ValueError, match=message):
        store.apply(jnp.ones(2), pulled_version)
    assert store.pull() is before
    assert len(store.schedule.worker) == 1
    assert store.apply(jnp.ones(2), 1) == 0  # the lock was released


def test_an_old_snapshot_stays_valid_and_unchanged_after_later_applies():
    store = SharedParameters(TREE, make_optimizer("adam", learning_rate=0.1))
    snapshots = [store.pull()]
    copies = [jax.tree.map(np.array, snapshots[0].params)]
    for n in range(3):
        store.apply(jax.tree.map(jnp.ones_like, TREE), n)
        snapshots.append(store.pull())
        copies.append(jax.tree.map(np.array, snapshots[-1].params))
    for snapshot, copy in zip(snapshots, copies, strict=True):
        assert not any(x.is_deleted() for x in jax.tree.leaves(snapshot.params))
        chex.assert_trees_all_equal(snapshot.params, copy)


def test_gradients_and_optimizer_state_are_not_donated_either():
    store = SharedParameters(jnp.zeros(2), make_optimizer("adam", learning_rate=0.1))
    gradients, opt_state = jnp.ones(2), store.opt_state
    store.apply(gradients, 0)
    store.apply(gradients, 1)
    np.testing.assert_array_equal(gradients, [1, 1])
    assert int(optax.tree.get(opt_state, "count")) == 0


def test_compiling_applies_nothing_and_the_update_then_compiles_no_more():
    store = SharedParameters(TREE, make_optimizer("rmsprop", learning_rate=1.0, num_workers=3))
    gradients = jax.tree.map(jnp.ones_like, TREE)
    store.compile(gradients)
    assert store.pull().version == 0
    chex.assert_trees_all_equal(store.pull().params, TREE)
    assert not any(np.any(x) for x in jax.tree.leaves(store.opt_state))
    for n in range(6):
        store.apply(gradients, n, worker=n % 3)
    assert store._update._cache_size() == 1


# The lock. Updates add one, so that the sum of a run is known exactly.


def test_many_threads_together_apply_every_one_of_their_updates():
    num_threads, updates_each = 6, 300
    store = SharedParameters(jnp.zeros(4), optax.sgd(1.0))
    store.compile(jnp.zeros(4))
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


def test_an_update_that_another_one_overtakes_is_computed_again_under_the_lock():
    store = SharedParameters(jnp.float32(1.0), optax.sgd(1.0))
    update, computed = store._update, []

    def double(gradients, opt_state, params, worker):
        computed.append((worker, float(params), store._lock.locked()))
        if len(computed) == 1:  # worker 7 has begun, and worker 8 comes in between
            assert store.apply(jnp.float32(-10.0), 0, worker=8) == 0
        return update(gradients * params, opt_state, params, worker)

    store._update = double
    assert store.apply(jnp.float32(-1.0), 0, worker=7) == 1
    assert computed == [(7, 1.0, False), (8, 1.0, False), (7, 11.0, True)]
    assert store.pull().version == 2
    assert float(store.pull().params) == 22.0  # 1, 1 + 10 * 1, 11 + 1 * 11
    schedule = store.schedule
    np.testing.assert_array_equal(schedule.worker, [8, 7])
    np.testing.assert_array_equal(schedule.pulled_version, [0, 0])


def test_the_optimizers_state_of_an_overtaken_update_is_not_lost_either():
    store = SharedParameters(jnp.zeros(2), make_optimizer("adam", learning_rate=0.1))
    update, overtaken = store._update, []

    def overtake(*arguments):
        if not overtaken:
            overtaken.append(True)
            store.apply(jnp.ones(2), 0)
        return update(*arguments)

    store._update = overtake
    store.apply(jnp.ones(2), 0)
    assert int(optax.tree.get(store.opt_state, "count")) == store.pull().version == 2


def test_a_commit_runs_under_the_lock_after_the_swap_with_the_new_snapshot():
    store = SharedParameters(jnp.zeros(2), optax.sgd(1.0))
    store.apply(-jnp.ones(2), 0)
    seen = []

    def commit(snapshot, staleness):
        acquired = store._lock.acquire(blocking=False)
        seen.append((snapshot, staleness, store.pull(), acquired))

    assert store.apply(-jnp.ones(2), pulled_version=0, commit=commit) == 1
    ((snapshot, staleness, pulled, acquired),) = seen
    assert not acquired, "the lock was free"
    assert snapshot is pulled, "the commit must see the swap done"
    assert (snapshot.version, staleness) == (2, 1)
    np.testing.assert_array_equal(snapshot.params, [2, 2])
    assert store._lock.acquire(blocking=False), "the lock must be free again"


def test_two_commits_never_overlap():
    store = SharedParameters(jnp.zeros(()), optax.sgd(1.0))
    store.compile(jnp.zeros(()))
    barrier, inside, versions = threading.Barrier(4), [], []

    def commit(snapshot, staleness):
        inside.append(threading.get_ident())
        versions.append(snapshot.version)
        float(snapshot.params.sum())  # gives another thread the chance to come in
        assert inside == [threading.get_ident()]
        inside.clear()

    def work():
        barrier.wait(TIMEOUT)
        for _ in range(100):
            store.apply(jnp.float32(-1.0), store.pull().version, commit=commit)

    run_threads(*[work] * 4)
    assert versions == list(range(1, 401))


def test_a_commit_that_raises_releases_the_lock():
    store = SharedParameters(jnp.zeros(2), optax.sgd(1.0))

    def commit(snapshot, staleness):
        raise RuntimeError("from the commit")

    with pytest.raises(RuntimeError, match="from the commit"):
        store.apply(jnp.ones(2), 0, commit=commit)
    assert store._lock.acquire(blocking=False)


# The optimizers, against NumPy in float64.

START = np.array([1.0, -2.0, 3.0, 0.5])
LEARNING_RATE = 0.05


def gradient_sequence(num_updates, seed=0):
    return np.random.default_rng(seed).normal(size=(num_updates, len(START)))


def assert_same_path(actual, expected):
    # A parameter that passes near zero is as exact as the steps that lead there.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def apply_all(optimizer, gradients, workers=None):
    """The parameters after each update, `[updates, 4]`."""
    store = SharedParameters(jnp.asarray(START, jnp.float32), optimizer)
    result = []
    for n, gradient in enumerate(gradients):
        worker = 0 if workers is None else workers[n]
        store.apply(jnp.asarray(gradient, jnp.float32), n, worker)
        result.append(np.asarray(store.pull().params))
    return np.array(result)


def rmsprop(gradients, workers, decay=0.99, epsilon=1e-2):
    """The paper's RMSProp: epsilon inside the root, statistics from zero, a set for each worker."""
    params = START.copy()
    statistics = {worker: np.zeros_like(START) for worker in workers}
    result = []
    for gradient, worker in zip(gradients, workers, strict=True):
        statistics[worker] = decay * statistics[worker] + (1 - decay) * gradient**2
        params = params - LEARNING_RATE * gradient / np.sqrt(statistics[worker] + epsilon)
        result.append(params)
    return np.array(result)


def test_shared_rmsprop_is_the_papers_with_statistics_that_all_workers_share():
    gradients, workers = gradient_sequence(12), [0, 1, 2] * 4
    optimizer = make_optimizer(
        "shared_rmsprop", learning_rate=LEARNING_RATE, rmsprop_epsilon=1e-2, num_workers=3
    )
    expected = rmsprop(gradients, workers=[0] * 12)  # one set, whoever sends
    assert_same_path(apply_all(optimizer, gradients, workers), expected)


def test_the_first_step_of_rmsprop_worked_by_hand():
    optimizer = make_optimizer("shared_rmsprop", learning_rate=1.0, rmsprop_epsilon=0.07)
    store = SharedParameters(jnp.zeros(1), optimizer)
    store.apply(jnp.full(1, 3.0), 0)
    # g = 0.01 * 3^2 = 0.09; 3 / sqrt(0.09 + 0.07) = 3 / 0.4 = 7.5.
    # With epsilon outside the root it were 3 / (0.3 + 0.07) = 8.1; from a g of one, 2.8.
    np.testing.assert_allclose(store.pull().params, [-7.5], rtol=1e-5)


def test_rmsprop_keeps_statistics_for_each_worker_that_only_its_own_gradients_move():
    gradients, workers = gradient_sequence(12), [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1]
    gradients[np.array(workers) == 1] *= 100.0  # shared statistics would make 0's steps tiny
    optimizer = make_optimizer(
        "rmsprop", learning_rate=LEARNING_RATE, rmsprop_epsilon=1e-2, num_workers=2
    )
    expected = rmsprop(gradients, workers)
    assert_same_path(apply_all(optimizer, gradients, workers), expected)


def test_an_update_by_one_worker_leaves_the_statistics_of_the_others_alone():
    optimizer = make_optimizer("rmsprop", learning_rate=0.1, num_workers=3)
    store = SharedParameters(jnp.zeros(2), optimizer)
    store.apply(jnp.array([2.0, 4.0]), 0, worker=1)
    statistics = optax.tree.get(store.opt_state, "nu")
    np.testing.assert_allclose(statistics, [[0, 0], [0.04, 0.16], [0, 0]], rtol=1e-5)


def test_per_worker_also_keeps_counts_apart_and_gives_plain_optimizers_their_own_state():
    store = SharedParameters(jnp.zeros(2), per_worker(optax.adam(0.1), 2))
    for n, worker in enumerate([0, 1, 1, 1]):
        store.apply(jnp.ones(2), n, worker)
    np.testing.assert_array_equal(optax.tree.get(store.opt_state, "count"), [1, 3])


def test_momentum_is_the_heavy_ball():
    gradients = gradient_sequence(8)
    params, velocity, expected = START.copy(), np.zeros_like(START), []
    for gradient in gradients:
        velocity = 0.7 * velocity + gradient
        params = params - LEARNING_RATE * velocity
        expected.append(params)
    optimizer = make_optimizer("momentum", learning_rate=LEARNING_RATE, momentum=0.7)
    assert_same_path(apply_all(optimizer, gradients), expected)


def test_adam_is_adam():
    gradients = gradient_sequence(8)
    params, m, v, expected = START.copy(), np.zeros_like(START), np.zeros_like(START), []
    for k, gradient in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-2)
        params = params - LEARNING_RATE * step
        expected.append(params)
    optimizer = make_optimizer("adam", learning_rate=LEARNING_RATE, adam_epsilon=1e-2)
    np.testing.assert_allclose(apply_all(optimizer, gradients), expected, rtol=0, atol=2e-5)


def plain_sgd(**options):
    return make_optimizer("momentum", learning_rate=1.0, momentum=0.0, **options)


def test_clipping_scales_the_whole_gradient_down_to_the_norm_and_keeps_its_direction():
    zeros = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    store = SharedParameters(zeros, plain_sgd(max_gradient_norm=0.5))
    store.apply({"a": jnp.array([3.0]), "b": jnp.array([-4.0])}, 0)
    # The norm over both leaves is 5, so that the factor is 0.1; elementwise it were [-0.5, 0.5].
    params = store.pull().params
    np.testing.assert_allclose([params["a"][0], params["b"][0]], [-0.3, 0.4], rtol=1e-6)


def test_clipping_comes_before_the_statistics_and_not_after():
    optimizer = make_optimizer(
        "shared_rmsprop", learning_rate=LEARNING_RATE, rmsprop_epsilon=1e-2, max_gradient_norm=0.5
    )
    gradients = gradient_sequence(6)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    clipped = gradients * np.minimum(1.0, 0.5 / norms)
    assert (norms > 0.5).any()
    expected = rmsprop(clipped, [0] * 6)
    assert_same_path(apply_all(optimizer, gradients), expected)


@pytest.mark.parametrize("limit", [None, 5.1])
def test_a_gradient_within_the_limit_is_left_alone(limit):
    store = SharedParameters(jnp.zeros(2), plain_sgd(max_gradient_norm=limit))
    store.apply(jnp.array([3.0, -4.0]), 0)
    np.testing.assert_array_equal(store.pull().params, [-3, 4])


def test_annealing_falls_linearly_and_reaches_exactly_zero():
    optimizer = make_optimizer("momentum", learning_rate=1.0, momentum=0.0, anneal_over=4)
    params = apply_all(optimizer, np.ones((7, 4)))
    steps = -np.diff(params, axis=0, prepend=START[None])
    np.testing.assert_allclose(steps[:4, 0], [1.0, 0.75, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(steps[4:], 0.0)


def test_annealing_counts_the_updates_of_all_workers_together():
    optimizer = make_optimizer("rmsprop", learning_rate=1.0, anneal_over=4, num_workers=2)
    params = apply_all(optimizer, np.ones((6, 4)), workers=[0, 1, 0, 1, 0, 1])
    assert (np.diff(params[:4], axis=0) < 0).all()
    np.testing.assert_array_equal(np.diff(params[3:], axis=0), 0.0)


def test_an_unknown_optimizer_is_answered_with_the_known_ones():
    message = r"optimizer must be one of adam, .*rmsprop.*, got 'sgd'; use 'adam'\.$"
    with pytest.raises(ValueError, match=message):
        make_optimizer("sgd", learning_rate=0.1)


@pytest.mark.parametrize("name", ["adam", "momentum", "shared_rmsprop", "rmsprop"])
def test_one_flat_vector_and_a_tree_of_the_same_numbers_move_alike(name):
    flat, unravel = jax.flatten_util.ravel_pytree(TREE)
    options = {"learning_rate": 0.1, "max_gradient_norm": 0.5, "anneal_over": 5, "num_workers": 2}
    on_tree = SharedParameters(TREE, make_optimizer(name, **options))
    on_flat = SharedParameters(flat, make_optimizer(name, **options))
    for n, gradient in enumerate(np.random.default_rng(0).normal(size=(4, flat.size))):
        gradient = jnp.asarray(gradient, jnp.float32)
        on_tree.apply(unravel(gradient), n, n % 2)
        on_flat.apply(gradient, n, n % 2)
    jax.tree.map(assert_same_path, on_tree.pull().params, unravel(on_flat.pull().params))


def test_a_worker_that_the_store_does_not_know_is_refused():
    store = SharedParameters(jnp.zeros(2), make_optimizer("rmsprop", learning_rate=1.0), 1)
    with pytest.raises(ValueError, match=r"worker must lie in \[0, 0\], got 1"):
        store.apply(jnp.ones(2), 0, 1)
    assert store.pull().version == 0


# The optimizer's state. Between updates it is one vector of words; to read, it is optax's own tree.


def optax_alone(optimizer, params, gradients, workers):
    """Parameters and state after the same updates, without a store."""
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def update(gradient, state, params, worker):
        updates, state = optimizer.update(gradient, state, params, worker=worker)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient, worker in zip(gradients, workers, strict=True):
        params, state = update(gradient, state, params, worker)
    return params, state


OPTIMIZERS = {name: lambda name=name: make_optimizer(
    name, learning_rate=0.1, max_gradient_norm=0.5, anneal_over=9, num_workers=2
) for name in ("adam", "momentum", "shared_rmsprop", "rmsprop")} | {
    "sgd, which has no state": lambda: optax.sgd(0.1),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(optax.cosine_decay_schedule(0.1, 10), weight_decay=0.01),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.5, 5)),
    ),
    "counts and flags": lambda: optax.apply_if_finite(optax.adam(0.1, mu_dtype=jnp.bfloat16), 3),
    "one for each part": lambda: optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        {"dense": {"kernel": "a", "bias": "b"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_optimizer_state_are_those_that_optax_alone_would_give(name):
    rng, workers = np.random.default_rng(1), [0, 1, 1, 0, 1]
    gradients = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), TREE)
        for _ in workers
    ]
    optimizer = OPTIMIZERS[name]()
    store = SharedParameters(TREE, optimizer, 2)
    chex.assert_trees_all_equal_structs(store.opt_state, optimizer.init(TREE))
    chex.assert_trees_all_equal(store.opt_state, optimizer.init(TREE))
    for n, (gradient, worker) in enumerate(zip(gradients, workers, strict=True)):
        store.apply(gradient, n, worker)
    params, state = optax_alone(optimizer, TREE, gradients, workers)
    chex.assert_trees_all_equal_structs(store.opt_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(store.opt_state, state)
    chex.assert_trees_all_close(store.opt_state, state, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(store.pull().params, params, rtol=1e-5, atol=1e-7)


def test_an_optimizer_may_keep_a_random_key():
    optimizer = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(3)), optax.sgd(0.1))
    store = SharedParameters(jnp.zeros(4), optimizer)
    store.apply(jnp.ones(4), 0)
    store.apply(jnp.ones(4), 1)
    params, state = optax_alone(optimizer, jnp.zeros(4), [jnp.ones(4)] * 2, [0, 0])
    assert_same_path(store.pull().params, params)
    key, expected = optax.tree.get(store.opt_state, "rng_key"), optax.tree.get(state, "rng_key")
    assert jax.random.key_impl(key) == jax.random.key_impl(expected)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


# A lock that is given.


class WatchedLock:
    """A lock that knows whether it is held, and how often it was taken."""

    def __init__(self):
        self.lock, self.held, self.times = threading.Lock(), False, 0

    def __enter__(self):
        self.lock.acquire()
        self.held, self.times = True, self.times + 1

    def __exit__(self, *_):
        self.held = False
        self.lock.release()


def test_a_given_lock_is_the_one_held_during_the_commit_and_not_the_update():
    lock, seen = WatchedLock(), []
    store = SharedParameters(jnp.zeros(2), optax.sgd(1.0), lock=lock)
    update = store._update

    def watched_update(*arguments):
        seen.append(("update", lock.held))
        return update(*arguments)

    store._update = watched_update
    for n in range(2):
        store.apply(jnp.ones(2), n, commit=lambda *_: seen.append(("commit", lock.held)))
        assert not lock.held
        assert lock.times == n + 1
    assert seen == [("update", False), ("commit", True)] * 2
    assert store.pull().version == 2
    assert lock.times == 2  # to pull takes no lock


def test_a_given_lock_is_released_by_what_goes_wrong_under_it():
    lock = WatchedLock()
    store = SharedParameters(jnp.zeros(2), optax.sgd(1.0), lock=lock)

    def commit(snapshot, staleness):
        assert lock.held
        raise RuntimeError("from the commit")

    with pytest.raises(RuntimeError, match="from the commit"):
        store.apply(jnp.ones(2), 0, commit=commit)
    with pytest.raises(ValueError, match="pulled_version"):
        store.apply(jnp.ones(2), 100)
    assert (lock.held, lock.times) == (False, 1)  # a wrong version is refused before


def test_stores_without_a_given_lock_each_have_their_own():
    first, second = (SharedParameters(jnp.zeros(2), optax.sgd(1.0)) for _ in range(2))
    versions = []

    def commit(snapshot, staleness):
        second.apply(jnp.ones(2), 0)  # would wait for ever, were there one lock for both
        versions.append((snapshot.version, second.pull().version))

    run_threads(lambda: first.apply(jnp.ones(2), 0, commit=commit))
    assert versions == [(1, 1)]
