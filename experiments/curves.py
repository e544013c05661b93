"""Draw the learning curves of many runs in one picture: `python -m experiments.curves runs/a runs/b`.

Runs of one environment share a panel. Runs that differ in nothing but their seeds form a group, with a thin line
for each run and a thick one for their mean, which ends where the group's shortest run ends. The legend says in what
the configurations differ.

MinAtar's panels show for comparison what actor-critic with traces reached in Young & Tian 2019 (arXiv:1903.03176)
after 5 million frames, read off their figures. Their environments differ from gymnax's: an action is repeated
with probability 0.1, and only gymnax ends an episode after 1,000 steps (Freeway: 2,500, in both).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from experiments.command_line import exit_on_bad_input, parse

if TYPE_CHECKING:
    from a3c_jax import EpisodeLog

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

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of runs that have ended."""
    output: Path = Path("curves.png")
    """Where the picture goes."""


Group = tuple[dict[str, Any], list["EpisodeLog"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the picture, and prints the results of each group."""
    with exit_on_bad_input():
        parsed = parse("curves", Arguments, __doc__, arguments)
        if not parsed.runs:
            raise ValueError(
                "no run folder given; name one or more: python -m experiments.curves runs/*"
            )
        environments = group_runs(parsed.runs)
    from experiments.plotting import Panel, learning_curves

    panels = {}
    for name, groups in environments.items():
        labels = label_groups([config for config, _ in groups])
        reference = (YOUNG_AND_TIAN[name], "AC(0.8)") if name in YOUNG_AND_TIAN else None
        named: dict[str, list[EpisodeLog]] = {}
        for label, (_, runs) in zip(labels, groups, strict=True):
            count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
            named[f"{label} ({count})" if label else count] = runs
        panels[name] = Panel(named, reference)
        for label, runs in named.items():
            last = ", ".join(f"{run.episode_return[-100:].mean():.1f}" for run in runs)
            print(f"{name}, {label}: mean return of the last 100 episodes: {last}")
    learning_curves(parsed.output, panels)
    print(f"picture: {parsed.output}")


def group_runs(folders: Sequence[Path]) -> dict[str, list[Group]]:
    """The runs by environment, and of each environment those with equal configurations together.

    Raises:
      ValueError: if a folder is not that of a run that has ended.
    """
    from a3c_jax import EpisodeLog

    environments: dict[str, list[Group]] = {}
    for folder in sorted(folders):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            with np.load(folder / "episodes.npz") as arrays:
                episodes = EpisodeLog(**arrays)
        except OSError as error:
            raise ValueError(
                f"{folder} is not the folder of a run that has ended ({error}); name others."
            ) from None
        if not len(episodes.episode_return):
            raise ValueError(f"no episode ended in the run of {folder}; name others.")
        config.pop("seed", None)
        groups = environments.setdefault(config.pop("environment"), [])
        same = next((runs for other, runs in groups if other == config), None)
        if same is None:
            groups.append((config, [episodes]))
        else:
            same.append(episodes)
    return environments


def label_groups(configs: Sequence[dict[str, Any]]) -> list[str]:
    """For each configuration the fields in which they are not all equal, as text; nothing if there is only one."""
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [n for n in names if any(c.get(n) != configs[0].get(n) for c in configs)]
    return [", ".join(f"{n} {config.get(n)}" for n in differing) for config in configs]


if __name__ == "__main__":
    main()
