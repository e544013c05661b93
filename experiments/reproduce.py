"""An experiment over many seeds, each in a fresh process: `python -m experiments.reproduce`.

It prints the table of results that README.md shows. Options it does not know go to the experiment:
`python -m experiments.reproduce --seeds 3 --num-workers 16`.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to repeat, and how often."""

    experiment: str = "cartpole"
    """Name of a module in experiments/."""
    seeds: int = 10
    """Number of runs."""
    first_seed: int = 0
    """The first run's seed; the others follow it."""
    threshold: float = 475.0
    """Mean return of an evaluation from which a run counts as having passed it."""


def main() -> None:
    """Runs the seeds one after the other and prints the table."""
    arguments, options = tyro.cli(Arguments, return_unknown_args=True, description=__doc__)
    folder = Path("runs") / f"reproduce-{arguments.experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    print("seed  solved      steps  seconds  import  setup  compile  train   greedy  sampled")
    rows = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        run_dir = folder / f"seed{seed}"
        command = [sys.executable, "-m", f"experiments.{arguments.experiment}", "--seed", str(seed)]
        command += ["--run-dir", str(run_dir), "--no-progress", *options]
        started = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr}")
        summary = json.loads((run_dir / "summary.json").read_text())
        seconds, evaluation = summary["seconds"], summary["evaluation"]
        row = {
            "seed": seed,
            "solved": summary["stop_reason"] == "solved",
            "steps": summary["environment_steps"],
            "seconds": summary["trained_at"] - started,
            **{part: seconds[part] for part in ("import", "setup", "compile", "train")},
            **{policy: evaluation[policy]["mean"] for policy in ("greedy", "sampled")},
        }
        rows.append(row)
        print(
            f"{seed:4d}  {row['solved']!s:6} {row['steps']:10,d} {row['seconds']:8.2f} "
            f"{row['import']:7.2f} {row['setup']:6.2f} {row['compile']:8.2f} {row['train']:6.2f} "
            f"{row['greedy']:8.1f} {row['sampled']:8.1f}",
            flush=True,
        )
    print(f"\n{len(rows)} seeds, {os.cpu_count()} cores; median (smallest to largest):")
    for name in ("steps", "seconds", "import", "setup", "compile", "train", "greedy", "sampled"):
        values = [row[name] for row in rows]
        print(f"  {name:8} {np.median(values):12,.2f} ({min(values):,.2f} to {max(values):,.2f})")
    for name in ("greedy", "sampled"):
        passed = sum(row[name] >= arguments.threshold for row in rows)
        print(f"  {name} evaluation of {arguments.threshold:g} or more: {passed} of {len(rows)}")
    print(f"  solved: {sum(row['solved'] for row in rows)} of {len(rows)}")
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"folder: {folder}")


if __name__ == "__main__":
    main()
