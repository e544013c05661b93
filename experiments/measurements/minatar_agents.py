"""MinAtar with many seeds, beside other agents: `python -m experiments.measurements.minatar_agents --python venv/bin/python`.

Each run is a process of its own. It learns for so many environment steps, and then plays 100 fresh episodes by its final
policy as it acted in training (PQN: with epsilon 0.005). `a3c` and `a3c-lstm` are this project's presets; the second has 128
LSTM cells behind the torso. `ppo` and `pqn` are those of rejax, installed for the Python that `--python` names, in the same
environments of gymnax. Their settings are those that purejaxrl and PureJaxQL publish for MinAtar and ten million steps, with
rejax's dense networks and initial weights. No seed that is reported has helped to choose a setting of this project.

gymnax's games end after 1,000 steps (Freeway after 2,500), and do what the agent says. `--rules original` plays by the rules of
Young & Tian's games: each step repeats the action before it with probability 0.1, and episodes are not cut (here after ten times as
many steps as in gymnax, so that an evaluation ends; Freeway as it is).

Shown are the interquartile mean over seeds and a 95 % bootstrap interval. It prints the table, and leaves
`minatar_agents.json`, `.png` and `.pdf` in its run folder. A command that was killed goes on if it is given again with its
`--run-dir`.
"""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments import minatar
from experiments.command_line import exit_on_bad_input, parse
from experiments.measurements.simulated import (
    COLOURS,
    Records,
    Summary,
    as_plain,
    check,
    check_known,
    drawing,
    start_or_go_on,
    summarize,
)
from experiments.run_folder import write_json

AGENTS = {
    "a3c": "A3C",
    "a3c-lstm": "A3C with LSTM",
    "ppo": "PPO (rejax)",
    "pqn": "PQN (rejax)",
}
"""What the agents are called in the table and the picture."""

OWN: dict[str, list[str]] = {
    "a3c": [],
    "a3c-lstm": ["--core", "lstm", "--core-size", "128"],
}
"""The options of this project's agents."""

FIRST_SEED = 20
"""The first of the seeds. Those below it have chosen settings."""

ORIGINAL = {
    game: "?sticky_action_prob=0.1" + ("" if game == "freeway" else "&max_steps_in_episode=10000")
    for game in minatar.PRESETS
}
"""What follows the environment's name if the rules are the original ones."""

_PEERS = Path(__file__).with_name("minatar_peers.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to compare. Seeds begin at 20, because those below have chosen settings."""

    agents: tuple[str, ...] = ("a3c", "a3c-lstm")
    """Any of a3c, a3c-lstm, ppo and pqn."""
    games: tuple[str, ...] = tuple(minatar.PRESETS)
    """Presets of `experiments.minatar`."""
    seeds: int = 10
    """Number of seeds of each agent in each game."""
    max_steps: int = 5_000_000
    """Environment steps of each run."""
    num_workers: int = 2
    """Number of workers of this project's agents."""
    rules: Literal["gymnax", "original"] = "gymnax"
    """Whose rules the games have. The original ones are for this project's agents only."""
    python: Path | None = None
    """The Python of rejax, for ppo and pqn."""
    run_dir: Path | None = None
    """Folder for the results. By default a new one under runs/. If it holds the same command's, that one goes on."""

    def __post_init__(self) -> None:
        check(self, "agents", "games", seeds=2, max_steps=1, num_workers=1)
        check_known("agents", self.agents, AGENTS)
        check_known("games", self.games, minatar.PRESETS)
        theirs = [agent for agent in self.agents if agent not in OWN]
        if theirs and (self.python is None or not self.python.exists()):
            raise ValueError(
                f"python must name the Python of {theirs[0]}, got {self.python}; install rejax in a virtual environment."
            )
        if theirs and self.rules != "gymnax":
            raise ValueError(
                f"rules must be gymnax for {theirs[0]}, got {self.rules}; leave that agent out."
            )


class Line(NamedTuple):
    """What one agent reached in one game: returns, and the median of a run's seconds, from start to end of its process."""

    game: str
    agent: str
    reached: Summary
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same in plain values."""
        returns, value, interval = self.reached
        summary = {"returns": returns, "value": value, "interval": interval}
        return {"game": self.game, "agent": self.agent, **summary, "seconds": self.seconds}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Trains, prints the table and draws the picture; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.minatar_agents", Arguments, __doc__, arguments)
        options = as_plain(parsed)
        run_dir = start_or_go_on("minatar-agents", parsed)
    from tqdm import tqdm

    records = Records(run_dir / "returns.jsonl")
    cases = [(g, a, s) for s in _seeds(parsed) for g in parsed.games for a in parsed.agents]
    for case in (bar := tqdm(cases, unit=" runs")):
        if case not in records:
            bar.set_description(f"{case[0]}, {case[1]}")
            records.add([case], [play(parsed, run_dir, *case)])
    lines = []
    for game, agent in itertools.product(parsed.games, parsed.agents):
        runs = np.array([records[game, agent, seed] for seed in _seeds(parsed)])
        lines.append(Line(game, agent, summarize(runs[:, 0]), float(np.median(runs[:, 1]))))
    write_json(
        run_dir / "minatar_agents.json",
        {"arguments": options, "lines": [line.as_dict() for line in lines]},
    )
    print_table(parsed, lines)
    draw([run_dir / "minatar_agents.png", run_dir / "minatar_agents.pdf"], parsed, lines)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def _seeds(parsed: Arguments) -> range:
    return range(FIRST_SEED, FIRST_SEED + parsed.seeds)


def play(parsed: Arguments, run_dir: Path, game: str, agent: str, seed: int) -> list[float]:
    """The mean return of one run's fresh episodes, and its seconds."""
    began = time.perf_counter()
    if agent in OWN:
        folder = run_dir / f"{game}-{agent}-seed{seed}"
        if folder.exists():
            shutil.rmtree(folder)  # a run that was killed
        _run([*own_command(parsed, game, agent, seed), "--run-dir", str(folder)])
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        reached = summary["evaluation"]["sampled"]["mean"]
    else:
        case = [agent, minatar.PRESETS[game].environment, str(seed), str(parsed.max_steps)]
        output = _run([str(parsed.python), str(_PEERS), *case])
        reached = float(output.rsplit("RETURN", 1)[1])
    return [reached, time.perf_counter() - began]


def own_command(parsed: Arguments, game: str, agent: str, seed: int) -> list[str]:
    """What trains and evaluates one of this project's agents."""
    command = [sys.executable, "-m", "experiments.minatar", "--preset", game, *OWN[agent]]
    if parsed.rules == "original":
        command += ["--environment", minatar.PRESETS[game].environment + ORIGINAL[game]]
    command += ["--seed", str(seed), "--max-steps", str(parsed.max_steps)]
    command += ["--num-workers", str(parsed.num_workers)]
    return [*command, "--no-progress", "--no-compilation-cache"]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def print_table(parsed: Arguments, lines: Sequence[Line]) -> None:
    """Prints a row for each game, a column for each agent."""
    print(
        f"\nMinAtar, {parsed.rules} rules, {parsed.max_steps:,} steps: mean return of 100 fresh episodes, interquartile mean over "
        f"{parsed.seeds} seeds [95 % interval] (seconds of a run)\n{'game':<16}"
        + "".join(f"{AGENTS[agent]:<34}" for agent in parsed.agents)
    )
    for game in parsed.games:
        own = [line for line in lines if line.game == game]
        cells = [f"{line.reached.text('.1f')} ({line.seconds:.0f})" for line in own]
        print(f"{game:<16}" + "".join(f"{cell:<34}" for cell in cells))


def draw(paths: Sequence[Path], parsed: Arguments, lines: Sequence[Line]) -> None:
    """Draws a panel for each game: every seed, the interquartile mean and its interval."""
    columns, rows = len(parsed.games), len(parsed.agents)
    size = (1.3 + 1.6 * columns, 0.7 + 0.28 * rows)
    with drawing(paths, 1, columns, size, sharey=True) as (_, (panels,)):
        for axes, game in zip(panels, parsed.games, strict=True):
            for y, line in enumerate(line for line in lines if line.game == game):
                line.reached.draw(axes, y, COLOURS[y])
            axes.set_title(game)
            axes.set_xlabel("return")
            axes.set_xlim(left=0)
        panels[0].set_yticks(range(rows), [AGENTS[agent] for agent in parsed.agents])
        panels[0].set_ylim(rows - 0.5, -0.5)


if __name__ == "__main__":
    main()
