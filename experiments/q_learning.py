"""The paper's other three methods on CartPole-v1: `python -m experiments.q_learning --preset one-step`.

Presets are `one-step` Q-learning, `sarsa`, and `n-step` Q-learning. They share all settings but the algorithm's name. A
worker acts at random now and then, so that its returns in training stay below those of the greedy policy, which is
evaluated at the end. `--environment` and every other option work as with the other examples.
"""

from a3c_jax.config import A3CConfig
from experiments.command_line import main


def settings(algorithm: str) -> A3CConfig:
    """The same settings for every method."""
    return A3CConfig(
        environment="CartPole-v1",
        # Both are environment steps of all workers together: 8 updates, and a twentieth of the run.
        algorithm=f"{algorithm}?target_interval=500&exploration_steps=50_000",
        t_max=8,
        max_gradient_norm=10.0,
        learning_rate=3e-3,
        learning_rate_schedule="linear",
        max_steps=1_000_000,
    )


PRESETS = {
    "one-step": settings("one_step_q"),
    "sarsa": settings("one_step_sarsa"),
    "n-step": settings("n_step_q"),
}

if __name__ == "__main__":
    main(
        "q_learning",
        "Train asynchronous Q-learning or Sarsa on CartPole-v1, and evaluate the greedy policy.",
        PRESETS,
    )
