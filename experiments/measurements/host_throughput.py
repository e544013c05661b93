"""How fast A3C is in environments on the host: `python -m experiments.measurements.host_throughput`.

It plays the parts of a worker's segment alone, one after the other in one thread: the environments, the choice of actions, the
gradient of a segment, the update. They need so much processor time for each step, all threads of the process together. If no core
ever idled, and no step cost more in company than alone, all cores could play so many steps a second: the *bound*. In turn with that,
it runs A3C with one worker, with one for each core, one more and twice as many. It shows the share of the bound that they
reach, what each worker's time goes into, and a picture of that, `timeline.png` in the run folder. All options of
`experiments.atari` change what is measured, for instance `--environment ale:breakout`, or
`--environment gymnasium:LunarLander-v3 --torso mlp`.
"""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from a3c_jax.config import A3CConfig, available_cores
from experiments import atari
from experiments.command_line import exit_on_bad_input, parse
from experiments.run_folder import make_run_dir, write_json

PARTS = ("environments", "act", "learn", "update")

_FEWEST = 12
"""How many segments are played alone at least."""

_COUNTED = ("seconds", "environment_steps", "updates", "cpu_seconds", "context_switches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, and for how long."""

    config: Annotated[A3CConfig, tyro.conf.arg(name="")] = atari.settings("ale:pong")
    rounds: int = 5
    """How often the runs are measured, in turn."""
    seconds: float = 10.0
    """About how long each run takes."""
    workers: tuple[int, ...] = (1, available_cores(), available_cores() + 1, 2 * available_cores())
    """With how many workers to measure, in place of `--num-workers`."""
    run_dir: Path | None = None
    """Folder for the results, which must not exist yet. By default a new one under runs/."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures, prints, writes; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.host_throughput", Arguments, __doc__, arguments)
        from experiments.measurements import breakdown, timing

        timing.check(parsed, [(workers, 1, 1) for workers in parsed.workers])
        run_dir = make_run_dir("host-throughput", parsed.run_dir)
        config = dataclasses.replace(parsed.config, learning_rate_schedule="constant")
        traced = Traced(config)
    found: dict[str, Any] = {"surroundings": timing.surroundings(), "config": config.as_dict()}
    runs = {w: functools.partial(traced.run, w) for w in sorted(set(parsed.workers))}
    calls: dict[Any, Callable[[float], Any]] = {
        "alone": functools.partial(play_alone, traced),
        **runs,
    }
    measured = timing.interleave(calls, parsed.rounds, parsed.seconds)
    alone: list[Alone] = measured["alone"]
    found["parts"] = {name: timing.spread(a.microseconds[name] for a in alone) for name in PARTS}
    found["processor_time"] = timing.spread(a.processor_time for a in alone)
    found["bound"] = timing.spread(a.bound for a in alone)
    found["runs"] = {
        w: timing.summarize(measured[w])
        | {
            "share_of_bound": timing.spread(
                run.steps_per_second / a.bound for run, a in zip(measured[w], alone, strict=True)
            )
        }
        for w in runs
    }
    lanes: dict[tuple[int, int, int], Any] = {}
    found["shares"] = {}
    for workers, run in runs.items():
        run(parsed.seconds)
        own = dict(sorted(traced.trace.workers.items()))
        found["shares"][workers] = {name: breakdown.shares(spans) for name, spans in own.items()}
        lanes[workers, config.envs_per_worker, config.t_max] = own
    breakdown.draw(run_dir / "timeline.png", lanes, 3)
    write_json(run_dir / "host_throughput.json", found)
    _print(config, found)
    print(f"\nrun folder: {run_dir}")
    return run_dir


class Traced:
    """A program whose calls are stamped with the time: environments, act, learn, update."""

    def __init__(self, config: A3CConfig) -> None:
        from a3c_jax import _compiled, build, environments
        from a3c_jax.host_worker import CompiledHostStep
        from experiments.measurements import breakdown

        self.trace = breakdown.Trace(PARTS)
        named = environments.make(config.environment, action_bounds=config.action_bounds)
        if not isinstance(named, environments.HostEnvironment):
            raise ValueError(
                f"environment must be on the host, got {config.environment!r}; give gymnasium:... or ale:..., "
                "or use experiments.measurements.throughput."
            )
        self._make = named.make
        named.make = self._make_player  # type: ignore[method-assign, assignment]
        names = iter(("act", "learn"))

        def compile(function: Any, *examples: Any, **options: Any) -> Any:
            compiled = _compiled.compile(function, *examples, **options)

            def call(*arguments: Any) -> Any:
                return jax.block_until_ready(compiled(*arguments))

            stamped = self.trace.stamp(next(names), call)
            stamped.in_single_kernel = compiled.in_single_kernel  # type: ignore[attr-defined]
            return stamped

        program = build(config, environment=named)
        params, state = program.initial_params(), program.initial_states()[0]
        step = CompiledHostStep(program.blueprint.worker_step, compile, params, state)
        update = self.trace.stamp("update", program.updater.update)
        self.program = dataclasses.replace(
            program, step=step, updater=program.updater._replace(update=update)
        )

    def _make_player(self, *arguments: Any) -> Any:
        player = self._make(*arguments)
        player.step = self.trace.stamp("environments", player.step)  # type: ignore[method-assign]
        return player

    def run(self, workers: int, seconds: float) -> Any:
        """Trains for about so many seconds. The clock runs from the first steps on, when all environments are made."""
        from experiments.measurements import timing

        self.trace.workers.clear()
        result, rows = timing.train_for(self.program.replace(num_workers=workers), seconds)
        first, last = rows[0], rows[-1]
        return timing.Measurement(
            **{name: last[name] - first[name] for name in _COUNTED},
            staleness=float(result.schedule.staleness.mean()),
        )


class Alone(NamedTuple):
    """What the parts of a segment take alone, in microseconds for each step of one environment.

    Attributes:
      microseconds: how long each part takes, by name.
      processor_time: what all of them take on all cores together.
    """

    microseconds: dict[str, float]
    processor_time: float

    @property
    def bound(self) -> float:
        """How many steps per second all cores could play."""
        return available_cores() * 1e6 / self.processor_time


def play_alone(traced: Traced, seconds: float) -> Alone:
    """Plays segments one after the other in one thread, for at least so many seconds, and measures their parts."""
    program, config, trace = traced.program, traced.program.config, traced.trace
    spent: dict[str, list[float]] = {name: [] for name in PARTS}
    processor: list[float] = []
    with _named_as_a_worker():  # because calls are stamped in worker threads only
        params, state = program.initial_params(), program.initial_states()[0]
        optimizer_state = program.updater.init(params)
        began = time.perf_counter()
        while len(processor) < _FEWEST or time.perf_counter() < began + seconds:
            trace.workers.clear()
            before = time.process_time()
            gradients, state, _ = program.step(params, state)
            params, optimizer_state, _ = program.updater.update(
                gradients, optimizer_state, params, 0
            )
            processor.append(1e6 * (time.process_time() - before))
            (calls,) = trace.workers.values()
            for name, spans in calls.items():
                spent[name].append(sum(end - begin for begin, end in spans) / 1e3)
        program.release([state])
    steps = config.steps_per_update
    # The first segments make the environments.
    microseconds = {name: float(np.median(times[2:])) / steps for name, times in spent.items()}
    return Alone(microseconds, float(np.mean(processor[2:])) / steps)


@contextlib.contextmanager
def _named_as_a_worker() -> Iterator[None]:
    """Gives the calling thread the name of a worker's for a block."""
    thread = threading.current_thread()
    name, thread.name = thread.name, "a3c-worker-0"
    try:
        yield
    finally:
        thread.name = name


def _print(config: A3CConfig, found: dict[str, Any]) -> None:
    print(f"\n{config.environment}, {config.envs_per_worker} environments x {config.t_max} steps")
    print("microseconds for each step of one environment, each part alone in one thread:")
    print("  " + ", ".join(f"{name} {found['parts'][name]['median']:.0f}" for name in PARTS))
    print(
        f"processor time, all threads together: {found['processor_time']['median']:.0f}; "
        f"bound: {found['bound']['median']:,.0f} steps/s on {available_cores()} cores"
    )
    for workers, summary in found["runs"].items():
        rate, share = summary["steps_per_second"], summary["share_of_bound"]
        print(
            f"{workers} workers: {rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) steps/s, "
            f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}) of the bound, {summary['cores_used']:.2f} cores used, "
            f"staleness {summary['staleness']:.2f}"
        )
        for name, shares in found["shares"][workers].items():
            parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
            print(f"  {name}: {parts}")


if __name__ == "__main__":
    main()
