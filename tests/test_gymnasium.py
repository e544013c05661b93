"""Gymnasium's environments by name: what is found, what is refused, and that it can be played again."""

import functools
import sys
import warnings

import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv
from host_games import Stairs
from small_runs import (
    assert_equal_runs,
    assert_exact_counters,
    cut_short,
    program,
    replay,
    small,
    train,
)

import a3c_jax
from a3c_jax.environments import HostEnvironment, make

MODULE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

gymnasium.register("Wagon-v0", CartPoleEnv, max_episode_steps=20)
"""


def test_a_module_that_registers_an_environment_is_imported_first(tmp_path, monkeypatch):
    (tmp_path / "my_wagons.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    environment = make("gymnasium:my_wagons:Wagon-v0")
    assert environment.observation_shape == (4,)
    player = environment.make(2)
    assert player.can_put_back
    player.close()
    with pytest.raises(ValueError, match="names the module 'no_wagons', which cannot be imported"):
        make("gymnasium:no_wagons:Wagon-v0")


def test_parameters_reach_the_environment():
    environment = make("gymnasium:CartPole-v1?max_episode_steps=7&vectorization_mode='sync'")
    with environment.playing(1) as player:
        player.begin(np.zeros(1, np.int32))
        lengths = [bool(player.step(np.array([k % 2])).truncated[0]) for k in range(7)]
    assert lengths == 6 * [False] + [True]
    assert make(
        "gymnasium:CartPole-v1", max_episode_steps=7
    ).marks_beginnings  # a vector of its own kind
    assert make("gymnasium:Pendulum-v1?g=9.0&step_seconds=3").step_seconds == 3
    assert make("gymnasium:Pendulum-v1", action_bounds="tanh").action_bounds == "tanh"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "CartPol-v1",
            r"'gymnasium:CartPol-v1' cannot be made .*did you mean gymnasium:CartPole-v1",
        ),
        ("CartPole", r"cannot be made .* No registered env.*did you mean gymnasium:CartPole-v"),
        ("cartpole-v1", r"did you mean gymnasium:CartPole-v1"),
        ("CartPole-v7", r"version `v7` for environment `CartPole` doesn't exist"),
        ("CartPole-v1?wheels=3", r"unexpected keyword argument 'wheels'"),
        ("CartPole-v1?max_episode_steps='a'", r"max_episode_steps must be a positive int.*got 'a'"),
        ("CartPole-v1?max_episode_steps=-1", r"max_episode_steps must be a positive int.*got -1"),
        ("Acrobot-v1?max_episode_steps=0", r"cannot be made .* `max_episode_steps` to be positive"),
        ("CartPole-v1?vectorization_mode='odd'", r"cannot be made .*vectorization mode: 'odd'"),
        (
            "CartPole-v1?wheels=round",
            r"must be numbers, or words in quotes, as in 'gymnasium:LunarLander.*got 'wheels=round'",
        ),
        ("FrozenLake-v1?map_name='9x9'", r"cannot be made by gymnasium.make_vec: '9x9'"),
        ("", r"'gymnasium:' cannot be made by gymnasium.make_vec"),
        ("Taxi-v3", r"deprecated"),
    ],
)
def test_wrong_names_and_parameters_are_refused_in_one_sentence(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(f"gymnasium:{name}")
    assert "\n" not in str(caught.value)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for module in [m for m in sys.modules if m.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(
        ValueError, match=r"needs a library that is not installed \(Box2D is not .*pip install"
    ):
        make("gymnasium:LunarLander-v3")


# Played again


def goes_on_and_replays(settings, environment, tmp_path, cuts):
    checkpoint = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for updates in cuts:
            checkpoint = cut_short(settings, updates, tmp_path, environment, resume=checkpoint)
            assert_exact_counters(checkpoint)
        while checkpoint.states["episode_length"].max() == 0:  # all stand at an episode's start
            checkpoint = cut_short(settings, 1, tmp_path, environment, resume=checkpoint)
        result = train(settings, environment, resume=checkpoint)
        assert_equal_runs(replay(settings, result.schedule, environment), result)
        assert_equal_runs(replay(settings, result.schedule, environment, start=checkpoint), result)
    return result


@pytest.mark.parametrize(
    "name",
    [
        "CartPole-v1?vectorization_mode='sync'",
        pytest.param("Pendulum-v1", marks=pytest.mark.slow),
        pytest.param("Acrobot-v1?max_episode_steps=60", marks=pytest.mark.slow),
        pytest.param("FrozenLake-v1", marks=pytest.mark.slow),
        pytest.param("Blackjack-v1", marks=pytest.mark.slow),
    ],
)
def test_gymnasium_s_own_are_played_again_exactly(tmp_path, name):
    settings = small(environment=f"gymnasium:{name}", num_workers=2, max_steps=560)
    goes_on_and_replays(settings, None, tmp_path, (23, 24))


@pytest.mark.parametrize(
    "name",
    [
        "LunarLander-v3",
        pytest.param("LunarLander-v3?continuous=True&enable_wind=True", marks=pytest.mark.slow),
        pytest.param("BipedalWalkerHardcore-v3", marks=pytest.mark.slow),
    ],
)
def test_box2d_is_played_again_exactly(tmp_path, name):
    pytest.importorskip("Box2D")
    settings = small(
        environment=f"gymnasium:{name}&max_episode_steps=70".replace("v3&", "v3?"),
        num_workers=2,
        max_steps=800,
    )
    result = goes_on_and_replays(settings, None, tmp_path, (33, 44))
    assert len(result.episodes.length) > 0


@pytest.mark.slow
def test_an_episode_that_depends_on_those_before_it_replays_with_them(tmp_path):
    pytest.importorskip("Box2D")
    settings = small(environment="gymnasium:BipedalWalker-v3?max_episode_steps=30", max_steps=800)
    checkpoint = cut_short(settings, 64, tmp_path, None)
    assert len(checkpoint.episodes.length) > 0
    with warnings.catch_warnings():  # there may be one
        warnings.filterwarnings("ignore", message="environment .* cannot be put back")
        assert train(settings, None, resume=checkpoint).version == 100
    result = train(settings, None)
    assert_equal_runs(replay(settings, result.schedule, None), result)


# Processes


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_environments_in_processes_are_played_again_and_closed(tmp_path):
    make_async = functools.partial(AsyncVectorEnv, context="spawn", autoreset_mode="Disabled")
    environment = HostEnvironment("Stairs", lambda num_envs: make_async([Stairs] * num_envs))
    settings = small(num_workers=2, max_steps=320)
    goes_on_and_replays(settings, environment, tmp_path, (11, 12))
    assert_no_children()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("when", ["in a step", "before it is closed"])
def test_a_process_that_dies_takes_the_others_along(when):
    class Dies(AsyncVectorEnv):
        def step(self, actions):
            if next(calls) == 30 and when == "in a step":
                self.kill_one()
            return super().step(actions)

        def close(self, **options):
            if when != "in a step":
                self.kill_one()
            super().close(**options)

        def kill_one(self):
            self.processes[0].kill()
            self.processes[0].join(20)

    def make_one(num_envs):
        return Dies([Stairs] * num_envs, context="spawn", autoreset_mode="Disabled")

    calls = iter(range(10**9))
    built = program(small(max_steps=320), HostEnvironment("Stairs", make_one))
    if when == "in a step":
        with pytest.raises(a3c_jax.WorkerError) as caught:
            a3c_jax.train(built)
        assert caught.value.__cause__ is not None
    else:
        assert a3c_jax.train(built).version == 40
    assert_no_children()


def assert_no_children():
    import multiprocessing

    for child in multiprocessing.active_children():
        child.join(20)
    assert not multiprocessing.active_children()
