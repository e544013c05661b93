"""A3C with continuous actions: `python -m experiments.pendulum`, or with `--preset mountain-car`.

The policy is a Gaussian with one free standard deviation for each dimension of the action, and the
lambda of the returns is below 1 (generalised advantage estimation).
"""

from a3c_jax.config import A3CConfig
from experiments.command_line import main

PRESETS = {
    "pendulum": A3CConfig(
        environment="Pendulum-v1",
        envs_per_worker=16,
        t_max=10,
        hidden_sizes=(64, 64),
        state_dependent_scale=False,
        discount=0.95,
        gae_lambda=0.95,
        entropy_cost=1e-4,
        learning_rate=1e-3,
        learning_rate_schedule="linear",
        normalize_rewards=True,  # they reach -16 a step
        max_steps=2_000_000,
    ),
    "mountain-car": A3CConfig(
        environment="MountainCarContinuous-v0",
        envs_per_worker=16,
        t_max=20,
        gae_lambda=0.95,
        state_dependent_scale=False,
        normalize_observations=True,  # the velocity is a hundred times smaller than the position
        normalize_rewards=True,
        max_steps=1_000_000,
    ),
}

if __name__ == "__main__":
    main("pendulum", "Train A3C with a Gaussian policy on a continuous control task.", PRESETS)
