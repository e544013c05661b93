"""Train at full speed for a while and look for what grows or drifts: `python -m experiments.measurements.soak`.

It saves checkpoints, samples the process's memory, threads and open files, and compares the counters with each other:
every environment step must be in an episode that ended, or in one of the few that are still running.
"""

import dataclasses
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tyro

import a3c_jax
from a3c_jax.config import A3CConfig
from experiments.command_line import exit_on_bad_input, parse

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to train, and for how long."""

    minutes: float = 20.0
    """How long to train, unless a budget of the configuration is spent before."""
    checkpoint_seconds: float = 10.0
    """Seconds between two checkpoints."""
    config: Annotated[A3CConfig, tyro.conf.arg(name="")] = A3CConfig(
        max_steps=None, max_episodes=2**60
    )


class Samples:
    """A sink that samples the process at every row: seconds, resident MiB, threads, open files."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []

    def write(self, row: dict[str, float], episodes: Any) -> None:
        """Takes a sample."""
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE
        files = len(os.listdir("/proc/self/fd"))
        self.rows.append((row["seconds"], resident, threading.active_count(), files))

    def close(self) -> None:
        """Nothing to close."""


def main(arguments: Sequence[str] | None = None) -> "a3c_jax.TrainResult":
    """Trains and prints what was found. The process ends with exit code 1 if the counters do not agree."""
    with exit_on_bad_input():
        parsed = parse("measurements.soak", Arguments, __doc__, arguments)
        from experiments import tasks  # noqa: F401 (registers its environments; loads JAX, --help does not)

        program = a3c_jax.build(parsed.config)
    samples = Samples()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = a3c_jax.CheckpointFolder(folder, every_seconds=parsed.checkpoint_seconds)
        result = train_for(60 * parsed.minutes, program, samples, checkpoints)
        checkpoint = a3c_jax.find_checkpoint(folder)
    _print_memory(samples, result)
    if not compare_counters(checkpoint, result):
        raise SystemExit(1)
    return result


def train_for(seconds: float, program: Any, samples: Samples, checkpoints: Any) -> Any:
    """Trains until the time is up, as a SIGTERM would end it, or until a budget is spent."""
    alarm = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    alarm.start()
    try:
        return a3c_jax.train(program, sinks=[samples], interval=1.0, checkpoints=checkpoints)
    except a3c_jax.TrainingInterrupted as interruption:
        return interruption.result
    finally:
        alarm.cancel()


def _print_memory(samples: Samples, result: Any) -> None:
    seconds, resident, threads, files = np.array(samples.rows).T
    half, minutes = len(seconds) // 2, result.wall_clock["train"] / 60
    slope = 60 * np.polyfit(seconds[half:], resident[half:], 1)[0] if len(seconds) > 3 else np.nan
    steady = seconds >= min(120, seconds[-1] / 2)
    growth = np.ptp(resident[steady])
    log = (12 * result.version + 32 * len(result.episodes.length)) / MEBIBYTE
    print(
        f"{minutes:.1f} minutes, {result.environment_steps:,} steps, {result.version:,} updates, "
        f"{len(result.episodes.length):,} episodes, stopped ({result.stop_reason})\n"
        f"memory: {resident[0]:.0f} MiB at the start, {resident[half]:.0f} halfway, {resident[-1]:.0f} at the end, "
        f"{resident.max():.0f} at most; {slope:+.2f} MiB a minute over the second half\n"
        f"  after the first two minutes, the largest and the smallest differ by {growth:.1f} MiB\n"
        f"  on disk, the logs of updates and episodes grow by {log / minutes:.2f} MiB a minute\n"
        f"threads: {threads.min():.0f} to {threads.max():.0f}, open files: {files.min():.0f} to {files.max():.0f}"
    )


def compare_counters(checkpoint: Any, result: Any) -> bool:
    """Prints whether the counters agree with each other and with the last checkpoint."""
    config = result.config
    in_updates = result.version * config.steps_per_update
    running = result.environment_steps - int(result.episodes.length.sum())
    saved = (checkpoint.version, checkpoint.environment_steps, len(checkpoint.episodes.length))
    final = (result.version, result.environment_steps, len(result.episodes.length))
    agree = result.environment_steps == in_updates and running >= 0 and saved == final
    print(
        f"steps that the updates do not account for: {result.environment_steps - in_updates}\n"
        f"steps in no episode that ended: {running:,}, in {config.num_workers * config.envs_per_worker} "
        f"running episodes\n"
        f"last checkpoint: update {saved[0]:,}, {saved[2]:,} episodes\n"
        f"the counters {'agree' if agree else 'DO NOT AGREE'}"
    )
    return agree


if __name__ == "__main__":
    main()
