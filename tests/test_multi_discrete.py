"""Several discrete actions at once: the three forms of their space, from the environment to the replayed run."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import environment, spaces

import a3c_jax
from a3c_jax import A3CConfig, CheckpointFolder, find_checkpoint, fixed_delay
from a3c_jax.distributions import MultiCategorical
from a3c_jax.environments import adapt

SIZES = (3, 2)
SPACES = {
    "tuple": spaces.Tuple([spaces.Discrete(n) for n in SIZES]),
    "dict": spaces.Dict({"lever": spaces.Discrete(3), "switch": spaces.Discrete(2)}),
    "nvec": types.SimpleNamespace(nvec=np.array(SIZES), shape=(2,), dtype=np.int32),
}
TINY = {"num_workers": 3, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,), "max_steps": 240}


@struct.dataclass
class State(environment.EnvState):
    shown: jax.Array


class Levers(environment.Environment):
    """Four steps. Putting the lever where the observation shows earns 1, and the switch at 1 earns 0.5: at most 6."""

    default_params = environment.EnvParams(max_steps_in_episode=1000)

    def __init__(self, form, shows_dict=False):
        super().__init__()
        self.form, self.shows_dict = form, shows_dict

    def reset_env(self, key, params):
        state = State(time=0, shown=jax.random.randint(key, (), 0, 3))
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        lever, switch = self.parts(action)
        reward = 1.0 * (lever == state.shown) + 0.5 * (switch == 1)
        state = State(time=state.time + 1, shown=jax.random.randint(key, (), 0, 3))
        return self.observe(state), state, jnp.float32(reward), state.time == 4, {}

    def parts(self, action):
        """The two actions, each of which must have the form that the space describes."""
        if self.form == "dict":
            return action["lever"], action["switch"]
        if self.form == "nvec":
            chex.assert_shape(action, (2,))
        else:
            assert isinstance(action, tuple)
        return action[0], action[1]

    def observe(self, state):
        shown = jax.nn.one_hot(state.shown, 3)
        return {"shown": shown, "bias": jnp.ones(1)} if self.shows_dict else shown

    def observation_space(self, params):
        shown = spaces.Box(0.0, 1.0, (3,))
        return (
            spaces.Dict({"shown": shown, "bias": spaces.Box(0.0, 1.0, (1,))})
            if self.shows_dict
            else shown
        )

    def action_space(self, params):
        return SPACES[self.form]


@pytest.mark.parametrize("form", SPACES)
def test_the_environment_gets_what_its_space_describes(form):
    played = adapt(Levers(form))
    assert (played.num_actions, played.continuous) == (SIZES, False)
    _, state = played.reset(jax.random.key(0), 2)
    right = jnp.stack([state.shown, jnp.array([1, 0])], axis=-1).astype(jnp.int32)
    rewards = jax.jit(played.step)(jax.random.key(1), state, right).reward
    np.testing.assert_array_equal(rewards, [1.5, 1.0])
    drawn = played.random_action(jax.random.key(2), 500)
    assert drawn.shape == (500, 2)
    assert [np.unique(column).tolist() for column in drawn.T] == [[0, 1, 2], [0, 1]]


def test_the_network_gives_a_product_of_categoricals():
    config = A3CConfig(**TINY)
    network = a3c_jax.blueprint.make_blueprint(config, environment=Levers("tuple")).network
    assert network.num_actions == SIZES
    params = network.init(jax.random.key(0), jnp.zeros((5, 3)))
    distribution, value = network.apply(params, jnp.zeros((5, 3)))
    assert isinstance(distribution, MultiCategorical)
    assert distribution.logits.shape == (5, 5) and value.shape == (5,)


@pytest.mark.parametrize("form", ["dict", pytest.param("nvec", marks=pytest.mark.slow)])
def test_all_of_the_actions_are_learnt(form):
    played = Levers(form)
    settings = A3CConfig(
        num_workers=2, hidden_sizes=(16,), learning_rate=1e-2, max_steps=60_000, entropy_cost=0.01
    )
    result = a3c_jax.train(settings, environment=played)
    for make_policy, at_least in ((a3c_jax.greedy_policy, 6.0), (a3c_jax.sampled_policy, 5.0)):
        policy = make_policy(result.network)
        returns = a3c_jax.evaluate(policy, result.params, result.environment, jax.random.key(0), 50)
        assert returns.returns.mean() >= at_least
    random = a3c_jax.random_policy(result.environment)
    returns = a3c_jax.evaluate(random, result.params, result.environment, jax.random.key(0), 400)
    # 4 * (1 / 3 + 0.5 / 2)
    np.testing.assert_allclose(returns.returns.mean(), 4 * (1 / 3 + 1 / 4), atol=0.3)


def test_with_dict_observations_it_replays_goes_on_and_is_simulated(tmp_path):
    config = A3CConfig(**TINY)
    program = a3c_jax.build(config, environment=Levers("tuple", shows_dict=True))
    result = a3c_jax.train(program)
    again = a3c_jax.replay(program, result.schedule)
    chex.assert_trees_all_equal(again.params, result.params)
    np.testing.assert_array_equal(again.episodes.episode_return, result.episodes.episode_return)

    alone = program.replace(num_workers=1)
    whole = a3c_jax.train(alone)
    a3c_jax.train(alone.replace(max_steps=80), checkpoints=CheckpointFolder(tmp_path))
    resumed = a3c_jax.train(alone, resume=find_checkpoint(tmp_path))
    chex.assert_trees_all_equal(resumed.params, whole.params)

    schedule = fixed_delay(1, num_updates=6)
    simulate = a3c_jax.make_simulation(config, 1, environment=Levers("tuple", shows_dict=True))
    simulated = simulate(0, 2e-3, schedule)
    replayed = a3c_jax.replay(program, schedule)
    chex.assert_trees_all_close(simulated.params, replayed.params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_actions", [6, (2, 3), (3, 2, 2)])
def test_a_network_of_other_actions_is_refused(num_actions):
    with pytest.raises(ValueError, match=r"over the \(3, 2\) actions"):
        a3c_jax.build(
            A3CConfig(), environment=Levers("tuple"), network=a3c_jax.ActorCritic(num_actions)
        )


def test_action_values_are_refused():
    config = A3CConfig(algorithm="one_step_q")
    with pytest.raises(ValueError, match="action values need one discrete action"):
        a3c_jax.build(config, environment=Levers("tuple"))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2), spaces.Box(0.0, 1.0, (1,))]),
        spaces.Tuple([spaces.Tuple([spaces.Discrete(2)])]),
        types.SimpleNamespace(nvec=np.ones((2, 2))),
    ],
)
def test_other_parts_of_a_space_are_refused(space):
    class Other(Levers):
        def action_space(self, params):
            return space

    with pytest.raises(ValueError, match="flatten them into one of those first"):
        adapt(Other("tuple"))
