"""The optimizers' arithmetic, each worker's own state, and updates that are never made because they are not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a3c_jax.optimizers import all_finite, make_optimizer, make_updater, per_worker

TREE = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.array([0.5, -0.5, 1.0])}}


class Path:
    """Parameters, and what successive updates make of them."""

    def __init__(self, params, optimizer):
        updater = make_updater(optimizer)
        self.params, self.state = params, updater.init(params)
        self.update = jax.jit(updater.update)

    def apply(self, gradients, worker=0):
        self.params, self.state, _ = self.update(gradients, self.state, self.params, worker)


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
    path = Path(jnp.asarray(START, jnp.float32), optimizer)
    result = []
    for n, gradient in enumerate(gradients):
        worker = 0 if workers is None else workers[n]
        path.apply(jnp.asarray(gradient, jnp.float32), worker)
        result.append(np.asarray(path.params))
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
    path = Path(jnp.zeros(1), optimizer)
    path.apply(jnp.full(1, 3.0))
    # g = 0.01 * 3^2 = 0.09; 3 / sqrt(0.09 + 0.07) = 3 / 0.4 = 7.5.
    # With epsilon outside the root it were 3 / (0.3 + 0.07) = 8.1; from a g of one, 2.8.
    np.testing.assert_allclose(path.params, [-7.5], rtol=1e-5)


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
    path = Path(jnp.zeros(2), optimizer)
    path.apply(jnp.array([2.0, 4.0]), worker=1)
    statistics = optax.tree.get(path.state.state, "nu")
    np.testing.assert_allclose(statistics, [[0, 0], [0.04, 0.16], [0, 0]], rtol=1e-5)


def test_per_worker_also_keeps_counts_apart_and_gives_plain_optimizers_their_own_state():
    path = Path(jnp.zeros(2), per_worker(optax.adam(0.1), 2))
    for worker in [0, 1, 1, 1]:
        path.apply(jnp.ones(2), worker)
    np.testing.assert_array_equal(optax.tree.get(path.state.state, "count"), [1, 3])


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
    path = Path(zeros, plain_sgd(max_gradient_norm=0.5))
    path.apply({"a": jnp.array([3.0]), "b": jnp.array([-4.0])})
    # The norm over both leaves is 5, so that the factor is 0.1; elementwise it were [-0.5, 0.5].
    params = path.params
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
    path = Path(jnp.zeros(2), plain_sgd(max_gradient_norm=limit))
    path.apply(jnp.array([3.0, -4.0]))
    np.testing.assert_array_equal(path.params, [-3, 4])


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
    on_tree = Path(TREE, make_optimizer(name, **options))
    on_flat = Path(flat, make_optimizer(name, **options))
    for n, gradient in enumerate(np.random.default_rng(0).normal(size=(4, flat.size))):
        gradient = jnp.asarray(gradient, jnp.float32)
        on_tree.apply(unravel(gradient), n % 2)
        on_flat.apply(gradient, n % 2)
    jax.tree.map(assert_same_path, on_tree.params, unravel(on_flat.params))


# The optimizer's state is optax's own tree.


def optax_alone(optimizer, params, gradients, workers):
    """Parameters and state after the same updates, by optax alone."""
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
    path = Path(TREE, optimizer)
    chex.assert_trees_all_equal_structs(path.state.state, optimizer.init(TREE))
    chex.assert_trees_all_equal(path.state.state, optimizer.init(TREE))
    for gradient, worker in zip(gradients, workers, strict=True):
        path.apply(gradient, worker)
    params, state = optax_alone(optimizer, TREE, gradients, workers)
    chex.assert_trees_all_equal_structs(path.state.state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(path.state.state, state)
    chex.assert_trees_all_close(path.state.state, state, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(path.params, params, rtol=1e-5, atol=1e-7)


def test_an_optimizer_may_keep_a_random_key():
    optimizer = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(3)), optax.sgd(0.1))
    path = Path(jnp.zeros(4), optimizer)
    path.apply(jnp.ones(4))
    path.apply(jnp.ones(4))
    params, state = optax_alone(optimizer, jnp.zeros(4), [jnp.ones(4)] * 2, [0, 0])
    assert_same_path(path.params, params)
    key, expected = optax.tree.get(path.state.state, "rng_key"), optax.tree.get(state, "rng_key")
    assert jax.random.key_impl(key) == jax.random.key_impl(expected)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


# Updates that are not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["kernel", "bias"])
def test_an_update_that_is_not_finite_is_not_made_and_says_so(bad, leaf):
    path = Path(TREE, make_optimizer("adam", learning_rate=0.1))
    path.apply(jax.tree.map(jnp.ones_like, TREE))
    params, state = path.params, path.state
    assert state.finite
    gradients = jax.tree.map(jnp.ones_like, TREE)
    gradients["dense"][leaf] = gradients["dense"][leaf].at[-1].set(bad)
    path.apply(gradients)
    assert not path.state.finite
    chex.assert_trees_all_equal((path.params, path.state.state), (params, state.state))
    path.apply(jax.tree.map(jnp.ones_like, TREE))
    assert path.state.finite
    assert int(optax.tree.get(path.state.state, "count")) == 2


def test_finite_gradients_that_make_a_parameter_infinite_are_refused_too():
    path = Path(jnp.array([3e38, 1.0]), optax.sgd(1.0))
    path.apply(jnp.array([-3e38, 1.0]))
    assert not path.state.finite
    np.testing.assert_array_equal(path.params, np.float32([3e38, 1.0]))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, True),
        ({"count": jnp.int32(3), "flag": jnp.bool_(True)}, True),
        ({"a": jnp.full(3, 3.4e38), "b": jnp.full((2, 2), 3.4e38)}, True),  # their sum is infinite
        ({"a": jnp.zeros(3), "b": jnp.array([[0.0, jnp.nan]])}, False),
        ({"a": jnp.bfloat16(jnp.inf), "b": jnp.zeros(3)}, False),
        (jnp.array([jnp.inf, -jnp.inf]), False),
    ],
    ids=["empty", "no floats", "large", "nan", "other dtype", "vector"],
)
def test_all_finite_looks_at_every_floating_point_number(tree, expected):
    assert bool(jax.jit(all_finite)(tree)) == expected


def test_flattened_optimizers_move_a_tree_bit_for_bit_as_its_vector():
    flat, unravel = jax.flatten_util.ravel_pytree(TREE)
    optimizer = make_optimizer("adam", learning_rate=0.1, max_gradient_norm=0.5)
    on_tree, on_flat = Path(TREE, optax.flatten(optimizer)), Path(flat, optimizer)
    for gradient in np.random.default_rng(0).normal(size=(20, flat.size)):
        gradient = jnp.asarray(gradient, jnp.float32)
        on_tree.apply(unravel(gradient))
        on_flat.apply(gradient)
    chex.assert_trees_all_equal(on_tree.params, unravel(on_flat.params))
