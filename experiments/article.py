"""The article's own experiment, without its mistakes: `python -m experiments.article`.

A3C on CartPole-v0 with separate networks of 128 units, Adam at 1e-4, segments of 20 steps, a reward of
-1 where the pole falls and an episode budget. README.md lists where it departs from the article.
"""

from tqdm import tqdm

from a3c_jax.config import A3CConfig
from a3c_jax.metrics import EpisodeLog, Row
from experiments.runner import main

DEFAULTS = A3CConfig(
    environment="CartPole-v0",
    envs_per_worker=1,
    t_max=20,
    optimizer="adam",
    learning_rate=1e-4,
    critic_cost=1.0,  # the article's 0.5 * (R - V)^2; the half is inside our loss
    entropy_cost=0.01,
    max_gradient_norm=None,
    terminal_reward=-1.0,
    hidden_sizes=(128,),
    activation="relu",
    max_steps=None,
    max_episodes=1000,
)


class EpisodePrinter:
    """Prints each episode's number, worker and return."""

    def __init__(self) -> None:
        self._number = 0

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        del row
        for worker, episode_return in zip(episodes.worker, episodes.episode_return, strict=True):
            self._number += 1
            tqdm.write(
                f"episode {self._number:5d}  worker {worker:2d}  return {episode_return:5.0f}"
            )  # prints above the progress bar

    def close(self) -> None:
        """Nothing to close."""


if __name__ == "__main__":
    main(
        "article",
        "Run the article's A3C experiment on CartPole-v0, with its mistakes put right.",
        {"article": DEFAULTS},
        sinks=[EpisodePrinter()],
        solved=195.0,
        over_episodes=True,
    )
