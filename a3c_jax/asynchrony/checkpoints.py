"""Checkpoints of a run: when to save one, which ones to keep, and which one to go on from."""

import time
from pathlib import Path
from typing import Any

from a3c_jax.asynchrony.checkpoint_files import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    read_mean_return,
    save_checkpoint,
)
from a3c_jax.asynchrony.trees import restore_from_vector, restore_leaves
from a3c_jax.config import A3CConfig

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
        good = next(filter(_is_good, reversed(files[:-1])), None)
        if good is None:
            raise
        raise CheckpointError(
            f"{error} The one before it, {good}, is good (update {load_checkpoint(good).version:,}): "
            "give its name to go on from there."
        ) from error


def check_same_run(before: A3CConfig, now: A3CConfig) -> None:
    """Checks that a run may go on under another configuration: only its budgets may differ.

    Raises:
      ValueError: if another field differs, or if `max_steps` differs and the learning rate is annealed
        over it.
    """
    may_differ = {"max_steps", "max_episodes", "solved_return", "max_concurrent_workers"}
    if now.learning_rate_schedule == "linear":
        may_differ.remove("max_steps")
    for name, value in before.as_dict().items():
        if name not in may_differ and now.as_dict()[name] != value:
            raise ValueError(
                f"A3CConfig.{name} must be the checkpoint's {value!r} to go on from it, got "
                f"{now.as_dict()[name]!r}; only {', '.join(sorted(may_differ))} may change."
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

    Args:
      path: the folder. It is made if it does not exist.
      every_seconds: save when so many seconds have passed; None does not look at the time.
      every_updates: save when so many updates have been made; None does not count them. Both are looked
        at a few times a second.
      keep: how many of the latest to keep. The one with the highest mean return is kept as well.

    Raises:
      ValueError: if a value is not positive.
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
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}; use 1 to keep the last only.")
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._every_seconds, self._every_updates, self._keep = every_seconds, every_updates, keep
        self._saved_at, self._saved_version = time.monotonic(), 0

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

    def _remove_old(self) -> None:
        for partial in self.path.glob(f".*{_SUFFIX}.*.partial"):  # of a process that was killed
            partial.unlink(missing_ok=True)
        files = _files(self.path)
        means = [read_mean_return(file) for file in files]
        best = max(range(len(files)), key=lambda i: (means[i], i), default=None)
        for i, file in enumerate(files[: -self._keep]):
            if i != best:
                file.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def _is_good(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True
