"""A3C on CartPole-v1, until it is solved: `python -m experiments.cartpole`."""

from a3c_jax.config import A3CConfig
from experiments.runner import main

DEFAULTS = A3CConfig(environment="CartPole-v1", solved_return=475.0)

if __name__ == "__main__":
    main(
        "cartpole",
        "Train A3C on CartPole-v1 until the mean return of the last 100 episodes reaches 475, "
        "then evaluate it on fresh episodes.",
        {"cartpole": DEFAULTS},
    )
