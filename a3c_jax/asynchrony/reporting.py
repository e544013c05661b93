"""What a run shows and saves while it goes on: rows for its sinks, checkpoints."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from a3c_jax.asynchrony.checkpoints import CheckpointFolder
from a3c_jax.asynchrony.metrics import Row, Sink
from a3c_jax.asynchrony.records import EpisodeLog
from a3c_jax.asynchrony.result import TrainResult
from a3c_jax.asynchrony.run import Run


class SinkError(RuntimeError):
    """A sink failed during `train`; `__cause__` is its exception.

    Attributes:
      result: the result so far; it is that of the whole run if the sink failed at the end. None if it failed
        before the training began.
    """

    result: TrainResult | None = None


class Outlets:
    """The sinks of a run. One that fails does not keep the others from getting their rows, nor from being closed.

    Attributes:
      failure: what the first one that failed raised; None if none has.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self.failure: SinkError | None = None

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        for sink in self._sinks:
            with self._noting_failure(sink, "write"):
                sink.write(row, episodes)

    def __enter__(self) -> "Outlets":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for sink in self._sinks:
            with self._noting_failure(sink, "close"):
                sink.close()
        self.add_failure_to(error)

    def add_failure_to(self, error: BaseException | None) -> None:
        """Adds a note to the error that ended a run, if a sink has failed as well."""
        if error is not None and self.failure not in (None, error):
            error.add_note(f"As well, {self.failure}")

    @contextlib.contextmanager
    def _noting_failure(self, sink: Sink, method: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.failure is None:
                self.failure = SinkError(
                    f"{type(sink).__name__}.{method} failed with {type(error).__name__}: {error}"
                )
                self.failure.__cause__ = error


class Progress:
    """What a run shows and saves while it goes on.

    Args:
      run: the run.
      outlets: where rows go.
      checkpoints: where it is saved, if anywhere.
    """

    def __init__(self, run: Run, outlets: Outlets, checkpoints: CheckpointFolder | None) -> None:
        self._run, self._outlets, self._checkpoints = run, outlets, checkpoints

    def tick(self) -> None:
        """Shows what is new, and saves a checkpoint if one is due.

        Raises:
          SinkError: if a sink failed.
        """
        self.show()
        if self._checkpoints is not None and self._checkpoints.due(self._run.version):
            self.save()
        if self._outlets.failure is not None:
            raise self._outlets.failure

    def show(self, *, last: bool = False) -> None:
        """Sends the new rows and episodes to every sink, and writes the logs to their files, if they have files."""
        # Taken even if there is no sink, so that they do not pile up.
        for row, episodes in self._run.take_rows(last=last):
            self._outlets.write(row, episodes)
        with contextlib.suppress(OSError):  # the rows wait in memory, and saving a checkpoint warns
            self._run.flush()

    def save(self) -> None:
        """Saves a checkpoint; warns if it cannot be written."""
        if self._checkpoints is None:
            return
        try:
            self._checkpoints.make_again()
            self._checkpoints.save(self._run.checkpoint())
        except OSError as error:
            warnings.warn(
                f"the checkpoint of update {self._run.version:,} cannot be written to "
                f"{self._checkpoints.path} ({error.strerror}); training goes on, and earlier "
                "checkpoints stay.",
                RuntimeWarning,
                stacklevel=2,
            )
