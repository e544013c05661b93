"""A3C on CartPole-v1 until it is solved: `python -m experiments.cartpole`.

The settings are the defaults of `A3CConfig`: on this task, 8 environments for each worker and 16 steps between
two updates need few environment steps and keep the cores busy. Every option on the command line changes a field
of the configuration, for example `--num-workers 4 --seed 1` or `--environment Acrobot-v1 --solved-return None`.

Without the command line, the same is `a3c_jax.train(DEFAULTS)`.
"""

from a3c_jax.config import A3CConfig
from experiments.command_line import main

DEFAULTS = A3CConfig(
    environment="CartPole-v1",
    solved_return=475.0,  # stop when the mean return of the last 100 episodes reaches this
)

if __name__ == "__main__":
    main(
        "cartpole",
        "Train A3C on CartPole-v1 until the mean return of the last 100 episodes reaches 475, "
        "then evaluate it on fresh episodes.",
        {"cartpole": DEFAULTS},
    )
