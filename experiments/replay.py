"""Repeat a run update by update and compare the results: `python -m experiments.replay runs/...`.

One thread makes every update again in the order in which the run made them, whatever the number of workers was.
The result must be that of the run, bit for bit. If the run failed, the replay goes on to the update that failed.
A long run can be repeated in part: `--from` begins at a checkpoint, and `--until` ends at an update.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import a3c_jax
from a3c_jax.asynchrony.objects import check_objects, name_objects
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.recorded_threads import start_with_threads_of
from experiments.run_folder import read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to repeat."""

    run: tyro.conf.Positional[Path]
    """The run folder, or one of its checkpoints."""
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Begin at this checkpoint of the run, instead of at its first update."""
    until: int | None = None
    """End at this update, counted from the run's first, and print the metrics of the last one made. The result is compared if the run has a checkpoint of this update. None goes to the end, and compares."""
    cache: Annotated[CompilationCache, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=CompilationCache
    )


def main(arguments: Sequence[str] | None = None, **objects: Any) -> None:
    """Replays a run. The process ends with exit code 1 if the result differs.

    Args:
      arguments: the command line; by default that of the process.
      **objects: the environment or the network, if the run was given an object instead of a name.
    """
    with exit_on_bad_input():
        parsed = parse("replay", Arguments, __doc__, arguments)
        if parsed.until is not None and parsed.until < 1:
            raise ValueError(f"until must be >= 1, got {parsed.until}; use 1 or more.")
        start_with_threads_of(parsed.run)
        # It registers its environments, and sets the process up before anything starts JAX.
        from experiments import tasks  # noqa: F401

        checkpoint = a3c_jax.find_checkpoint(parsed.run)
        check_objects(checkpoint.objects, name_objects(objects))
        start = None
        if parsed.start is not None:
            start = _find_start(
                parsed.start, checkpoint.version if parsed.until is None else parsed.until
            )
    parsed.cache.use()
    _compare_versions(checkpoint)
    with exit_on_bad_input(ValueError):
        if parsed.until is not None:
            _show_update(checkpoint, parsed.until, objects, start)
            return
        failed = read_json(parsed.run / "failure.json")
        if failed is not None and start is None and _repeat_failure(checkpoint, failed, objects):
            return
        _compare(checkpoint, _replay(checkpoint, checkpoint.schedule, objects, start=start))


def _find_start(path: Path, last: int) -> Any:
    """The checkpoint to begin at.

    Raises:
      ValueError: if it is not before the last update.
    """
    start = a3c_jax.load_checkpoint(path)
    if start.version >= last:
        raise ValueError(
            f"from must be a checkpoint before the last update, {last:,}, got one of update {start.version:,}; "
            "give an earlier one."
        )
    return start


def _repeat_failure(checkpoint: Any, failed: dict[str, Any], objects: Any) -> bool:
    """Repeats a run up to the update that failed; True if that fails again."""
    if not isinstance(failed.get("worker"), int) or not isinstance(failed.get("error"), str):
        print("failure.json cannot be understood; up to the last checkpoint:")
        return False
    if failed.get("pulled_version") is None:
        print("the run failed before its worker had pulled parameters; up to there:")
        return False
    if _fails_again(checkpoint, failed, objects):
        return True
    print("the update that failed in the run does not fail when it is repeated; up to it:")
    return False


def _compare_versions(checkpoint: Any) -> None:
    from a3c_jax.asynchrony.checkpoint_files import library_versions

    now = library_versions()
    if any(value != now.get(name, value) for name, value in checkpoint.versions.items()):
        print(
            f"note: the run was made by {checkpoint.versions}, this is {now}: the last bits may differ"
        )


def _replay(checkpoint: Any, schedule: Any, objects: Any, **options: Any) -> Any:
    """Repeats the updates of a schedule, with a progress bar."""
    from tqdm import tqdm

    on_update = options.pop("on_update", None)
    with tqdm(total=len(schedule.worker[: options.get("until")]), unit=" updates") as bar:

        def update(k: int, *seen: Any) -> None:
            bar.update()
            if on_update is not None:
                on_update(k, *seen)

        return a3c_jax.replay(
            checkpoint.config,
            schedule,
            on_update=update,
            single_kernel=checkpoint.single_kernel,
            **options,
            **objects,
        )


def _show_update(checkpoint: Any, until: int, objects: Any, start: Any) -> None:
    """Repeats the updates up to one, prints its metrics, and compares if there is a checkpoint of it."""
    last: dict[str, float] = {}

    def note(k: int, snapshot: Any, gradients: Any, metrics: dict[str, float]) -> None:
        last.update(metrics)

    result = _replay(
        checkpoint, checkpoint.schedule, objects, start=start, until=until, on_update=note
    )
    print(f"update {result.version - 1:,}, by worker {result.schedule.worker[-1]}:")
    for name, value in last.items():
        print(f"  {name:20} {value:.6g}")
    if (there := _checkpoint_of(checkpoint, result.version)) is not None:
        _compare(there, result)


def _checkpoint_of(checkpoint: Any, version: int) -> Any:
    """The run's checkpoint of an update; None if there is none."""
    if checkpoint.version == version:
        return checkpoint
    if checkpoint.logs is None:
        return None
    path = checkpoint.logs["schedule"].path.parent / f"{version:012d}.checkpoint"
    return a3c_jax.load_checkpoint(path) if path.exists() else None


def _fails_again(checkpoint: Any, failed: dict[str, Any], objects: Any) -> bool:
    """Repeats the update that failed, too; True if it fails again."""
    schedule = checkpoint.schedule._replace(
        worker=np.append(checkpoint.schedule.worker, np.int32(failed["worker"])),
        pulled_version=np.append(checkpoint.schedule.pulled_version, failed["pulled_version"]),
    )
    try:
        _replay(checkpoint, schedule, objects)
    except a3c_jax.WorkerError as error:
        _compare(checkpoint, error.result)
        # Other workers may have made a few more updates in the run before they saw that it had failed.
        ran, replayed = (re.sub(r"of version \d+ ", "", x) for x in (failed["error"], str(error)))
        as_it_did = "as it did in the run" if ran == replayed else "in another way"
        print(f"update {error.result.version:,} fails {as_it_did}: {error}")
        return True
    return False


def _compare(checkpoint: Any, result: Any) -> None:
    """Prints that the replay is identical, or the first difference, and then exits with 1."""
    difference = first_difference(checkpoint, result)
    if difference is not None:
        print(f"different: {difference}")
        raise SystemExit(1)
    print(
        f"identical: parameters, best parameters, optimizer state and all {len(result.episodes.length):,} "
        f"episodes of {result.version:,} updates by {checkpoint.config.num_workers} workers"
    )


def first_difference(checkpoint: Any, result: Any) -> str | None:
    """The first thing in which a replay differs from the run, in words; None if nothing differs."""
    from a3c_jax.asynchrony.trees import name_leaves

    difference = _first_different_episode(checkpoint, result.episodes)
    # Besides the optimizer's state, a store holds whether its last update was finite.
    for name, ran, replayed in (
        ("parameters", checkpoint.params, result.params),
        ("best parameters", checkpoint.best_params, result.best_params),
        ("optimizer's state", checkpoint.optimizer_state, {"state": result.opt_state}),
    ):
        difference = difference or _first_different_number(name, ran, name_leaves(replayed))
    return difference


def _first_different_episode(checkpoint: Any, replayed: Any) -> str | None:
    ran, steps_per_update = checkpoint.episodes, checkpoint.config.steps_per_update
    count = min(len(ran.worker), len(replayed.worker))
    for name in ("worker", "episode_return", "length", "environment_steps"):
        ours, theirs = getattr(ran, name)[:count], getattr(replayed, name)[:count]
        if ours.tobytes() != theirs.tobytes():
            i = int(np.argmax(ours != theirs))
            update = ran.environment_steps[i] // steps_per_update - 1
            return (
                f"episode {i:,}, reported by update {update:,}, has {name} {ours[i]} in the run and "
                f"{theirs[i]} in the replay"
            )
    if len(ran.worker) != len(replayed.worker):
        return f"{len(ran.worker):,} episodes in the run, {len(replayed.worker):,} in the replay"
    return None


def _first_different_number(what: str, ran: Any, replayed: dict[str, np.ndarray]) -> str | None:
    if not isinstance(ran, dict):  # a checkpoint of format 1 has one vector of 32-bit words
        vector = np.concatenate([_bits(x).astype(np.uint32) for x in replayed.values()])
        ran, replayed = {"": ran.view(np.uint32)[: len(vector)]}, {"": vector}
    for name, theirs in replayed.items():
        ours, where = ran[name], " ".join(filter(None, [what, name]))
        different = _bits(ours) != _bits(theirs)
        if different.any():
            i = int(np.argmax(different))
            return (
                f"the {where}, at element {i:,}: {ours.ravel()[i]} in the run and "
                f"{theirs.ravel()[i]} in the replay"
            )
    return None


def _bits(array: np.ndarray) -> np.ndarray:
    """The numbers of an array as unsigned integers, so that NaN can be compared and -0 differs from 0."""
    return np.ascontiguousarray(array).ravel().view(f"u{array.itemsize}")


if __name__ == "__main__":
    main()
