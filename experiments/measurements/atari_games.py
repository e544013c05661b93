"""The paper's Atari games by their presets: `python -m experiments.measurements.atari_games`.

One run of each game, one after the other, by `python -m experiments.atari --preset GAME`. It prints a table and leaves
`atari_games.json`, `.png` and `.pdf` in its run folder, beside the run folders of the games. Beside each game stand the scores of two
other A3C implementations: NoisyNet's (arXiv:1706.10295) and PFRL's, which are from games that begin with no-ops, as here, and the
paper's own after a day on 16 threads, which begin where people had got to. Their budgets are 200 to 320 million frames.

A command that was interrupted or killed goes on if it is given again with its `--run-dir`.
"""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import atari
from experiments.command_line import exit_on_bad_input, parse
from experiments.curves import read_run
from experiments.measurements.simulated import (
    COLOURS,
    as_plain,
    check,
    check_known,
    drawing,
    start_or_go_on,
)
from experiments.run_folder import exit_on_interruption, read_json, write_json

if TYPE_CHECKING:
    from a3c_jax import EpisodeLog

FRAMES = 4
"""Frames of the game for each step of the agent."""

WINDOW = 100
"""Training games in a point of the learning curve."""


class Scores(NamedTuple):
    """What feed-forward A3C reached elsewhere: the baseline of NoisyNet's paper, PFRL's best evaluation, the paper's own."""

    noisynet: float
    pfrl: float
    paper: float


ELSEWHERE = {
    "pong": Scores(7, 20.9, 11.4),
    "breakout": Scores(496, 581, 551.6),
    "beam-rider": Scores(9_214, 8_883, 13_235.9),
    "qbert": Scores(18_586, 20_722, 13_752.3),
    "seaquest": Scores(1_744, 1_782, 2_300.2),
    "space-invaders": Scores(1_034, 1_044, 2_214.7),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to play."""

    games: tuple[str, ...] = tuple(atari.PRESETS)
    """Presets of `experiments.atari`."""
    seed: int = 0
    """The seed of every run."""
    max_steps: int = 10_000_000
    """Steps of the agent in each game, of four frames each. The learning rate falls to zero over them."""
    evaluation_episodes: int = 30
    """Fresh games for each evaluation of the final policy."""
    run_dir: Path | None = None
    """Folder for the results. By default a new one under runs/. If it holds the same command's, that one goes on."""

    def __post_init__(self) -> None:
        check(self, "games", max_steps=1, evaluation_episodes=1)
        check_known("games", self.games, atari.PRESETS)


class Played(NamedTuple):
    """What a run reached: the mean of its last training games, if any has ended, and fresh games by its final policy."""

    game: str
    frames: int
    hours: float
    training: float | None
    sampled: float
    greedy: float
    random: float


def main(arguments: Sequence[str] | None = None) -> Path:
    """Trains, prints the table and draws the picture; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.atari_games", Arguments, __doc__, arguments)
        options = as_plain(parsed)
        run_dir = start_or_go_on("atari-games", parsed)
    with exit_on_interruption():
        for number, game in enumerate(parsed.games, start=1):
            if not is_done(run_dir / game):
                print(f"{game}, {number} of {len(parsed.games)}", file=sys.stderr)
                train(parsed, run_dir / game, game)
    logs = {game: read_run(run_dir / game)[1] for game in parsed.games}
    games = [read(run_dir / game, log) for game, log in logs.items()]
    write_json(
        run_dir / "atari_games.json",
        {"arguments": options, "games": [played._asdict() for played in games]},
    )
    print_table(games)
    draw([run_dir / "atari_games.png", run_dir / "atari_games.pdf"], games, logs)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def is_done(folder: Path) -> bool:
    """Whether a run has been trained and evaluated."""
    return "evaluation" in (read_json(folder / "summary.json") or {})


def train(parsed: Arguments, folder: Path, game: str) -> None:
    """Trains and evaluates in a process, and goes on where one was killed. Its progress bar is shown."""
    from a3c_jax.asynchrony.signals import raise_noted

    where = ["--resume" if any(folder.glob("checkpoints/*.checkpoint")) else "--run-dir"]
    if folder.exists() and where == ["--run-dir"]:
        shutil.rmtree(folder)
    command = [sys.executable, "-m", "experiments.atari", "--preset", game, *where, str(folder)]
    command += ["--seed", str(parsed.seed), "--max-steps", str(parsed.max_steps)]
    command += ["--evaluation-episodes", str(parsed.evaluation_episodes)]
    with subprocess.Popen(command) as process:
        try:
            while process.poll() is None:
                raise_noted()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
        finally:
            process.terminate()
    if process.returncode:
        raise SystemExit(process.returncode)


def read(folder: Path, episodes: "EpisodeLog") -> Played:
    """What a run reached, from its folder."""
    summary: Any = read_json(folder / "summary.json")
    last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    returns = episodes.episode_return[-WINDOW:]
    means = {name: value["mean"] for name, value in summary["evaluation"].items()}
    return Played(
        folder.name,
        FRAMES * summary["environment_steps"],
        json.loads(last)["seconds"] / 3600,
        float(returns.mean()) if len(returns) else None,
        **means,
    )


def print_table(games: Sequence[Played]) -> None:
    """Prints a row for each game."""
    print(
        f"\n{'game':<16}{'frames':>8}{'hours':>7}{f'last {WINDOW}':>10}{'sampled':>9}{'greedy':>9}{'random':>9}"
        f"{'NoisyNet':>11}{'PFRL':>8}{'paper, 1 day':>14}"
    )
    for played in games:
        training = "-" if played.training is None else f"{played.training:,.1f}"
        scores = (played.sampled, played.greedy, played.random)
        other = ELSEWHERE[played.game]
        print(
            f"{played.game:<16}{played.frames / 1e6:>6.1f} M{played.hours:>7.1f}{training:>10}"
            + "".join(f"{score:>9,.1f}" for score in scores)
            + f"{other.noisynet:>11,.0f}{other.pfrl:>8,.0f}{other.paper:>14,.0f}"
        )


def draw(paths: Sequence[Path], games: Sequence[Played], logs: "dict[str, EpisodeLog]") -> None:
    """Draws each game's running mean, and what the others reached as lines."""
    from experiments.plotting import running_mean

    columns = min(3, len(games))
    rows = -(-len(games) // columns)
    with drawing(paths, rows, columns, (2.4 * columns, 0.8 + 1.9 * rows)) as (figure, panels):
        for axes, played in zip(panels.flat, games, strict=False):
            log, other = logs[played.game], ELSEWHERE[played.game]
            every = -(-len(log.episode_return) // 2_000) or 1
            mean = running_mean(log.episode_return, WINDOW, every)
            frames = log.environment_steps[::every] * (FRAMES / 1e6)
            axes.plot(
                frames,
                mean,
                color=COLOURS[0],
                label=f"a3c_jax, one run, mean of {WINDOW} training games",
            )
            axes.axhline(
                other.noisynet,
                color=COLOURS[1],
                linestyle="--",
                label="NoisyNet's A3C after 320 million frames",
            )
            axes.axhline(
                other.pfrl,
                color=COLOURS[2],
                linestyle=":",
                label="PFRL's A3C, best evaluation within 200 million frames",
            )
            axes.axhline(played.random, color="0.6", linewidth=0.8, label="random policy")
            axes.set_title(f"{played.game}, {played.hours:.1f} hours")
            axes.set_xlim(left=0)
        for axes in list(panels.flat)[len(games) :]:
            axes.axis("off")
        for row in panels:
            row[0].set_ylabel("return")
        for axes in list(panels.flat)[max(0, len(games) - columns) : len(games)]:
            axes.set_xlabel("million frames")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        legend = {
            "loc": "outside lower center",
            "ncols": 2 if columns == 3 else 1,
            "frameon": False,
        }
        figure.legend(handles, labels, **legend)


if __name__ == "__main__":
    main()
