"""Learning curves of many runs in one picture: `python -m experiments.curves runs/a runs/b --output curves.png`.

Runs of the same environment share a panel. MinAtar's show what actor-critic with traces came to in Young & Tian 2019
(arXiv:1903.03176) after 5 million frames, read off their figures. Their environments differ from gymnax's: an action is
repeated with probability 0.1, and only gymnax ends an episode after 1,000 steps (Freeway: 2,500, in both).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro

YOUNG_AND_TIAN = {
    "Asterix-MinAtar": 19.0,
    "Breakout-MinAtar": 17.5,
    "Freeway-MinAtar": 47.5,
    "Seaquest-MinAtar": 15.5,
    "SpaceInvaders-MinAtar": 185.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to draw."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders that ended."""
    output: Path = Path("curves.png")
    """Where the picture goes."""


def main() -> None:
    """Draws the picture and prints each task's returns."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from a3c_jax.metrics import EpisodeLog
    from experiments.plotting import Curves, learning_curves

    tasks: dict[str, list[EpisodeLog]] = {}
    for run in sorted(arguments.runs):
        environment = json.loads((run / "config.json").read_text())["environment"]
        with np.load(run / "episodes.npz") as episodes:
            tasks.setdefault(environment, []).append(EpisodeLog(**episodes))
    panels = []
    for name, runs in tasks.items():
        reference = (YOUNG_AND_TIAN[name], "AC(0.8)") if name in YOUNG_AND_TIAN else None
        panels.append(Curves(name, runs, reference))
        last = [f"{run.episode_return[-100:].mean():.1f}" for run in runs]
        print(f"{name}: mean return of the last 100 episodes: {', '.join(last)}")
    learning_curves(arguments.output, panels)
    print(f"picture: {arguments.output}")


if __name__ == "__main__":
    main()
