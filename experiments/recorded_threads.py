"""Starts JAX with as many threads as a recorded run had, so that its last bits are the same on another machine."""

import json
from pathlib import Path

from a3c_jax.asynchrony import thread_pools

_LONGEST_LINE = 1 << 16


def start_with_threads_of(run: Path) -> None:
    """Prepares the process to go on with a run, or to repeat it. Call it before JAX is imported.

    A checkpoint that cannot be read is left to `find_checkpoint`, which says what is wrong with it.

    Args:
      run: a run folder, a folder of checkpoints, or a checkpoint.
    """
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    saved = (file for file in folder.glob("*.checkpoint") if file.stem.isdecimal())
    checkpoint = run if run.is_file() else max(saved, key=lambda file: int(file.stem), default=None)
    if checkpoint is None:
        return
    try:
        with open(checkpoint, "rb") as file:
            versions = json.loads(file.readline(_LONGEST_LINE))["run"]["versions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(versions, dict):
        thread_pools.start_with(versions)
