"""A3C on the five MinAtar games of gymnax: `python -m experiments.minatar --preset breakout`.

The network is that of Young & Tian (arXiv:1903.03176): one 3x3 convolution of 16 channels and a dense layer of
128 units, shared by actor and critic. `torso="auto"` chooses it, because the observations are images of 10x10.
"""

from a3c_jax.config import A3CConfig
from experiments.command_line import main


def settings(environment: str, entropy_cost: float = 0.01) -> A3CConfig:
    """The same settings for every game, but for the entropy bonus."""
    return A3CConfig(
        environment=environment,
        envs_per_worker=32,
        t_max=10,
        hidden_sizes=(128,),
        activation="relu",
        shared_torso=True,
        gae_lambda=0.9,
        entropy_cost=entropy_cost,
        learning_rate=3e-3,
        learning_rate_schedule="linear",
        max_steps=5_000_000,
    )


PRESETS = {
    "breakout": settings("Breakout-MinAtar", entropy_cost=0.1),  # with less, some seeds stay at 10
    "asterix": settings("Asterix-MinAtar"),
    "freeway": settings("Freeway-MinAtar"),
    "seaquest": settings("Seaquest-MinAtar"),
    "space-invaders": settings("SpaceInvaders-MinAtar"),
}

if __name__ == "__main__":
    main("minatar", "Train A3C with a convolutional network on a MinAtar game.", PRESETS)
