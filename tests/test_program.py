"""A program: built once, the same each time, and run as often as one likes."""

import dataclasses
import re

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from probes import Probe
from small_runs import WALK, Walk, assert_equal_runs, program, small, words

import a3c_jax
from a3c_jax import A3CConfig, _compiled, build, replay, train
from a3c_jax.asynchrony.trees import name_leaves
from a3c_jax.config import OPTIMIZER_FIELDS
from a3c_jax.distributions import Categorical

SMALL = {"num_workers": 3, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (4,)}


def named(tree):
    return name_leaves(_compiled.unpack(tree))


@pytest.fixture(scope="module")
def built():
    return build(A3CConfig(**SMALL, seed=5))


def test_a_configuration_gives_the_same_parameters_and_states_bit_for_bit(built):
    again = build(A3CConfig(**SMALL, seed=5))
    chex.assert_trees_all_equal(named(built.initial_params()), named(again.initial_params()))
    for first, second in zip(built.initial_states(), again.initial_states(), strict=True):
        chex.assert_trees_all_equal(named(first), named(second))
    assert built.config == again.config


def test_another_seed_gives_other_parameters_and_states(built):
    other = built.replace(seed=6)
    params, other_params = named(built.initial_params()), named(other.initial_params())
    for name, array in params.items():
        assert array.ndim == 1 or not np.any(array == other_params[name])  # biases begin at zero
    for x, y in zip(built.initial_states(), other.initial_states(), strict=True):
        x, y = named(x), named(y)
        assert not np.array_equal(x["key"], y["key"])
        assert not np.any(x["observation"] == y["observation"])
    assert words(jax.random.key_data(built.evaluation_key())) != words(
        jax.random.key_data(other.evaluation_key())
    )


def test_a_program_with_another_seed_is_the_one_built_with_it(built):
    config = A3CConfig(**SMALL, seed=6)
    ours, theirs = built.replace(seed=6), build(config)
    assert ours.config == theirs.config
    chex.assert_trees_all_equal(named(ours.initial_params()), named(theirs.initial_params()))
    for x, y in zip(ours.initial_states(), theirs.initial_states(), strict=True):
        chex.assert_trees_all_equal(named(x), named(y))


def test_every_worker_has_its_own_environments_and_its_own_key(built):
    states = [named(state) for state in built.initial_states()]
    assert len(states) == 3
    assert len({state["key"].tobytes() for state in states}) == 3
    # 3 workers with 2 environments each, and each of the six begins elsewhere.
    observations = np.concatenate([state["observation"] for state in states])
    assert observations.shape == (6, 4)
    assert len(np.unique(observations, axis=0)) == 6


def test_a_worker_starts_alike_however_many_others_there_are(built):
    alone = built.replace(num_workers=1)
    (state,) = alone.initial_states()
    chex.assert_trees_all_equal(named(state), named(built.initial_states()[0]))
    chex.assert_trees_all_equal(named(alone.initial_params()), named(built.initial_params()))


def test_the_largest_seed_is_a_seed_like_any_other(built):
    programs = [built.replace(seed=seed) for seed in (2**32 - 1, 0, 2**31)]
    assert len({named(p.initial_states()[0])["key"].tobytes() for p in programs}) == 3
    assert len({jax.random.key_data(p.evaluation_key()).tobytes() for p in programs}) == 3
    assert (
        len({named(p.initial_params())["params/value_head/kernel"].tobytes() for p in programs})
        == 3
    )


class Linear(nn.Module):
    """One weight a feature for each of two logits, and one for the value."""

    def setup(self):
        self.logits, self.values = nn.Dense(2, use_bias=False), nn.Dense(1, use_bias=False)

    def actor(self, observation):
        return Categorical(self.logits(observation))

    def critic(self, observation):
        return self.values(observation)[..., 0]

    def __call__(self, observation):
        return self.actor(observation), self.critic(observation)


def test_an_environment_and_a_network_that_are_given_are_used():
    probe, network = Probe(1, lambda sign, action, last: sign * (2 * action - 1)), Linear()
    config = A3CConfig(num_workers=3, envs_per_worker=2, t_max=4, max_steps=80)
    given = build(config, environment=probe, network=network)
    assert given.environment is probe
    assert given.network is network
    shapes = {name: array.shape for name, array in named(given.initial_params()).items()}
    assert shapes == {"params/logits/kernel": (2, 2), "params/values/kernel": (2, 1)}
    # A probe's observation is a random sign, and how many steps remain: one.
    observation = named(given.initial_states()[0])["observation"]
    np.testing.assert_array_equal(np.abs(observation), np.ones((2, 2)))
    result = train(given)
    assert result.environment is probe
    assert result.network is network
    assert result.version == 10


# Run often.


def test_a_program_runs_often_and_each_time_as_a_program_of_its_own(built):
    many = built.replace(num_workers=1, max_steps=160)
    results = {seed: train(many.replace(seed=seed)) for seed in (1, 2, 1)}
    assert words(results[1].params) != words(results[2].params)
    assert_equal_runs(
        results[1], train(A3CConfig(**SMALL | {"num_workers": 1}, seed=1, max_steps=160))
    )
    assert many.config.seed == 5


class Counted(Walk):
    """A walk that counts how often it is traced."""

    traces = 0

    def step(self, key, state, action):
        self.traces += 1
        return super().step(key, state, action)


def test_nothing_is_traced_again_whatever_may_change_without_compilation():
    environment = Counted()
    built = build(small(), environment=environment)
    train(built)
    replay(built, a3c_jax.round_robin(1, 5))
    traces = environment.traces
    assert traces > 0
    for changes in (
        {"seed": 9},
        {"max_steps": 80},
        {"max_steps": None, "max_episodes": 3},
        {"max_steps": None, "solved_return": -9.0, "solved_window": 2},
        {"num_workers": 3},
        {"num_workers": 3, "max_concurrent_workers": 1},
        {"nonfinite": "skip"},
    ):
        changed = built.replace(**changes)
        assert changed.config == dataclasses.replace(built.config, **changes)
        result = train(changed)
        assert result.config == changed.config
        assert result.version > 0
        replay(changed, result.schedule)
    assert environment.traces == traces


@pytest.fixture(scope="module")
def compilations():
    """A list that grows by one for each program that XLA compiles or loads, anywhere in the process."""
    events, listening = [], [True]

    def note(event, seconds, **_):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            events.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    listening.clear()


def test_ten_seeds_are_compiled_once(compilations):
    before = len(compilations)
    built = build(A3CConfig(num_workers=2, envs_per_worker=2, t_max=3, max_steps=60))
    train(built)
    compiled = len(compilations)
    assert compiled > before
    results = [train(built.replace(seed=seed)) for seed in range(1, 11)]
    assert len(compilations) == compiled, (
        "a run compiled something that an earlier one had compiled"
    )
    assert len({tuple(words(result.params)) for result in results}) == 10


# A change of each field of the configuration, from the defaults.
CHANGES = {
    "environment": "Acrobot-v1", "algorithm": "n_step_q", "num_workers": 3, "envs_per_worker": 3, "t_max": 5, "discount": 0.5,
    "gae_lambda": 0.5, "critic_cost": 0.1, "entropy_cost": 0.5, "reward_clip": 1.0, "terminal_reward": -1.0,
    "normalize_observations": True, "normalize_rewards": True, "optimizer": "momentum",
    "learning_rate": 0.5, "learning_rate_schedule": "linear", "max_gradient_norm": 0.1,
    "adam_epsilon": 0.1, "momentum": 0.1, "rmsprop_decay": 0.5, "rmsprop_epsilon": 0.1,
    "max_concurrent_workers": 1, "nonfinite": "skip", "seed": 9, "torso": "mlp", "hidden_sizes": (9,),
    "activation": "relu", "shared_torso": True, "core": "gru", "core_size": 9, "forget_bias": 0.5,
    "action_bounds": "tanh", "state_dependent_scale": False, "max_steps": 80, "max_episodes": 9,
    "solved_return": 9.0, "solved_window": 9,
}  # fmt: skip
RUN_ONLY = {
    "seed", "max_steps", "max_episodes", "solved_return", "solved_window", "num_workers",
    "max_concurrent_workers", "nonfinite",
}  # fmt: skip


def test_what_a_run_may_change_is_this_and_no_more():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(A3CConfig)}
    built = program(small(), WALK)
    built = dataclasses.replace(built, config=A3CConfig())
    assert set(OPTIMIZER_FIELDS) < set(CHANGES)
    for name, value in CHANGES.items():
        assert getattr(built.config, name) != value, name
        if name in RUN_ONLY:
            changed = built.replace(**{name: value})
            assert changed.config == dataclasses.replace(built.config, **{name: value})
            assert changed.step is built.step and changed.updater is built.updater
        elif name not in OPTIMIZER_FIELDS:
            with pytest.raises(ValueError, match=f"must not change {name}, "):
                built.replace(**{name: value})
    assert built.config == A3CConfig()


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {"t_max": 5}),
        ({}, {"hidden_sizes": (9,)}),
        ({}, {"environment": "Acrobot-v1"}),
    ],
)
def test_what_needs_another_program_is_refused_by_name(config, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"Program.replace must not change {name}.*build another"):
        program(small(**config), WALK).replace(**changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {"learning_rate": 0.5}),
        ({}, {"optimizer": "momentum", "max_gradient_norm": None}),
        ({"optimizer": "rmsprop", "num_workers": 1}, {"num_workers": 2}),
        ({"learning_rate_schedule": "linear", "max_steps": 400}, {"max_steps": 80}),
    ],
    ids=["learning rate", "another one", "its state", "its schedule"],
)
def test_another_optimizer_is_compiled_and_the_worker_step_is_not(config, changes):
    built = build(small(**config), environment=WALK)
    changed = built.replace(**changes)
    assert changed.step is built.step and changed.updater is not built.updater
    schedule = a3c_jax.round_robin(changed.config.num_workers, num_updates=6)
    expected = replay(changed.config, schedule, environment=WALK, single_kernel=built.single_kernel)
    assert_equal_runs(replay(changed, schedule), expected)


def test_an_optimizer_of_one_s_own_stays():
    built = a3c_jax.build(small(), environment=WALK, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="learning_rate belongs to the built-in optimizer"):
        built.replace(learning_rate=0.5)
    with pytest.raises(ValueError, match="must not change momentum, on which .* your own optim"):
        built.replace(momentum=0.5)


def test_a_function_of_the_learning_rate_is_called_again_for_another_one():
    built = a3c_jax.build(small(), environment=WALK, optimizer=lambda rate: optax.sgd(rate))
    changed = built.replace(learning_rate=0.5)
    assert changed.step is built.step
    schedule = a3c_jax.fixed_delay(1, num_updates=6)
    options = {"environment": WALK, "single_kernel": built.single_kernel}
    expected = replay(small(), schedule, optimizer=optax.sgd(0.5), **options)
    chex.assert_trees_all_equal(replay(changed, schedule).params, expected.params)


def test_nonsense_is_refused_as_the_configuration_refuses_it(built):
    with pytest.raises(ValueError, match=re.escape("A3CConfig.seed must be")):
        built.replace(seed=-1)
    with pytest.raises(TypeError, match="seeed"):
        built.replace(seeed=1)


def test_what_is_built_already_takes_no_environment_or_network(built):
    for options in ({"environment": WALK}, {"network": Linear()}):
        with pytest.raises(ValueError, match="must not be given beside a Program"):
            train(built, **options)
        with pytest.raises(ValueError, match="must not be given beside a Program"):
            replay(built, a3c_jax.round_robin(3, 3), **options)


# Parameters to start from.


def test_a_run_starts_from_the_parameters_that_are_given_and_its_replay_too():
    built = program(small(), WALK)
    first = train(built)
    second = train(built, params=first.params)
    assert words(second.params) != words(first.params)
    assert_equal_runs(replay(built, second.schedule, params=first.params), second)
    # Without an update they are what comes back, as the best too.
    none = replay(built, second.schedule, params=first.params, until=0)
    assert words(none.params) == words(none.best_params) == words(first.params)
    assert words(jax.tree.leaves(none.opt_state)) != words(jax.tree.leaves(first.opt_state))


def test_parameters_of_another_network_are_refused_by_name():
    built = program(small(), WALK)
    params = train(built).params
    inner = params["params"]
    value_head = {k: v for k, v in inner.items() if k != "value_head"}
    for wrong, message in (
        ({"params": value_head}, "'params/value_head/bias' is missing"),
        ({"params": inner | {"more": np.zeros(2)}}, "'params/more' is float.*needs no such array"),
        (jax.tree.map(lambda x: x[..., None], params), r"is float32\[.*, 1\], but this run needs"),
        (jax.tree.map(lambda x: x.astype("bfloat16"), params), "is bfloat16"),
    ):
        with pytest.raises(
            ValueError, match=f"params .*{message}.*give parameters of the same net"
        ):
            train(built, params=wrong)


# What a program is made of, for who wants to take it apart.


def test_a_program_is_a_value_with_these_parts(built):
    assert [field.name for field in dataclasses.fields(built)] == [
        "config", "blueprint", "describe", "step", "updater", "init", "start", "max_concurrent_calls",
        "single_kernel", "objects", "seconds",
    ]  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.config = A3CConfig()
    assert set(built.seconds) == {"setup", "compile"}
    assert all(seconds > 0 for seconds in built.seconds.values())
    assert built.environment.name == "CartPole-v1"


def test_step_and_updater_are_the_blueprints_functions_compiled(built):
    state, params = built.initial_states()[0], built.initial_params()
    compiled = [_compiled.unpack(result) for result in built.step(params, state)]
    plain = jax.jit(built.blueprint.worker_step)(params, state)
    for have, expected in zip(compiled, plain, strict=True):
        chex.assert_trees_all_equal_structs(have, expected)
        for name, array in named(expected).items():
            np.testing.assert_allclose(named(have)[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    optimizer_state = built.updater.init(params)
    moved, optimizer_state, _ = built.updater.update(compiled[0], optimizer_state, params, 0)
    assert bool(optimizer_state.finite)
    chex.assert_trees_all_equal_shapes_and_dtypes(_compiled.unpack(moved), params)


def test_no_worker_has_the_key_for_evaluation(built):
    keys = {jax.random.key_data(built.evaluation_key()).tobytes()}
    keys |= {named(state)["key"].tobytes() for state in built.initial_states()}
    assert len(keys) == 4


@pytest.mark.parametrize("run", [train, lambda p: replay(p, a3c_jax.round_robin(1, 10))])
def test_a_step_can_be_wrapped(run):
    built, calls = program(small(), WALK).replace(max_steps=80), []

    def step(params, state):
        calls.append(params)
        return built.step(params, state)

    result = run(dataclasses.replace(built, step=step))
    assert len(calls) == result.version == 10
