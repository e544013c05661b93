"""Where the time of each worker goes: time stamps around its calls, and a picture of them."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from a3c_jax import Program
from experiments.measurements.timing import asynchronous, program

COLOURS = {
    "step": "tab:blue", "update": "tab:green", "environments": "tab:orange", "act": "tab:cyan", "learn": "tab:blue",
}  # fmt: skip
"""Of a worker's activities in the timeline. What lies between them is white."""

Calls = dict[str, list[tuple[int, int]]]


class Trace:
    """When each worker thread was inside which call, in nanoseconds: `workers[name][call] = [(begin, end), ...]`."""

    def __init__(self, names: tuple[str, ...] = ("step", "update")) -> None:
        self.workers: dict[str, Calls] = collections.defaultdict(
            lambda: {name: [] for name in names}
        )

    def stamp(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a note of each of its calls in a worker thread."""

        def stamped(*arguments: Any) -> Any:
            began = time.perf_counter_ns()
            result = function(*arguments)
            thread = threading.current_thread().name.removesuffix("-environments")
            if thread.startswith("a3c-worker-"):
                self.workers[thread][name].append((began, time.perf_counter_ns()))
            return result

        return stamped

    def program(self, program: Program) -> Program:
        """The program, with its step and its update stamped."""
        update = self.stamp("update", program.updater.update)
        return dataclasses.replace(
            program,
            step=self.stamp("step", program.step),
            updater=program.updater._replace(update=update),
        )


def shares(calls: Calls) -> dict[str, float]:
    """What a worker's time from its first call to its last goes into: each of the calls, and `between` them."""
    spans = {name: np.array(times, np.int64).reshape(-1, 2) for name, times in calls.items()}
    every = np.concatenate(list(spans.values()))
    total = float(every.max() - every.min())
    parts = {name: float(np.sum(s[:, 1] - s[:, 0])) / total for name, s in spans.items()}
    return parts | {"between": 1.0 - sum(parts.values())}


def measure(
    cases: Iterable[tuple[int, int, int]], seconds: float, picture: Path
) -> list[dict[str, Any]]:
    """Breaks the time of each case down (workers, environments per worker, t_max), and draws the timelines."""
    rows, timelines = [], {}
    for case in cases:
        trace = Trace()
        run = asynchronous(trace.program(program(*case)))
        trace.workers.clear()
        measured = run(seconds)
        num_updates = sum(len(calls["update"]) for calls in trace.workers.values())
        rows.append(
            {
                "case": case,
                "updates_per_second": measured.updates / measured.seconds,
                "microseconds_per_update": 1e6 * case[0] * measured.seconds / measured.updates,
                "shares": {name: shares(calls) for name, calls in sorted(trace.workers.items())},
                # An update is computed again under the lock if another worker's came in between.
                "computed_twice": num_updates / measured.updates - 1,
                "context_switches_per_update": measured.context_switches / measured.updates,
                "cores_used": measured.cpu_seconds / measured.seconds,
            }
        )
        timelines[case] = dict(sorted(trace.workers.items()))
    if timelines:
        draw(picture, timelines)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints where the time goes, a line for each worker."""
    if rows:
        print(
            "\nwhere a worker's time goes: `between` the step and the update lie Python, the counters, and waiting "
            "for the\ninterpreter lock, the store's lock or a turn; `twice` is the share of updates computed again "
            "under the store's lock\n\n"
            "workers  envs  t_max  worker    step  update  between  us/update  updates/s   twice  "
            "context switches/update  cores used"
        )
    for row in rows:
        (workers, envs, t_max) = row["case"]
        for index, parts in enumerate(row["shares"].values()):
            print(
                f"{workers:7d} {envs:5d} {t_max:6d} {index:7d} {parts['step']:7.1%} "
                f"{parts['update']:7.1%} {parts['between']:8.1%} {row['microseconds_per_update']:10.1f} "
                f"{row['updates_per_second']:10,.0f} {row['computed_twice']:7.1%} "
                f"{row['context_switches_per_update']:24.2f} {row['cores_used']:11.2f}"
            )


def draw(path: Path, timelines: dict[Any, dict[str, Calls]], num_steps: int = 4) -> None:
    """Draws a lane for each worker, about `num_steps` of the slowest steps long, from the middle of each run."""
    names = list(next(iter(next(iter(timelines.values())).values())))
    first = "learn" if "learn" in names else "step"
    figure, panels = plt.subplots(
        len(timelines), 1, squeeze=False, layout="constrained",
        figsize=(9, 1 + sum(1.2 + 0.4 * len(lanes) for lanes in timelines.values())),
        height_ratios=[2 + len(lanes) for lanes in timelines.values()],
    )  # fmt: skip
    starts = {
        case: [np.array(calls[first]) for calls in lanes.values()]
        for case, lanes in timelines.items()
    }
    for axes, (case, lanes) in zip(panels[:, 0], timelines.items(), strict=True):
        (workers, envs, t_max), steps = case, starts[case]
        # Equal segments are drawn to the same scale, however many workers play them.
        alike = [s for other, group in starts.items() if other[1:] == case[1:] for s in group]
        length = num_steps * max(float(np.ptp(s)) / len(s) for s in alike)
        unit, unit_name = (1e6, "milliseconds") if length > 1e7 else (1e3, "microseconds")
        begin = float(np.median(np.concatenate([s[:, 0] for s in steps])))
        for lane, calls in enumerate(lanes.values()):
            for name in names:
                spans = (np.array(calls[name], np.float64).reshape(-1, 2) - begin) / unit
                spans = spans[(spans[:, 1] > 0) & (spans[:, 0] < length / unit)]
                bars = np.stack([spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)
                axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=COLOURS[name])
        axes.set_xlim(0, length / unit)
        axes.set_xlabel(unit_name)
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_yticks(range(len(lanes)), [f"worker {w}" for w in range(len(lanes))])
        title = f"{envs} environments × {t_max} steps, {workers} worker" + "s" * (workers > 1)
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    handles: Any = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
