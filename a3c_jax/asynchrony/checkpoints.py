"""Checkpoints of a run: when to save one, which ones to keep, and which one to go on from."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from a3c_jax.asynchrony.checkpoint_files import (
    LOG_NAMES,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    read_mean_return,
    save_checkpoint,
)
from a3c_jax.asynchrony.logs import Log, StoredLog
from a3c_jax.asynchrony.trees import restore_from_vector, restore_leaves
from a3c_jax.config import A3CConfig
from a3c_jax.rules import check_int

_SUFFIX = ".checkpoint"


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint to go on from.

    Args:
      path: a checkpoint file, a folder of them, or a run folder that has such a folder.

    Raises:
      CheckpointError: if there is none, or if the newest cannot be read. An older one that can be read
        is named.
    """
    path = Path(path)
    if path.is_file():
        return load_checkpoint(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = _files(folder)
    if not files:
        raise CheckpointError(f"no checkpoint in {folder}; give a run folder that has one.")
    try:
        return load_checkpoint(files[-1])
    except CheckpointError as error:
        for file in reversed(files[:-1]):
            try:
                version = load_checkpoint(file).version
            except CheckpointError:
                continue
            raise CheckpointError(
                f"{error} The one before it, {file}, is good (update {version:,}): give its name to go on from there."
            ) from error
        raise


def check_same_run(before: A3CConfig, now: A3CConfig) -> None:
    """Checks that a run may go on under another configuration.

    Only its budgets, and how many workers play at once, may differ.

    Raises:
      ValueError: if another field differs, or if `max_steps` differs and the learning rate is annealed
        over it.
    """
    may_differ = {"max_steps", "max_episodes", "solved_return", "max_concurrent_workers"}
    if now.learning_rate_schedule == "linear":
        may_differ.remove("max_steps")
    wanted = now.as_dict()
    for name, value in before.as_dict().items():
        if name not in may_differ and wanted[name] != value:
            raise ValueError(
                f"A3CConfig.{name} must be the checkpoint's {value!r} to go on from it, got "
                f"{wanted[name]!r}; only {', '.join(sorted(may_differ))} may change."
            )


def restore_tree(what: str, saved: Any, like: Any) -> Any:
    """The saved arrays as a tree like `like`.

    Args:
      what: what the tree is, for the error message.
      saved: arrays by name; or one vector, as a file of format 1 holds it.
      like: a tree of arrays of the right names, shapes and dtypes.

    Raises:
      CheckpointError: if the arrays do not fit.
    """
    restore: Any = restore_leaves if isinstance(saved, dict) else restore_from_vector
    try:
        return restore(what, saved, like)
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint does not fit: {error}; give the environment, the network and the "
            "optimizer that the run was started with."
        ) from None


class CheckpointFolder:
    """Saves a run now and then; keeps the last few checkpoints and the best one.

    The run's schedule and episodes are in two files beside the checkpoints, which only grow.

    Args:
      path: the folder. It is made if it does not exist.
      every_seconds: save when so many seconds have passed; None does not look at the time.
      every_updates: save when so many updates have been made; None does not count them. Both are looked
        at a few times a second.
      keep: how many of the latest to keep. The one with the highest mean return is kept as well.

    Raises:
      ValueError: if a value is not positive.
      TypeError: if `keep` is no integer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every_seconds: float | None = 30.0,
        every_updates: int | None = None,
        keep: int = 3,
    ) -> None:
        for name, value in (("every_seconds", every_seconds), ("every_updates", every_updates)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}; use None for never.")
        check_int("keep", keep, 1)
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._every_seconds, self._every_updates, self._keep = every_seconds, every_updates, keep
        self._saved_at, self._saved_version = time.monotonic(), 0
        self._logs: Mapping[str, Log[Any]] = {}
        self._earlier: Mapping[str, StoredLog] | None = None
        self._file_lock = filelock.FileLock(self.path / ".lock")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes, and other runs of this one, out of the folder during the block.

        The system lifts the lock when the process ends, however it ends.

        Raises:
          CheckpointError: if somebody else is in it.
        """
        try:
            self._file_lock.acquire(blocking=False)
        except filelock.Timeout:
            raise CheckpointError(
                f"the folder of checkpoints must not be in use, got {self.path}, where a run goes on; wait for its end, "
                "or resume from a checkpoint file in another folder."
            ) from None
        except OSError:
            pass  # where nothing can be written, nothing can be overwritten
        try:
            yield
        finally:
            self._file_lock.release()

    @contextlib.contextmanager
    def keeping(self, logs: Mapping[str, Log[Any]], resume: Checkpoint | None) -> Iterator[None]:
        """Keeps the logs of a run in files in this folder during the block, and everybody else out.

        Args:
          logs: `schedule` and `episodes`, restored from the checkpoint if there is one.
          resume: the checkpoint that the run goes on from, if any.

        Raises:
          CheckpointError: if somebody else is in the folder, if it has checkpoints of another run or later ones
            than this one, or if what the checkpoint's logs held has changed.
        """
        with self.locked():
            self._check_nothing_is_lost(resume)
            self._logs = logs
            self._earlier = None if resume is None else resume.logs
            try:
                # If it fails, it is tried again, with a warning, when a checkpoint is saved.
                with contextlib.suppress(OSError):
                    self._open_logs()
                yield
            finally:
                self._logs = {}
                for log in logs.values():
                    log.close()

    def due(self, version: int) -> bool:
        """Whether it is time to save."""
        passed, made = time.monotonic() - self._saved_at, version - self._saved_version
        return (self._every_seconds is not None and passed >= self._every_seconds) or (
            self._every_updates is not None and made >= self._every_updates
        )

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint and removes those that are no longer kept.

        Raises:
          OSError: if it cannot be written. Nothing is removed then, and `due` counts from now on.
        """
        self._saved_at, self._saved_version = time.monotonic(), checkpoint.version
        path = self.path / f"{checkpoint.version:012d}{_SUFFIX}"
        save_checkpoint(path, checkpoint)
        self._remove_old()
        return path

    def make_again(self) -> None:
        """Makes the folder and the logs in it again if somebody has deleted them, but not the folder it is in.

        Raises:
          OSError: if that fails.
        """
        self.path.mkdir(exist_ok=True)
        self._open_logs()
        for log in self._logs.values():
            log.make_again()

    def _open_logs(self) -> None:
        """Lets the logs keep their rows in files, if they do not yet."""
        for name, log in self._logs.items():
            earlier = None if self._earlier is None else self._earlier[name]
            try:
                log.keep_in(self.path / LOG_NAMES[name], earlier)
            except ValueError as error:
                raise CheckpointError(f"the checkpoint cannot be used: {error}") from error

    def _check_nothing_is_lost(self, resume: Checkpoint | None) -> None:
        """Refuses a folder whose checkpoints would be of no use once the logs are this run's."""
        files = _files(self.path)
        if not files:
            return
        last = int(files[-1].stem)
        if resume is None:
            raise CheckpointError(
                f"a new run's folder of checkpoints must have none, got {self.path} with one of update {last:,}; "
                "give another folder, or resume the run."
            )
        if last > resume.version:
            raise CheckpointError(
                "a run must go on from the latest checkpoint of the folder that it saves to, got update "
                f"{resume.version:,}, but {self.path} has one of update {last:,}; give another folder."
            )
        if resume.logs is not None and not resume.logs["schedule"].path.parent.samefile(self.path):
            raise CheckpointError(
                f"a run must not save to the folder of another run, got {self.path}; give another folder."
            )

    def _remove_old(self) -> None:
        for partial in self.path.glob(".*.partial"):  # of a process that was killed
            partial.unlink(missing_ok=True)
        files = _files(self.path)
        means = [read_mean_return(file) for file in files]
        best = max(range(len(files)), key=lambda i: (means[i], i), default=None)
        for i, file in enumerate(files[: -self._keep]):
            if i != best:
                file.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """The checkpoints that a run has saved to a folder, oldest first. Copies under other names are somebody's own."""
    saved = (file for file in folder.glob(f"*{_SUFFIX}") if file.stem.isdecimal())
    return sorted(saved, key=lambda file: int(file.stem))
