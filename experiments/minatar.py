"""A3C on the five MinAtar games of gymnax: `python -m experiments.minatar --preset breakout`.

The network is Young & Tian's (arXiv:1903.03176): one 3x3 convolution of 16 channels and a dense layer of 128.
"""

from a3c_jax.config import A3CConfig
from experiments.runner import main

GAMES = {  # and the weight of the entropy: with less, some of Breakout's seeds stay at 10
    "breakout": ("Breakout-MinAtar", 0.1),
    "asterix": ("Asterix-MinAtar", 0.01),
    "freeway": ("Freeway-MinAtar", 0.01),
    "seaquest": ("Seaquest-MinAtar", 0.01),
    "space-invaders": ("SpaceInvaders-MinAtar", 0.01),
}
PRESETS = {
    name: A3CConfig(
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
    for name, (environment, entropy_cost) in GAMES.items()
}

if __name__ == "__main__":
    main("minatar", "Train A3C with a convolutional network on a MinAtar game.", PRESETS)
