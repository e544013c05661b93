"""Checkpoints: one consistent cut of a whole run in one file, written so that no crash can spoil it.

A file is a line of JSON (what it is, its format, its length, its checksum, where the run stood) followed by
the arrays in MessagePack. It is written beside its final name, flushed to the disk, and renamed: a reader
finds the old file or the new one, never half of one.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from a3c_jax import __version__
from a3c_jax.config import A3CConfig
from a3c_jax.metrics import EpisodeLog
from a3c_jax.parameters import Schedule

FORMAT = 1
"""Version of the file format. A reader refuses newer ones."""

_MAGIC = "a3c_jax checkpoint"
_SUFFIX = ".checkpoint"
_MAX_HEADER = 1 << 16


class CheckpointError(ValueError):
    """A checkpoint cannot be read: which, why, and what to do."""


class Checkpoint(NamedTuple):
    """A whole run at one moment between two updates.

    Attributes:
      config: its configuration.
      params: the parameters as one flat vector, `[P]` float32.
      opt_state: the optimizer's state as a vector of words, `[S]` uint32.
      schedule: which worker made each update, from which version; the version is its length.
      skipped: how many updates were not finite and skipped.
      states: each worker's state, with its key and its environments, as words, `[num_workers, W]` uint32.
      episodes: every episode that ended so far.
      best_params: the parameters at the highest mean return so far, `[P]` float32.
      best_mean_return: that mean, or None.
      seconds: time spent training.
      versions: of Python and the libraries that made it.
    """

    config: A3CConfig
    params: np.ndarray
    opt_state: np.ndarray
    schedule: Schedule
    skipped: int
    states: np.ndarray
    episodes: EpisodeLog
    best_params: np.ndarray
    best_mean_return: float | None
    seconds: float
    versions: dict[str, str]

    @property
    def version(self) -> int:
        """Number of updates."""
        return len(self.schedule.worker)

    @property
    def environment_steps(self) -> int:
        """Number of environment steps, all workers together."""
        return self.version * self.config.steps_per_update

    @property
    def mean_return(self) -> float | None:
        """Mean return of the last `config.solved_window` episodes; None before there are so many."""
        returns = self.episodes.episode_return[-self.config.solved_window :]
        return float(returns.mean()) if len(returns) == self.config.solved_window else None


def library_versions() -> dict[str, str]:
    """What a run's last bits depend on."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "a3c_jax": __version__,
        "backend": jax.default_backend(),
    }


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, all of it or nothing.

    Raises:
      OSError: where it cannot be written; a file that was there before is still there, and whole.
    """
    payload = serialization.msgpack_serialize(
        {
            "params": np.asarray(checkpoint.params),
            "opt_state": np.asarray(checkpoint.opt_state),
            "states": np.asarray(checkpoint.states),
            "best_params": np.asarray(checkpoint.best_params),
            "schedule": checkpoint.schedule._asdict(),
            "episodes": checkpoint.episodes._asdict(),
        }
    )
    run = {
        "version": checkpoint.version,
        "mean_return": checkpoint.mean_return,
        "best_mean_return": checkpoint.best_mean_return,
        "skipped": checkpoint.skipped,
        "seconds": checkpoint.seconds,
        "versions": checkpoint.versions,
        "config": checkpoint.config.as_dict(),
    }
    header = {
        "what": _MAGIC,
        "format": FORMAT,
        "sha256": _checksum(run, payload),
        "run": run,
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.write(payload)  # apart: together they would be copied
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    if os.name == "posix":  # the name itself must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint file, and believes nothing that it has not checked.

    Raises:
      CheckpointError: where the file is missing, damaged, of another kind, or of a newer format.
    """
    try:
        with open(path, "rb") as file:
            header = _parse_header(path, file.readline(_MAX_HEADER))
            payload = file.read()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}.") from error
    run = header["run"]
    if _checksum(run, payload) != header.get("sha256"):
        raise CheckpointError(
            f"checkpoint {path} is damaged: its checksum does not match its {len(payload):,} bytes."
        )
    try:
        arrays = serialization.msgpack_restore(payload)
        return Checkpoint(
            config=A3CConfig(**run["config"]),
            params=arrays["params"],
            opt_state=arrays["opt_state"],
            schedule=Schedule(**arrays["schedule"]),
            skipped=run["skipped"],
            states=arrays["states"],
            episodes=EpisodeLog(**arrays["episodes"]),
            best_params=arrays["best_params"],
            best_mean_return=run["best_mean_return"],
            seconds=run["seconds"],
            versions=run["versions"],
        )
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} is whole but not understood: {type(error).__name__}: {error}."
        ) from error


def find(path: Path) -> Checkpoint:
    """The checkpoint to go on from.

    Args:
      path: a checkpoint file, a folder of them, or a run folder that has such a folder.

    Raises:
      CheckpointError: where there is none, or the newest cannot be read; an older one that can is named.
    """
    if path.is_file():
        return load(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = _files(folder)
    if not files:
        raise CheckpointError(f"no checkpoint in {folder}; give a run folder that has one.")
    try:
        return load(files[-1])
    except CheckpointError as error:
        good = next(filter(_is_good, reversed(files[:-1])), None)
        if good is None:
            raise
        raise CheckpointError(
            f"{error} The one before it, {good}, is good (update {load(good).version:,}): give its name to go "
            "on from there."
        ) from error


def check_same_run(before: A3CConfig, now: A3CConfig) -> None:
    """Whether a run may go on under another configuration: with other budgets, that is.

    Raises:
      ValueError: where another field differs, or the budget does and the learning rate is annealed over it.
    """
    may_differ = {"max_steps", "max_episodes", "solved_return", "max_concurrent_workers"}
    if now.learning_rate_schedule == "linear":
        may_differ.remove("max_steps")  # the learning rate depends on it
    for name, value in before.as_dict().items():
        if name not in may_differ and now.as_dict()[name] != value:
            raise ValueError(
                f"A3CConfig.{name} must be the checkpoint's {value!r} to go on from it, got "
                f"{now.as_dict()[name]!r}; only {', '.join(sorted(may_differ))} may change."
            )


class CheckpointFolder:
    """Keeps the last few checkpoints of a run, and the best.

    Args:
      path: the folder; made where it does not exist.
      every_seconds: save when so many seconds have passed; None does not look at the time.
      every_updates: save when so many updates have been made; None does not count them. Either is looked at
        a few times a second.
      keep: how many of the latest to keep. The one with the highest mean return is kept besides.

    Raises:
      ValueError: where a value breaks its rule.
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
          OSError: where it cannot be written. Nothing is removed then, and `due` counts from now on.
        """
        self._saved_at, self._saved_version = time.monotonic(), checkpoint.version
        path = self.path / f"{checkpoint.version:012d}{_SUFFIX}"
        save(path, checkpoint)
        self._prune()
        return path

    def _prune(self) -> None:
        for partial in self.path.glob(f".*{_SUFFIX}.*.partial"):  # of a process that was killed
            partial.unlink(missing_ok=True)
        files = _files(self.path)
        means = [_mean_return(file) for file in files]
        best = max(range(len(files)), key=lambda i: (means[i], i), default=None)
        for i, file in enumerate(files[: -self._keep]):
            if i != best:
                file.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def _is_good(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def _mean_return(path: Path) -> float:
    """The mean return in a file's header; minus infinity where there is none or it cannot be read."""
    try:
        with open(path, "rb") as file:
            mean = float(_parse_header(path, file.readline(_MAX_HEADER))["run"]["mean_return"])
    except (OSError, CheckpointError, KeyError, TypeError, ValueError):
        return float("-inf")
    return float("-inf") if math.isnan(mean) else mean


def _parse_header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("what") != _MAGIC:
        raise CheckpointError(f"{path} is no a3c_jax checkpoint, or its first line is damaged.")
    number, run = header.get("format"), header.get("run")
    if type(number) is not int or number < 1 or not isinstance(run, dict):
        raise CheckpointError(f"checkpoint {path} is damaged: its first line is not complete.")
    if number > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {number}, but this version of a3c_jax reads up to {FORMAT}; "
            f"use the version that wrote it ({run.get('versions')}), or a newer one."
        )
    return header


def _checksum(run: dict[str, Any], payload: bytes) -> str:
    checksum = hashlib.sha256(json.dumps(run, sort_keys=True).encode())
    checksum.update(payload)
    return checksum.hexdigest()
