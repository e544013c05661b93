"""What a checkpoint costs after a short and after a long run: `python -m experiments.measurements.checkpoint_cost`.

It trains up to each number of updates in turn, and measures there how long a checkpoint takes to save, how large
it is, how long another thread waits meanwhile at most, and how long it takes to go on from it. Longer runs than one
has the patience for are made up: their logs are filled with rows, and all else is real.
"""

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import a3c_jax
from a3c_jax.config import A3CConfig
from experiments.command_line import exit_on_bad_input, parse

_PART = 1_000_000
_NAP = 0.0005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    updates: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Train up to each of these numbers of updates, in this order."""
    made_up: tuple[int, ...] = (100_000_000,)
    """Fill the logs up to each of these numbers of updates."""
    repetitions: int = 20
    """How many checkpoints to save at each of them."""
    config: Annotated[A3CConfig, tyro.conf.arg(name="")] = A3CConfig()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a row for each number of updates."""
    with exit_on_bad_input():
        parsed = parse("measurements.checkpoint_cost", Arguments, __doc__, arguments)
        if list(parsed.updates + parsed.made_up) != sorted(parsed.updates + parsed.made_up):
            raise ValueError("updates and made_up must grow, got other numbers; sort them.")
        from a3c_jax.asynchrony.run import Run

        program = a3c_jax.build(parsed.config)
    print(
        "updates       made by    episodes  file KiB  save ms: median  max  another waits ms  resume s"
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        for updates in parsed.updates + parsed.made_up:
            if updates in parsed.updates:
                checkpoint = _train_until(program, updates, Path(folder), checkpoint)
            run = Run(program)
            if checkpoint is not None:
                run.restore(checkpoint)
            with (checkpoints := a3c_jax.CheckpointFolder(folder)).keeping(run.logs, checkpoint):
                if updates in parsed.made_up:
                    _make_up(run, updates)
                checkpoint, costs = _measure(run, checkpoints, parsed.repetitions)
            began = time.perf_counter()
            run = Run(program)
            run.restore(checkpoint)
            with a3c_jax.CheckpointFolder(folder).keeping(run.logs, checkpoint):
                resume = time.perf_counter() - began
            by = "training" if updates in parsed.updates else "hand"
            print(
                f"{updates:<14,}{by:<9}{len(run.logs['episodes']):>12,}{costs}{resume:>10.2f}",
                flush=True,
            )


def _train_until(program: Any, updates: int, folder: Path, resume: Any) -> Any:
    """Trains up to a number of updates, and returns the checkpoint."""
    program = program.replace(max_steps=updates * program.config.steps_per_update)
    a3c_jax.train(
        program, resume=resume, checkpoints=a3c_jax.CheckpointFolder(folder, every_seconds=None)
    )
    return a3c_jax.find_checkpoint(folder)


def _make_up(run: Any, updates: int) -> None:
    """Fills the logs up to a number of updates, with an episode for every tenth."""
    schedule, episodes = run.logs["schedule"], run.logs["episodes"]
    while (begin := len(schedule)) < updates:
        count = min(_PART, updates - begin)
        schedule.extend(count, 0, np.arange(begin, begin + count))
        steps = np.arange(begin, begin + count, 10) * run.program.config.steps_per_update
        episodes.extend(len(steps), 0, 1.0, 100, steps, 1.0)
        for log in (schedule, episodes):
            log.seal()
            log.flush()


def _measure(run: Any, checkpoints: Any, repetitions: int) -> tuple[Any, str]:
    """Saves a few checkpoints. Returns the last one, and the figures as a part of the row."""
    seconds, path = [], Path()
    with _longest_wait() as waits:
        for _ in range(repetitions):
            began = time.perf_counter()
            path = checkpoints.save(run.checkpoint())
            seconds.append(time.perf_counter() - began)
    size, milliseconds = path.stat().st_size / 1024, 1000 * np.array(seconds)
    costs = f"{size:>10.1f}{np.median(milliseconds):>17.1f}{milliseconds.max():>7.0f}{1000 * max(waits):>18.1f}"
    return a3c_jax.load_checkpoint(path), costs


@contextlib.contextmanager
def _longest_wait() -> Iterator[list[float]]:
    """How much longer than it asked for a thread slept, again and again during the block."""
    waits, stop = [0.0], threading.Event()

    def sleep() -> None:
        while not stop.is_set():
            began = time.perf_counter()
            time.sleep(_NAP)
            waits.append(time.perf_counter() - began - _NAP)

    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    try:
        yield waits
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
