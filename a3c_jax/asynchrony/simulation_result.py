"""What a simulated run leaves behind, and what can be read off it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class SimulationResult(NamedTuple):
    """What a simulated run leaves behind. Mapped over B runs, each array has a leading axis B.

    Attributes:
      params: the final parameters, Flax variables.
      num_episodes: how many episodes ended in each update's segment, `[updates]` int32.
      episode_return: their mean return, `[updates]` float32; 0 if none ended.
      metrics: the parts of the loss and `gradient_norm` (`a3c_jax.worker.SegmentReport`), `[updates]` each.
      applied: whether the update changed the parameters, `[updates]` bool. It did not if it was not finite,
        or if its row of the schedule is impossible. If `config.nonfinite` is `stop`, the run ends there:
        all later rows are False too, and no more episodes are counted.
    """

    params: Any
    num_episodes: Array
    episode_return: Array
    metrics: dict[str, Array]
    applied: Array

    def final_return(self, fraction: float = 0.1, least_episodes: int = 0) -> Array:
        """Mean return of the episodes that ended in the last part of the run, `[]`; NaN if none ended.

        A policy that never fails may end no episode there, because its environments all reach the time limit at
        once. So ask for a number of episodes to compare policies as good as that.

        Args:
          fraction: which part of the updates counts, in (0, 1].
          least_episodes: count as many updates before that part as are needed for so many episodes.
        """
        num_updates = self.num_episodes.shape[-1]
        is_late = jnp.arange(num_updates) >= num_updates - max(1, round(fraction * num_updates))
        until_the_end = jnp.cumsum(self.num_episodes[..., ::-1], axis=-1)[..., ::-1]
        is_needed = until_the_end - self.num_episodes < least_episodes
        count = jnp.where(is_late | is_needed, self.num_episodes, 0)
        return jnp.sum(count * self.episode_return, axis=-1) / jnp.sum(count, axis=-1)

    def recent_return(self, window: int = 100) -> Array:
        """The mean return of the last episodes after each update, `[updates]`; NaN before the first has ended.

        Episodes that ended in the same update are counted together, so that the mean may be over a few more. It is
        over fewer as long as fewer have ended.

        Args:
          window: how many episodes are the last ones.
        """
        means = jnp.vectorize(_recent_return, signature="(n),(n),()->(n)")
        return means(self.num_episodes, self.episode_return, window)

    def updates_to_solve(self, solved_return: float, solved_window: int = 100) -> Array:
        """After how many updates the mean return of the last episodes reached a value, `[]` float32; infinity if never.

        Args:
          solved_return: the value.
          solved_window: how many episodes are the last ones; see `recent_return`.
        """
        enough = jnp.cumsum(self.num_episodes, axis=-1) >= solved_window
        is_solved = enough & (self.recent_return(solved_window) >= solved_return)
        first = 1.0 + jnp.argmax(is_solved, axis=-1)
        return jnp.where(jnp.any(is_solved, axis=-1), first, jnp.inf)


def _recent_return(num_episodes: Array, mean_return: Array, window: Array) -> Array:
    count = jnp.append(0, jnp.cumsum(num_episodes))  # after 0, 1, 2 and so on updates
    total = jnp.append(0.0, jnp.cumsum(num_episodes * mean_return))
    first = jnp.searchsorted(count, jnp.maximum(count - window, 0), side="right") - 1
    return ((total - total[first]) / (count - count[first]))[1:]
