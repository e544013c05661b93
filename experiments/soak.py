"""Train at full speed for a while, with checkpoints, and look for what grows or drifts: `python -m experiments.soak`.

It samples the process's memory, threads and file handles, and compares the counters with each other: every step that
was played must be in an episode that ended or in one of the few that are running.
"""

import dataclasses
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from a3c_jax.config import A3CConfig

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to train, and for how long."""

    minutes: float = 20.0
    """How long to train."""
    checkpoint_seconds: float = 10.0
    """Seconds between two checkpoints."""
    config: Annotated[A3CConfig, tyro.conf.arg(name="")] = A3CConfig(
        max_steps=None, max_episodes=2**60
    )


class Samples:
    """A sink that samples the process at every row."""

    def __init__(self, steps_per_update: int) -> None:
        self._steps_per_update = steps_per_update
        self.rows: list[tuple[float, ...]] = []

    def write(self, row: dict[str, float], episodes: Any) -> None:
        del episodes
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        # The row reads them one after the other, while the workers go on.
        drift = row["environment_steps"] - row["updates"] * self._steps_per_update
        handles = len(os.listdir("/proc/self/fd"))
        self.rows.append(
            (row["seconds"], resident / MEBIBYTE, threading.active_count(), handles, drift)
        )

    def close(self) -> None:
        """Nothing to close."""


def main() -> None:
    """Trains, and prints what was found."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from a3c_jax import environments, training
    from a3c_jax.checkpoints import CheckpointFolder, find

    config = arguments.config
    environment = environments.make(config.environment)
    samples = Samples(config.steps_per_update)
    alarm = threading.Timer(60 * arguments.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointFolder(folder, every_seconds=arguments.checkpoint_seconds)
        alarm.start()
        began = time.monotonic()
        try:
            training.train(
                config,
                environment=environment,
                sinks=[samples],
                interval=1.0,
                checkpoints=checkpoints,
            )
        except training.TrainingInterrupted as interruption:
            result = interruption.result
        minutes = (time.monotonic() - began) / 60
        checkpoint = find(Path(folder))

    seconds, resident, threads, handles, drift = np.array(samples.rows).T
    half = len(seconds) // 2
    slope = 60 * np.polyfit(seconds[half:], resident[half:], 1)[0]
    # A row of the schedule is 12 bytes, one of the episodes 28.
    log = (12 * result.version + 28 * len(result.episodes.length)) / MEBIBYTE
    running = result.environment_steps - int(result.episodes.length.sum())
    print(
        f"{minutes:.1f} minutes, {result.environment_steps:,} steps, {result.version:,} updates, "
        f"{len(result.episodes.length):,} episodes\n"
        f"memory: {resident[0]:.0f} MiB at the start, {resident[half]:.0f} halfway, {resident[-1]:.0f} at the end, "
        f"{resident.max():.0f} at most; {slope:+.2f} MiB a minute over the second half,\n"
        f"  of which the log of all updates and episodes, kept for replay, is {log / minutes:.2f} MiB a minute\n"
        f"threads: {int(threads.min())} to {int(threads.max())}, file handles: {int(handles.min())} to {int(handles.max())}\n"
        f"steps less updates times {config.steps_per_update}: {int(np.abs(drift).max())} at most while it ran, "
        f"{result.environment_steps - result.version * config.steps_per_update} at the end\n"
        f"steps that are in no episode that ended: {running:,}, in {config.num_workers * config.envs_per_worker} "
        f"running episodes\n"
        f"last checkpoint: update {checkpoint.version:,}, {len(checkpoint.episodes.length):,} episodes: "
        f"{'equal' if _same_counters(checkpoint, result) else 'DIFFERENT'}"
    )


def _same_counters(checkpoint: Any, result: Any) -> bool:
    return (checkpoint.version, checkpoint.environment_steps, len(checkpoint.episodes.length)) == (
        result.version,
        result.environment_steps,
        len(result.episodes.length),
    )


if __name__ == "__main__":
    main()
