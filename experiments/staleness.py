"""Return against staleness: `python -m experiments.staleness`.

Every update of a run is computed from the parameters of d updates ago (`a3c_jax.fixed_delay`), for each delay d and
optimizer. No thread runs: many seeds and learning rates are simulated side by side (`a3c_jax.make_simulation`).

A run's score is the mean return of the episodes that ended in the last tenth of its updates. First, seeds that are
not reported choose learning rates by their mean score: for each optimizer the best one at the smallest delay, and
the best one at each delay. Then fresh seeds are scored with both: their interquartile mean is shown, with a 95 %
interval from a bootstrap over the seeds. It prints the table and leaves `staleness.json`, `staleness.png` and
`staleness.pdf` in its run folder.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from a3c_jax.config import A3CConfig, Optimizer, available_cores
from experiments.runner import make_run_dir

RATES: dict[str, tuple[float, ...]] = {
    "adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "shared_rmsprop": (3e-4, 1e-3, 3e-3, 1e-2),
    "rmsprop": (3e-4, 1e-3, 3e-3, 1e-2),
    "momentum": (3e-3, 1e-2, 3e-2, 1e-1),
}
"""Learning rates to choose from. In trials on CartPole without delay, 1e-4 learned too little in the budget with
Adam and Shared RMSProp, and 0.3 failed with momentum, whose steps add up to ten times the rate."""

TUNING_SEED = 1_000_000
"""The first of the seeds that choose the learning rates. Those that are reported begin at 0."""

PANELS = {
    "fixed": "learning rate chosen without delay",
    "own": "learning rate chosen at each delay",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to simulate."""

    optimizers: tuple[Optimizer, ...] = ("adam", "shared_rmsprop", "momentum")
    """Optimizers to compare."""
    delays: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    """Numbers of updates between the parameters that gradients are computed from and those they move."""
    rates: tuple[float, ...] | None = None
    """Learning rates to choose from, the same for all optimizers. By default each has its own four."""
    seeds: int = 10
    """Seeds reported for each point."""
    tuning_seeds: int = 10
    """Other seeds, which choose the learning rates."""
    environment: str = "CartPole-v1"
    """What is played."""
    max_steps: int = 300_000
    """Environment steps of each run."""
    envs_per_worker: int = 8
    """Environments played side by side in each run."""
    t_max: int = 16
    """Steps in each environment between two updates."""
    batch: int = 20
    """Runs simulated in one compiled call."""
    threads: int = dataclasses.field(default_factory=available_cores)
    """Compiled calls made at the same time; by default the number of cores."""
    resamples: int = 10_000
    """Bootstrap samples for each interval."""
    progress: bool = True
    """Show a progress bar."""
    run_dir: Path | None = None
    """Folder to write to; it must not exist. By default a new one under runs/."""

    def __post_init__(self) -> None:
        for name, minimum in (
            ("seeds", 2),
            ("tuning_seeds", 1),
            ("batch", 1),
            ("threads", 1),
            ("resamples", 1),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(
                    f"{name} must be >= {minimum}, got {getattr(self, name)}; use {minimum} or more."
                )
        for name in ("optimizers", "delays", "rates"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(
                    f"{name} must be one or more, each once, got {values}; remove the repetitions."
                )
        if min(self.delays) < 0:
            raise ValueError(f"delays must be >= 0, got {min(self.delays)}; use 0 for no delay.")
        for optimizer in self.optimizers:
            for rate in self.rates_of(optimizer):
                self.config(optimizer, rate)  # which refuses what cannot be

    def rates_of(self, optimizer: str) -> tuple[float, ...]:
        """The learning rates to choose from, rising."""
        return tuple(sorted(self.rates or RATES[optimizer]))

    def config(self, optimizer: Optimizer, learning_rate: float) -> A3CConfig:
        """The configuration of the runs. One that diverges goes on with its last finite parameters."""
        return A3CConfig(
            environment=self.environment,
            num_workers=1,
            envs_per_worker=self.envs_per_worker,
            t_max=self.t_max,
            optimizer=optimizer,
            learning_rate=learning_rate,
            max_steps=self.max_steps,
            nonfinite="skip",
        )


class Run(NamedTuple):
    """One run to simulate."""

    delay: int
    learning_rate: float
    seed: int


class Point(NamedTuple):
    """A point of the picture.

    Attributes:
      optimizer: its name.
      panel: a key of `PANELS`: how the learning rate was chosen.
      delay: the staleness.
      learning_rate: the chosen one.
      returns: each reported seed's score.
      mean: their interquartile mean.
      low: the lower end of its 95 % interval.
      high: the upper end.
    """

    optimizer: str
    panel: str
    delay: int
    learning_rate: float
    returns: list[float]
    mean: float
    low: float
    high: float


Score = Callable[[Sequence[Run]], np.ndarray]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Simulates, prints the table and draws the picture; returns the run folder."""
    try:
        parsed = tyro.cli(Arguments, description=__doc__, args=arguments)
        from a3c_jax import environments  # after the command line: --help answers at once

        environments.make(parsed.environment)
        run_dir = make_run_dir("staleness", parsed.run_dir)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from tqdm import tqdm

    began = time.perf_counter()
    points, tuning = [], {}
    rng = np.random.default_rng(0)
    for optimizer in parsed.optimizers:
        with tqdm(desc=optimizer, unit=" runs", disable=not parsed.progress) as bar:
            score = _make_score(parsed, optimizer, bar)
            scores = _tune(parsed, optimizer, score)
            points += _report(parsed, optimizer, score, scores, rng)
            tuning[optimizer] = {
                "rates": parsed.rates_of(optimizer),
                "returns": {d: scores[i].tolist() for i, d in enumerate(_sorted(parsed.delays))},
            }
    results = {
        "arguments": {k: v for k, v in dataclasses.asdict(parsed).items() if k != "run_dir"},
        "config": parsed.config(parsed.optimizers[0], 1.0).as_dict()
        | {"optimizer": None, "learning_rate": None, "seed": None},
        "tuning": tuning,
        "points": [point._asdict() for point in points],
        "seconds": time.perf_counter() - began,
    }
    text = json.dumps(results, indent=1)
    (run_dir / "staleness.json").write_text(text + "\n", encoding="utf-8")
    _print(parsed, points)
    plot([run_dir / "staleness.png", run_dir / "staleness.pdf"], points)
    print(f"\n{results['seconds']:.0f} seconds\nrun folder: {run_dir}")
    return run_dir


def _make_score(arguments: Arguments, optimizer: Optimizer, bar: Any) -> Score:
    """Makes the function that simulates runs, a batch of them in each compiled call, and scores them."""
    import jax

    from a3c_jax.parameters import Schedule
    from a3c_jax.simulation import fixed_delay, make_simulation

    config = arguments.config(optimizer, 1.0)
    num_updates = config.max_updates
    assert num_updates is not None
    simulate = jax.vmap(make_simulation(config, max(arguments.delays)))

    def score_batch(seeds: Any, rates: Any, schedules: Schedule) -> jax.Array:
        return simulate(seeds, rates, schedules).final_return()

    def inputs(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, Schedule]:
        padded = [*runs, *[runs[-1]] * (arguments.batch - len(runs))]
        schedules = [fixed_delay(run.delay, num_updates) for run in padded]
        return (
            np.array([run.seed for run in padded], np.uint32),
            np.array([run.learning_rate for run in padded], np.float32),
            jax.tree.map(lambda *columns: np.stack(columns).astype(np.int32), *schedules),
        )

    compiled = jax.jit(score_batch).lower(*inputs([Run(0, 1.0, 0)])).compile()

    def score_some(runs: Sequence[Run]) -> np.ndarray:
        scores = np.asarray(compiled(*inputs(runs)))[: len(runs)]
        bar.update(len(runs))
        return scores

    def score(runs: Sequence[Run]) -> np.ndarray:
        batches = [runs[i : i + arguments.batch] for i in range(0, len(runs), arguments.batch)]
        with ThreadPoolExecutor(arguments.threads) as pool:
            scores = np.concatenate(list(pool.map(score_some, batches)))
        if np.isnan(scores).any():
            raise SystemExit(
                "error: no episode ended in the last tenth of a run, which is what scores it; raise "
                f"--max-steps, got {arguments.max_steps}."
            )
        return scores

    return score


def _tune(arguments: Arguments, optimizer: str, score: Score) -> np.ndarray:
    """The scores of the seeds that choose the learning rates, `[delays, rates, tuning_seeds]`."""
    delays, rates = _sorted(arguments.delays), arguments.rates_of(optimizer)
    seeds = range(TUNING_SEED, TUNING_SEED + arguments.tuning_seeds)
    runs = [Run(d, rate, seed) for d in delays for rate in rates for seed in seeds]
    return score(runs).reshape(len(delays), len(rates), len(seeds))


def _report(
    arguments: Arguments,
    optimizer: str,
    score: Score,
    tuning: np.ndarray,
    rng: np.random.Generator,
) -> list[Point]:
    """Fresh seeds' scores with the learning rates that `tuning` chose."""
    delays, rates = _sorted(arguments.delays), arguments.rates_of(optimizer)
    best = [rates[i] for i in tuning.mean(axis=2).argmax(axis=1)]  # the smaller one of equals
    chosen = {"fixed": [best[0]] * len(delays), "own": best}
    pairs = sorted({pair for own in chosen.values() for pair in zip(delays, own, strict=True)})
    runs = [Run(d, rate, seed) for d, rate in pairs for seed in range(arguments.seeds)]
    scores = dict(zip(pairs, score(runs).reshape(len(pairs), arguments.seeds), strict=True))
    intervals = {
        pair: bootstrap_interval(returns, arguments.resamples, rng)
        for pair, returns in scores.items()
    }
    return [
        Point(
            optimizer,
            panel,
            *pair,
            scores[pair].tolist(),
            float(interquartile_mean(scores[pair])),
            *intervals[pair],
        )
        for panel, own in chosen.items()
        for pair in zip(delays, own, strict=True)
    ]


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half along the last axis: without the lowest and the highest quarter, rounded down.

    Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
    """
    count = values.shape[-1]
    return np.sort(values, axis=-1)[..., count // 4 : count - count // 4].mean(axis=-1)


def bootstrap_interval(
    values: np.ndarray, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """The 95 % percentile interval of the interquartile mean, from a bootstrap over the runs of one task.

    Args:
      values: one per seed, `[seeds]`.
      resamples: how many samples to draw.
      rng: where they come from.
    """
    means = interquartile_mean(rng.choice(values, size=(resamples, len(values))))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _sorted(delays: Iterable[int]) -> list[int]:
    return sorted(delays)


def _print(arguments: Arguments, points: Sequence[Point]) -> None:
    print(
        f"\n{arguments.environment}, {arguments.max_steps:,} steps, {arguments.envs_per_worker} environments x "
        f"{arguments.t_max} steps an update: interquartile mean over {arguments.seeds} seeds [95 % interval],\n"
        f"mean return in the last tenth of the run; learning rates chosen by {arguments.tuning_seeds} other seeds"
    )
    for panel, title in PANELS.items():
        print(f"\n{title}\n{'delay':>5}" + "".join(f"  {o:^33}" for o in arguments.optimizers))
        for delay in _sorted(arguments.delays):
            row = [p for p in points if (p.panel, p.delay) == (panel, delay)]
            cells = (
                f"{p.mean:6.1f} {f'[{p.low:.1f}, {p.high:.1f}]':<16} {f'({p.learning_rate:g})':<9}"
                for p in row
            )
            print(f"{delay:5d}" + "".join(f"  {cell}" for cell in cells))


STYLES: dict[str, dict[str, Any]] = {
    "adam": {"label": "Adam", "color": "#0072B2", "marker": "o", "linestyle": "-"},
    "shared_rmsprop": {
        "label": "Shared RMSProp", "color": "#D55E00", "marker": "s", "linestyle": "--",
    },
    "momentum": {"label": "momentum SGD", "color": "#009E73", "marker": "^", "linestyle": "-."},
    "rmsprop": {"label": "RMSProp", "color": "#CC79A7", "marker": "D", "linestyle": ":"},
}  # fmt: skip
"""Of the lines: colours of Okabe and Ito, and markers and dashes for those who print in grey."""


def plot(paths: Sequence[Path], points: Sequence[Point]) -> None:
    """Draws the interquartile mean over the delay, with its interval as a band, a panel for each choice of rate.

    Args:
      paths: where the picture goes, in the format that each suffix names.
      points: what to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    delays = _sorted({point.delay for point in points})
    place = {delay: index for index, delay in enumerate(delays)}
    settings: Any = {"font.size": 9, "axes.titlesize": 9, "pdf.fonttype": 42}
    with plt.rc_context(settings):
        figure, panels = plt.subplots(1, 2, figsize=(7, 2.9), sharey=True, layout="constrained")
        for axes, (panel, title) in zip(panels, PANELS.items(), strict=True):
            for name, style in STYLES.items():
                line = [p for p in points if (p.optimizer, p.panel) == (name, panel)]
                x = [place[p.delay] for p in line]
                axes.plot(x, [p.mean for p in line], markersize=4, linewidth=1.4, **style)
                axes.fill_between(
                    x, [p.low for p in line], [p.high for p in line], color=style["color"],
                    alpha=0.18, linewidth=0,
                )  # fmt: skip
            axes.set_title(title)
            axes.set_xlabel("staleness (updates)")
            axes.set_xticks(range(len(delays)), [str(delay) for delay in delays])
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("final return (IQM)")
        used = {point.optimizer for point in points}
        handles = [
            line for line, name in zip(panels[0].get_lines(), STYLES, strict=True) if name in used
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )
        for path in paths:
            figure.savefig(path, dpi=200)
        plt.close(figure)


if __name__ == "__main__":
    main()
