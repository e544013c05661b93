"""The file of a checkpoint: written so that no crash can spoil it, read without believing anything.

A file is a line of JSON (what it is, its format, its checksum, where the run stood) followed by the arrays
in MessagePack. It is written beside its final name, flushed to the disk, and renamed, so that a reader
finds the old file or the new one, and never half of one.

What grows with a run, its schedule and its episodes, is in two files beside the checkpoints
(`a3c_jax.asynchrony.logs`). A checkpoint says how many of their rows belong to it, so that it costs the same
in a run's last hour as in its first.
"""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from a3c_jax import __version__, _compiled
from a3c_jax.asynchrony.logs import StoredLog, as_columns, map_rows
from a3c_jax.asynchrony.records import EpisodeLog, Schedule, make_episode_log, make_schedule_log
from a3c_jax.asynchrony.thread_pools import thread_counts
from a3c_jax.asynchrony.trees import Named
from a3c_jax.asynchrony.whole_files import writing_whole
from a3c_jax.config import A3CConfig

FORMAT = 3
"""Version of the file format. Files of older formats can be read, newer ones are refused."""

LOG_NAMES = {"schedule": "schedule.bin", "episodes": "episodes.bin"}
"""The files of the logs, in the folder of the checkpoints."""

_MAGIC = "a3c_jax checkpoint"
_MAX_HEADER = 1 << 16


class CheckpointError(ValueError):
    """A checkpoint cannot be used: the message says which, why, and what to do."""


class Checkpoint(NamedTuple):
    """A whole run at one moment between two updates.

    Trees are held as arrays by name (`a3c_jax.asynchrony.trees`), for example
    `checkpoint.params["params/value_head/bias"]`. A file of format 1 gives vectors instead.

    Attributes:
      config: the run's configuration.
      params: the parameters.
      optimizer_state: the optimizer's state.
      schedule: which worker made each update, from which version. The version is its length.
      skipped: how many updates were not finite and skipped.
      states: each worker's state with its environments and its random key; every array has a leading
        dimension `num_workers`.
      episodes: every episode that ended so far.
      best_params: the parameters at the highest mean return so far.
      best_mean_return: that mean, or None.
      seconds: time spent training.
      versions: of Python and of the libraries that made the run, and what else its last bits depend on.
      single_kernel: whether its worker step was a single kernel; None in files written before this field
        existed.
      objects: what the run was given as an object, `environment`, `network`, `loss`, `optimizer` or `algorithm`, by the name
        of its class or function (`a3c_jax.asynchrony.objects`); None in files written before this field existed.
      in_flight: the parameters from which workers were computing gradients, by their version. Only a replay that
        starts here needs them (`a3c_jax.replay`).
      logs: the files in which `schedule` and `episodes` are, by these names; they are mapped, and read when
        somebody looks at them. None if they are in memory, and are saved as part of the checkpoint.
    """

    config: A3CConfig
    params: Named | np.ndarray
    optimizer_state: Named | np.ndarray
    schedule: Schedule
    skipped: int
    states: Named | np.ndarray
    episodes: EpisodeLog
    best_params: Named | np.ndarray
    best_mean_return: float | None
    seconds: float
    versions: dict[str, str]
    single_kernel: bool | None = None
    objects: dict[str, str] | None = None
    in_flight: dict[int, Named] = {}  # noqa: RUF012 (never changed)
    logs: dict[str, StoredLog] | None = None

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
    """What the last bits of a run depend on, besides its configuration."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "a3c_jax": __version__,
        "backend": jax.default_backend(),
        "programs": "compiled for speed" if _compiled.enabled() else "plain",
    } | thread_counts()


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, all of it or nothing.

    If its logs are in files, they must be in the same folder. `checkpoint._replace(logs=None)` is one that holds
    everything itself.

    Raises:
      OSError: if it cannot be written. A file that was there before is still there, and whole.
    """
    path = Path(path)
    arrays = {
        name: getattr(checkpoint, name)
        for name in ("params", "optimizer_state", "states", "best_params")
    }
    arrays["in_flight"] = {str(version): named for version, named in checkpoint.in_flight.items()}
    if checkpoint.logs is None:
        arrays |= {
            name: {
                k: np.ascontiguousarray(v) for k, v in getattr(checkpoint, name)._asdict().items()
            }
            for name in LOG_NAMES
        }
    payload = serialization.msgpack_serialize(arrays)
    run = {
        "version": checkpoint.version,
        "mean_return": checkpoint.mean_return,
        "best_mean_return": checkpoint.best_mean_return,
        "skipped": checkpoint.skipped,
        "seconds": checkpoint.seconds,
        "versions": checkpoint.versions,
        "single_kernel": checkpoint.single_kernel,
        "objects": checkpoint.objects,
        "logs": _mark_logs(checkpoint.logs),
        "config": checkpoint.config.as_dict(),
    }
    header = {"what": _MAGIC, "format": FORMAT, "sha256": _checksum(run, payload), "run": run}
    with writing_whole(path) as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(payload)
    if os.name == "posix":  # the name itself must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads one checkpoint file, and believes nothing that it has not checked.

    Raises:
      CheckpointError: if the file is missing, damaged, of another kind, or of a newer format.
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
        optimizer_state = arrays["opt_state" if header["format"] == 1 else "optimizer_state"]
        in_flight = {int(version): named for version, named in arrays.get("in_flight", {}).items()}
        logs = _find_logs(path, run.get("logs"))
        schedule, episodes = _read_logs(arrays, logs)
        checkpoint = Checkpoint(
            config=A3CConfig(**run["config"]),
            params=arrays["params"],
            optimizer_state=optimizer_state,
            schedule=schedule,
            skipped=run["skipped"],
            states=arrays["states"],
            episodes=episodes,
            best_params=arrays["best_params"],
            best_mean_return=run["best_mean_return"],
            seconds=run["seconds"],
            versions=run["versions"],
            single_kernel=run.get("single_kernel"),
            objects=run.get("objects"),
            in_flight=in_flight,
            logs=logs,
        )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} is whole but not understood: {type(error).__name__}: {error}."
        ) from error
    if checkpoint.version != run["version"]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: it is of update {run['version']:,}, but its schedule has "
            f"{checkpoint.version:,} updates."
        )
    return checkpoint


def _mark_logs(logs: dict[str, StoredLog] | None) -> dict[str, tuple[int, int]] | None:
    """What a checkpoint says of its logs; None if they are in it."""
    return None if logs is None else {name: (log.rows, log.crc32) for name, log in logs.items()}


def _find_logs(path: str | Path, marks: Any) -> dict[str, StoredLog] | None:
    """Where the logs of a checkpoint are; None if they are in it."""
    if marks is None:
        return None
    folder = Path(path).parent
    return {name: StoredLog(folder / LOG_NAMES[name], *marks[name]) for name in LOG_NAMES}


def _read_logs(
    arrays: dict[str, Any], logs: dict[str, StoredLog] | None
) -> tuple[Schedule, EpisodeLog]:
    """The schedule and the episodes of a checkpoint.

    Raises:
      CheckpointError: if they should be in a file that is missing or too short.
    """
    if logs is None:
        return Schedule(**arrays["schedule"]), EpisodeLog(**arrays["episodes"])
    try:
        schedule = map_rows(logs["schedule"], make_schedule_log().dtype)
        episodes = map_rows(logs["episodes"], make_episode_log().dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's schedule and episodes cannot be read: {error}; they are in files beside it, so "
            "keep or copy the folder as a whole."
        ) from error
    return as_columns(Schedule, schedule), as_columns(EpisodeLog, episodes)


def read_mean_return(path: Path) -> float:
    """The mean return in a file's first line; minus infinity if there is none that is finite, or it cannot be read."""
    try:
        with open(path, "rb") as file:
            mean = float(_parse_header(path, file.readline(_MAX_HEADER))["run"]["mean_return"])
    except (OSError, CheckpointError, KeyError, TypeError, ValueError):
        return float("-inf")
    return mean if np.isfinite(mean) else float("-inf")


def _parse_header(path: str | Path, line: bytes) -> dict[str, Any]:
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
