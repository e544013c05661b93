"""Run an example with many seeds, each in a fresh process: `python -m experiments.measurements.reproduction`.

It prints a line for each seed, and the table of medians that docs/results.md shows. Options that it does not know
go to the example: `python -m experiments.measurements.reproduction --seeds 3 --num-workers 16`.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.command_line import parse
from experiments.run_folder import make_run_dir, write_json

COLUMNS = ("steps", "seconds", "import", "setup", "compile", "train", "prompt", "greedy", "sampled")
"""`seconds` is until it is solved, `prompt` until the process has ended, with evaluation and picture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to repeat, and how often."""

    experiment: str = "cartpole"
    """Name of an example in experiments/."""
    seeds: int = 10
    """Number of runs."""
    first_seed: int = 0
    """The first run's seed. The others follow it."""
    threshold: float = 475.0
    """Mean return from which an evaluation counts as passed."""


def main() -> None:
    """Runs the seeds one after the other and prints the table."""
    name = "measurements.reproduction"
    arguments, options = parse(name, Arguments, __doc__, None, return_unknown_args=True)
    folder = make_run_dir(f"reproduction-{arguments.experiment}", None)
    print("seed  solved" + "".join(f"{name:>11}" for name in COLUMNS))
    rows = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        row = run_seed(arguments.experiment, seed, folder / f"seed{seed}", options)
        rows.append(row)
        print(
            f"{seed:4d}  {row['solved']!s:6}{row['steps']:11,}"
            + "".join(f"{row[name]:11.2f}" for name in COLUMNS[1:]),
            flush=True,
        )
    print(f"\n{len(rows)} seeds, {os.cpu_count()} cores; median (smallest to largest):")
    for name in COLUMNS:
        values = [row[name] for row in rows]
        print(f"  {name:8} {np.median(values):12,.2f} ({min(values):,.2f} to {max(values):,.2f})")
    for name in ("greedy", "sampled"):
        passed = sum(row[name] >= arguments.threshold for row in rows)
        print(f"  {name} evaluation of {arguments.threshold:g} or more: {passed} of {len(rows)}")
    print(f"  solved: {sum(row['solved'] for row in rows)} of {len(rows)}")
    write_json(folder / "results.json", rows)
    print(f"folder: {folder}")


def run_seed(experiment: str, seed: int, run_dir: Path, options: list[str]) -> dict[str, Any]:
    """Runs one seed in a process of its own; its figures. Seconds count from the start of the process."""
    command = [sys.executable, "-m", f"experiments.{experiment}", "--seed", str(seed)]
    command += ["--run-dir", str(run_dir), "--no-progress", *options]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr}")
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "solved": summary["stop_reason"] == "solved",
        "steps": summary["environment_steps"],
        **summary["seconds"],
        **{name: summary["evaluation"][name]["mean"] for name in ("greedy", "sampled")},
        "seconds": summary["trained_at"] - started,
        "prompt": ended - started,
    }


if __name__ == "__main__":
    main()
