"""The speed of simulated workers beside that of threads: `python -m experiments.measurements.simulation_speed`.

The paper's workers have one environment and segments of 5 steps. So small a segment costs less than the Python code around
it, and only one thread at a time can run that. A simulation (`a3c_jax.make_simulation`) has no such code: all workers and all
updates are one compiled program. So has a synchronous loop, which makes one update of all environments instead of one for
each worker. All of them are measured in turns, with the same losses and the same network, on CartPole-v1.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.run_folder import make_run_dir, write_json

if TYPE_CHECKING:
    from a3c_jax.config import A3CConfig
    from experiments.measurements.timing import Measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, and how long."""

    workers: int = 16
    """Number of workers that are simulated, at least 2."""
    segment: str = "1x5"
    """A worker's environments x steps."""
    runs: int = 10
    """Number of simulated runs that are mapped with `jax.vmap`."""
    rounds: int = 7
    """How often each case is measured."""
    seconds: float = 1.0
    """About how long each measurement runs."""
    run_dir: Path | None = None
    """Folder for the results, which must not exist yet. By default a new one under runs/."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures, prints, writes; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.simulation_speed", Arguments, __doc__, arguments)
        from experiments.measurements import timing  # it loads JAX, --help does not

        envs, t_max = timing.parse_segment(parsed.segment, "segment")
        if parsed.workers < 2 or parsed.runs < 1:
            raise ValueError(
                f"workers must be >= 2 and runs >= 1, got {parsed.workers} and {parsed.runs}; use more."
            )
        timing.check(parsed, [(parsed.workers, envs, t_max)])
        run_dir = make_run_dir("simulation-speed", parsed.run_dir)
    CompilationCache().use()
    surroundings = timing.surroundings()
    print("compiling", file=sys.stderr, flush=True)
    workers = parsed.workers
    config = timing.configure(workers, envs, t_max)
    runs: dict[str, Measure] = {
        f"{w} worker thread{'s' * (w > 1)}": timing.asynchronous(timing.program(w, envs, t_max))
        for w in (1, 2, workers)
    }
    runs["simulated, one after the other"] = simulated(config, 1)
    runs["simulated, side by side"] = simulated(config, workers)
    runs[f"{parsed.runs} such runs at once"] = simulated(config, workers, parsed.runs)
    runs["synchronous, one worker's environments"] = timing.synchronous_loop(
        timing.configure(1, envs, t_max)
    )
    runs["synchronous, all workers' environments"] = timing.synchronous_loop(config)
    measured = timing.interleave(runs, parsed.rounds, parsed.seconds)
    rows = {name: timing.summarize(rounds) for name, rounds in measured.items()}
    options = {k: v for k, v in dataclasses.asdict(parsed).items() if k != "run_dir"}
    results = {"surroundings": surroundings, "options": options, "rows": rows}
    write_json(run_dir / "simulation_speed.json", results)
    print(
        f"\nCartPole-v1, {workers} workers x {envs} x {t_max}, medians of {parsed.rounds} rounds (smallest to largest)\n"
        f"{'':40}{'steps/s':>11}{'':28}{'updates/s':>10}  steps/s over the first"
    )
    first = next(iter(measured.values()))
    for name, row in rows.items():
        rate = row["steps_per_second"]
        spread = f"({rate['min']:,.0f} to {rate['max']:,.0f})"
        print(
            f"{name:40}{rate['median']:11,.0f} {spread:27}{row['updates_per_second']['median']:10,.0f}  "
            f"{timing.ratio(measured[name], first):.2f}"
        )
    print(f"\nrun folder: {run_dir}")
    return run_dir


def simulated(config: "A3CConfig", workers_at_once: int, num_runs: int = 1) -> "Measure":
    """Simulated workers that take turns, in a function that makes such runs for about so many seconds."""
    import resource

    import jax
    import jax.numpy as jnp

    from a3c_jax import make_simulation, round_robin
    from experiments.measurements.timing import Measurement, used_since

    workers = config.num_workers
    num_updates = workers * max(1, 80_000 // config.steps_per_update // workers)
    simulate = make_simulation(config, workers - 1, workers_at_once=workers_at_once)
    schedule = jax.tree.map(jnp.asarray, round_robin(workers, num_updates))
    run = jax.jit(jax.vmap(simulate, (0, None, None)) if num_runs > 1 else simulate)
    seed = jnp.arange(num_runs) if num_runs > 1 else 0
    jax.block_until_ready(run(seed, config.learning_rate, schedule))

    def measure(seconds: float) -> Measurement:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        began, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - began < seconds:
            jax.block_until_ready(run(seed, config.learning_rate, schedule))
            calls += 1
        updates = calls * num_updates * num_runs
        return Measurement(
            time.perf_counter() - began,
            updates * config.steps_per_update,
            updates,
            workers - 1.0,
            *used_since(usage),
        )

    return measure


if __name__ == "__main__":
    main()
