"""What each choice of this project is worth: `python -m experiments.measurements.ablations`.

Each line of the table is A3C with one thing changed. 16 workers with one environment each take turns and send the gradient
of 5 steps, as in the paper; they are simulated (`a3c_jax.make_simulation`), many seeds side by side. All lines play equally
many environment steps. The changes are

- no bonus for entropy, and the article's term in its place, which is no entropy and has the wrong sign;
- time limits that count as deaths, so that nothing is bootstrapped there;
- one torso that actor and critic share;
- asynchrony taken away in two ways: every worker has the newest parameters when it plays, or all workers' gradients make
  one update together, so that there are fewer updates of larger batches (A2C).

A run's score is the mean return of the episodes that ended in the last tenth of its updates, and of its last 100 episodes if
fewer ended there. Other seeds than the reported ones choose each line's learning rate. Shown are the interquartile mean over
seeds, and a 95 % bootstrap interval. It prints the table, and leaves `ablations.json`, `.png` and `.pdf` in its run folder.
A command that was killed goes on if it is given again with its `--run-dir`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from a3c_jax.config import A3CConfig
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.measurements.robustness import TASKS
from experiments.measurements.simulated import (
    COLOURS,
    TUNING_SEED,
    Run,
    Scores,
    check,
    drawing,
    start_or_go_on,
)
from experiments.run_folder import write_json

STEPS = {"CartPole-v0": 100_000, "Acrobot-v1": 300_000, "Catch-bsuite": 100_000}
"""Environment steps of each run, where they are fewer than in the measurement of robustness."""


def article_entropy_loss(params: Any, apply_fn: Any, trajectory: Any) -> Any:
    """A3C's loss with the article's "entropy": that of the chosen actions only, added where it should be subtracted."""
    import jax.numpy as jnp

    from a3c_jax.losses import a3c_loss

    loss, metrics = a3c_loss(params, apply_fn, trajectory, entropy_cost=0.0)
    log_prob = apply_fn(params, trajectory)[0].log_prob(trajectory.action_tm1)
    return loss - 0.01 * jnp.mean(jnp.exp(log_prob) * log_prob), metrics


def death_at_time_limit_loss(params: Any, apply_fn: Any, trajectory: Any) -> Any:
    """A3C's loss with a value of zero behind every time limit."""
    from a3c_jax.losses import a3c_loss

    ended = trajectory.terminated_t | trajectory.truncated_t
    return a3c_loss(
        params, apply_fn, trajectory._replace(terminated_t=ended, truncated_t=ended & False)
    )


class Ablation(NamedTuple):
    """One change.

    Attributes:
      changes: fields of the configuration that differ.
      loss: the loss in place of A3C's.
      delay: how many updates late each gradient is.
      is_synchronous: whether one worker plays the environments of all.
    """

    changes: dict[str, Any] = {}
    loss: Callable[[Any, Any, Any], Any] | None = None
    delay: int | None = None
    is_synchronous: bool = False


ABLATIONS = {
    "A3C": Ablation(),
    "no entropy bonus": Ablation({"entropy_cost": 0.0}),
    "the article's entropy": Ablation(loss=article_entropy_loss),
    "time limit as death": Ablation(loss=death_at_time_limit_loss),
    "shared torso": Ablation({"shared_torso": True}),
    "newest parameters": Ablation(delay=0),
    "synchronous (A2C)": Ablation(is_synchronous=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to compare."""

    environments: tuple[str, ...] = (*STEPS, "Breakout-MinAtar")
    """What is played."""
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    """Lines of the table."""
    num_workers: int = 16
    """How many workers take turns, or are synchronised."""
    t_max: int = 5
    """Steps of a segment."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    """Learning rates to choose from."""
    seeds: int = 10
    """Number of seeds reported for each line."""
    tuning_seeds: int = 5
    """Number of other seeds, which choose the learning rates."""
    max_steps: int | None = None
    """Environment steps of each run. By default each environment has its own number."""
    batch: int = 10
    """Number of runs simulated in one compiled call."""
    run_dir: Path | None = None
    """Folder for the results. By default a new one under runs/. If it holds the same command's, that one goes on."""

    def __post_init__(self) -> None:
        lists = ("environments", "ablations", "rates")
        check(self, *lists, seeds=2, tuning_seeds=1, batch=1)
        unknown = [name for name in self.ablations if name not in ABLATIONS]
        if unknown:
            raise ValueError(f"ablations must be among {', '.join(ABLATIONS)}, got {unknown}.")
        for environment in self.environments:
            self.config(environment, ABLATIONS["A3C"])  # refuses what cannot be

    def config(self, environment: str, ablation: Ablation) -> A3CConfig:
        """The configuration of the runs, but for the learning rate."""
        task = TASKS.get(environment, TASKS["CartPole-v1"])
        together = self.num_workers if ablation.is_synchronous else 1
        shape: dict[str, Any] = {
            "num_workers": self.num_workers // together,
            "envs_per_worker": together,
            "t_max": self.t_max,
            "max_steps": self.max_steps or STEPS.get(environment, task.max_steps),
            "shared_torso": False,
            "gae_lambda": 1.0,
        }
        own = {"environment": environment, "nonfinite": "skip"}
        return dataclasses.replace(task, **(shape | own | ablation.changes))


class Line(NamedTuple):
    """What one ablation reached in one environment.

    Attributes:
      learning_rate: the one that was chosen.
      scores: of the seeds.
      value: their interquartile mean.
      interval: its 95 % interval; None without rliable, or with too few seeds.
    """

    environment: str
    ablation: str
    learning_rate: float
    scores: list[float]
    value: float
    interval: list[float] | None


def main(arguments: Sequence[str] | None = None) -> Path:
    """Simulates, prints the table and draws the picture; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.ablations", Arguments, __doc__, arguments)
        from a3c_jax import environments  # loads JAX, --help does not

        for environment in parsed.environments:
            environments.make(environment)
        run_dir = start_or_go_on("ablations", parsed.run_dir, dataclasses.asdict(parsed))
    CompilationCache().use()
    from tqdm import tqdm

    scores = Scores(run_dir / "scores.jsonl", parsed.batch)
    cases = [(e, a) for e in parsed.environments for a in parsed.ablations]
    runs_of_each = len(parsed.rates) * parsed.tuning_seeds + parsed.seeds
    with tqdm(total=len(cases) * runs_of_each, unit=" runs") as bar:
        lines = [play(parsed, *case, scores, bar) for case in cases]
    configs = {e: parsed.config(e, ABLATIONS["A3C"]).as_dict() for e in parsed.environments}
    results = {"configs": configs, "lines": [line._asdict() for line in lines]}
    write_json(run_dir / "ablations.json", results)
    print_table(parsed, lines)
    draw([run_dir / "ablations.png", run_dir / "ablations.pdf"], parsed, lines)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def play(parsed: Arguments, environment: str, name: str, scores: Scores, bar: Any) -> Line:
    """Chooses the learning rate of a line, and scores the reported seeds with it."""
    from experiments.aggregate import aggregate

    bar.set_description(f"{environment}, {name}")
    ablation = ABLATIONS[name]
    config = parsed.config(environment, ablation)
    delay = config.num_workers - 1 if ablation.delay is None else ablation.delay
    own = {} if ablation.loss is None else {"loss": ablation.loss}

    def score(rates: Sequence[float], seeds: range) -> np.ndarray:
        runs = [Run(delay, rate, seed) for rate in rates for seed in seeds]
        found = scores.of(f"{environment} {name}", config, runs, bar.update, **own)
        return found.reshape(len(rates), -1)

    tuning = score(parsed.rates, range(TUNING_SEED, TUNING_SEED + parsed.tuning_seeds))
    rate = parsed.rates[int(tuning.mean(axis=1).argmax())]
    reached = score([rate], range(parsed.seeds))[0]
    found = aggregate(reached[:, None])
    interval = None if found.interval is None else found.interval[:, 0].tolist()
    return Line(environment, name, rate, reached.tolist(), found.value.item(), interval)


def print_table(parsed: Arguments, lines: Sequence[Line]) -> None:
    """Prints a row for each ablation and environment."""
    print(
        f"\n{parsed.num_workers} workers x 1 environment x {parsed.t_max} steps: mean return at the end of the run, "
        f"interquartile mean over {parsed.seeds} seeds [95 % interval]\n"
        f"{'environment':<18} {'A3C with':<22} {'rate':>7}  return"
    )
    for line in lines:
        low_high = "" if line.interval is None else " [{:.1f}, {:.1f}]".format(*line.interval)
        print(
            f"{line.environment:<18} {line.ablation:<22} {line.learning_rate:7g}  {line.value:.1f}{low_high}"
        )


def draw(paths: Sequence[Path], parsed: Arguments, lines: Sequence[Line]) -> None:
    """Draws a panel for each environment: every seed, the interquartile mean and its interval."""
    columns, rows = len(parsed.environments), len(parsed.ablations)
    size = (1.3 + 1.6 * columns, 0.6 + 0.28 * rows)
    with drawing(paths, 1, columns, size, sharey=True) as (_, (panels,)):
        for axes, environment in zip(panels, parsed.environments, strict=True):
            own = [line for line in lines if line.environment == environment]
            for y, line in enumerate(own):
                colour = COLOURS[0] if y == 0 else COLOURS[1]
                axes.plot(line.scores, [y] * parsed.seeds, "|", color="0.6", markersize=5)
                if line.interval is not None:
                    axes.plot(line.interval, [y, y], "-", color=colour, linewidth=2)
                axes.plot(line.value, y, "o", color=colour, markersize=4)
            axes.axvline(own[0].value, color="0.85", linewidth=0.8, zorder=0)
            axes.set_title(environment)
            axes.set_xlabel("return")
        panels[0].set_yticks(range(rows), parsed.ablations)
        panels[0].invert_yaxis()


if __name__ == "__main__":
    main()
