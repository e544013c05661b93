"""How the cost of A3C grows, and a model that predicts it: `python -m experiments.scaling`.

It varies one factor at a time, workers, width of the hidden layer, environments per worker and `t_max`, and draws
steps per second over each (`scaling.png`). From the same runs it takes the constants of a model and predicts what
more cores would give:

1. A single worker's update takes `t(E, T) = c_call + c_step * E * T`, for E environments and T steps. The
   predictions start from the t measured for a segment, not from this line, so that its error is not in them.
2. Of an update, `c_serial` cannot overlap with another worker's, because a thread has to hold Python's interpreter
   lock, or waits until it is handed over. It is taken from the fastest rate of updates that two or more
   workers reach here with the smallest segment. A single worker does not hand over: it holds the interpreter lock for
   `c_interpreter` of its t. The store's lock is held for `c_lock`, mostly with the interpreter lock,
   where others are so many that each update has to be computed again under it.
3. W workers on C cores are min(W, C) customers of a closed queue, or fewer where segments are so short that `train`
   lets fewer play at the same time. Each computes for `t - c_interpreter`, then is served
   for `max(c_serial, c_lock)`, one at a time. Mean value analysis gives the updates per second.

What the model assumes:
- a core more is a core like those here: memory, caches, power and the other users of the machine add no cost;
- t is that of a single worker, whatever the others do. XLA spreads large segments over several cores: where that
  gains, t is too small for many workers; where handing over costs more than it gains, too large;
- handing over the interpreter lock takes no longer with more workers, and workers beyond those change nothing;
- where several workers do not saturate the interpreter lock with the smallest segment, c_serial is too large.

The second prediction, "free hand-over", puts c_interpreter in place of c_serial: what could be reached if handing over
the interpreter lock cost nothing.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tyro

from a3c_jax.config import A3CConfig, available_cores
from experiments.benchmark import parse_segment
from experiments.runner import make_run_dir

if TYPE_CHECKING:
    from experiments.measure import Measurement

DEFAULTS = A3CConfig()
CORES = (8, 16, 64)
"""Numbers of cores to predict for, besides this machine's."""


class Point(NamedTuple):
    """What to run."""

    workers: int
    envs_per_worker: int
    t_max: int
    width: int

    @property
    def steps(self) -> int:
        """Environment steps of an update."""
        return self.envs_per_worker * self.t_max

    @property
    def segment(self) -> str:
        """Its segment's size, as `8x5`."""
        return f"{self.envs_per_worker}x{self.t_max}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to vary, and how long to measure."""

    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of worker threads; 1 and a larger one at least, which the model needs."""
    segments: tuple[str, ...] = ("1x5", "8x5", "8x16", "64x20")
    """Segments (environments x t_max) to vary the workers at, and to predict."""
    width: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Widths of the hidden layer."""
    envs: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """Numbers of environments per worker."""
    t_max: tuple[int, ...] = (5, 16, 32, 64, 128)
    """Numbers of steps in a segment."""
    rounds: int = 3
    """How often each point is measured."""
    seconds: float = 1.0
    """How long each measurement runs."""
    run_dir: Path | None = None
    """Folder to write to; it must not exist. By default a new one under runs/."""


class Constants(NamedTuple):
    """The model's constants, in seconds.

    Attributes:
      c_call: what an update costs that does not depend on its work.
      c_step: what an environment step costs.
      fit_error: the largest relative error of `c_call + c_step * E * T` over the points it was fitted to.
      c_serial: the part of an update that cannot overlap with another worker's.
    """

    c_call: float
    c_step: float
    fit_error: float
    c_serial: float


class Alone(NamedTuple):
    """A segment's update by a single worker, in seconds.

    Attributes:
      update: all of it.
      segment: the call that plays, without what comes before and after.
      lock_held: with the store's lock held, were the update computed again under it.
      interpreter_held: with the interpreter lock held: all but the two compiled programs.
    """

    update: float
    segment: float
    lock_held: float
    interpreter_held: float


def fit_line(work: Iterable[float], seconds: Iterable[float]) -> tuple[float, float, float]:
    """Fits `seconds = a + b * work` with the smallest squares of relative errors.

    Returns:
      a, b and the largest relative error.
    """
    x, y = np.array(list(work), np.float64), np.array(list(seconds), np.float64)
    design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(y))
    return float(a), float(b), float(np.max(np.abs(a + b * x - y) / y))


def predict(workers: int, cores: int, think: float, serial: float) -> float:
    """Updates per second of a closed queue, by mean value analysis.

    Args:
      workers: how many; those beyond the cores change nothing.
      cores: how many.
      think: seconds of an update that the workers spend side by side.
      serial: seconds of it in which there is room for one.
    """
    rate = queue = 0.0
    for customers in range(1, min(workers, cores) + 1):
        response = serial * (1 + queue)
        rate = customers / (think + response)
        queue = rate * response
    return rate


def predict_segment(workers: int, cores: int, alone: Alone, serial: float | None = None) -> float:
    """Updates per second of a segment; without `serial`, handing over the interpreter lock is free."""
    from a3c_jax.training import workers_at_once

    if min(workers, cores) == 1:
        return 1 / alone.update
    cores = workers_at_once(alone.segment, cores)
    if serial is None:
        bound = max(alone.interpreter_held, alone.lock_held)
        return predict(workers, cores, alone.update - bound, bound)
    bound = max(serial, alone.lock_held)
    return predict(workers, cores, alone.update - alone.interpreter_held, bound)


def main(arguments: list[str] | None = None) -> Path:
    """Measures, predicts, prints, writes; returns the run folder."""
    try:
        parsed = tyro.cli(Arguments, description=__doc__, args=arguments)
        from experiments import measure  # after the command line: --help answers at once

        for name, example in (
            ("workers", "1 2"), ("width", "64 128"), ("envs", "1 8"),
            ("t_max", "5 20"), ("rounds", 3), ("seconds", 1.0),
        ):  # fmt: skip
            measure.check_positive(name, getattr(parsed, name), example)
        if not parsed.segments:
            raise ValueError("segments must not be empty; give 1x5 8x5.")
        segments = [parse_segment(text, "segments") for text in parsed.segments]
        if 1 not in parsed.workers or max(parsed.workers) < 2:
            raise ValueError(
                f"workers must hold 1 and a larger number, got {parsed.workers}; give 1 2."
            )
        run_dir = make_run_dir("scaling", parsed.run_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    surroundings = measure.surroundings()
    print(measure.describe(surroundings))
    sweeps = _sweeps(parsed, segments)
    points = dict.fromkeys(p for lines in sweeps.values() for _, line in lines for p in line)
    print(f"compiling for {len(points)} points", file=sys.stderr, flush=True)
    runs: dict[Any, Any] = {point: measure.Asynchronous(_config(point)) for point in points}
    measured = measure.interleave(runs, parsed.rounds, parsed.seconds)
    updates = {
        point: float(np.median([m.updates_per_second for m in measured[point]])) for point in points
    }
    one_worker = [p for p in points if p.workers == 1 and p.width == DEFAULTS.hidden_sizes[0]]
    c_call, c_step, fit_error = fit_line(
        (p.steps for p in one_worker), (1 / updates[p] for p in one_worker)
    )
    smallest = min(segments, key=lambda segment: segment[0] * segment[1])
    fastest = max(
        rate for p, rate in updates.items()
        if p.workers > 1 and (p.envs_per_worker, p.t_max) == smallest
    )  # fmt: skip
    constants = Constants(c_call, c_step, fit_error, 1 / fastest)
    alone = {
        segment: _alone(_point(1, *segment), updates[_point(1, *segment)], parsed.seconds)
        for segment in segments
    }

    predictions = _predictions(parsed, segments, constants, alone, updates)
    results = {
        "surroundings": surroundings,
        "options": {k: v for k, v in dataclasses.asdict(parsed).items() if k != "run_dir"},
        "points": [{**p._asdict(), **_rates(measured[p])} for p in points],
        "constants": constants._asdict(),
        "alone": [
            {"envs_per_worker": envs, "t_max": t_max, **a._asdict()}
            for (envs, t_max), a in alone.items()
        ],
        "predictions": predictions,
    }
    text = json.dumps(results, indent=2, allow_nan=False)
    (run_dir / "scaling.json").write_text(text + "\n", encoding="utf-8")
    _plot(run_dir, sweeps, measured, constants, alone, surroundings)
    _print_sweeps(sweeps, measured, parsed)
    _print_model(constants, alone, predictions, smallest)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def _point(
    workers: int,
    envs: int = DEFAULTS.envs_per_worker,
    t_max: int = DEFAULTS.t_max,
    width: int = DEFAULTS.hidden_sizes[0],
) -> Point:
    return Point(workers, envs, t_max, width)


def _config(point: Point) -> A3CConfig:
    return dataclasses.replace(
        DEFAULTS,
        num_workers=point.workers,
        envs_per_worker=point.envs_per_worker,
        t_max=point.t_max,
        hidden_sizes=(point.width,),
    )


def _sweeps(
    arguments: Arguments, segments: list[tuple[int, int]]
) -> dict[str, list[tuple[str, list[Point]]]]:
    """For each factor the lines to measure, each a label and its points."""
    many = min(max(arguments.workers), max(available_cores(), 2))

    def both(points: Any) -> list[tuple[str, list[Point]]]:
        return [
            (f"{workers} worker{'s' * (workers > 1)}", points(workers)) for workers in (1, many)
        ]

    return {
        "workers": [
            (f"{envs} × {t_max}", [_point(w, envs, t_max) for w in sorted(set(arguments.workers))])
            for envs, t_max in segments
        ],
        "envs_per_worker": both(lambda w: [_point(w, envs=n) for n in sorted(set(arguments.envs))]),
        "t_max": both(lambda w: [_point(w, t_max=n) for n in sorted(set(arguments.t_max))]),
        "width": both(lambda w: [_point(w, width=n) for n in sorted(set(arguments.width))]),
    }


def _alone(point: Point, updates_per_second: float, seconds: float) -> Alone:
    """Takes a single worker's update apart."""
    from a3c_jax.training import segment_seconds
    from experiments import measure

    trace = measure.Trace()
    run = measure.Asynchronous(_config(point), trace)
    run.measure(seconds)
    dispatch = measure.empty_step_seconds(run)
    update, empty_update = measure.update_seconds(run)
    stamps = trace.stamps()[0]
    each = {name: s / len(stamps) for name, s in measure.parts(stamps, dispatch).items()}
    return Alone(
        update=1 / updates_per_second,
        segment=segment_seconds(run.step, run.store.pull().params, run.states[0]),
        # A second computation of an update finds its code in the caches, like a call alone.
        lock_held=each["lock held"] + update,
        # Of an update, the interpreter lock is held for all but its program, whose time is taken from a
        # call alone: it may take longer after a large segment, but then does not hold it.
        interpreter_held=each["pull"]
        + each["bookkeeping"]
        + each["lock held"]
        + dispatch
        + empty_update,
    )


def _predictions(
    arguments: Arguments,
    segments: list[tuple[int, int]],
    constants: Constants,
    alone: dict[tuple[int, int], Alone],
    updates: dict[Point, float],
) -> list[dict[str, Any]]:
    """Steps per second: for the workers measured here, and for as many workers as there are cores elsewhere."""
    here = available_cores()
    rows = []
    for segment in segments:
        a = alone[segment]
        wanted = [(w, here) for w in sorted(set(arguments.workers))] + [(c, c) for c in CORES]
        for workers, cores in wanted:
            point = _point(workers, *segment)
            measured = updates.get(point) if cores == here else None
            rows.append(
                {
                    "envs_per_worker": segment[0],
                    "t_max": segment[1],
                    "workers": workers,
                    "cores": cores,
                    "predicted": point.steps
                    * predict_segment(workers, cores, a, constants.c_serial),
                    "free_hand_over": point.steps * predict_segment(workers, cores, a),
                    "measured": None if measured is None else point.steps * measured,
                }
            )
    return rows


def _rates(measurements: "list[Measurement]") -> dict[str, Any]:
    from experiments.measure import summary

    return {
        "steps_per_second": summary(m.steps_per_second for m in measurements),
        "updates_per_second": summary(m.updates_per_second for m in measurements),
        "staleness": float(np.median([m.staleness for m in measurements])),
    }


def _plot(
    run_dir: Path,
    sweeps: dict[str, list[tuple[str, list[Point]]]],
    measured: "dict[Any, list[Measurement]]",
    constants: Constants,
    alone: dict[tuple[int, int], Alone],
    surroundings: dict[str, Any],
) -> None:
    from experiments.measure import summary
    from experiments.plotting import Line, Rate, scaling

    def model(points: list[Point]) -> list[float]:
        a = alone[points[0].envs_per_worker, points[0].t_max]
        serial, here = constants.c_serial, surroundings["cores"]
        return [p.steps * predict_segment(p.workers, here, a, serial) for p in points]

    default = f"{DEFAULTS.envs_per_worker} environments"
    steps, width = f"segments of {DEFAULTS.t_max} steps", f"{DEFAULTS.hidden_sizes[0]} units"
    titles = {
        "workers": ("worker threads", f"{width}; environments per worker × steps in the legend"),
        "envs_per_worker": ("environments per worker", f"{steps}, {width}"),
        "t_max": ("steps in a segment (t_max)", f"{default} per worker, {width}"),
        "width": ("units of the hidden layer", f"{default} per worker, {steps}"),
    }
    scaling(
        run_dir / "scaling.png",
        [
            (
                *titles[factor],
                [
                    Line(
                        label,
                        [getattr(p, factor) for p in points],
                        [Rate(**summary(m.steps_per_second for m in measured[p])) for p in points],
                        model(points) if factor == "workers" else None,
                    )
                    for label, points in lines
                ],
            )
            for factor, lines in sweeps.items()
        ],
        title=f"A3C on CartPole-v1, {surroundings['cores']} cores",
    )


def _print_sweeps(
    sweeps: dict[str, list[tuple[str, list[Point]]]],
    measured: "dict[Any, list[Measurement]]",
    arguments: Arguments,
) -> None:
    print(
        f"\nCartPole-v1, environment steps/s, medians of {arguments.rounds} rounds of "
        f"{arguments.seconds:g} s; otherwise {DEFAULTS.envs_per_worker} environments per worker, "
        f"segments of {DEFAULTS.t_max} steps, {DEFAULTS.hidden_sizes[0]} units"
    )
    for factor, lines in sweeps.items():
        print(f"\n{factor:16}" + "".join(f"{getattr(p, factor):12,}" for p in lines[0][1]))
        for label, points in lines:
            rates = [float(np.median([m.steps_per_second for m in measured[p]])) for p in points]
            print(f"{label:16}" + "".join(f"{rate:12,.0f}" for rate in rates))


def _print_model(
    constants: Constants,
    alone: dict[tuple[int, int], Alone],
    predictions: list[dict[str, Any]],
    smallest: tuple[int, int],
) -> None:
    c = constants
    print(
        f"\nThe model, in microseconds: a single worker's update t = {1e6 * c.c_call:.0f} + "
        f"{1e6 * c.c_step:.2f} * environments * t_max\n"
        f"(largest relative error of that line over all points: {c.fit_error:.0%}; the predictions start from each "
        f"segment's own measured t instead)\n"
        f"c_serial = {1e6 * c.c_serial:.0f}, from the fastest rate of updates of several workers at "
        f"{smallest[0]}x{smallest[1]}\n\n"
        "segment   t, alone  lock held  interpreter lock held"
    )
    for (envs, t_max), a in alone.items():
        print(
            f"{envs}x{t_max:<6} {1e6 * a.update:9.0f} {1e6 * a.lock_held:10.0f} "
            f"{1e6 * a.interpreter_held:22.0f}"
        )
    print(
        "\nsegment  workers  cores  predicted, steps/s    measured  predicted/measured  "
        "with free hand-over"
    )
    for row in predictions:
        known = row["measured"]
        print(
            f"{row['envs_per_worker']}x{row['t_max']:<6} {row['workers']:7} {row['cores']:6} "
            f"{row['predicted']:19,.0f} {'-' if known is None else f'{known:,.0f}':>11} "
            f"{'-' if known is None else format(row['predicted'] / known, '.2f'):>19} "
            f"{row['free_hand_over']:20,.0f}"
        )
    print(
        "Assumed: more cores are like those here and share nothing that slows them down; t is a single worker's, "
        "whatever\nthe others do (XLA spreads large segments over several cores); handing over the interpreter lock takes "
        "no longer with\nmore workers; workers beyond those that may play at the same time change nothing. `python -m experiments.scaling --help` "
        "says more."
    )


if __name__ == "__main__":
    main()
