"""What each choice of this project is worth: `python -m experiments.measurements.ablations`.

Each line of the table is A3C with one thing changed. 16 workers with one environment each take turns and send the gradient
of 5 steps, as in the paper; they are simulated (`a3c_jax.make_simulation`), many seeds side by side. All lines play equally
many environment steps. The changes are

- no bonus for entropy, and the article's term in its place, which is no entropy and has the wrong sign;
- time limits that count as deaths, so that nothing is bootstrapped there;
- one torso that actor and critic share;
- asynchrony taken away in two ways: every worker has the newest parameters when it plays, or all workers' gradients make
  one update together, so that there are fewer updates of larger batches (A2C).

Measured are the return during training, which is the mean over all updates of the mean return of the last 100 episodes,
and the return at the end: the mean of the episodes that ended in the last tenth of the updates, and of the last 100 if
fewer ended there. The first is high if a run learns soon and does not forget. Other seeds than the reported ones choose each
line's learning rate by it. Shown are the interquartile mean over seeds, and a 95 % bootstrap interval.
It prints the table, and leaves `ablations.json`, `.png` and `.pdf` in its run folder.
A command that was killed goes on if it is given again with its `--run-dir`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from a3c_jax.config import A3CConfig
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.measurements.simulated import (
    COLOURS,
    TUNING_SEED,
    Run,
    Scores,
    Summary,
    check,
    check_known,
    drawing,
    late_return,
    start_or_go_on,
    summarize,
)
from experiments.run_folder import write_json

if TYPE_CHECKING:
    from a3c_jax import SimulationResult


MAX_STEPS = {"CartPole-v0": 150_000, "Acrobot-v1": 150_000, "Catch-bsuite": 300_000}
"""What is played, and for how many environment steps. The other settings are the defaults."""


Loss = Callable[[Any, Any, Any], Any]


def article_entropy(config: A3CConfig) -> Loss:
    """A3C's loss with the article's "entropy": that of the chosen actions only, added where it should be subtracted."""
    import jax.numpy as jnp

    from a3c_jax.losses import a3c_loss

    own = {"discount": config.discount, "critic_cost": config.critic_cost}

    def loss(params: Any, apply_fn: Any, trajectory: Any) -> Any:
        loss, metrics = a3c_loss(params, apply_fn, trajectory, entropy_cost=0.0, **own)
        log_prob = apply_fn(params, trajectory)[0].log_prob(trajectory.action_tm1)
        return loss - config.entropy_cost * jnp.mean(jnp.exp(log_prob) * log_prob), metrics

    return loss


def death_at_time_limit(config: A3CConfig) -> Loss:
    """A3C's loss with a value of zero behind every time limit."""
    from a3c_jax.losses import a3c_loss

    own = {"discount": config.discount, "critic_cost": config.critic_cost}
    own["entropy_cost"] = config.entropy_cost

    def loss(params: Any, apply_fn: Any, trajectory: Any) -> Any:
        ended = trajectory.terminated_t | trajectory.truncated_t
        as_death = trajectory._replace(terminated_t=ended, truncated_t=ended & False)
        return a3c_loss(params, apply_fn, as_death, **own)

    return loss


class Ablation(NamedTuple):
    """One change.

    Attributes:
      changes: fields of the configuration that differ.
      loss: makes the loss in place of A3C's.
      delay: how many updates late each gradient is.
      is_synchronous: whether one worker plays the environments of all.
    """

    changes: dict[str, Any] = {}
    loss: Callable[[A3CConfig], Loss] | None = None
    delay: int | None = None
    is_synchronous: bool = False


ABLATIONS = {
    "nothing changed": Ablation(),
    "no entropy bonus": Ablation({"entropy_cost": 0.0}),
    "the article's entropy": Ablation(loss=article_entropy),
    "time limit as death": Ablation(loss=death_at_time_limit),
    "shared torso": Ablation({"shared_torso": True}),
    "newest parameters": Ablation(delay=0),
    "synchronous (A2C)": Ablation(is_synchronous=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to compare."""

    environments: tuple[str, ...] = tuple(MAX_STEPS)
    """What is played, any of these."""
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    """Lines of the table."""
    num_workers: int = 16
    """How many workers take turns, or are synchronised."""
    t_max: int = 5
    """Steps of a segment."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
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
        for name, known in (("environments", MAX_STEPS), ("ablations", ABLATIONS)):
            check_known(name, getattr(self, name), known)
        for environment in self.environments:
            self.config(environment, Ablation())  # refuses what cannot be

    def config(self, environment: str, ablation: Ablation) -> A3CConfig:
        """The configuration of the runs, but for the learning rate."""
        together = self.num_workers if ablation.is_synchronous else 1
        settings: dict[str, Any] = {
            "environment": environment,
            "num_workers": self.num_workers // together,
            "envs_per_worker": together,
            "t_max": self.t_max,
            "max_steps": self.max_steps or MAX_STEPS[environment],
            "nonfinite": "skip",
        }
        return A3CConfig(**(settings | ablation.changes))


class Line(NamedTuple):
    """What one ablation reached in one environment, with the learning rate that was chosen."""

    environment: str
    ablation: str
    learning_rate: float
    during: Summary
    at_end: Summary


def main(arguments: Sequence[str] | None = None) -> Path:
    """Simulates, prints the table and draws the picture; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.ablations", Arguments, __doc__, arguments)
        run_dir = start_or_go_on("ablations", parsed)
    CompilationCache().use()
    from tqdm import tqdm

    cases = [(e, a) for e in parsed.environments for a in parsed.ablations]
    runs_of_each = len(parsed.rates) * parsed.tuning_seeds + parsed.seeds
    with tqdm(total=len(cases) * runs_of_each, unit=" runs") as bar:
        lines = [play(parsed, *case, run_dir / "scores.jsonl", bar) for case in cases]
    configs = {e: parsed.config(e, Ablation()).as_dict() for e in parsed.environments}
    results = {"configs": configs, "lines": [_as_dict(line) for line in lines]}
    write_json(run_dir / "ablations.json", results)
    print_table(parsed, lines)
    draw([run_dir / "ablations.png", run_dir / "ablations.pdf"], parsed, lines)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def play(parsed: Arguments, environment: str, name: str, path: Path, bar: Any) -> Line:
    """Chooses the learning rate of a line, and measures the reported seeds with it."""
    bar.set_description(f"{environment}, {name}")
    ablation = ABLATIONS[name]
    config = parsed.config(environment, ablation)
    delay = config.num_workers - 1 if ablation.delay is None else ablation.delay
    own = {} if ablation.loss is None else {"loss": ablation.loss(config)}

    def measure(result: "SimulationResult") -> Any:
        import jax.numpy as jnp

        during = jnp.nanmean(result.recent_return(), axis=-1)
        return jnp.stack([during, late_return(result)], axis=-1)

    scores = Scores(path, parsed.batch, measure)

    def score(rates: Sequence[float], seeds: range) -> np.ndarray:
        """The returns during training and at the end, `[rates, seeds, 2]`."""
        runs = [Run(delay, rate, seed) for rate in rates for seed in seeds]
        found = scores.of(f"{environment} {name}", config, runs, bar.update, **own)
        return found.reshape(len(rates), len(seeds), 2)

    tuning = score(parsed.rates, range(TUNING_SEED, TUNING_SEED + parsed.tuning_seeds))
    rate = parsed.rates[int(np.argmax(tuning[..., 0].mean(axis=1)))]
    reached = score([rate], range(parsed.seeds))[0]
    return Line(environment, name, rate, *(summarize(column) for column in reached.T))


def _as_dict(line: Line) -> dict[str, Any]:
    return line._asdict() | {"during": line.during._asdict(), "at_end": line.at_end._asdict()}


def print_table(parsed: Arguments, lines: Sequence[Line]) -> None:
    """Prints a row for each ablation and environment."""
    print(
        f"\n{parsed.num_workers} workers x 1 environment x {parsed.t_max} steps: return during training, and at the end; "
        f"interquartile mean over {parsed.seeds} seeds [95 % interval]\n"
        f"{'environment':<17} {'A3C with':<22} {'rate':>6} {'during training':<24} at the end"
    )
    for line in lines:
        form = ".2f" if abs(line.at_end.value) < 20 else ".1f"
        print(
            f"{line.environment:<17} {line.ablation:<22} {line.learning_rate:6g} {line.during.text(form):<24} "
            f"{line.at_end.text(form)}"
        )


def draw(paths: Sequence[Path], parsed: Arguments, lines: Sequence[Line]) -> None:
    """Draws a panel for each environment with the return during training: every seed, the interquartile mean and its interval."""
    columns, rows = len(parsed.environments), len(parsed.ablations)
    size = (1.3 + 1.6 * columns, 0.7 + 0.28 * rows)
    with drawing(paths, 1, columns, size, sharey=True) as (_, (panels,)):
        for axes, environment in zip(panels, parsed.environments, strict=True):
            own = [line.during for line in lines if line.environment == environment]
            for y, found in enumerate(own):
                found.draw(axes, y, COLOURS[0] if y == 0 else COLOURS[1])
            axes.axvline(own[0].value, color="0.85", linewidth=0.8, zorder=0)
            axes.set_title(environment)
            axes.set_xlabel("return during training")
        panels[0].set_yticks(range(rows), parsed.ablations)
        panels[0].invert_yaxis()


if __name__ == "__main__":
    main()
