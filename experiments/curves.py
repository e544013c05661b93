"""Draw the learning curves of many runs in one picture: `python -m experiments.curves runs/a runs/b`.

Runs of one environment share a panel. Runs that differ in nothing but their seeds form a group, with a thin line
for each run. A thick line is the interquartile mean of the group: the mean without the lowest and the highest quarter
of its runs. The band around it is its 95 % stratified bootstrap interval. Both end where the group's shortest run ends.
Groups of one or two runs have no band, because resamples of two runs say nothing about a third; their thick line is
the mean. With three to five runs the band is narrower than it should be. The statistics are those of rliable:
`pip install -e '.[rliable]'`. Without it, all thick lines are means and there are no bands.

The legend says in what the configurations differ, and in which objects of their own: losses, networks, optimizers.
These are known by the names of their classes or functions only, so that two functions of one name, or two optimizers
of optax, are taken for the same. `--labels` gives names to the groups instead.

A run is read from its latest checkpoint, so that it can still be going on.

MinAtar's panels show for comparison what actor-critic with traces reached in Young & Tian 2019 (arXiv:1903.03176)
after 5 million frames, read off their figures. Their environments differ from gymnax's: an action is repeated
with probability 0.1, and only gymnax ends an episode after 1,000 steps (Freeway: 2,500, in both).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tyro

from experiments.command_line import exit_on_bad_input, parse
from experiments.run_folder import read_json

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
    """Run folders. Their runs may have been interrupted, or still be going on."""
    output: Path = Path("curves.png")
    """Where the picture goes. The ending says in which format: .png, .pdf or .svg."""
    labels: tuple[str, ...] = ()
    """Names for the legend: one for each group, in the order in which they are printed without this option. Groups that are called the same in several panels take one name."""


class Group(NamedTuple):
    """Runs that differ in nothing but their seeds.

    Attributes:
      config: their configuration without environment and seed, and the names of their own objects.
      runs: the episodes of each run.
    """

    config: dict[str, Any]
    runs: list["EpisodeLog"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the picture, and prints the results of each group."""
    with exit_on_bad_input():
        parsed = parse("curves", Arguments, __doc__, arguments)
        if not parsed.runs:
            raise ValueError(
                "no run folder given; name one or more: python -m experiments.curves runs/*"
            )
        environments = label_groups(group_runs(parsed.runs), parsed.labels)
    from experiments.plotting import Panel, learning_curves

    panels = {}
    for name, groups in environments.items():
        reference = (
            (YOUNG_AND_TIAN[name], "Young & Tian, AC(0.8)") if name in YOUNG_AND_TIAN else None
        )
        panels[name] = Panel({label: group.runs for label, group in groups.items()}, reference)
        for label, group in groups.items():
            print(f"{name}, {label}" if label else name)
            print_results(group)
    learning_curves(parsed.output, panels)
    print(f"picture: {parsed.output}")


def print_results(group: Group) -> None:
    """Prints what a group's runs reached in their last episodes, and how many of them were solved."""
    from experiments.aggregate import decimals, in_words

    last = [float(run.episode_return[-100:].mean()) for run in group.runs]
    each = ", ".join(f"{x:.{decimals(last)}f}" for x in last)
    together = f"; {in_words(last)}" if len(last) > 1 else ""
    print(f"  mean return of the last 100 episodes: {each}{together}")
    solved_return = group.config["solved_return"]
    if solved_return is not None:
        window = group.config["solved_window"]
        steps = [steps_to_solved(run, solved_return, window) for run in group.runs]
        solved, median = np.isfinite(steps).sum(), np.median(steps)
        print(
            f"  solved (mean return {solved_return:g}): {solved} of {len(steps)}"
            + (f", median after {median:,.0f} steps" if math.isfinite(median) else "")
        )


def steps_to_solved(run: "EpisodeLog", solved_return: float, window: int) -> float:
    """The environment steps after which the mean return of the last `window` episodes first reached `solved_return`.

    Returns:
      The number of steps. It is infinite if the run was never solved, so that a median over runs counts those as later
      than all others, and is itself infinite if half of the runs were not solved.
    """
    from experiments.plotting import running_mean

    mean, steps = running_mean(run.episode_return, window), run.environment_steps
    # All episodes that one update reports have the same number of steps, and it is judged after the last of them.
    judged = np.append(np.diff(steps) > 0, True) & (np.arange(len(steps)) >= window - 1)
    reached = judged & (mean >= solved_return - 1e-9)  # which was summed in another order
    return float(steps[reached.argmax()]) if reached.any() else math.inf


def group_runs(folders: Sequence[Path]) -> dict[str, list[Group]]:
    """The runs by environment, and of each environment those with equal configurations together.

    Raises:
      ValueError: if a folder has no run with episodes.
    """
    environments: dict[str, list[Group]] = {}
    for folder in sorted(folders):
        config, episodes = read_run(folder)
        if not len(episodes.episode_return):
            raise ValueError(f"no episode has ended in the run of {folder}; name others.")
        del config["seed"]
        groups = environments.setdefault(config.pop("environment"), [])
        for group in groups:
            if group.config == config:
                group.runs.append(episodes)
                break
        else:
            groups.append(Group(config, [episodes]))
    return environments


def read_run(folder: Path) -> tuple[dict[str, Any], "EpisodeLog"]:
    """A run's configuration with the names of its own objects, and its episodes so far.

    Raises:
      ValueError: if the folder has neither a checkpoint that can be read nor the files of a run that has ended.
    """
    from a3c_jax import A3CConfig, CheckpointError, EpisodeLog, find_checkpoint

    try:
        checkpoint = find_checkpoint(folder)
    except CheckpointError as error:
        try:  # of an earlier version, which wrote all episodes at the end of a run
            with np.load(folder / "episodes.npz") as arrays:
                episodes = EpisodeLog(**arrays)
            return A3CConfig(**(read_json(folder / "config.json") or {})).as_dict(), episodes
        except (OSError, TypeError, ValueError):
            raise ValueError(f"{folder} has no run to draw: {error}") from None
    return checkpoint.config.as_dict() | (checkpoint.objects or {}), checkpoint.episodes


def label_groups(
    environments: Mapping[str, Sequence[Group]], labels: Sequence[str] = ()
) -> dict[str, dict[str, Group]]:
    """The groups of each environment by their labels.

    Args:
      environments: the groups of each.
      labels: names for them. By default a group has the name that `describe_groups` gives it.

    Raises:
      ValueError: if there are not as many labels as different names to replace, or if two labels are equal.
    """
    described = {
        name: describe_groups([group.config for group in groups])
        for name, groups in environments.items()
    }
    found = list(dict.fromkeys(label for names in described.values() for label in names))
    if labels and not len(labels) == len(set(labels)) == len(found):
        names = "; ".join(label or "all runs" for label in found)
        raise ValueError(
            f"labels must be {len(found)} different names, got {len(labels)} ({', '.join(labels)}); "
            f"give one for each of: {names}."
        )
    name_of = dict(zip(found, labels or found, strict=True))
    return {
        name: {name_of[label]: group for label, group in zip(described[name], groups, strict=True)}
        for name, groups in environments.items()
    }


def describe_groups(configs: Sequence[dict[str, Any]]) -> list[str]:
    """For each configuration the fields in which they are not all equal, as text; nothing if there is only one."""
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [n for n in names if any(c.get(n) != configs[0].get(n) for c in configs)]
    return [", ".join(f"{n} {c.get(n, 'built-in')}" for n in differing) for c in configs]


if __name__ == "__main__":
    main()
