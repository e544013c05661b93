"""Do a run again, update by update, and compare: `python -m experiments.replay runs/...`.

One thread makes every update of the run's schedule, whatever the number of workers was, and the result
must be the run's, bit for bit. For a run that failed, it goes on to the very update that did.
"""

import dataclasses
import json
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
    schedule, failure = checkpoint.schedule, arguments.run / "failure.json"
    if failure.exists() and arguments.until is None:
        failed = json.loads(failure.read_text(encoding="utf-8"))
        schedule = type(schedule)(
            np.append(schedule.worker, np.int32(failed["worker"])),
            np.append(schedule.pulled_version, failed["pulled_version"]),
        )
    _replay(checkpoint, schedule, arguments.until)


def _replay(checkpoint: Any, schedule: Any, until: int | None) -> None:
    from tqdm import tqdm

    from a3c_jax import training
    from a3c_jax.threads import WorkerError

    total = len(schedule.worker) if until is None else until
    last: dict[str, float] = {}
    with tqdm(total=total, unit=" updates") as bar:

        def on_update(k: int, snapshot: Any, gradients: Any, metrics: dict[str, float]) -> None:
            last.update(metrics)
            bar.update()

        try:
            result = training.replay(checkpoint.config, schedule, until=until, on_update=on_update)
        except WorkerError as error:
            bar.close()
            print(f"update {bar.n:,} fails as it did in the run: {error}")
            return
    if until is not None:
        print(f"update {result.version - 1:,}, by worker {schedule.worker[result.version - 1]}:")
        for name, value in last.items():
            print(f"  {name:20} {value:.6g}")
        return
    difference = first_difference(checkpoint, result)
    if difference is None:
        print(
            f"identical: parameters, best parameters, optimizer state and all {len(result.episodes.length):,} "
            f"episodes of {result.version:,} updates by {checkpoint.config.num_workers} workers"
        )
        return
    print(f"different: {difference}")
    raise SystemExit(1)


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
