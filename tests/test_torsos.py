"""The convolutional torsos: the functions of plain Flax networks, whose parameters they can use."""

import os

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3c_jax import A3CConfig, train
from a3c_jax.networks import ActorCritic
from a3c_jax.protocol import Transition
from a3c_jax.torsos import MLP, Atari, Conv, Trunk, background, choose_torso

INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class PlainAtari(nn.Module):
    """The paper's network with what Flax has, and without what makes it fast."""

    hidden_sizes: tuple[int, ...] = (256,)

    @nn.compact
    def __call__(self, observation):
        batch, frames = observation.shape[:-3], observation.shape[-3:]
        x = observation.reshape(-1, *frames) / 255
        x = x - jnp.median(x[:, -1, ::4, ::4], axis=(1, 2))[:, None, None, None]
        x = jnp.moveaxis(x, 1, -1)
        x = nn.relu(nn.Conv(16, (8, 8), (4, 4), padding="VALID", kernel_init=INIT)(x))
        x = nn.relu(nn.Conv(32, (4, 4), (2, 2), padding="VALID", kernel_init=INIT)(x))
        x = x.reshape(*batch, -1)
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size, kernel_init=INIT)(x))
        return x


class PlainConv(nn.Module):
    """The network of MinAtar's paper with what Flax has."""

    @nn.compact
    def __call__(self, observation):
        batch, image = observation.shape[:-3], observation.shape[-3:]
        x = observation.reshape(-1, *image).astype(jnp.float32)
        x = nn.relu(nn.Conv(16, (3, 3), padding="VALID", kernel_init=INIT)(x))
        return nn.relu(nn.Dense(32, kernel_init=INIT)(x.reshape(*batch, -1)))


class PlainActorCritic(ActorCritic):
    def make_trunk(self):
        return Trunk(PlainAtari(self.hidden_sizes), self.core, self.core_size, self.forget_bias)


def frames(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.uint8)


def assert_equal_but_for_rounding(actual, expected):
    """Each array to a hundred-thousandth of its largest number: sums are added in another order."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def assert_same(network, plain, observation, compiled=True):
    """The same initial parameters bit for bit, the same features, the same gradients."""
    params = plain.init(jax.random.key(3), observation)
    chex.assert_trees_all_equal(network.init(jax.random.key(3), observation), params)
    params = jax.tree.map(lambda x: x + 0.01, params)  # so that no bias is zero
    features = plain.apply(params, observation)
    weights = jnp.cos(jnp.arange(features.size, dtype=jnp.float32)).reshape(features.shape)

    def gradients(module):
        def loss(params):
            features = module.apply(params, observation)
            return jnp.sum(weights * features), features

        gradient = jax.grad(loss, has_aux=True)
        return (jax.jit(gradient) if compiled else gradient)(params)

    assert_equal_but_for_rounding(gradients(network), gradients(plain))


# Batches of up to 32, and of 37, stay whole; 40 are two chunks, and 48 as well.
@pytest.mark.parametrize(
    ("batch", "size"),
    [
        pytest.param((3,), (84, 84), marks=pytest.mark.slow),
        pytest.param((3, 16), (84, 84), marks=pytest.mark.slow),
        pytest.param((37,), (42, 42), marks=pytest.mark.slow),
        pytest.param((40,), (42, 42), marks=pytest.mark.slow),
        ((3, 16), (42, 42)),
        ((), (20, 23)),
        pytest.param((1, 2, 2), (20, 23), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_atari_torso_is_the_plain_network_of_the_paper(batch, size):
    assert_same(Atari((16,), nn.relu), PlainAtari((16,)), frames(*batch, 4, *size))


@pytest.mark.slow
def test_it_needs_no_compilation():
    assert_same(Atari((8,), nn.relu), PlainAtari((8,)), frames(2, 4, 24, 24), compiled=False)


@pytest.mark.parametrize("channels", [pytest.param(4, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("batch", [(), (3, 16)], ids=str)
def test_the_minatar_torso_is_the_plain_network_of_its_paper(batch, channels):
    observation = frames(*batch, 10, 10, channels) > 200
    assert_same(Conv((32,), nn.relu), PlainConv(), observation)


def test_the_paper_has_these_parameters():
    params = Atari((256,), nn.relu).init(jax.random.key(0), frames(1, 4, 84, 84))["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "Conv_0": {"kernel": (8, 8, 4, 16), "bias": (16,)},
        "Conv_1": {"kernel": (4, 4, 16, 32), "bias": (32,)},
        "Dense_0": {"kernel": (9 * 9 * 32, 256), "bias": (256,)},
    }


@pytest.mark.slow
def test_the_torso_can_be_mapped_over_parameters_and_observations():
    torso, plain = Atari((8,), nn.relu), PlainAtari((8,))
    observations = frames(2, 40, 4, 24, 24)
    keys = jax.random.split(jax.random.key(0))
    params = jax.vmap(plain.init, (0, None))(keys, observations[0])
    mapped = jax.vmap(torso.apply)(params, observations)
    one_by_one = [
        plain.apply(jax.tree.map(lambda x, n=n: x[n], params), observations[n]) for n in range(2)
    ]
    assert_equal_but_for_rounding(mapped, jnp.stack(one_by_one))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared", "core"),
    [
        (True, None),
        (False, "lstm"),
        (True, "lstm"),
        (False, None),
    ],
)
def test_the_actor_critic_unrolls_it_as_the_plain_one(core, shared):
    options = dict(
        hidden_sizes=(8,), activation="relu", shared_torso=shared, core=core, core_size=8
    )
    network = ActorCritic(3, torso="atari", **options)
    plain = PlainActorCritic(3, torso="atari", **options)
    observation = frames(5, 16, 4, 24, 24)
    starts = jnp.zeros((5, 16), bool).at[2, 3].set(True)
    carry = network.initialize_carry(16)
    params = plain.init(jax.random.key(0), observation[0])
    chex.assert_trees_all_equal(network.init(jax.random.key(0), observation[0]), params)

    def gradients(module):
        def loss(params):
            policy, value, _ = module.apply(params, observation, carry, starts, method="unroll")
            return jnp.sum(policy.logits[..., 0]) + jnp.sum(value**2), (policy.logits, value)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    actual, expected = gradients(network), gradients(plain)
    assert_equal_but_for_rounding(actual, expected)
    _, (logits, value) = actual
    policy, _ = network.apply(params, observation[0], carry, method="act")
    assert_equal_but_for_rounding(policy.logits, logits[0])
    assert_equal_but_for_rounding(
        network.apply(params, observation[0], carry, method="value"), value[0]
    )


# The background.


def test_it_is_the_median_of_every_fourth_pixel_of_the_last_frame():
    images = np.asarray(frames(3, 4, 9, 13))
    expected = [np.median(image[3, ::4, ::4]) for image in images]
    np.testing.assert_array_equal(background(images), expected)


@pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1" or jax.default_backend() != "cpu",
    reason="the machine room is switched off",
)
def test_frames_are_prepared_without_a_sort_four_bytes_at_a_time_and_once_for_the_gradient():
    torso, images = Atari((8,), nn.relu), frames(40, 4, 24, 24)
    params = torso.init(jax.random.key(0), images)

    def loss(params):
        return jnp.sum(torso.apply(params, images))

    forward, gradient = (str(jax.make_jaxpr(f)(params)) for f in (loss, jax.grad(loss)))
    assert " sort[" not in gradient
    for operation in (" bitcast_convert_type[", " lt "):
        assert 0 < gradient.count(operation) < 1.5 * forward.count(operation)


def test_its_brightness_does_not_matter():
    torso, images = Atari((8,), nn.relu), frames(2, 4, 24, 24) // 2
    params = torso.init(jax.random.key(0), images)
    # Differences of whole numbers are exact.
    chex.assert_trees_all_equal(torso.apply(params, images + 50), torso.apply(params, images))


def test_what_stands_before_a_background_is_seen_as_before_a_black_one():
    torso, images = Atari((8,), nn.relu), np.full((2, 4, 24, 24), 87, np.uint8)
    images[1, :, 3, 2] = 236  # the other image has one colour
    params = torso.init(jax.random.key(0), images)
    seen = torso.apply(params, images)
    chex.assert_trees_all_equal(seen, torso.apply(params, images - np.uint8(87)))
    assert jnp.count_nonzero(seen[0]) == 0 < jnp.count_nonzero(seen[1])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_integers_up_to_255_and_floats_up_to_1_show_it_what_bytes_show(dtype):
    torso, images = Atari((8,), nn.relu), frames(2, 4, 24, 24)
    params = torso.init(jax.random.key(0), images)
    others = images.astype(dtype) if dtype == np.int32 else images / 255
    assert_equal_but_for_rounding(torso.apply(params, others), torso.apply(params, images))


# Which torso is chosen, and what is refused.


@pytest.mark.parametrize(
    ("shape", "torso"),
    [
        ((4, 84, 84), "atari"),
        ((1, 36, 42), "atari"),
        ((4, 35, 84), "mlp"),
        ((4, 84, 35), "mlp"),
        ((16, 84, 84), "atari"),
        ((17, 84, 84), "mlp"),
        ((84, 96, 3), "atari"),
        ((35, 84, 3), "mlp"),
        ((10, 10, 4), "conv"),
        ((10, 10, 36), "conv"),
        ((84, 84), "mlp"),
        ((4,), "mlp"),
        (((4, 84, 84), (2,)), "mlp"),
        ({"screen": (4, 84, 84)}, "mlp"),
    ],
    ids=str,
)
def test_auto_takes_the_torso_for_the_shape_of_observations(shape, torso):
    assert choose_torso(shape) == torso


def test_an_image_with_its_colours_last_is_the_same_as_with_them_first():
    network = Atari((8,), nn.relu)
    first = np.random.default_rng(0).integers(0, 256, (5, 3, 40, 44)).astype(np.uint8)
    params = network.init(jax.random.key(0), first)
    last = np.moveaxis(first, 1, -1)
    chex.assert_trees_all_equal(params, network.init(jax.random.key(0), last))
    chex.assert_trees_all_equal(network.apply(params, first), network.apply(params, last))
    assert np.ptp(network.apply(params, first)) > 0


def test_a_multilayer_perceptron_scales_images_of_bytes_and_nothing_else():
    def layers(observation, ndim):
        network = MLP((4,), jnp.tanh, ndim)
        return network.apply(network.init(jax.random.key(0), observation), observation)

    draw = np.random.default_rng(0)
    for shape in [(20, 20, 3), (3, 20, 20), (2, 20, 20, 3), (20, 20)]:
        image = draw.integers(0, 256, (2, *shape)).astype(np.uint8)
        floats = image.astype(np.float32) / 255
        chex.assert_trees_all_equal(layers(image, len(shape)), layers(floats, len(shape)))
    for shape, dtype in [((19, 20, 3), np.uint8), ((400,), np.uint8), ((20, 20), np.int32)]:
        grid = draw.integers(0, 3, (2, *shape)).astype(dtype)
        floats = grid.astype(np.float32)
        chex.assert_trees_all_equal(layers(grid, len(shape)), layers(floats, len(shape)))


@pytest.mark.parametrize("shape", [(2, 84, 84, 4, 3), (2, 4, 19, 84), (84, 84)], ids=str)
def test_observations_that_are_no_frames_are_refused(shape):
    network = ActorCritic(2, torso="atari")
    with pytest.raises(ValueError, match=r"at least 20x20 .*got shape \(.*; use the torso 'mlp'"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"torso must be 'mlp', 'conv' or 'atari', got 'vgg'; use"):
        ActorCritic(2, torso="vgg")


# A run.


class Screens:
    """Frames that brighten from left to right, or the other way round. It pays to say which."""

    name, num_actions, continuous, observation_shape = "Screens", 2, False, (4, 36, 36)

    def reset(self, key, num_envs):
        side = jax.random.bernoulli(key, shape=(num_envs,))
        ramp = jnp.arange(36, dtype=jnp.uint8)
        row = jnp.where(side[:, None], ramp, ramp[::-1])
        return jnp.broadcast_to(row[:, None, None], (num_envs, *self.observation_shape)), side

    def step(self, key, side, action):
        observation, state = self.reset(key, len(side))
        reward = jnp.where(action == side, 1.0, -1.0)
        ended = jnp.ones(len(side), bool)
        return Transition(observation, state, reward, ended, ~ended, observation)


@pytest.mark.slow
def test_screens_are_learnt_with_the_torso_that_auto_takes():
    config = A3CConfig(
        num_workers=1, envs_per_worker=16, t_max=3, hidden_sizes=(16,), activation="relu",
        shared_torso=True, learning_rate=5e-3, discount=0.0, max_steps=4_000,
    )  # fmt: skip
    result = train(config, environment=Screens())
    assert result.network.torso == "atari"
    assert "Conv_1" in result.params["params"]["actor_trunk"]["torso"]
    assert np.mean(result.episodes.episode_return[-200:]) > 0.9
