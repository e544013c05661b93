"""What the measurements of speed share: A3C and the synchronous loop, run for some seconds at a time."""

import dataclasses
import functools
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import matplotlib.ticker
import numpy as np

from a3c_jax import Program, SinkError, TrainResult, build, train
from a3c_jax.blueprint import make_blueprint
from a3c_jax.config import A3CConfig, available_cores
from experiments.measurements import synchronous


class Measurement(NamedTuple):
    """The speed of one run.

    Attributes:
      seconds: wall-clock seconds of the training itself.
      environment_steps: all workers together.
      updates: all workers together.
      staleness: the mean of all updates.
      cpu_seconds: processor time of the whole process, XLA's threads included.
      context_switches: voluntary ones, of the whole process: a thread waited for something.
    """

    seconds: float
    environment_steps: int
    updates: int
    staleness: float
    cpu_seconds: float
    context_switches: int

    @property
    def steps_per_second(self) -> float:
        """Environment steps, all workers together."""
        return self.environment_steps / self.seconds


def configure(
    workers: int, envs_per_worker: int, t_max: int, *, base: A3CConfig | None = None, **changes: Any
) -> A3CConfig:
    """The default configuration, or another one, with so many workers, environments and steps."""
    shape = {"num_workers": workers, "envs_per_worker": envs_per_worker, "t_max": t_max}
    return dataclasses.replace(base or A3CConfig(), **(changes | shape))


_build = functools.cache(build)


def program(workers: int, *shape: int, **changes: Any) -> Program:
    """The program of such a configuration. Those that differ in the number of workers only share one compilation."""
    return _build(configure(1, *shape, **changes)).replace(num_workers=workers)


Measure = Callable[[float], Measurement]
T = TypeVar("T")
"""Runs for about so many seconds, from the initial parameters."""


def asynchronous(program: Program) -> Measure:
    """A3C as `a3c_jax.train` runs it, in a function that trains for about so many seconds."""

    def run(steps: float) -> Measurement:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        result = train(program.replace(max_steps=max(1, round(steps))))
        return Measurement(
            result.wall_clock["train"],
            result.environment_steps,
            result.version,
            float(result.schedule.staleness.mean()),
            *used_since(usage),
        )

    steps = 16.0 * program.config.steps_per_update
    while (trial := run(steps)).seconds < 0.1:  # which also warms up
        steps *= 2
    return lambda seconds: run(seconds * trial.steps_per_second)


def train_for(
    program: Program, seconds: float, *, ray: Any = None
) -> tuple[TrainResult, list[dict[str, Any]]]:
    """Trains for about so many seconds after the first steps.

    Returns:
      The result, and the rows that a sink receives since the first steps, with `cpu_seconds` and `context_switches` besides.
      There are two of them at least.
    """
    rows: list[dict[str, Any]] = []
    usage = resource.getrusage(resource.RUSAGE_SELF)

    def on_progress(row: dict[str, Any]) -> None:
        if row["environment_steps"] > 0:
            cpu_seconds, switches = used_since(usage)
            rows.append(row | {"cpu_seconds": cpu_seconds, "context_switches": switches})
            if row["seconds"] > rows[0]["seconds"] + seconds:
                raise _TimeIsUp

    try:
        train(program.replace(max_steps=10**12), on_progress=on_progress, interval=0.25, ray=ray)
    except SinkError as error:
        if isinstance(error.__cause__, _TimeIsUp) and error.result is not None:
            return error.result, rows
        raise
    raise AssertionError("a run without an end has ended")


class _TimeIsUp(Exception):
    """Ends a run."""


def synchronous_loop(config: A3CConfig) -> Measure:
    """The synchronous loop with as many environments as the configuration's workers have together."""
    config = synchronous.synchronous_config(config)
    blueprint = make_blueprint(config)
    # Enough updates that the call itself costs nothing, and few enough to stop in time.
    updates = max(2, 16_384 // config.steps_per_update)
    start = synchronous.start(config, blueprint)
    run = jax.jit(synchronous.make_run(config, blueprint, updates))
    jax.block_until_ready(run(start))

    def measure(seconds: float) -> Measurement:
        state, calls = start, 0
        usage = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        while calls == 0 or time.perf_counter() - began < seconds:
            state, _ = jax.block_until_ready(run(state))
            calls += 1
        elapsed = time.perf_counter() - began
        steps = calls * updates * config.steps_per_update
        return Measurement(elapsed, steps, calls * updates, 0.0, *used_since(usage))

    return measure


def interleave(
    runs: Mapping[Any, Callable[[float], T]], rounds: int, seconds: float
) -> dict[Any, list[T]]:
    """Measures every run once in each round, so that a slow minute of the machine touches all of them."""
    measurements: dict[Any, list[T]] = {key: [] for key in runs}
    for index in range(rounds):
        for key in runs if index % 2 == 0 else reversed(list(runs)):
            measurements[key].append(runs[key](seconds))
        print(f"  round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return measurements


def ratio(a: list[Measurement], b: list[Measurement]) -> float:
    """The median of the rounds' ratios of steps per second."""
    ratios = [x.steps_per_second / y.steps_per_second for x, y in zip(a, b, strict=True)]
    return float(np.median(ratios))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    values = list(values)
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def summarize(measurements: list[Measurement]) -> dict[str, Any]:
    """The rounds of one measurement: medians, and the rounds themselves."""
    return {
        "steps_per_second": spread(m.steps_per_second for m in measurements),
        "updates_per_second": spread(m.updates / m.seconds for m in measurements),
        "staleness": float(np.median([m.staleness for m in measurements])),
        "cores_used": float(np.median([m.cpu_seconds / m.seconds for m in measurements])),
        "rounds": [m._asdict() for m in measurements],
    }


def surroundings() -> dict[str, Any]:
    """Versions and machine, for the record; printed as well."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": available_cores(),
        "load_average": list(os.getloadavg()),
    }
    load = found["load_average"][0]
    print(
        f"{found['date']}, Python {found['python']}, jax {found['jax']}, {found['machine']}, "
        f"{found['cores']} cores, load average at the start {load:.1f}"
    )
    if load > found["cores"] / 2:
        print("Other programs are running: the figures below are too low, and not to be quoted.")
    return found


def check(parsed: Any, shapes: list[Any]) -> None:
    """Refuses options with which nothing can be measured: workers, environments, steps, rounds, seconds.

    Raises:
      ValueError: with the name, the rule, the value and a remedy.
    """
    if not shapes:
        raise ValueError("workers, envs and t_max must not be empty; give one number of each.")
    for shape in shapes:
        configure(*shape[:3])  # which refuses what cannot be
    if parsed.rounds < 1 or not parsed.seconds > 0:
        raise ValueError(
            f"rounds and seconds must be positive, got {parsed.rounds} and {parsed.seconds}."
        )


def parse_segment(text: str, option: str) -> tuple[int, int]:
    """Environments and steps of a segment, written as `8x5`.

    Raises:
      ValueError: if it is written otherwise.
    """
    numbers = text.split("x")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"{option} must be environments x t_max, got {text!r}; give 8x5.")
    return int(numbers[0]), int(numbers[1])


def error_bars(rates: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """The medians, and how far the smallest and the largest are from them, `[2, N]`, as matplotlib wants it."""
    medians, lows, highs = (np.array([r[name] for r in rates]) for name in ("median", "min", "max"))
    return medians, np.stack([medians - lows, highs - medians])


def tidy(axes: Any, axis: str) -> None:
    """A light grid along one axis, whose numbers are written as 10k and 1M."""
    getattr(axes, f"{axis}axis").set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(axis=axis, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def used_since(usage: resource.struct_rusage) -> tuple[float, int]:
    """Processor seconds and voluntary context switches of this process since then."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds = now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime
    return seconds, now.ru_nvcsw - usage.ru_nvcsw
