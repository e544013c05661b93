"""The networks: shapes, sizes, first policies, whose gradient goes where, which value is used."""

from types import SimpleNamespace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from a3c_jax.blueprint import make_blueprint
from a3c_jax.config import A3CConfig
from a3c_jax.distributions import Categorical
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import ACTIVATIONS, ActorCritic, trajectory_apply
from a3c_jax.rollout import Trajectory

separate_and_shared = pytest.mark.parametrize(
    "shared_torso", [False, True], ids=["separate", "shared"]
)


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def random_normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(network, observation, seed=0):
    """Parameters as after training: no bias is zero and no policy is close to uniform."""
    shapes, tree = jax.tree.flatten(
        jax.eval_shape(network.init, jax.random.key(0), jnp.asarray(observation))
    )
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        [
            jnp.asarray(rng.normal(size=leaf.shape) / max(leaf.shape[0], 4) ** 0.5, jnp.float32)
            for leaf in shapes
        ]
    )


# Shapes, sizes and values.


@separate_and_shared
@pytest.mark.parametrize("hidden_sizes", [(), (16,), (16, 8)], ids=str)
@pytest.mark.parametrize("batch", [(), (5,), (3, 2)], ids=str)
def test_policy_and_values_have_the_shape_of_the_batch(batch, hidden_sizes, shared_torso):
    network = ActorCritic(3, hidden_sizes, shared_torso=shared_torso)
    observation = random_normal(*batch, 4)
    params = jax.eval_shape(network.init, jax.random.key(0), observation)
    distribution, value = jax.eval_shape(network.apply, params, observation)
    assert isinstance(distribution, Categorical)
    chex.assert_shape(distribution.logits, (*batch, 3))
    chex.assert_shape(value, batch)  # and no trailing one
    chex.assert_type([distribution.logits, value], jnp.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_torsos_and_heads_compute_what_their_weights_say(activation):
    non_linearity = {
        "relu": lambda x: np.maximum(x, 0.0),
        "tanh": np.tanh,
        "elu": lambda x: np.where(x > 0.0, x, np.expm1(x)),
        "silu": lambda x: x / (1.0 + np.exp(-x)),
        "gelu": lambda x: x * scipy.stats.norm.cdf(x),
    }[activation]
    network = ActorCritic(3, (16, 8), activation=activation)
    observation = random_normal(5, 4)
    params = random_params(network, observation)
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])

    def expected(trunk, head):
        x = np.asarray(observation, np.float64)
        for layer in ("Dense_0", "Dense_1"):
            x = non_linearity(
                x @ weights[trunk]["torso"][layer]["kernel"]
                + weights[trunk]["torso"][layer]["bias"]
            )
        return x @ weights[head]["kernel"] + weights[head]["bias"]

    distribution, value = network.apply(params, observation)
    atol = 2e-3 if activation == "gelu" else 1e-5  # flax takes the tanh approximation of gelu
    assert_close(distribution.logits, expected("actor_trunk", "policy_head"), atol=atol)
    assert_close(value, expected("critic_trunk", "value_head")[..., 0], atol=atol)


def test_the_number_of_parameters_in_closed_form():
    def count(**settings):
        network = ActorCritic(2, **settings)
        params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(4))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    actor = 4 * 128 + 128 + 128 * 2 + 2
    critic = 4 * 128 + 128 + 128 * 1 + 1
    assert count() == count(hidden_sizes=(128,)) == actor + critic
    assert count(shared_torso=True) == actor + 128 * 1 + 1 < actor + critic
    torso = 4 * 32 + 32 + 32 * 16 + 16
    assert count(hidden_sizes=(32, 16)) == 2 * torso + 16 * 2 + 2 + 16 * 1 + 1
    assert count(hidden_sizes=(32, 16), shared_torso=True) == torso + 16 * 2 + 2 + 16 * 1 + 1


@separate_and_shared
def test_the_policy_is_given_by_logits_and_never_by_probabilities(shared_torso):
    network = ActorCritic(3, (16,), shared_torso=shared_torso)
    observation = random_normal(50, 4)
    params = random_params(network, observation)
    logits = network.apply(params, observation)[0].logits
    assert np.any(np.asarray(logits) < 0.0)  # probabilities are not
    assert np.any(np.abs(np.exp(logits).sum(-1) - 1.0) > 0.1)  # log-probabilities add up to one
    # Logits are linear in the weights of the last layer.
    head = jax.tree.map(lambda x: 2.0 * x, params["params"]["policy_head"])
    params = {"params": {**params["params"], "policy_head": head}}
    assert_close(network.apply(params, observation)[0].logits, 2.0 * logits)


@separate_and_shared
def test_the_actor_and_the_critic_alone_equal_the_whole(shared_torso):
    network = ActorCritic(3, (16,), shared_torso=shared_torso)
    observation = random_normal(5, 4)
    params = random_params(network, observation)
    whole = network.apply(params, observation)
    actor, critic = (network.apply(params, observation, method=m) for m in ("actor", "critic"))
    chex.assert_trees_all_equal((actor, critic), whole)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, jnp.bool_, jnp.float16])
def test_observations_of_many_dimensions_and_any_type_are_flattened_to_floats(dtype):
    network = ActorCritic(3, (16,), observation_ndim=3)
    image = np.random.default_rng(0).integers(0, 2, (5, 2, 4, 4, 3)).astype(dtype)
    params = random_params(network, image)
    distribution, value = network.apply(params, image)
    chex.assert_shape([distribution.logits, value], [(5, 2, 3), (5, 2)])
    chex.assert_type([distribution.logits, value], jnp.float32)
    flat = image.reshape(5, 2, 48).astype(np.float32)
    assert_close((distribution, value), network.clone(observation_ndim=1).apply(params, flat))
    single = network.apply(params, image[4, 1])
    assert_close(single, jax.tree.map(lambda x: x[4, 1], (distribution, value)))


@pytest.mark.slow
@separate_and_shared
@pytest.mark.parametrize("observation_size", [4, 400])
def test_the_first_policy_is_close_to_uniform(observation_size, shared_torso):
    network = ActorCritic(6, shared_torso=shared_torso)
    observation = random_normal(1000, observation_size)
    params = jax.jit(network.init)(jax.random.key(0), observation)
    distribution, _ = network.apply(params, observation)
    entropy = np.asarray(distribution.entropy())
    assert np.all(entropy > np.log(6) - 1e-2)
    assert np.all(np.ptp(distribution.logits, axis=-1) > 0.0)  # and yet not exactly uniform


# Whose gradient goes where.


@separate_and_shared
def test_the_critic_moves_the_torso_only_where_it_is_shared(shared_torso):
    network = ActorCritic(3, (16,), shared_torso=shared_torso)
    observation = random_normal(8, 4)
    params = random_params(network, observation)

    def gradient_of(method, reduce):
        def loss(params):
            return reduce(network.apply(params, observation, method=method)).sum()

        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params)["params"])

    critic = gradient_of("critic", lambda value: value)
    actor = gradient_of("actor", lambda distribution: distribution.logits[..., 0])

    def touched(gradient):
        return {
            name
            for name, part in gradient.items()
            if any(np.any(x != 0.0) for x in jax.tree.leaves(part))
        }

    if shared_torso:
        assert touched(critic) == {"actor_trunk", "value_head"}
        assert touched(actor) == {"actor_trunk", "policy_head"}
    else:
        assert touched(critic) == {"critic_trunk", "value_head"}
        assert touched(actor) == {"actor_trunk", "policy_head"}


# The value of what followed.


def play(num_steps, terminated, truncated, num_envs, seed=0):
    """A trajectory of distinct observations: a stream that goes on except where an episode ends."""
    rng = np.random.default_rng(seed)
    shape = (num_steps, num_envs)
    terminated_t, truncated_t = np.zeros(shape, bool), np.zeros(shape, bool)
    terminated_t[terminated, 0], truncated_t[truncated, 0] = True, True
    observation_tm1, observation_t = np.zeros((2, *shape, 4), np.float32)
    observation = rng.normal(size=(num_envs, 4))
    for step in range(num_steps):
        observation_tm1[step] = observation
        observation_t[step] = rng.normal(size=(num_envs, 4))
        ended = terminated_t[step] | truncated_t[step]
        reset = rng.normal(size=(num_envs, 4))
        observation = np.where(ended[:, None], reset, observation_t[step])
    return Trajectory(
        observation_tm1=observation_tm1,
        action_tm1=rng.integers(0, 3, shape).astype(np.int32),
        reward_t=rng.normal(size=shape).astype(np.float32),
        terminated_t=terminated_t,
        truncated_t=truncated_t,
        observation_t=observation_t,
    )


def value_everywhere_apply(network):
    """The plain way: the critic at every observation that followed, whether read or not."""

    def apply_fn(params, trajectory):
        distribution_tm1, v_tm1 = network.apply(params, trajectory.observation_tm1)
        v_t = network.apply(params, trajectory.observation_t, method="critic")
        return distribution_tm1, v_tm1, v_t

    return apply_fn


ENDINGS = {
    "no_ending": ([], []),
    "a_termination": ([2], []),
    "a_time_limit": ([], [2]),
    "a_time_limit_at_the_last_step": ([], [5]),
    "a_termination_at_the_last_step": ([5], []),
    "both_at_once": ([3], [3]),
    "every_kind": ([0, 3], [1, 3, 4]),
}
with_every_ending = pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)


@pytest.fixture(scope="module")
def compiled():
    """A network's parameters and, compiled once for many tests, its critic and its `apply_fn`."""
    network = ActorCritic(3, (16,))
    return SimpleNamespace(
        params=random_params(network, jnp.zeros(4)),
        critic=jax.jit(lambda params, observation: network.apply(params, observation)[1]),
        apply_fn=jax.jit(trajectory_apply(network)),
    )


@with_every_ending
def test_v_t_is_the_critic_at_what_followed_wherever_it_is_read(ending, compiled):
    trajectory = play(6, *ending, num_envs=2)
    _, v_tm1, v_t = compiled.apply_fn(compiled.params, trajectory)
    assert_close(v_tm1, compiled.critic(compiled.params, trajectory.observation_tm1))
    read = ~trajectory.terminated_t
    assert read.sum() >= 10
    expected = compiled.critic(compiled.params, trajectory.observation_t)
    assert_close(v_t[read], expected[read])


def test_a_time_limit_bootstraps_from_the_final_observation_never_from_the_reset_one(compiled):
    trajectory = play(6, terminated=[], truncated=[2], num_envs=2)
    _, _, v_t = compiled.apply_fn(compiled.params, trajectory)
    final = compiled.critic(compiled.params, trajectory.observation_t)[2, 0]
    reset = compiled.critic(compiled.params, trajectory.observation_tm1)[3, 0]
    assert abs(final - reset) > 0.1
    assert_close(v_t[2, 0], final)


def test_a_segment_of_one_step_bootstraps_from_what_followed(compiled):
    for truncated in ([], [0]):
        trajectory = play(1, [], truncated, num_envs=2)
        _, _, v_t = compiled.apply_fn(compiled.params, trajectory)
        assert_close(v_t, compiled.critic(compiled.params, trajectory.observation_t))


@pytest.mark.slow
@separate_and_shared
def test_the_saving_changes_neither_the_loss_nor_its_gradient(shared_torso):
    network = ActorCritic(3, (16,), shared_torso=shared_torso)
    params = random_params(network, jnp.zeros(4))

    def compiled_loss_and_gradient(apply_fn):
        def loss(params, trajectory):
            return a3c_loss(params, apply_fn, trajectory)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    saving = compiled_loss_and_gradient(trajectory_apply(network))
    plain = compiled_loss_and_gradient(value_everywhere_apply(network))
    for ending in ENDINGS.values():
        trajectory = play(6, *ending, num_envs=2)
        assert_close(saving(params, trajectory), plain(params, trajectory))


def test_without_a_time_limit_only_the_last_of_the_final_observations_is_looked_at(compiled):
    for truncated in ([], [1]):
        trajectory = play(6, [], truncated, num_envs=2)
        hidden = trajectory.observation_t.copy()
        hidden[[0, 2, 3, 4]] = np.nan  # inside an episode, the next observation acted upon is read
        assert_close(
            compiled.apply_fn(compiled.params, trajectory),
            compiled.apply_fn(compiled.params, trajectory._replace(observation_t=hidden)),
        )


def test_any_network_with_a_critic_method_can_be_applied_to_a_trajectory():
    class Oracle(nn.Module):
        def __call__(self, observation):
            return Categorical(observation[..., :3]), self.critic(observation)

        def critic(self, observation):
            return 10.0 * observation[..., 0]

    trajectory = SimpleNamespace(
        observation_tm1=jnp.array([[1.0], [2.0], [7.0]]),
        observation_t=jnp.array([[2.0], [3.0], [8.0]]),
        terminated_t=jnp.array([False, False, False]),
        truncated_t=jnp.array([False, True, False]),
        carry=(),
    )
    _, v_tm1, v_t = trajectory_apply(Oracle())({}, trajectory)
    chex.assert_trees_all_equal(v_tm1, jnp.array([10.0, 20.0, 70.0]))
    # On to 2; cut at 3, before the reset to 7; on past the end of the segment to 8.
    chex.assert_trees_all_equal(v_t, jnp.array([20.0, 30.0, 80.0]))


# Images.


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 10])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_the_convolution_is_that_of_young_and_tian_for_any_type_of_pixels(channels, dtype):
    network = ActorCritic(3, (128,), activation="relu", torso="conv", shared_torso=True)
    images = np.random.default_rng(0).random((4, 2, 10, 10, channels)) < 0.3
    params = random_params(network, images[0])
    torso = params["params"]["actor_trunk"]["torso"]
    assert torso["Conv_0"]["kernel"].shape == (3, 3, channels, 16)
    assert torso["Dense_0"]["kernel"].shape == (8 * 8 * 16, 128)

    distribution, value = network.apply(params, jnp.asarray(images.astype(dtype)))
    assert distribution.logits.shape == (4, 2, 3) and value.shape == (4, 2)
    kernel, bias = (np.asarray(torso["Conv_0"][name], np.float64) for name in ("kernel", "bias"))
    patches = np.lib.stride_tricks.sliding_window_view(images.astype(float), (3, 3), axis=(2, 3))
    x = np.maximum(np.einsum("abhwcij,ijck->abhwk", patches, kernel) + bias, 0.0)
    for layer, weights in ((torso["Dense_0"], True), (params["params"]["value_head"], False)):
        x = x.reshape(4, 2, -1) @ np.asarray(layer["kernel"], np.float64) + layer["bias"]
        x = np.maximum(x, 0.0) if weights else x
    assert_close(value, x[..., 0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "torso", "expected"),
    [
        ("Asterix-MinAtar", "auto", "Conv_0"),
        ("Asterix-MinAtar", "mlp", "Dense_0"),
        ("Catch-bsuite", "auto", "Dense_0"),
        ("FourRooms-misc", "auto", "Dense_0"),
    ],
)
def test_images_of_ten_by_ten_get_the_convolution_unless_told_otherwise(
    environment, torso, expected
):
    blueprint = make_blueprint(A3CConfig(environment=environment, torso=torso, hidden_sizes=(8,)))
    observation = jnp.zeros(blueprint.environment.observation_shape)
    params = jax.eval_shape(blueprint.init, 0, observation)
    assert expected in params["params"]["actor_trunk"]["torso"]


# How it is made.


def test_the_defaults_are_those_of_the_configuration():
    """So that a network rebuilt by hand is the function that was trained."""
    assert make_blueprint(A3CConfig()).network == ActorCritic(2)


@pytest.mark.parametrize("ndim", [1, [1, 0]], ids=str)
def test_lists_become_tuples_so_that_a_network_can_be_hashed_and_compiled(ndim):
    network = ActorCritic(2, hidden_sizes=[64, 8], observation_ndim=ndim)
    same = ActorCritic(2, (64, 8), observation_ndim=tuple(ndim) if ndim != 1 else 1)
    assert network.hidden_sizes == (64, 8)
    assert network == same and hash(network) == hash(same)
    jax.jit(lambda network, x: x, static_argnums=0)(network, 0.0)


# Observations that are trees.


def test_the_leaves_of_a_tree_are_flattened_and_concatenated():
    network = ActorCritic(3, (16,), observation_ndim=(2, 0, 1))
    image, number, vector = (
        random_normal(5, 2, 3),
        random_normal(5, seed=1),
        random_normal(5, 4, seed=2),
    )
    observation = {
        "b": (number, vector),
        "a": image,
    }  # a dict's leaves come in the order of their names
    flat = jnp.concatenate([image.reshape(5, 6), number[:, None], vector], axis=-1)
    params = random_params(network.clone(observation_ndim=1), flat)
    expected = network.clone(observation_ndim=1).apply(params, flat)
    assert_close(network.apply(params, observation), expected)
    segment = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), observation)
    _, value = network.apply(params, segment)
    assert value.shape == (2, 5)
    assert_close(value[0], expected[1])
