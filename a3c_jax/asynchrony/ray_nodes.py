"""What each machine of a Ray cluster does, as rows of metrics show it."""

import collections
import threading
import time
from typing import Any

from a3c_jax.asynchrony.step_process import StepProcess

_WINDOW = 10.0
"""Over how many of the last seconds a machine's rates are taken."""


class StepProcessOnRay(StepProcess):
    """A step process that can say on which machine it runs."""

    def arrive(self) -> str:
        """The machine's name. As soon as a call of it returns, the process runs."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        return f"{ray.util.get_node_ip_address()}-{node_id[:6]}"


class Nodes:
    """What the machines did in the last seconds.

    Args:
      steps_per_update: how many environment steps an update is made of.
    """

    def __init__(self, steps_per_update: int) -> None:
        self._steps_per_update = steps_per_update
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._done: dict[str, collections.deque[tuple[float, float]]] = {}

    def count(self, node: str, exchange_seconds: float) -> None:
        """Counts a step of a worker that a machine has made."""
        with self._lock:
            done = self._done.setdefault(node, collections.deque())
            done.append((time.monotonic(), exchange_seconds))
            self._forget(done)

    def _forget(self, done: collections.deque[tuple[float, float]]) -> None:
        oldest = time.monotonic() - _WINDOW
        while done and done[0][0] < oldest:
            done.popleft()

    def metrics(self) -> dict[str, float]:
        """For each machine its steps per second, and the mean of the times that its exchanges took.

        A machine that has made no step lately shows 0 steps, and no time.
        """
        found = {}
        with self._lock:
            window = min(_WINDOW, max(time.monotonic() - self._began, 1e-9))
            for node, done in self._done.items():
                self._forget(done)
                found[f"steps_per_second/{node}"] = len(done) * self._steps_per_update / window
                if done:
                    mean = sum(seconds for _, seconds in done) / len(done)
                    found[f"exchange_milliseconds/{node}"] = 1e3 * mean
        return found


class TimedReport:
    """A worker's report with what its exchange took, and what the machines do, among its metrics.

    Args:
      report: what the worker step returned, `a3c_jax.worker.SegmentReport`.
      step_seconds: what the step took.
      exchange_seconds: what was needed besides, to send it there and back.
      nodes: what the machines do.
    """

    def __init__(
        self, report: Any, step_seconds: float, exchange_seconds: float, nodes: Nodes
    ) -> None:
        self.num_episodes, self.episodes = report.num_episodes, report.episodes
        self._report, self._times, self._nodes = report, (step_seconds, exchange_seconds), nodes

    @property
    def metrics(self) -> dict[str, Any]:
        """See `a3c_jax.worker.SegmentReport`."""
        step, exchange = self._times
        times = {"step_milliseconds": 1e3 * step, "exchange_milliseconds": 1e3 * exchange}
        return {**self._report.metrics, **times, **self._nodes.metrics()}
