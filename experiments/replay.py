"""Do a run again, update by update, and compare: `python -m experiments.replay runs/...`.

One thread makes every update of the run's schedule, whatever the number of workers was, and the result
must be the run's, bit for bit. For a run that failed, it goes on to the very update that did.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to replay."""

    run: tyro.conf.Positional[Path]
    """The run folder, or one of its checkpoints."""
    until: int | None = None
    """How many updates to make; None makes all, and compares."""


def main() -> None:
    """Replays a run folder; the exit code is 0 where it is identical, and 1 where it is not."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from a3c_jax import training  # noqa: F401 (first, since it sets how JAX runs)
    from a3c_jax.checkpoints import CheckpointError, find, library_versions

    if arguments.until is not None and arguments.until < 1:
        print(f"error: until must be >= 1, got {arguments.until}; use 1 or more.", file=sys.stderr)
        raise SystemExit(2)
    try:
        checkpoint = find(arguments.run)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if checkpoint.versions != library_versions():
        print(
            f"note: the run was made by {checkpoint.versions}, this is {library_versions()}: "
            "the last bits may differ"
        )
    if arguments.until is not None:
        _show_update(checkpoint, arguments.until)
        return
    failure = arguments.run / "failure.json"
    if failure.exists():
        failed = json.loads(failure.read_text(encoding="utf-8"))
        if _fails_again(checkpoint, failed):
            return
        print("the update that failed does not fail when it is played again; up to it:")
    _compare(checkpoint, _replay(checkpoint, checkpoint.schedule))


def _replay(checkpoint: Any, schedule: Any, **options: Any) -> Any:
    from tqdm import tqdm

    from a3c_jax import training
    from experiments import tasks  # noqa: F401  (registers them)

    on_update = options.pop("on_update", None)
    total = len(schedule.worker[: options.get("until")])
    with tqdm(total=total, unit=" updates") as bar:

        def update(k: int, *seen: Any) -> None:
            bar.update()
            if on_update is not None:
                on_update(k, *seen)

        return training.replay(checkpoint.config, schedule, on_update=update, **options)


def _show_update(checkpoint: Any, until: int) -> None:
    last: dict[str, float] = {}
    result = _replay(
        checkpoint,
        checkpoint.schedule,
        until=until,
        on_update=lambda k, snapshot, gradients, metrics: last.update(metrics),
    )
    print(f"update {result.version - 1:,}, by worker {result.schedule.worker[-1]}:")
    for name, value in last.items():
        print(f"  {name:20} {value:.6g}")


def _fails_again(checkpoint: Any, failed: dict[str, Any]) -> bool:
    """Plays the update that failed too; whether it fails again."""
    from a3c_jax.threads import WorkerError

    schedule = checkpoint.schedule._replace(
        worker=np.append(checkpoint.schedule.worker, np.int32(failed["worker"])),
        pulled_version=np.append(checkpoint.schedule.pulled_version, failed["pulled_version"]),
    )
    try:
        _replay(checkpoint, schedule)
    except WorkerError as error:
        _compare(checkpoint, error.result)
        # Others may have made a few more updates in the run, before they saw that it had failed.
        ran, replayed = (re.sub(r"of version \d+ ", "", x) for x in (failed["error"], str(error)))
        as_it_did = "as it did in the run" if ran == replayed else "in another way"
        print(f"update {error.result.version:,} fails {as_it_did}: {error}")
        return True
    return False


def _compare(checkpoint: Any, result: Any) -> None:
    """Says identical, or shows the first difference and exits with 1."""
    difference = first_difference(checkpoint, result)
    if difference is not None:
        print(f"different: {difference}")
        raise SystemExit(1)
    print(
        f"identical: parameters, best parameters, optimizer state and all {len(result.episodes.length):,} "
        f"episodes of {result.version:,} updates by {checkpoint.config.num_workers} workers"
    )


def first_difference(checkpoint: Any, result: Any) -> str | None:
    """The first thing in which a replay differs from the run, in words; None where nothing does."""
    import jax

    from a3c_jax.worker import PackedWorkerStep

    for name in ("worker", "episode_return", "length", "environment_steps"):
        ran, replayed = getattr(checkpoint.episodes, name), getattr(result.episodes, name)
        count = min(len(ran), len(replayed))
        if ran[:count].tobytes() != replayed[:count].tobytes():
            i = int(np.argmax(ran[:count] != replayed[:count]))
            update = checkpoint.episodes.environment_steps[i] // checkpoint.config.steps_per_update
            return (
                f"episode {i:,}, reported by update {update - 1:,}, has {name} {ran[i]} in the run and "
                f"{replayed[i]} in the replay"
            )
        if len(ran) != len(replayed):
            return f"{len(ran):,} episodes in the run, {len(replayed):,} in the replay"
    opt_state = np.concatenate(
        [np.ravel(np.asarray(x)).view(np.uint32) for x in jax.tree.leaves(result.opt_state)]
    )
    for name, ran, replayed in (
        ("parameters", checkpoint.params, PackedWorkerStep.flatten(result.params)),
        ("best parameters", checkpoint.best_params, PackedWorkerStep.flatten(result.best_params)),
        ("optimizer's state", checkpoint.opt_state[: len(opt_state)], opt_state),
    ):
        replayed = np.asarray(replayed)
        if ran.tobytes() != replayed.tobytes():
            i = int(np.argmax(ran != replayed))
            return f"the {name}, at word {i:,}: {ran[i]} in the run and {replayed[i]} in the replay"
    return None


if __name__ == "__main__":
    main()
