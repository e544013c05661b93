"""Every environment that gymnax registers trains, is evaluated, saved and restored by its id."""

import gymnax
import numpy as np
import pytest

from a3c_jax import (
    A3CConfig,
    CheckpointFolder,
    build,
    environments,
    evaluate,
    find_checkpoint,
    sampled_policy,
    train,
)

CANNOT_RUN = {
    "MNISTBandit-bsuite": "downloads its data when it is made",
}
# Those whose episodes may last for thousands of steps are cut short for the evaluation.
TINY = {"num_workers": 2, "envs_per_worker": 2, "t_max": 2, "hidden_sizes": (4,), "max_steps": 12}
QUICK = {"Breakout-MinAtar"}
CONTINUOUS = {
    "Pendulum-v1", "MountainCarContinuous-v0", "PointRobot-misc", "Reacher-misc", "Swimmer-misc",
}  # fmt: skip
IMAGES = {name for name in gymnax.registered_envs if name.endswith("MinAtar")}


def runs(name):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


def registered():
    return [n for n in gymnax.registered_envs if n not in CANNOT_RUN and "-misc2" not in n]


@pytest.mark.slow
@pytest.mark.parametrize("name", [runs(name) for name in registered() if "positions" not in name])
def test_three_updates_an_evaluation_a_checkpoint_and_on_from_it(name, tmp_path):
    short = environments.make(name)
    if hasattr(short.params, "max_steps_in_episode"):
        short = environments.make(name, max_steps_in_episode=5)
    config = A3CConfig(environment=name, **TINY)
    program = build(config, environment=short)
    result = train(program, checkpoints=CheckpointFolder(tmp_path))
    assert result.version == 3
    network = result.params["params"]
    assert ("Conv_0" in network["actor_trunk"]["torso"]) == (name in IMAGES)
    assert ("scale_head" in network) == (name in CONTINUOUS)
    policy = sampled_policy(result.network)
    returns, lengths = evaluate(policy, result.params, short, result.evaluation_key, 2)
    assert np.isfinite(returns).all() and (lengths >= 1).all()
    again = train(program.replace(max_steps=24), resume=find_checkpoint(tmp_path))
    assert again.version == 6
    np.testing.assert_array_equal(again.schedule.worker[:3], result.schedule.worker)


def test_those_that_cannot_run_are_registered():
    assert set(CANNOT_RUN) <= set(gymnax.registered_envs)
