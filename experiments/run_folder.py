"""The folder of a run: everything that a run leaves behind, however it ends."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import a3c_jax


def check_is_new(run_dir: Path | None) -> None:
    """Refuses a folder that exists.

    Raises:
      FileExistsError: if it exists.
    """
    if run_dir is not None and run_dir.exists():
        raise FileExistsError(
            f"run_dir must not exist, got {run_dir}; choose another name or remove it."
        )


def make_run_dir(name: str, wanted: Path | None) -> Path:
    """Makes a folder that did not exist before: the one wanted, or a new one under runs/."""
    check_is_new(wanted)
    run_dir = fresh = wanted or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(2, 1000):
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            check_is_new(wanted)
            run_dir = fresh.with_name(f"{fresh.name}-{attempt}")
    raise FileExistsError(f"run_dir {run_dir} and all like it exist; give --run-dir.")


def continue_in(run_dir: Path, wanted: Path | None, environment_steps: int) -> Path:
    """The run folder to go on in, with its metrics cut back to the number of steps that a checkpoint has.

    Raises:
      ValueError: if another folder is wanted.
    """
    if wanted not in (None, run_dir):
        raise ValueError(
            f"run_dir must not be given with a run folder to resume, got {wanted}; resume from a "
            "checkpoint file to go on in a new folder."
        )
    rows = run_dir / "metrics.jsonl"
    if rows.exists():
        kept = []
        for line in rows.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a process that was killed
                if json.loads(line)["environment_steps"] <= environment_steps:
                    kept.append(line + "\n")
        rows.write_text("".join(kept), encoding="utf-8")
    (run_dir / "failure.json").unlink(missing_ok=True)
    return run_dir


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, indented for people to read. The file is there with all of it, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def train_in_folder(
    program: "a3c_jax.Program",
    run_dir: Path,
    checkpoints: "a3c_jax.CheckpointFolder",
    resume: "a3c_jax.Checkpoint | None" = None,
    *,
    progress: bool = True,
    sinks: Sequence[Any] = (),
    updates_per_row: int | None = None,
) -> "a3c_jax.TrainResult":
    """Trains, with metrics in the run folder and a progress bar; the arguments are those of `a3c_jax.train`.

    Raises:
      WorkerError: if a worker failed. `failure.json` says why.
      TrainingInterrupted: on Ctrl-C and on SIGTERM.
    """
    config = program.config
    write_json(run_dir / "config.json", config.as_dict())
    sinks = [*sinks, a3c_jax.JsonLines(run_dir / "metrics.jsonl")]
    if progress:
        sinks.append(
            a3c_jax.ProgressBar(config.max_steps, config.solved_window, desc=config.environment)
        )
    try:
        return a3c_jax.train(
            program,
            sinks=sinks,
            checkpoints=checkpoints,
            resume=resume,
            updates_per_row=updates_per_row,
        )
    except a3c_jax.WorkerError as error:
        failure = {
            "error": str(error),
            "worker": error.worker,
            "pulled_version": error.pulled_version,
            "update": error.result.version,
        }
        write_json(run_dir / "failure.json", failure)
        raise


@contextlib.contextmanager
def exit_if_cut_short(run_dir: Path, resume: "a3c_jax.Checkpoint | None") -> Iterator[None]:
    """Ends the process with a message on how to go on, if the training in the block does not come to its end.

    Raises:
      SystemExit: on Ctrl-C with exit code 130, on SIGTERM with 143, and with 1 if a worker failed.
    """
    try:
        yield
    except a3c_jax.TrainingInterrupted as interruption:
        _end_interrupted(run_dir, interruption, resume)
    except a3c_jax.WorkerError as error:
        print(
            f"error: {error}\nrun folder: {run_dir}, with everything up to update "
            f"{error.result.version:,}\nlook at it with: python -m experiments.replay {run_dir}",
            file=sys.stderr,
        )
        raise SystemExit(1) from error


def _end_interrupted(run_dir: Path, interruption: Any, resume: Any) -> NoReturn:
    from experiments.report import print_training

    print_training(interruption.result, 0 if resume is None else resume.environment_steps)
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec is not None else "experiments.cartpole"
    print(f"run folder: {run_dir}\ngo on with: python -m {module} --resume {run_dir}")
    code = 128 + interruption.signal
    if any(thread.name.startswith("a3c-worker") for thread in threading.enumerate()):
        # A second Ctrl-C: JAX must not be taken down under threads that are still inside it.
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code) from None
