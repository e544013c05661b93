"""The experiment of the article that this project started from, without its mistakes: `python -m experiments.article`.

It trains A3C on CartPole-v0 for 1,000 episodes, with the article's settings. docs/departures.md says where it
departs from the article, and why. `EpisodePrinter` shows how to follow a run with a sink of your own.
"""

from typing import Any

from tqdm import tqdm

from a3c_jax.config import A3CConfig
from experiments.command_line import main

DEFAULTS = A3CConfig(
    environment="CartPole-v0",
    envs_per_worker=1,
    t_max=20,
    learning_rate=1e-4,
    critic_cost=1.0,  # the article's 0.5 * (R - V)^2: the half is inside our loss
    max_gradient_norm=None,
    terminal_reward=-1.0,  # the reward of the step in which the pole falls
    hidden_sizes=(128,),
    activation="relu",
    max_steps=None,
    max_episodes=1000,
)


class EpisodePrinter:
    """A sink that prints the number, the worker and the return of each episode, above the progress bar."""

    number = 0

    def write(self, row: dict[str, float], episodes: Any) -> None:
        for worker, returned in zip(episodes.worker, episodes.episode_return, strict=True):
            self.number += 1
            tqdm.write(f"episode {self.number:5d}  worker {worker:2d}  return {returned:5.0f}")

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(
        "article",
        "Run the article's A3C experiment on CartPole-v0, with its mistakes put right.",
        {"article": DEFAULTS},
        sinks=[EpisodePrinter()],
        solved=195.0,
        over_episodes=True,
    )
