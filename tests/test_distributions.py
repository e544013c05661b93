"""The action distributions, against closed forms, SciPy, sampling and their own gradients."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.test_util import check_grads

from a3c_jax.action_values import EpsilonGreedy
from a3c_jax.distributions import Categorical, DiagonalGaussian, MultiCategorical, at_action

NUM_SAMPLES = 20_000
# A mean of NUM_SAMPLES draws strays from its expectation by more than five standard errors once in
# two million times; the keys are fixed besides.
STANDARD_ERRORS = 5.0


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(
        actual, jax.tree.map(np.float32, expected), rtol=rtol, atol=atol, strict=True
    )


def random_normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_categorical(*shape):
    return Categorical(jnp.asarray(2.0 * random_normal(*shape)))


def random_multi_categorical(sizes, *batch):
    return MultiCategorical(jnp.asarray(2.0 * random_normal(*batch, sum(sizes))), sizes)


def split_by_hand(array, sizes):
    """The columns of each component, with slices."""
    ends = list(itertools.accumulate(sizes))
    return [array[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]


def random_gaussian(*shape):
    return DiagonalGaussian(
        jnp.asarray(random_normal(*shape)), jnp.asarray(np.exp(random_normal(*shape, seed=1)))
    )


# Categorical.


def test_categorical_by_hand():
    distribution = Categorical(jnp.log(jnp.array([[1.0, 2.0, 1.0], [1.0, 1.0, 8.0]])))
    # Probabilities 1/4, 1/2, 1/4 and 1/10, 1/10, 8/10: logits need not be normalised.
    assert_close(distribution.log_prob(jnp.array([1, 2])), np.log([0.5, 0.8]))
    # 2 * 1/4 * log 4 + 1/2 * log 2 = 1.5 log 2.
    assert_close(distribution.entropy()[0], 1.5 * np.log(2.0))
    chex.assert_trees_all_equal(distribution.mode(), jnp.array([1, 2], jnp.int32))


@pytest.mark.parametrize("shape", [(3,), (4, 2), (5, 2, 6)], ids=str)
def test_categorical_equals_scipy_for_any_batch_shape(shape):
    distribution = random_categorical(*shape)
    action = np.random.default_rng(1).integers(0, shape[-1], shape[:-1])
    log_probs = scipy.special.log_softmax(np.asarray(distribution.logits, np.float64), axis=-1)
    assert_close(distribution.log_probs(), log_probs)
    assert_close(
        distribution.log_prob(jnp.asarray(action)),
        np.take_along_axis(log_probs, np.asarray(action)[..., None], -1)[..., 0],
    )
    assert_close(distribution.entropy(), scipy.stats.entropy(np.exp(log_probs), axis=-1))
    mode = distribution.mode()
    chex.assert_trees_all_equal(mode, np.argmax(log_probs, -1).astype(np.int32))


def test_categorical_probabilities_of_all_actions_add_up_to_one():
    distribution = random_categorical(5, 4)
    every = [distribution.log_prob(jnp.full(5, action)) for action in range(4)]
    assert_close(jnp.sum(jnp.exp(jnp.stack(every)), axis=0), np.ones(5))


def test_categorical_samples_have_the_given_frequencies():
    probabilities = np.array([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    distribution = Categorical(jnp.log(jnp.asarray(probabilities)))
    keys = jax.random.split(jax.random.key(0), NUM_SAMPLES)
    samples = jax.jit(jax.vmap(distribution.sample))(keys)
    chex.assert_shape(samples, (NUM_SAMPLES, 2))
    chex.assert_type(samples, jnp.int32)
    frequencies = np.mean(np.asarray(samples)[..., None] == np.arange(3), axis=0)
    standard_error = np.sqrt(probabilities * (1.0 - probabilities) / NUM_SAMPLES)
    assert np.all(np.abs(frequencies - probabilities) <= STANDARD_ERRORS * standard_error)
    assert frequencies[1, 2] == 0.0  # an impossible action is never drawn
    # The elements of a batch are drawn independently: P(2 and 0) = 0.7 * 0.5.
    together = np.mean((samples[:, 0] == 2) & (samples[:, 1] == 0))
    assert abs(together - 0.35) < STANDARD_ERRORS * np.sqrt(0.35 * 0.65 / NUM_SAMPLES)


def test_the_gradient_of_a_log_probability_is_one_hot_minus_the_policy():
    distribution, action = random_categorical(5, 4), jnp.array([0, 1, 2, 3, 0])
    gradient = jax.jit(jax.grad(lambda logits: Categorical(logits).log_prob(action).sum()))
    one_hot = jnp.eye(4)[action]
    assert_close(gradient(distribution.logits), one_hot - jax.nn.softmax(distribution.logits))


@pytest.mark.parametrize("num_actions", [1, 2, 9])
def test_the_entropy_is_log_of_the_number_of_equal_actions_and_its_gradient_there_zero(num_actions):
    entropy, gradient = jax.value_and_grad(lambda z: Categorical(z).entropy())(
        jnp.full(num_actions, -7.0)
    )
    assert_close(entropy, np.log(num_actions))
    assert_close(gradient, np.zeros(num_actions))


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        first, action = rng.normal(size=(2, 4, 3))
        scale = rng.uniform(0.5, 1.5, size=(4, 3))
        index = np.array([0, 2, 1, 1])
        for function, arguments in [
            (lambda z: Categorical(z).log_prob(index), (first,)),
            (lambda z: Categorical(z).entropy(), (first,)),
            (lambda z: MultiCategorical(z, (1, 2)).log_prob(index[:, None] * [0, 1] % 2), (first,)),
            (lambda z: MultiCategorical(z, (1, 2)).entropy(), (first,)),
            (lambda m, s, a: DiagonalGaussian(m, s).log_prob(a), (first, scale, action)),
            (lambda m, s: DiagonalGaussian(m, s).entropy(), (first, scale)),
        ]:
            check_grads(jax.jit(function), arguments, order=1, atol=1e-6, rtol=1e-6)


def test_an_impossible_action_leaves_values_and_gradients_as_if_it_were_not_there():
    logits = jnp.array([0.3, -jnp.inf, 1.2, -jnp.inf])
    without = logits[jnp.array([0, 2])]

    @jax.jit
    def both(logits, action):
        distribution = Categorical(logits)
        return jnp.stack([distribution.log_prob(action), distribution.entropy()])

    assert_close(both(logits, jnp.array(2)), both(without, jnp.array(1)))
    gradients = np.asarray(jax.jit(jax.jacrev(both))(logits, jnp.array(2)))
    assert_close(gradients[:, [0, 2]], jax.jit(jax.jacrev(both))(without, jnp.array(1)))
    assert np.all(gradients[:, [1, 3]] == 0.0)
    assert Categorical(logits).mode() == 2
    # To have taken it is as unlikely as can be, but not undefined.
    assert Categorical(logits).log_prob(jnp.array(1)) == -jnp.inf
    chex.assert_tree_all_finite(jax.jit(jax.jacrev(both))(logits, jnp.array(1)))


def test_extreme_logits_give_exact_values_and_finite_gradients():
    logits = jnp.array([1e4, -1e4, 0.0])

    def values(logits):
        distribution = Categorical(logits)
        every = [distribution.log_prob(jnp.array(action)) for action in range(3)]
        return jnp.stack([*every, distribution.entropy()])

    chex.assert_trees_all_equal(values(logits), jnp.array([0.0, -2e4, -1e4, 0.0]))
    # The policy is one-hot: one_hot(action) - (1, 0, 0) for each action, and a flat entropy.
    expected = [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert_close(jax.jit(jax.jacrev(values))(logits), np.array(expected))


def test_adding_a_constant_to_all_logits_changes_nothing():
    logits = jnp.array([0.5, -1.0, 2.0])  # 1000 more rounds them by less than 1e-4
    near, far = Categorical(logits), Categorical(logits + 1000.0)
    assert_close(far.log_probs(), near.log_probs(), atol=2e-4)
    assert_close(far.entropy(), near.entropy(), atol=2e-4)


def test_the_mode_is_the_first_of_equally_probable_actions():
    chex.assert_trees_all_equal(
        Categorical(jnp.array([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])).mode(), jnp.array([1, 0])
    )


def test_an_action_out_of_range_gives_nan_and_no_neighbours_probability():
    log_prob = random_categorical(5, 3).log_prob(jnp.array([-1, 3, 100, 0, 2]))
    chex.assert_trees_all_equal(jnp.isnan(log_prob), jnp.array([True, True, True, False, False]))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_actions_of_every_integer_type_have_the_same_log_probability(dtype):
    distribution, action = random_categorical(5, 4), jnp.array([0, 1, 2, 3, 0])
    chex.assert_trees_all_equal(
        distribution.log_prob(action.astype(dtype)), distribution.log_prob(action)
    )


def test_more_actions_than_a_narrow_integer_type_can_count_are_told_apart():
    distribution, action = random_categorical(2, 300), jnp.array([3, 200])
    chex.assert_trees_all_equal(
        distribution.log_prob(action.astype(jnp.uint8)), distribution.log_prob(action)
    )


@pytest.mark.parametrize("variant", [lambda f: f, jax.jit], ids=["without_jit", "with_jit"])
@pytest.mark.parametrize(
    ("action", "match"),
    [
        (jnp.zeros((4, 1), jnp.int32), r"shape \(4, 1\) but expected \(4,?\)"),
        (jnp.zeros((), jnp.int32), r"shape \(\) but expected \(4,?\)"),
        (jnp.zeros((4, 3), jnp.int32), r"shape \(4, 3\) but expected \(4,?\)"),
        (jnp.zeros(4), r"type float32 but expected .*int"),
    ],
    ids=["trailing_one", "scalar", "one_per_logit", "floats"],
)
def test_a_categorical_action_of_the_wrong_shape_or_type_is_refused(variant, action, match):
    with pytest.raises(AssertionError, match=match):
        variant(random_categorical(4, 3).log_prob)(action)


# MultiCategorical.

SIZES = [(3,), (3, 2), (2, 1, 4), (2, 2, 2)]


def test_multi_categorical_by_hand():
    distribution = MultiCategorical(jnp.log(jnp.array([[1.0, 2.0, 1.0, 3.0, 1.0]])), (3, 2))
    # Probabilities 1/4, 1/2, 1/4 and 3/4, 1/4: of the second and the first choice 1/2 * 3/4.
    assert_close(distribution.log_prob(jnp.array([[1, 0]])), np.log([0.375]))
    # 1.5 log 2, and 3/4 log(4/3) + 1/4 log 4 = 2 log 2 - 3/4 log 3.
    assert_close(distribution.entropy(), np.array([3.5 * np.log(2.0) - 0.75 * np.log(3.0)]))
    chex.assert_trees_all_equal(distribution.mode(), jnp.array([[1, 0]], jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (4,), (5, 2)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_multi_categorical_equals_numpy_for_any_batch_shape(sizes, batch):
    distribution = random_multi_categorical(sizes, *batch)
    action = np.random.default_rng(1).integers(0, sizes, (*batch, len(sizes)))
    log_prob, entropy = np.zeros(batch), np.zeros(batch)
    modes = []
    for d, logits in enumerate(split_by_hand(np.asarray(distribution.logits, np.float64), sizes)):
        log_probs = scipy.special.log_softmax(logits, axis=-1)
        log_prob += np.take_along_axis(log_probs, action[..., d, None], -1)[..., 0]
        entropy += scipy.stats.entropy(np.exp(log_probs), axis=-1)
        modes.append(np.argmax(logits, -1).astype(np.int32))
    assert_close(distribution.log_prob(jnp.asarray(action)), log_prob)
    assert_close(distribution.entropy(), entropy)
    chex.assert_trees_all_equal(distribution.mode(), np.stack(modes, -1))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_multi_categorical_is_a_product_of_categoricals_and_so_are_its_gradients(sizes):
    distribution, action = random_multi_categorical(sizes, 6), random_action(sizes, 6)

    def together(logits):
        distribution = MultiCategorical(logits, sizes)
        return distribution.log_prob(action), distribution.entropy()

    def one_by_one(logits):
        parts = [Categorical(part) for part in split_by_hand(logits, sizes)]
        log_probs = [part.log_prob(action[:, d]) for d, part in enumerate(parts)]
        return sum(log_probs), sum(part.entropy() for part in parts)

    logits = distribution.logits
    assert_close(together(logits), one_by_one(logits))
    gradient, expected = (jax.jit(jax.jacrev(f))(logits) for f in (together, one_by_one))
    assert_close(gradient, expected)


def random_action(sizes, *batch):
    return jax.random.randint(jax.random.key(2), (*batch, len(sizes)), 0, jnp.array(sizes))


def test_the_probabilities_of_all_joint_actions_add_up_to_one():
    distribution = random_multi_categorical((3, 1, 2))
    joint = jnp.array(list(itertools.product(range(3), range(1), range(2))))
    assert_close(jnp.exp(jax.vmap(distribution.log_prob)(joint)).sum(), np.array(1.0))


def test_multi_categorical_samples_are_independent_and_have_the_given_frequencies():
    first, second = np.array([0.2, 0.8]), np.array([0.1, 0.6, 0.3, 0.0])
    logits = jnp.log(jnp.asarray(np.concatenate([first, second])))
    keys = jax.random.split(jax.random.key(0), NUM_SAMPLES)
    samples = jax.jit(jax.vmap(MultiCategorical(logits, (2, 4)).sample))(keys)
    chex.assert_shape(samples, (NUM_SAMPLES, 2))
    chex.assert_type(samples, jnp.int32)
    joint = np.zeros((2, 4))
    np.add.at(joint, tuple(np.asarray(samples).T), 1.0 / NUM_SAMPLES)
    expected = first[:, None] * second
    standard_error = np.sqrt(expected * (1.0 - expected) / NUM_SAMPLES)
    assert np.all(np.abs(joint - expected) <= STANDARD_ERRORS * standard_error)
    assert np.all(joint[:, 3] == 0.0)  # an impossible choice is never drawn


def test_an_impossible_choice_leaves_the_other_components_as_they_are():
    logits, sizes = jnp.array([0.3, -jnp.inf, 1.2, -0.5, 0.7]), (3, 2)
    without = logits[jnp.array([0, 2, 3, 4])]

    def both(logits, sizes, action):
        distribution = MultiCategorical(logits, sizes)
        return jnp.stack([distribution.log_prob(action), distribution.entropy()])

    arguments = logits, sizes, jnp.array([2, 1])
    expected = without, (2, 2), jnp.array([1, 1])
    assert_close(both(*arguments), both(*expected))
    gradients, few = (np.asarray(jax.jacrev(both)(*given)) for given in (arguments, expected))
    assert_close(gradients[:, [0, 2, 3, 4]], few)
    assert np.all(gradients[:, 1] == 0.0)
    # To have taken it is as unlikely as can be, but not undefined, whatever the other component.
    taken = jnp.array([1, 0])
    assert MultiCategorical(logits, sizes).log_prob(taken) == -jnp.inf
    chex.assert_tree_all_finite(jax.jacrev(both)(logits, sizes, taken))


def test_extreme_logits_of_several_components_give_finite_gradients():
    logits = jnp.array([1e4, -1e4, 0.0, -1e4, 1e4])

    def values(logits):
        distribution = MultiCategorical(logits, (3, 2))
        return jnp.stack([distribution.log_prob(jnp.array([1, 0])), distribution.entropy()])

    chex.assert_trees_all_equal(values(logits), jnp.array([-4e4, 0.0]))
    expected = [[-1.0, 1.0, 0.0, 1.0, -1.0], [0.0] * 5]
    assert_close(jax.jit(jax.jacrev(values))(logits), np.array(expected))


def test_an_action_with_any_component_out_of_its_own_range_gives_nan():
    action = jnp.array([[0, 2], [0, -1], [3, 1], [-1, 0], [100, 100], [2, 1]])
    log_prob = random_multi_categorical((3, 2), 6).log_prob(action)
    chex.assert_trees_all_equal(jnp.isnan(log_prob), jnp.array([True] * 5 + [False]))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_several_actions_of_every_integer_type_have_the_same_log_probability(dtype):
    distribution = random_multi_categorical((300, 2), 3)
    action = jnp.array([[0, 1], [100, 0], [127, 1]])
    chex.assert_trees_all_equal(
        distribution.log_prob(action.astype(dtype)), distribution.log_prob(action)
    )


@pytest.mark.parametrize("variant", [lambda f: f, jax.jit], ids=["without_jit", "with_jit"])
@pytest.mark.parametrize(
    ("action", "match"),
    [
        (jnp.zeros(4, jnp.int32), r"shape \(4,\) but expected \(4, 2\)"),
        (jnp.zeros((4, 1), jnp.int32), r"shape \(4, 1\) but expected \(4, 2\)"),
        (jnp.zeros((2, 4), jnp.int32), r"shape \(2, 4\) but expected \(4, 2\)"),
        (jnp.zeros((4, 5), jnp.int32), r"shape \(4, 5\) but expected \(4, 2\)"),
        (jnp.zeros((4, 2)), r"type float32 but expected .*int"),
    ],
    ids=["one_number", "one_component", "transposed", "one_per_logit", "floats"],
)
def test_several_actions_of_the_wrong_shape_or_type_are_refused(variant, action, match):
    with pytest.raises(AssertionError, match=match):
        variant(random_multi_categorical((3, 2), 4).log_prob)(action)


@pytest.mark.parametrize("method", ["entropy", "mode", "components"])
def test_logits_of_another_number_than_all_choices_are_refused(method):
    distribution = MultiCategorical(jnp.zeros((4, 6)), (3, 2))
    with pytest.raises(AssertionError, match=r"equal to '5' on axis '-1'"):
        getattr(distribution, method)()


def test_other_numbers_of_choices_are_another_tree():
    several, others = (MultiCategorical(jnp.zeros(5), sizes) for sizes in [(3, 2), (2, 3)])
    assert jax.tree.structure(several) != jax.tree.structure(others)
    assert jax.jit(lambda distribution: distribution)(several).num_actions == (3, 2)


# DiagonalGaussian.


def test_gaussian_by_hand():
    distribution = DiagonalGaussian(jnp.array([[1.0, -1.0]]), jnp.array([[2.0, 0.5]]))
    # The deviations are 1 and -2 scales; the scales' logarithms cancel: -(1 + 4) / 2 - log(2 pi).
    assert_close(
        distribution.log_prob(jnp.array([[3.0, -2.0]])), np.array([-2.5 - np.log(2 * np.pi)])
    )
    # 1/2 log(2 pi e 4) + 1/2 log(2 pi e / 4) = log(2 pi e)
    assert_close(distribution.entropy(), np.array([np.log(2 * np.pi * np.e)]))


@pytest.mark.parametrize("shape", [(1,), (4, 2), (5, 2, 3)], ids=str)
def test_gaussian_equals_scipy_for_any_batch_shape(shape):
    distribution, action = random_gaussian(*shape), random_normal(*shape, seed=2)
    mean, scale = np.asarray(distribution.mean), np.asarray(distribution.scale)
    reference = scipy.stats.norm(mean.astype(np.float64), scale.astype(np.float64))
    assert_close(distribution.log_prob(jnp.asarray(action)), reference.logpdf(action).sum(-1))
    assert_close(distribution.entropy(), reference.entropy().sum(-1))
    chex.assert_trees_all_equal(distribution.mode(), distribution.mean)


def test_the_gaussian_density_integrates_to_one():
    grid, width = np.linspace(-12.0, 12.0, 4001, retstep=True)
    column = jnp.asarray(grid, jnp.float32)[:, None]
    distribution = DiagonalGaussian(jnp.full_like(column, 0.5), jnp.full_like(column, 1.5))
    density = np.exp(np.asarray(distribution.log_prob(column), np.float64))
    assert abs(density.sum() * width - 1.0) < 1e-5


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_extreme_scales_give_the_exact_density_and_finite_gradients(scale):
    mean, scales = jnp.array([1.0, -1.0]), jnp.full(2, scale)
    action = mean + jnp.array([1.5, -0.5]) * (scales if scale > 1.0 else 0.0)

    def values(mean, scales):
        distribution = DiagonalGaussian(mean, scales)
        return jnp.stack([distribution.log_prob(action), distribution.entropy()])

    reference = scipy.stats.norm(np.asarray(mean, np.float64), np.asarray(scales, np.float64))
    expected = [
        reference.logpdf(np.asarray(action, np.float64)).sum(),
        reference.entropy().sum(),
    ]
    assert_close(values(mean, scales), np.array(expected))
    chex.assert_tree_all_finite(jax.jit(jax.jacrev(values, (0, 1)))(mean, scales))


def test_gaussian_samples_have_the_given_means_scales_and_no_correlation():
    mean, scale = np.array([[1.0, -2.0], [0.0, 5.0]]), np.array([[0.5, 2.0], [1.0, 0.1]])
    distribution = DiagonalGaussian(jnp.asarray(mean), jnp.asarray(scale))
    keys = jax.random.split(jax.random.key(1), NUM_SAMPLES)
    samples = np.asarray(jax.jit(jax.vmap(distribution.sample))(keys), np.float64)
    assert samples.shape == (NUM_SAMPLES, 2, 2)
    z = (samples - mean) / scale
    # The standard errors of a normal's mean, mean square and product with another are 1, sqrt(2)
    # and 1, over the square root of the number of samples.
    tolerance = STANDARD_ERRORS / np.sqrt(NUM_SAMPLES)
    assert np.all(np.abs(z.mean(axis=0)) < tolerance)
    assert np.all(np.abs((z**2).mean(axis=0) - 1.0) < tolerance * np.sqrt(2.0))
    for first, second in itertools.combinations(z.reshape(NUM_SAMPLES, 4).T, 2):
        assert abs(np.mean(first * second)) < tolerance


@pytest.mark.parametrize("variant", [lambda f: f, jax.jit], ids=["without_jit", "with_jit"])
@pytest.mark.parametrize("shape", [(4, 1), (2,), (4,), (4, 2, 1)], ids=str)
def test_a_gaussian_action_of_the_wrong_shape_is_refused(variant, shape):
    found = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(AssertionError, match=rf"different shapes: \[{found}, \(4, 2\)"):
        variant(random_gaussian(4, 2).log_prob)(jnp.zeros(shape))


# All.


@pytest.mark.parametrize(
    ("distribution", "action", "num_leaves"),
    [
        (random_categorical(5, 3), jnp.array([0, 1, 2, 1, 0]), 1),
        (random_multi_categorical((3, 2), 5), random_action((3, 2), 5), 1),
        (random_gaussian(5, 3), random_normal(5, 3, seed=2), 2),
    ],
    ids=["categorical", "multi_categorical", "gaussian"],
)
def test_distributions_pass_through_transformations_as_trees(distribution, action, num_leaves):
    assert len(jax.tree.leaves(distribution)) == num_leaves

    def values(distribution, action):
        return distribution.log_prob(action), distribution.entropy(), distribution.mode()

    expected = values(distribution, action)
    assert_same = chex.assert_trees_all_close
    assert_same(jax.jit(values)(distribution, action), expected, rtol=1e-6)
    assert_same(jax.vmap(values)(distribution, action), expected, rtol=1e-6)
    _, scanned = jax.lax.scan(
        lambda carry, inputs: (carry, (inputs[0], values(*inputs))), None, (distribution, action)
    )
    assert_same(scanned, (distribution, expected), rtol=1e-6)


def test_the_same_key_gives_the_same_sample_and_another_key_another():
    several = random_multi_categorical((3, 2), 50)
    for distribution in (random_categorical(50, 3), several, random_gaussian(50, 3)):
        first, again, other = (distribution.sample(jax.random.key(seed)) for seed in (0, 0, 1))
        chex.assert_trees_all_equal(first, again)
        assert np.any(np.asarray(first != other))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_rare_actions_come_as_often_in_half_precision(dtype):
    probabilities = np.array([0.9, 0.09, 0.009, 0.001])
    logits = jnp.broadcast_to(jnp.log(jnp.array(probabilities)).astype(dtype), (400_000, 4))
    drawn = np.bincount(Categorical(logits).sample(jax.random.key(0)), minlength=4)
    # 400 of the rarest are expected, with a standard deviation of 20. By noise of bfloat16 there would be 23.
    np.testing.assert_allclose(drawn / 400_000, probabilities, rtol=0.2)


def test_the_number_at_an_action_by_hand():
    values = jnp.array([[1.0, -jnp.inf, 3.0], [4.0, 5.0, 6.0]])
    chex.assert_trees_all_equal(at_action(values, jnp.array([2, 0])), jnp.array([3.0, 4.0]))
    assert at_action(values[0], 2) == 3.0
    assert at_action(values[0], 1) == -jnp.inf
    assert jnp.isnan(at_action(values, jnp.array([3, -1]))).all()


def test_actions_and_samples_with_64_bits():
    with jax.enable_x64(True):
        assert jnp.isnan(Categorical(jnp.zeros(3)).log_prob(jnp.int64(2**32)))
        for policy in (Categorical(jnp.zeros(3)), EpsilonGreedy(jnp.zeros(3), 0.5)):
            assert policy.sample(jax.random.key(0)).dtype == jnp.int32


def test_several_choices_need_one_at_least():
    with pytest.raises(AssertionError, match="num_actions must have a number for each component"):
        MultiCategorical(jnp.zeros((2, 0)), ()).entropy()


def test_a_scale_of_another_shape_is_refused_by_every_method():
    policy = DiagonalGaussian(jnp.zeros(2), 1.0)
    for call in (
        lambda: policy.sample(jax.random.key(0)),
        lambda: policy.log_prob(jnp.zeros(2)),
        policy.entropy,
    ):
        with pytest.raises(AssertionError, match=r"\(2,\)"):
            call()
