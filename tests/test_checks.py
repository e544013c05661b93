"""Wrong set-ups are refused when a run is built, each with what is wrong and what to do; right ones pass."""

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import pytest
from gymnax.environments import spaces
from probes import DictProbe, Probe

from a3c_jax import environments
from a3c_jax.blueprint import make_blueprint
from a3c_jax.config import A3CConfig
from a3c_jax.distributions import Categorical, DiagonalGaussian
from a3c_jax.networks import ActorCritic

PROBE = Probe(3, lambda sign, action, last: sign * action)


def build(environment=None, network=None, **fields):
    return make_blueprint(A3CConfig(**fields), environment=environment, network=network)


def refused(message, kind=ValueError, **objects):
    with pytest.raises(kind, match=message):
        build(**objects)


# Options that contradict an object.


@pytest.mark.parametrize(
    "field",
    [
        {"torso": "mlp"}, {"hidden_sizes": (64,)}, {"activation": "relu"}, {"shared_torso": True},
        {"core": "lstm"}, {"core_size": 8}, {"forget_bias": 0.0}, {"state_dependent_scale": False},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_of_the_built_in_network_beside_an_own_one_is_refused(field):
    ((name, value),) = field.items()
    network = ActorCritic(2, torso="conv") if name == "torso" else ActorCritic(2)
    message = rf"A3CConfig\.{name} describes the built-in network and must stay .* beside network=ActorCritic, got .*; leave"
    refused(message, network=network, **field)


def test_options_that_agree_with_the_network_are_no_contradiction():
    build(network=ActorCritic(2, (64,), core="gru"), hidden_sizes=(64,), core="gru")


def test_the_name_of_another_environment_beside_an_object_is_refused():
    with pytest.raises(
        ValueError, match=r"A3CConfig\.environment must be 'Probe' .*got 'Acrobot-v1'; "
    ):
        make_blueprint(A3CConfig(environment="Acrobot-v1"), environment=PROBE)
    make_blueprint(A3CConfig(environment="Probe"), environment=PROBE)


def test_action_bounds_beside_an_environment_that_has_its_own_are_refused():
    pendulum = environments.make("Pendulum-v1")
    message = (
        r"A3CConfig\.action_bounds must be 'clip' beside environment=Pendulum-v1, .*got 'tanh'; "
    )
    refused(message, environment=pendulum, action_bounds="tanh")
    squashed = environments.make("Pendulum-v1", action_bounds="tanh")
    assert build(environment=squashed, action_bounds="tanh").environment is squashed
    own = gymnax.make("Pendulum-v1")[0]  # is adapted with them
    assert build(environment=own, action_bounds="tanh").environment.action_bounds == "tanh"


# Observations.


class Blind(Probe):
    """Shows nothing: its observations have no numbers."""

    observation_shape = (0,)

    def reset(self, key, num_envs):
        observation, state = super().reset(key, num_envs)
        return observation[:, :0], state

    def step(self, key, state, action):
        transition = super().step(key, state, action)
        return transition._replace(
            observation=transition.observation[:, :0],
            final_observation=transition.final_observation[:, :0],
        )


def test_observations_without_a_number_are_refused_for_the_built_in_network():
    blind = Blind(3, lambda sign, action, last: sign * action)
    refused(
        r"observation_shape of environment 'Probe' must have at least one number .*, got \(0,\); show",
        environment=blind,
    )


# Networks.


class Own(nn.Module):
    """A network of which a subclass gets one thing wrong."""

    def setup(self):
        self.policy, self.values = nn.Dense(2), nn.Dense(1)

    def actor(self, observation):
        return Categorical(self.policy(observation))

    def critic(self, observation):
        return self.values(observation)[..., 0]

    def __call__(self, observation):
        return self.actor(observation), self.critic(observation)


def test_a_right_network_passes():
    build(network=Own())


@pytest.mark.parametrize("number", [1, 5])
def test_a_network_with_another_number_of_actions_is_refused(number):
    message = rf"over the 2 actions of environment 'CartPole-v1', .*\[8, 2\].*, got \[8, {number}\]; set .* to 2"
    refused(message, network=ActorCritic(number))


def test_a_network_of_the_other_kind_of_actions_is_refused():
    message = r"over the discrete actions of environment 'CartPole-v1', got DiagonalGaussian; set"
    refused(message, network=ActorCritic(2, continuous=True))
    with pytest.raises(ValueError, match=r"over the continuous actions .*got Categorical; set"):
        make_blueprint(A3CConfig(environment="Pendulum-v1"), network=ActorCritic(1))


def test_values_with_a_dimension_too_many_are_refused_wherever_they_come_from():
    class Trailing(Own):
        def critic(self, observation):
            return self.values(observation)

    class TrailingInCall(Own):
        def __call__(self, observation):
            return self.actor(observation), self.values(observation)

    refused(r"one value for each observation, .*\[8\].*, got \[8, 1\]; squeeze", network=Trailing())
    refused(r"\[1, 8\], got \[1, 8, 1\]; squeeze", network=TrailingInCall())


def test_a_network_without_a_method_is_refused_by_name():
    class NoApply:
        def init(self, key, observation):
            return {}

    refused(
        r"network must have init, apply, got NoApply without apply; add",
        TypeError,
        network=NoApply(),
    )


def test_a_network_that_gives_no_pair_is_refused():
    class NoValues(nn.Module):
        @nn.compact
        def __call__(self, observation):
            return Categorical(nn.Dense(2)(observation))

    message = r"must give a pair \(distribution, values\) .*, got Categorical from NoValues; return"
    refused(message, TypeError, network=NoValues())


def test_a_network_with_a_carry_must_say_whether_it_is_recurrent():
    class Unsaid(Own):
        def initialize_carry(self, num_envs):
            return ()

    class Said(Own):
        is_recurrent = False

        def initialize_carry(self, num_envs):
            return ()

    refused(
        r"must say by an attribute is_recurrent .*got Unsaid without it; add",
        TypeError,
        network=Unsaid(),
    )
    build(network=Said())


def test_an_own_distribution_needs_four_methods_and_nothing_else():
    class Bare:
        """No tree, no logits."""

        def __init__(self, logits):
            self._inner = Categorical(logits)

        def sample(self, key):
            return self._inner.sample(key)

        def log_prob(self, action):
            return self._inner.log_prob(action)

        def entropy(self):
            return self._inner.entropy()

    class Complete(Bare):
        def mode(self):
            return self._inner.mode()

    def network(kind):
        class WithOwn(Own):
            def actor(self, observation):
                return kind(self.policy(observation))

        return WithOwn()

    build(network=network(Complete))
    refused(
        r"distribution must have .*, got Bare without mode; add", TypeError, network=network(Bare)
    )


def test_a_convolution_over_vectors_is_refused():
    refused(
        r"A3CConfig\.torso must be .*got 'conv' for observations of shape \(4,\); use", torso="conv"
    )


@pytest.mark.parametrize("environment", ["CartPole-v1", "Breakout-MinAtar"])
def test_the_atari_network_is_refused_unless_there_are_frames_large_enough(environment):
    refused(
        r"A3CConfig\.torso must be .*\[frames, height, width\] or \[height, width, colours\] of at least 20x20 pixels, got 'atari' for "
        r"observations of shape \(.*\); use 'auto'",
        environment=environments.make(environment),
        torso="atari",
    )


# Environments.


class Own1(Probe):
    """A probe whose subclass gets one thing wrong."""

    def __init__(self):
        super().__init__(3, lambda sign, action, last: sign * action)


def test_an_observation_of_another_shape_than_declared_is_refused():
    class Declares(Own1):
        observation_shape = (3,)

    class DeclaresATree(Own1):
        observation_shape = {"a": (2,)}

    message = (
        r"observations of 8 environments 'Probe' .* observation_shape .*, got \(8, 2\); correct"
    )
    refused(message, environment=Declares())
    refused(message, environment=DeclaresATree())


class Line:
    """gymnax's interface; the space is that of the class."""

    space = spaces.Box(0.0, 1.0, (1,))
    first = jnp.zeros(1)

    def reset(self, key, params=None):
        return self.first, jnp.int32(0)

    def step(self, key, state, action, params=None):
        ended = state == 3
        observation = jax.tree.map(lambda x: x + state.astype(x.dtype), self.first)
        shown = jax.tree.map(lambda a, b: jnp.where(ended, a, b), self.first, observation)
        info = {"final_observation": observation}
        return shown, jnp.where(ended, 0, state + 1), 1.0, ended, False, info

    def observation_space(self, params=None):
        return self.space

    def action_space(self, params=None):
        return spaces.Discrete(2)


@pytest.mark.parametrize(
    ("space", "first", "message"),
    [
        (
            spaces.Box(0, 1, (3,)),
            jnp.zeros(1),
            r"have shape \(3,\), as its space Box.*, got shape \(1,\); correct",
        ),
        (
            spaces.Box(0, 1, (1,)),
            jnp.zeros(1, jnp.int32),
            r"have dtype float32, as .*, got dtype int32; correct",
        ),
        (spaces.Discrete(4), jnp.zeros(()), r"have dtype int32, as .*, got dtype float32; correct"),
        (
            spaces.Discrete(4),
            jnp.zeros(2, jnp.int32),
            r"have shape \(\), as .*, got shape \(2,\); correct",
        ),
        (
            spaces.Dict({"a": spaces.Box(0, 1, (2,))}),
            {"a": jnp.zeros(3)},
            r"have shape \(2,\), .*got shape \(3,\)",
        ),
    ],
    ids=["shape", "dtype", "category of floats", "category of two", "part"],
)
def test_an_observation_must_be_of_its_space(space, first, message):
    class Wrong(Line):
        pass

    Wrong.space, Wrong.first = space, first
    refused(rf"an observation of environment 'Wrong' must {message}", environment=Wrong())


def test_what_a_step_returns_is_checked_too():
    def wrong(**changes):
        class Wrong(Own1):
            def step(self, key, state, action):
                transition = super().step(key, state, action)
                return transition._replace(
                    **{name: change(getattr(transition, name)) for name, change in changes.items()}
                )

        return Wrong()

    refused(
        r"observations from step as from reset, .*for final_observation",
        environment=wrong(final_observation=lambda x: x[:, :1]),
    )
    refused(
        r"return reward as float32\[8\] .*, got float32\[8, 1\]; return",
        environment=wrong(reward=lambda x: x[:, None]),
    )
    refused(
        r"return terminated as bool\[8\] .*, got float32\[8\]; return",
        environment=wrong(terminated=jnp.float32),
    )


def test_an_environment_without_a_method_is_refused_by_name():
    class Half:
        observation_shape = (1,)

        def reset(self, key, num_envs):
            pass

    refused(
        r"environment must have .*, got Half without num_actions, continuous, step; add",
        TypeError,
        environment=Half(),
    )


# Environments that do not reset themselves.


class Forgets(Probe):
    """Its episodes end and do not begin again."""

    def step(self, key, state, action):
        sign, remaining = state
        remaining = remaining - 1
        last = remaining <= 0
        final = self.observe(sign, remaining)
        never = jnp.zeros_like(last)
        transition = super().step(key, state, action)
        ends = (never, last) if self.truncates else (last, never)
        return transition._replace(
            observation=final, state=(sign, remaining), terminated=ends[0], truncated=ends[1],
            final_observation=final,
        )  # fmt: skip


class WalksBack(Line):
    """Ends at the last cell, stays there, and may leave it again to the left."""

    def step(self, key, state, action, params=None):
        state = jnp.clip(state + 2 * action - 1, 0, 3)
        observation = jnp.array([state / 3.0])
        return observation, state, 1.0, state == 3, False, {"final_observation": observation}


REWARD = PROBE.reward
MESSAGE = r"environment '.*' must reset itself in step when an episode has ended, .*got .*; return .* derive its class from gymnax's"


@pytest.mark.parametrize(
    "environment",
    [
        Forgets(3, REWARD),
        Forgets(3, REWARD, truncates=True),
        Forgets(3, REWARD, truncates=True, shows_time=False),  # nothing to see but the flags
        WalksBack(),
    ],
    ids=["termination", "time limit", "hidden time limit", "an end that can be left again"],
)
def test_an_environment_that_does_not_reset_itself_is_refused(environment):
    refused(MESSAGE, environment=environment)


class NeverEnds(Line):
    def step(self, key, state, action, params=None):
        return self.first, state, 1.0, False, False, {"final_observation": self.first}


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        PROBE,
        Probe(1, REWARD),  # one-step episodes: every step is an end
        Probe(1, REWARD, shows_time=False),
        Probe(3, REWARD, truncates=True, shows_time=False),
        DictProbe(3, REWARD),
        Line(),
        NeverEnds(),
        environments.make("SimpleBandit-bsuite"),
        gymnax.make("CartPole-v1")[0],
    ],
    ids=lambda environment: type(environment).__name__,
)
def test_an_environment_that_resets_itself_passes(environment):
    build(environment=environment)


class CountsTraces(Probe):
    """Counts how often its step is traced."""

    traces = 0

    def step(self, key, state, action):
        self.traces += 1
        return super().step(key, state, action)


def test_an_environment_is_played_only_once():
    own = CountsTraces(2, REWARD)
    build(environment=own)
    first = own.traces
    build(environment=own, seed=1)
    assert own.traces - first < first, "it was played again"


@pytest.mark.parametrize("kind", [Categorical, DiagonalGaussian])
def test_the_package_s_own_distributions_have_the_four_methods(kind):
    assert all(hasattr(kind, name) for name in ("sample", "log_prob", "entropy", "mode"))
