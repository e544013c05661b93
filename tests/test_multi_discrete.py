"""Several discrete actions at once: the three forms of their space, from the environment to the replayed run."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import environment, spaces
from small_runs import assert_equal_runs, cut_short, program, replay, train_together

import a3c_jax
from a3c_jax import A3CConfig, ActorCritic, CheckpointFolder
from a3c_jax.blueprint import make_blueprint
from a3c_jax.distributions import Categorical, MultiCategorical
from a3c_jax.environments import adapt, make
from a3c_jax.losses import a3c_loss
from a3c_jax.rollout import Trajectory

SIZES = (3, 2)
SPACES = {
    "tuple": spaces.Tuple([spaces.Discrete(n) for n in SIZES]),
    "dict": spaces.Dict({"lever": spaces.Discrete(3), "switch": spaces.Discrete(2)}),
    "nvec": types.SimpleNamespace(nvec=np.array(SIZES), shape=(2,), dtype=np.int32),
}
CONFIG = A3CConfig(num_workers=3, hidden_sizes=(16,), learning_rate=1e-2, max_steps=60_000)


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


LEVERS = {
    "tuple": Levers("tuple"),
    "dict": Levers("dict", shows_dict=True),
    "nvec": Levers("nvec"),
}
every_form = pytest.mark.parametrize(
    "form", ["dict", *(pytest.param(form, marks=pytest.mark.slow) for form in ("tuple", "nvec"))]
)


@functools.cache
def trained(form):
    return train_together(CONFIG, LEVERS[form])


# The whole of a run.


@pytest.mark.slow
@every_form
def test_all_of_the_actions_are_learnt(form):
    result = trained(form)
    for make_policy, at_least in ((a3c_jax.greedy_policy, 6.0), (a3c_jax.sampled_policy, 5.0)):
        policy = make_policy(result.network)
        returns = a3c_jax.evaluate(policy, result.params, result.environment, jax.random.key(0), 50)
        assert returns.returns.mean() >= at_least
    random = a3c_jax.random_policy(result.environment)
    returns = a3c_jax.evaluate(random, result.params, result.environment, jax.random.key(0), 400)
    # 4 * (1 / 3 + 0.5 / 2)
    np.testing.assert_allclose(returns.returns.mean(), 4 * (1 / 3 + 1 / 4), atol=0.3)


@every_form
def test_a_run_of_three_workers_is_replayed_bit_for_bit(form):
    result = trained(form)
    assert_equal_runs(replay(CONFIG, result.schedule, LEVERS[form]), result)


@every_form
@pytest.mark.parametrize("num_workers", [1, 3])
def test_an_interrupted_run_goes_on(form, num_workers, tmp_path):
    levers = LEVERS[form]
    config = dataclasses.replace(
        CONFIG, num_workers=num_workers, max_steps=30 * CONFIG.steps_per_update
    )
    checkpoint = cut_short(config, 11, tmp_path, levers)
    built = program(config, levers)
    result = a3c_jax.train(built, resume=checkpoint, checkpoints=CheckpointFolder(tmp_path))
    assert (checkpoint.version, result.version) == (11, 30)
    assert_equal_runs(replay(config, result.schedule, levers), result)
    if num_workers == 1:  # whose schedule is the same every time
        assert_equal_runs(a3c_jax.train(built), result)


@pytest.mark.slow
def test_a_run_is_simulated():
    levers = LEVERS["dict"]
    schedule = jax.tree.map(lambda x: x[:20], trained("dict").schedule)
    simulate = a3c_jax.make_simulation(CONFIG, 20, environment=levers)
    simulated = simulate(CONFIG.seed, CONFIG.learning_rate, schedule)
    chex.assert_trees_all_close(
        simulated.params, replay(CONFIG, schedule, levers).params, rtol=1e-4, atol=1e-6
    )


# The environment.


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tuple", "nvec"])
def test_a_space_that_starts_elsewhere_than_at_zero_gets_its_own_numbers(form):
    class Shifted(Levers):
        def parts(self, action):
            lever, switch = super().parts(action)
            return lever - 5, switch + 2

        def action_space(self, params):
            if self.form == "nvec":
                return types.SimpleNamespace(nvec=np.array(SIZES), start=np.array([5, -2]))
            parts = [
                types.SimpleNamespace(n=n, start=at) for n, at in zip(SIZES, (5, -2), strict=True)
            ]
            return spaces.Tuple(parts)

    played = adapt(Shifted(form))
    _, state = played.reset(jax.random.key(0), 3)
    right = jnp.stack([state.shown, jnp.array([1, 0, 1])], axis=-1).astype(jnp.int32)
    np.testing.assert_array_equal(
        played.step(jax.random.key(1), state, right).reward, [1.5, 1, 1.5]
    )
    drawn = played.random_action(jax.random.key(2), 100)
    assert (drawn.min(), drawn.max()) == (
        0,
        2,
    )  # it counts from zero, and only the environment is told otherwise


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2), spaces.Box(0.0, 1.0, (1,))]),
        spaces.Tuple([spaces.Tuple([spaces.Discrete(2)])]),
        spaces.Dict({"a": spaces.Discrete(2), "b": types.SimpleNamespace(nvec=np.array([2, 2]))}),
        spaces.Tuple([]),
        types.SimpleNamespace(nvec=np.ones((2, 2))),
        object(),
    ],
    ids=["box", "nested", "nvec_inside", "empty", "matrix", "no_space"],
)
def test_other_parts_of_a_space_are_refused(space):
    class Other(Levers):
        def action_space(self, params):
            return space

    with pytest.raises(
        ValueError, match="(?s)'Other' has the action space .*; flatten them into one"
    ):
        adapt(Other("tuple"))


# The network and its loss.


def test_the_network_gives_a_product_of_categoricals():
    network = make_blueprint(CONFIG, environment=LEVERS["tuple"]).network
    assert network.num_actions == SIZES
    observation = jnp.zeros((5, 3))
    (distribution, value), _ = jax.eval_shape(
        network.init_with_output, jax.random.key(0), observation
    )
    assert isinstance(distribution, MultiCategorical)
    assert distribution.logits.shape == (5, 5) and value.shape == (5,)


def test_the_loss_is_that_of_one_choice_among_all_pairs():
    """Two independent choices are one choice among 3 * 2 pairs, whose logits are the sums of theirs."""
    rng = np.random.default_rng(0)
    logits = jnp.float32(rng.normal(size=(6, 4, 5)))
    v_tm1, v_t, reward = jnp.float32(rng.normal(size=(3, 6, 4)))
    action = jnp.int32(rng.integers(0, SIZES, (6, 4, 2)))
    ended = jnp.asarray(rng.random((2, 6, 4)) < 0.2)

    def several(logits):
        return MultiCategorical(logits, SIZES), action

    def single(logits):
        pairs = (logits[..., :3, None] + logits[..., None, 3:]).reshape(6, 4, 6)
        return Categorical(pairs), 2 * action[..., 0] + action[..., 1]

    def loss(choice, logits):
        distribution, action = choice(logits)
        trajectory = Trajectory(None, action, reward, *ended, None)
        return a3c_loss(None, lambda *_: (distribution, v_tm1, v_t), trajectory, entropy_cost=0.5)

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, choice), has_aux=True))(logits)
        for choice in (several, single)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)


# What does not go together is refused before anything is compiled.


def refused(message, network, environment=LEVERS["tuple"]):
    with pytest.raises(ValueError, match=message):
        make_blueprint(A3CConfig(), environment=environment, network=network)


@pytest.mark.parametrize(
    ("num_actions", "message"),
    [
        (5, r"got a Categorical over 5"),
        (6, r"an array \[8, 5\] for 8 observations, got \[8, 6\]"),
        ((2, 3), r"got a MultiCategorical over \(2, 3\)"),
        ((3, 2, 2), r"got \[8, 7\]"),
    ],
    ids=str,
)
def test_a_network_of_other_actions_is_refused(num_actions, message):
    remedy = r"set the network's num_actions to \(3, 2\)"
    refused(rf"over the \(3, 2\) actions .*{message}; {remedy}", ActorCritic(num_actions))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPole-v1", r"over the 2 actions .*got a MultiCategorical over \(2,\); set .* to 2"),
        ("Pendulum-v1", r"over the continuous actions .*got MultiCategorical; set"),
    ],
)
def test_a_network_of_several_actions_is_refused_by_an_environment_of_other_ones(name, message):
    refused(message, ActorCritic((2,)), make(name))


def test_a_network_of_continuous_actions_is_refused():
    refused(r"over the discrete actions .*got DiagonalGaussian", ActorCritic(5, continuous=True))
    with pytest.raises(ValueError, match=r"num_actions must be one number .*got \(3, 2\); set"):
        ActorCritic([3, 2], continuous=True)


def test_an_own_distribution_must_draw_one_column_for_each_action():
    class First(ActorCritic):
        def _policy(self, features):
            return OwnCategorical(super()._policy(features).logits[..., :3])

    message = r"are int32\[8, 2\].*got int32\[8\]; use a3c_jax.distributions.MultiCategorical"
    refused(message, First(SIZES))


@struct.dataclass
class OwnCategorical:
    logits: jax.Array

    def sample(self, key):
        return Categorical(self.logits).sample(key)

    log_prob = entropy = mode = sample


@pytest.mark.parametrize("num_actions", [0, 2.5, (), (3, 0), (3, 2.5), [3, 2], None], ids=str)
def test_what_is_no_number_of_actions_is_refused(num_actions):
    played = adapt(Levers("tuple"))
    played.num_actions = num_actions
    refused("num_actions of .*must be a positive integer, or a tuple of them.*;", None, played)


@pytest.mark.parametrize("algorithm", ["one_step_q", "one_step_sarsa", "n_step_q"])
def test_action_values_are_refused(algorithm):
    message = "need one discrete action, but 'Levers' has several actions at once; use 'a3c'"
    with pytest.raises(ValueError, match=message):
        make_blueprint(A3CConfig(algorithm=algorithm), environment=LEVERS["tuple"])
