"""How fast A3C is here, and where the time goes: `python -m experiments.benchmark`.

1. Environment steps per second of A3C for some numbers of workers, environments per worker and `t_max`, beside the
   same work done by a synchronous A2C that is one compiled loop (`experiments.synchronous`) with as many
   environments. Everything is compiled first; then all cases are measured in turn, round after round, each time
   from the initial parameters. Ratios are taken within a round, and their median is shown.
2. Where each worker's time goes, from time stamps around its calls, and a picture of some milliseconds.
3. Peak memory, import time and compile time of short runs in fresh processes.

It prints the tables and leaves `benchmark.json`, `throughput.png` and `timeline.png` in its run folder.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tyro

from a3c_jax.config import A3CConfig, available_cores
from experiments import article
from experiments.runner import make_run_dir

if TYPE_CHECKING:
    from experiments.measure import Measurement

QUOTED = {1: 265.0, 2: 128.0}
"""Steps per second of the article's own TensorFlow code by number of threads, from an earlier measurement on 2 shared
Xeon cores (2026-11-23). They are not measured by this program."""


class Case(NamedTuple):
    """What to run."""

    workers: int
    envs_per_worker: int
    t_max: int


def _up_to_the_cores() -> tuple[int, ...]:
    return tuple(2**power for power in range(available_cores().bit_length()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, and for how long."""

    workers: tuple[int, ...] = dataclasses.field(default_factory=_up_to_the_cores)
    """Numbers of worker threads; by default 1, 2, 4 and so on up to the cores."""
    envs: tuple[int, ...] = (1, 8, 64)
    """Numbers of environments per worker."""
    t_max: tuple[int, ...] = (5, 20)
    """Numbers of steps in a segment."""
    breakdown: tuple[str, ...] = ("1x5", "8x5", "64x20")
    """Segments (environments x t_max) whose time is broken down, with one worker and with the most."""
    rounds: int = 5
    """How often each case is measured."""
    seconds: float = 1.5
    """How long each measurement runs."""
    processes: bool = True
    """Measure memory, import and compile time in fresh processes too."""
    run_dir: Path | None = None
    """Folder to write to; it must not exist. By default a new one under runs/."""

    def cases(self) -> list[Case]:
        """The cases whose throughput is measured."""
        return [
            Case(workers, envs, t_max)
            for t_max in self.t_max
            for envs in self.envs
            for workers in self.workers
        ]

    def breakdowns(self) -> list[Case]:
        """The cases whose time is broken down."""
        workers = sorted({1, max(self.workers)})
        return [Case(w, *parse_segment(text)) for text in self.breakdown for w in workers]


def parse_segment(text: str, option: str = "breakdown") -> tuple[int, int]:
    """Environments and `t_max` of a segment, written as `8x5`.

    Raises:
      ValueError: where it is written otherwise.
    """
    numbers = text.split("x")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"{option} must be environments x t_max, got {text!r}; give 8x5.")
    return int(numbers[0]), int(numbers[1])


def main(arguments: list[str] | None = None) -> Path:
    """Measures, prints, writes; returns the run folder."""
    try:
        parsed = tyro.cli(Arguments, description=__doc__, args=arguments)
        from experiments import measure  # after the command line: --help answers at once

        for name, example in (
            ("workers", "1 2"), ("envs", "1 8"), ("t_max", "5 20"), ("rounds", 5), ("seconds", 1.5),
        ):  # fmt: skip
            measure.check_positive(name, getattr(parsed, name), example)
        parsed.breakdowns()
        run_dir = make_run_dir("benchmark", parsed.run_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    surroundings = measure.surroundings()
    print(measure.describe(surroundings))
    throughput, articles = _throughput(parsed)
    breakdowns = _break_down(parsed, run_dir, throughput)
    processes = _processes() if parsed.processes else []
    results = {
        "surroundings": surroundings,
        "options": {
            k: v for k, v in dataclasses.asdict(parsed).items() if k not in ("run_dir", "processes")
        },
        "throughput": throughput,
        "article": articles,
        "breakdown": breakdowns,
        "processes": processes,
    }
    text = json.dumps(results, indent=2, allow_nan=False)
    (run_dir / "benchmark.json").write_text(text + "\n", encoding="utf-8")
    _plot_throughput(run_dir, throughput, surroundings)
    _print_throughput(throughput, articles, parsed)
    _print_breakdowns(breakdowns)
    _print_processes(processes)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def _config(case: Case, base: A3CConfig | None = None) -> A3CConfig:
    return dataclasses.replace(
        base or A3CConfig(),
        num_workers=case.workers,
        envs_per_worker=case.envs_per_worker,
        t_max=case.t_max,
    )


def _throughput(arguments: Arguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures all cases; returns them and those of the article's setting."""
    from experiments.measure import Asynchronous, Synchronous, interleave

    print("compiling", file=sys.stderr, flush=True)
    runs: dict[Any, Asynchronous | Synchronous] = {}
    for case in arguments.cases():
        runs["asynchronous", case] = Asynchronous(_config(case))
        total = "synchronous", case.workers * case.envs_per_worker, case.t_max
        if total not in runs:
            runs[total] = Synchronous(_config(case))
    article_cases = [Case(workers, 1, 20) for workers in arguments.workers if workers in QUOTED]
    for case in article_cases:
        runs["article", case] = Asynchronous(_config(case, article.DEFAULTS))
    measured = interleave(runs, arguments.rounds, arguments.seconds)

    rows = []
    for case in arguments.cases():
        mine = measured["asynchronous", case]
        theirs = measured["synchronous", case.workers * case.envs_per_worker, case.t_max]
        alone = measured.get(("asynchronous", case._replace(workers=1)))
        rows.append(
            {
                **case._asdict(),
                "asynchronous": _series(mine),
                "synchronous": _series(theirs),
                "ratio_to_one_worker": alone and _ratio(mine, alone),
                "ratio_to_synchronous": _ratio(mine, theirs),
            }
        )
    articles = [
        {
            **case._asdict(),
            "asynchronous": _series(measured["article", case]),
            "quoted_steps_per_second": QUOTED[case.workers],
        }
        for case in article_cases
    ]
    return rows, articles


def _series(measurements: "list[Measurement]") -> dict[str, Any]:
    """All rounds, and the median, smallest and largest rate."""
    from experiments.measure import summary

    return {
        "steps_per_second": summary(m.steps_per_second for m in measurements),
        "updates_per_second": summary(m.updates_per_second for m in measurements),
        "staleness": float(np.median([m.staleness for m in measurements])),
        "cores_used": float(np.median([m.cpu_seconds / m.seconds for m in measurements])),
        "rounds": [m._asdict() for m in measurements],
    }


def _ratio(a: "list[Measurement]", b: "list[Measurement]") -> float:
    """The median of the rounds' ratios of steps per second."""
    return float(
        np.median([x.steps_per_second / y.steps_per_second for x, y in zip(a, b, strict=True)])
    )


def _break_down(
    arguments: Arguments, run_dir: Path, throughput: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Where the time of each worker goes, and the picture of it."""
    from experiments import measure
    from experiments.plotting import Lanes, timeline

    untraced = {
        Case(row["workers"], row["envs_per_worker"], row["t_max"]): row["asynchronous"]
        for row in throughput
    }
    results: list[dict[str, Any]] = []
    lanes: dict[tuple[int, int], list[Lanes]] = {}
    for case in arguments.breakdowns():
        trace = measure.Trace()
        run = measure.Asynchronous(_config(case), trace)
        run.measure(min(arguments.seconds, 0.2))  # a warm-up
        measured = run.measure(arguments.seconds)
        stamps = trace.stamps()
        dispatch = measure.empty_step_seconds(run)
        workers: list[dict[str, Any]] = []
        totals = dict.fromkeys(measure.PARTS, 0.0)
        for worker, of_worker in stamps.items():
            seconds = float(of_worker[-1, -1] - of_worker[0, 0]) / 1e9
            parts = measure.parts(of_worker, dispatch)
            totals = {name: total + parts[name] for name, total in totals.items()}
            workers.append(
                {
                    "worker": worker,
                    "updates": len(of_worker),
                    "seconds": seconds,
                    "shares": {name: value / seconds for name, value in parts.items()},
                    "microseconds": {n: 1e6 * v / len(of_worker) for n, v in parts.items()},
                }
            )
        plain = untraced.get(case)
        results.append(
            {
                **case._asdict(),
                "updates_per_second": measured.updates_per_second,
                "untraced_updates_per_second": plain and plain["updates_per_second"]["median"],
                "lock_held_share": totals["lock held"] / measured.seconds,
                "lock_waited_share": totals["lock wait"] / measured.seconds,
                "context_switches_per_update": measured.context_switches / measured.updates,
                "cores_used": measured.cpu_seconds / measured.seconds,
                "empty_call_microseconds": dispatch * 1e6,
                "by_worker": workers,
            }
        )
        lanes.setdefault((case.envs_per_worker, case.t_max), []).append(
            Lanes(
                f"{_plural(case.envs_per_worker, 'environment')} × {case.t_max} steps, "
                f"{_plural(case.workers, 'worker')}: {measured.updates_per_second:,.0f} updates/s",
                {worker: measure.intervals(s) for worker, s in stamps.items()},
            )
        )
    if lanes:
        timeline(
            run_dir / "timeline.png",
            list(lanes.values()),
            title="What each worker did, in the middle of each run",
        )
    return results


_CHILD = """
import json, sys, time
began = time.perf_counter()
import a3c_jax.training
imported = time.perf_counter() - began
kind, fields = json.loads(sys.argv[1])
config = a3c_jax.A3CConfig(**fields)
if kind == "a3c":
    seconds = a3c_jax.train(config).wall_clock
else:
    from a3c_jax.agent import make_agent
    from experiments import synchronous
    began = time.perf_counter()
    agent = make_agent(synchronous.synchronous_config(config))
    seconds = {"setup": time.perf_counter() - began, **synchronous.train(agent).seconds}
from experiments.measure import peak_memory
print(json.dumps({"import": imported, **seconds, "peak_megabytes": peak_memory() / 1e6}))
"""


PROCESSES: tuple[tuple[str, str, A3CConfig], ...] = (
    ("A3C, the default", "a3c", A3CConfig(max_steps=100_000)),
    ("A3C, 1 environment × 5", "a3c", A3CConfig(max_steps=20_000, envs_per_worker=1, t_max=5)),
    ("synchronous, the default", "synchronous", A3CConfig(max_steps=100_000)),
)
"""Short runs, each in a process of its own: a name, which program, and what it trains."""


def _processes() -> list[dict[str, Any]]:
    """Memory, import and compile time of short runs, each in a process that has done nothing else."""
    # A cache of compiled programs, if there is one, would hide what compiling costs.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    rows = []
    for name, kind, config in PROCESSES:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps([kind, config.as_dict()])],
            cwd=Path(__file__).parent.parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"error: the process that measures {name} failed:\n{done.stderr}")
        rows.append({"name": name, **json.loads(done.stdout)})
    return rows


def _plot_throughput(
    run_dir: Path, throughput: list[dict[str, Any]], surroundings: dict[str, Any]
) -> None:
    from experiments.plotting import Comparison, Rate
    from experiments.plotting import throughput as plot

    plot(
        run_dir / "throughput.png",
        [
            Comparison(
                row["workers"],
                row["envs_per_worker"],
                row["t_max"],
                Rate(**row["asynchronous"]["steps_per_second"]),
                Rate(**row["synchronous"]["steps_per_second"]),
                row["ratio_to_synchronous"],
            )
            for row in throughput
        ],
        title=f"CartPole-v1 on {surroundings['cores']} cores: A3C, and the same environments in one "
        "compiled loop",
    )


def _print_throughput(
    rows: list[dict[str, Any]], articles: list[dict[str, Any]], arguments: Arguments
) -> None:
    print(
        f"\nCartPole-v1, {_plural(arguments.rounds, 'round')} of {arguments.seconds:g} s each: "
        "median (smallest to largest); ratios are medians of the rounds' own\n"
        "synchronous: one compiled loop over as many environments as all workers play together\n\n"
        "workers  envs  t_max     A3C steps/s                         updates/s  staleness  "
        "synchronous steps/s                 A3C/1 worker  A3C/synchronous"
    )
    for row in rows:
        mine, theirs = row["asynchronous"], row["synchronous"]
        alone = row["ratio_to_one_worker"]
        print(
            f"{row['workers']:7d} {row['envs_per_worker']:5d} {row['t_max']:6d}  "
            f"{_spread(mine['steps_per_second'])}  {mine['updates_per_second']['median']:9,.0f} "
            f"{mine['staleness']:10.2f}  {_spread(theirs['steps_per_second'])} "
            f"{'-' if alone is None else f'{alone:.2f}':>12} {row['ratio_to_synchronous']:16.2f}"
        )
    if articles:
        print("\nThe article's setting: its network, 1 environment a worker, segments of 20 steps")
    for row in articles:
        rate, quoted = row["asynchronous"]["steps_per_second"], row["quoted_steps_per_second"]
        print(
            f"  {_plural(row['workers'], 'worker')}: {_spread(rate).strip()} steps/s, "
            f"{rate['median'] / quoted:,.0f} times the {quoted:.0f} of its TensorFlow code"
        )
    if articles:
        print(
            "  Those figures of the TensorFlow code are quoted, from an earlier measurement on 2 shared Xeon "
            "cores,\n  not measured in this run: the ratios hold for a machine like that one."
        )


def _print_breakdowns(breakdowns: list[dict[str, Any]]) -> None:
    from experiments.measure import PARTS

    if not breakdowns:
        return
    print(
        "\nWhere a worker's time goes: share of its wall-clock, and microseconds an update in brackets.\n"
        "dispatch: what a call of an empty program with a step's arguments and results takes, alone; compute:\n"
        "the rest of the step's call, which is the program and waiting for the interpreter lock to come back;\n"
        "update: the optimizer's, which is a compiled call too, before the lock is taken; lock held: the swap, the\n"
        "counters, and the update again where another worker's came in between; bookkeeping: all else.\n"
    )

    def bracketed(value: float) -> str:
        return f"({value:.1f})"

    print(f"{'segment':8} {'workers':>7} {'worker':>6}" + "".join(f"{p:>16}" for p in PARTS))
    for row in breakdowns:
        for worker in row["by_worker"]:
            print(
                f"{row['envs_per_worker']}x{row['t_max']:<6d} {row['workers']:7d} "
                f"{worker['worker']:6d}"
                + "".join(
                    f"{worker['shares'][p]:9.1%} {bracketed(worker['microseconds'][p]):>6}"
                    for p in PARTS
                )
            )
    print(
        "\nsegment  workers  updates/s  without stamps  lock held  waited for  voluntary context switches/update  "
        "cores used"
    )
    for row in breakdowns:
        plain = row["untraced_updates_per_second"]
        print(
            f"{row['envs_per_worker']}x{row['t_max']:<6d} {row['workers']:7d} "
            f"{row['updates_per_second']:10,.0f} {'-' if plain is None else f'{plain:,.0f}':>15} "
            f"{row['lock_held_share']:10.1%} {row['lock_waited_share']:11.1%} "
            f"{row['context_switches_per_update']:34.2f} {row['cores_used']:11.2f}"
        )
    print("(the lock's shares are of the run's wall-clock, all workers together)")


def _print_processes(processes: list[dict[str, Any]]) -> None:
    if not processes:
        return
    print("\nShort runs in fresh processes  peak memory, MB  import, s  setup, s  compile, s")
    for row in processes:
        print(
            f"{row['name']:29} {row['peak_megabytes']:16,.0f} {row['import']:10.2f} "
            f"{row['setup']:9.2f} {row['compile']:11.2f}"
        )


def _spread(values: dict[str, float]) -> str:
    span = f"({values['min']:,.0f} to {values['max']:,.0f})"
    return f"{values['median']:9,.0f} {span:24}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


if __name__ == "__main__":
    main()
