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
from a3c_jax.asynchrony.signals import noted_signals, number_of
from a3c_jax.asynchrony.whole_files import writing_whole
from experiments.aggregate import decimals


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


def check_goes_on(
    run_dir: Path, checkpoint: "a3c_jax.Checkpoint", config: "a3c_jax.A3CConfig"
) -> None:
    """Refuses to go on in a folder that is no run folder, or where nothing is left to play and to write.

    Raises:
      ValueError: if the folder is one of checkpoints; if `checkpoint`, its latest, has played all that `config`
        allows. Under its own budget, a run that was cut short before its evaluation may still be evaluated.
    """
    if not (run_dir / "checkpoints").is_dir():
        raise ValueError(
            f"resume must be a run folder or a checkpoint file, got {run_dir}, a folder of checkpoints; give the folder of "
            "its run, or one of its files to go on in a new folder."
        )
    steps, episodes = checkpoint.environment_steps, len(checkpoint.episodes.episode_return)
    summary = read_json(run_dir / "summary.json") or {}
    has_ended = "evaluation" in summary and summary.get("environment_steps") == steps
    for name, played in (("max_steps", steps), ("max_episodes", episodes)):
        budget = getattr(config, name)
        is_spent = budget is not None and played >= budget
        if is_spent and (has_ended or budget != getattr(checkpoint.config, name)):
            raise ValueError(
                f"{name} must be more than the {played:,} that the run has played, to go on from there, got {budget:,}; "
                f"give a larger --{name.replace('_', '-')}."
            )


def continue_in(run_dir: Path, environment_steps: int) -> None:
    """Cuts the metrics of a run folder back to the number of steps that a checkpoint has, to go on from there."""
    rows = run_dir / "metrics.jsonl"
    if rows.exists():
        with open(rows, "rb") as lines, writing_whole(rows) as kept:
            kept.writelines(line for line in lines if _belongs_to(line, environment_steps))
    (run_dir / "failure.json").unlink(missing_ok=True)


def _belongs_to(line: bytes, environment_steps: int) -> bool:
    """Whether a line is a row of at most so many steps. The last one of a process that was killed is torn."""
    try:
        return line.endswith(b"\n") and json.loads(line)["environment_steps"] <= environment_steps
    except (KeyError, TypeError, ValueError, RecursionError):
        return False


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, indented for people to read. The file is there with all of it, or as it was before."""
    with writing_whole(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON; None if there is no such file, or if it holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def train_in_folder(
    program: "a3c_jax.Program",
    run_dir: Path,
    checkpoints: "a3c_jax.CheckpointFolder",
    resume: "a3c_jax.Checkpoint | None" = None,
    *,
    progress: bool = True,
    sinks: Sequence[Any] = (),
    updates_per_row: int | None = None,
    ray: "a3c_jax.RayOptions | None" = None,
) -> "a3c_jax.TrainResult":
    """Trains, with metrics in the run folder and a progress bar; the arguments are those of `a3c_jax.train`.

    Raises:
      WorkerError: if a worker failed. `failure.json` says why.
      SinkError: if a sink failed.
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
            ray=ray,
        )
    except a3c_jax.WorkerError as error:
        failure = {
            "error": str(error),
            "worker": error.worker,
            "pulled_version": error.pulled_version,
            "update": error.result.version,
        }
        try:
            write_json(run_dir / "failure.json", failure)
        except OSError as problem:
            error.add_note(f"failure.json cannot be written: {problem}")
        raise


def print_training(result: "a3c_jax.TrainResult", steps_before: int = 0) -> None:
    """Prints why a run ended, and the mean return of its last episodes."""
    config = result.config
    rate = (result.environment_steps - steps_before) / max(result.wall_clock["train"], 1e-9)
    returns = result.episodes.episode_return
    last = returns[-config.solved_window :]
    skipped = f", of which {result.skipped:,} were skipped" if result.skipped else ""
    print(
        f"\n{config.environment}, seed {config.seed}: stopped ({result.stop_reason}) after "
        f"{result.environment_steps:,} steps, {len(returns):,} episodes, {result.version:,} updates{skipped}\n"
        f"  mean return of the last {config.solved_window} episodes: "
        f"{f'{last.mean():.{decimals(last)}f}' if last.size else '-'}, "
        f"{rate:,.0f} steps/s, overshoot {result.overshoot:,} steps"
    )


@contextlib.contextmanager
def exit_if_cut_short(
    run_dir: Path, resume: "a3c_jax.Checkpoint | None", options: Sequence[str] = ()
) -> Iterator[None]:
    """Ends the process with a message on how to go on, if the training in the block does not come to its end.

    Args:
      run_dir: the run folder.
      resume: what the run goes on from.
      options: what the command to go on with has besides `--resume`.

    Raises:
      SystemExit: on Ctrl-C with exit code 130, on SIGTERM with 143, and with 1 if a worker or a sink failed.
    """
    go_on = f"go on with: {' '.join([_resume_command(run_dir), *options])}"
    try:
        yield
    except a3c_jax.TrainingInterrupted as interruption:
        print_training(interruption.result, 0 if resume is None else resume.environment_steps)
        print(f"run folder: {run_dir}\n{go_on}")
        _end_process(128 + interruption.signal)
    except a3c_jax.WorkerError as error:
        print(
            f"error: {error}\nrun folder: {run_dir}, with everything up to update "
            f"{error.result.version:,}\nlook at it with: python -m experiments.replay {run_dir}",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    except a3c_jax.SinkError as error:
        print(f"error: {error}\n{go_on}", file=sys.stderr)
        raise SystemExit(1) from error


@contextlib.contextmanager
def exit_on_interruption() -> Iterator[None]:
    """Notes Ctrl-C and SIGTERM during the block, and ends the process with exit code 130 or 143 where it is safe.

    `raise_noted` in the block says where that is, besides the training.
    """
    with noted_signals():
        try:
            yield
        except KeyboardInterrupt as interruption:
            print("interrupted", *interruption.args[1:], sep="; ", file=sys.stderr)
            _end_process(128 + number_of(interruption))


def _resume_command(run_dir: Path) -> str:
    spec = sys.modules["__main__"].__spec__
    return f"python -m {'experiments.cartpole' if spec is None else spec.name} --resume {run_dir}"


def _end_process(code: int) -> NoReturn:
    if any(thread.name.startswith("a3c-worker") for thread in threading.enumerate()):
        # A second Ctrl-C: JAX must not be taken down under threads that are still inside it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from None
