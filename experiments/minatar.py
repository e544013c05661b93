"""A3C on the five MinAtar games of gymnax: `python -m experiments.minatar --preset breakout`.

The network is Young & Tian's (arXiv:1903.03176): one 3x3 convolution of 16 channels and a dense layer of 128.
"""

import dataclasses

from a3c_jax.config import A3CConfig
from experiments.runner import main

BREAKOUT = A3CConfig(
    environment="Breakout-MinAtar",
    envs_per_worker=32,
    t_max=10,
    hidden_sizes=(128,),
    activation="relu",
    shared_torso=True,
    gae_lambda=0.9,
    learning_rate=3e-3,
    learning_rate_schedule="linear",
    max_steps=5_000_000,
)
GAMES = {
    "asterix": "Asterix",
    "breakout": "Breakout",
    "freeway": "Freeway",
    "seaquest": "Seaquest",
    "space-invaders": "SpaceInvaders",
}
ENTROPY = {
    "asterix": 0.01,
    "breakout": 0.03,  # with less, half of the seeds stay at 7 for a long time
    "freeway": 0.01,
    "seaquest": 0.01,
    "space-invaders": 0.01,
}
PRESETS = {
    name: dataclasses.replace(BREAKOUT, environment=f"{game}-MinAtar", entropy_cost=ENTROPY[name])
    for name, game in GAMES.items()
}

if __name__ == "__main__":
    main("minatar", "Train A3C with a convolutional network on a MinAtar game.", PRESETS)
