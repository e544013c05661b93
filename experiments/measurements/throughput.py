"""Measure how fast A3C is here, and where the time goes: `python -m experiments.measurements.throughput`.

1. Environment steps per second of A3C for some numbers of workers, environments per worker and steps in a segment,
   beside a synchronous loop over as many environments (`experiments.measurements.synchronous`). Everything is
   compiled first. Then all cases are measured in turn, round after round, each time from the initial parameters.
   Ratios are taken within a round, and their median is shown.
2. Where the time of each worker goes, from time stamps around its two compiled calls: the step, which plays a
   segment and computes the gradients, and the update of the shared parameters.

It prints the tables, and leaves `throughput.json` and the picture `timeline.png` in its run folder.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a3c_jax.config import available_cores
from experiments import article
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.run_folder import make_run_dir, write_json

QUOTED = {1: 265.0, 2: 128.0}
"""Steps per second of the article's own TensorFlow code by number of threads, measured once on 2 shared Xeon cores
(2026-11-23). This program does not measure them."""

Case = tuple[int, int, int]  # workers, environments per worker, t_max


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, and for how long."""

    workers: tuple[int, ...] = tuple(2**k for k in range(available_cores().bit_length()))
    """Numbers of worker threads. By default 1, 2, 4 and so on, up to the number of cores."""
    envs: tuple[int, ...] = (1, 8, 64)
    """Numbers of environments per worker."""
    t_max: tuple[int, ...] = (5, 20)
    """Numbers of steps in a segment."""
    breakdown: tuple[str, ...] = ("1x5", "8x5", "64x20")
    """Segments (environments x steps) to break the time down for, with one worker and with the most."""
    rounds: int = 5
    """How often each case is measured."""
    seconds: float = 1.5
    """About how long each measurement runs."""
    run_dir: Path | None = None
    """Folder for the results, which must not exist yet. By default a new one under runs/."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures, prints, writes; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.throughput", Arguments, __doc__, arguments)
        from experiments.measurements import breakdown, timing  # they load JAX, --help does not

        cases = [(w, n, t) for t in parsed.t_max for n in parsed.envs for w in parsed.workers]
        timing.check(parsed, cases)
        segments = [timing.parse_segment(text, "breakdown") for text in parsed.breakdown]
        run_dir = make_run_dir("throughput", parsed.run_dir)
    CompilationCache().use()
    surroundings = timing.surroundings()
    rows, articles = measure(parsed, cases)
    breakdowns = breakdown.measure(
        [(w, *segment) for segment in segments for w in sorted({1, max(parsed.workers)})],
        parsed.seconds,
        run_dir / "timeline.png",
    )
    results = {
        "surroundings": surroundings,
        "options": {k: v for k, v in dataclasses.asdict(parsed).items() if k != "run_dir"},
        "throughput": rows,
        "article": articles,
        "breakdown": breakdowns,
    }
    write_json(run_dir / "throughput.json", results)
    print_throughput(rows, articles, parsed)
    breakdown.print_table(breakdowns)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def measure(parsed: Arguments, cases: list[Case]) -> tuple[list[Any], list[Any]]:
    """Measures all cases, and those of the article's setting."""
    from experiments.measurements import timing

    print("compiling", file=sys.stderr, flush=True)
    article_cases = [(w, 1, 20) for w in parsed.workers if w in QUOTED]
    loops = dict.fromkeys((1, w * n, t) for w, n, t in cases)
    runs: dict[Any, Any] = {("a3c", c): timing.asynchronous(timing.program(*c)) for c in cases}
    runs |= {("loop", c): timing.synchronous_loop(timing.configure(*c)) for c in loops}
    for c in article_cases:
        runs["article", c] = timing.asynchronous(timing.program(*c, base=article.DEFAULTS))
    measured = timing.interleave(runs, parsed.rounds, parsed.seconds)

    rows = []
    for case in cases:
        workers, envs, t_max = case
        ours, theirs = measured["a3c", case], measured["loop", (1, workers * envs, t_max)]
        alone = measured.get(("a3c", (1, envs, t_max)))
        rows.append(
            {
                "case": case,
                "asynchronous": timing.summarize(ours),
                "synchronous": timing.summarize(theirs),
                "ratio_to_one_worker": alone and timing.ratio(ours, alone),
                "ratio_to_synchronous": timing.ratio(ours, theirs),
            }
        )
    articles = [
        {
            "case": case,
            "asynchronous": timing.summarize(measured["article", case]),
            "quoted_steps_per_second": QUOTED[case[0]],
        }
        for case in article_cases
    ]
    return rows, articles


def print_throughput(rows: list[Any], articles: list[Any], parsed: Arguments) -> None:
    """Prints the table of the cases, and the comparison with the article's code."""
    print(
        f"\nCartPole-v1, {parsed.rounds} rounds of {parsed.seconds:g} s: steps/s, median (smallest to largest)\n"
        "synchronous: one compiled loop over as many environments as all workers have together\n\n"
        "workers  envs  t_max  A3C                              updates/s  staleness  "
        "synchronous                      A3C/1 worker  A3C/synchronous"
    )
    for row in rows:
        (workers, envs, t_max), ours = row["case"], row["asynchronous"]
        alone = row["ratio_to_one_worker"]
        print(
            f"{workers:7d} {envs:5d} {t_max:6d}  {_spread(ours):33}"
            f"{ours['updates_per_second']['median']:9,.0f} {ours['staleness']:10.2f}  "
            f"{_spread(row['synchronous']):33}{'-' if alone is None else f'{alone:.2f}':>12} "
            f"{row['ratio_to_synchronous']:16.2f}"
        )
    for row in articles:
        quoted, ours = row["quoted_steps_per_second"], row["asynchronous"]
        print(
            f"\nthe article's setting (its network, 1 environment x 20), workers {row['case'][0]}: "
            f"{_spread(ours)} steps/s,\n  {ours['steps_per_second']['median'] / quoted:,.0f} times the "
            f"{quoted:.0f} of its TensorFlow code, which were measured once on 2 shared Xeon cores, not in this run"
        )


def _spread(summary: dict[str, Any]) -> str:
    rate = summary["steps_per_second"]
    return f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})"


if __name__ == "__main__":
    main()
