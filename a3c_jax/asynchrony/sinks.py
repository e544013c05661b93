"""Sinks that send a run's rows elsewhere: TensorBoard, Weights & Biases, trackio, or a function.

The libraries are extras, and are imported when a sink is made.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from a3c_jax.asynchrony.metrics import Row
from a3c_jax.asynchrony.records import EpisodeLog


class TensorBoard:
    """Writes event files for TensorBoard, with the environment steps as the step.

    Args:
      folder: where they go.
      **options: passed on to `tensorboardX.SummaryWriter`.

    Raises:
      ImportError: if tensorboardX is not installed.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self._writer = _import("tensorboardX", "tensorboard").SummaryWriter(str(folder), **options)

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, row["environment_steps"])

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """Logs to a library with `init(**options) -> run`, `run.log` and `run.finish`."""

    _library: str

    def __init__(self, **options: Any) -> None:
        self._run = _import(self._library, self._library).init(**options)

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        self._run.log(row, step=int(row["environment_steps"]))

    def close(self) -> None:
        self._run.finish()


class WeightsAndBiases(_Tracker):
    """Logs to Weights & Biases, with the environment steps as the step.

    Args:
      **options: passed on to `wandb.init`: `project`, `name`, `config`, `mode="offline"`.

    Raises:
      ImportError: if wandb is not installed.
    """

    _library = "wandb"


class Trackio(_Tracker):
    """Logs to trackio, with the environment steps as the step.

    Args:
      **options: passed on to `trackio.init`: `project`, `name`, `config`.

    Raises:
      ImportError: if trackio is not installed.
    """

    _library = "trackio"


class CallFunction:
    """Hands each row to a function.

    Args:
      function: called as `function(row)`, from the thread that called `train`.
    """

    def __init__(self, function: Callable[[Row], Any]) -> None:
        self._function = function

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        self._function(row)

    def close(self) -> None:
        pass


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this sink needs {module}, which is not installed; run: pip install -e '.[{extra}]'"
        ) from error
