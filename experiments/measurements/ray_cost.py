"""What workers on Ray cost, and when they pay: `python -m experiments.measurements.ray_cost`.

The first table is about the exchange alone: networks of several sizes on CartPole-v1 with the shortest of segments, one
worker and then two, on a Ray cluster on this machine. The second trains the same programs with two workers, as threads
and as two processes on Ray, in turn, and prints environment steps per second.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import a3c_jax
from a3c_jax.config import A3CConfig
from experiments import atari
from experiments.command_line import exit_on_bad_input, parse

SIZES = {"2 k": (154,), "130 k": (251, 251), "700 k": (588, 588), "4 M": (1410, 1410)}
"""Hidden layers by the number of parameters that they give, about."""

TASKS = {
    "CartPole 8x16": A3CConfig(envs_per_worker=8, t_max=16),
    "CartPole 64x20": A3CConfig(envs_per_worker=64, t_max=20),
    "MinAtar Breakout 32x10": A3CConfig(
        environment="Breakout-MinAtar", envs_per_worker=32, t_max=10
    ),
    "LunarLander 16x16": A3CConfig(
        environment="gymnasium:LunarLander-v3", envs_per_worker=16, t_max=16
    ),
    "Atari Pong 16x5": dataclasses.replace(
        atari.settings("ale:pong"), learning_rate_schedule="constant"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    seconds: float = 5.0
    """How long each run trains, about."""
    repetitions: int = 3
    """How many runs of each kind, in turn."""
    sizes: tuple[str, ...] = tuple(SIZES)
    """Which networks to exchange."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks to train."""

    def __post_init__(self) -> None:
        for name, known in (("sizes", SIZES), ("tasks", TASKS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"{name} must be of {', '.join(known)}, got {unknown[0]!r}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    with exit_on_bad_input(ValueError, ImportError):
        parsed = parse("measurements.ray_cost", Arguments, __doc__, arguments)
        from a3c_jax.asynchrony.ray_cluster import RayOptions, cluster

        with cluster(RayOptions(address="local"), 2):
            _print_exchanges(parsed)
            _print_tasks(parsed)


def _print_exchanges(arguments: Arguments) -> None:
    import jax

    print("parameters   step ms  exchange ms  exchanges/s: 1 worker  2 workers")
    for name in arguments.sizes:
        config = A3CConfig(num_workers=1, envs_per_worker=1, t_max=5, hidden_sizes=SIZES[name])
        program = a3c_jax.build(config)
        count = sum(x.size for x in jax.tree.leaves(program.initial_params()))
        _, rows = _steps_per_second(program, arguments.seconds, "auto")
        step = statistics.median(row["step_milliseconds"] for row in rows)
        exchange = statistics.median(row["exchange_milliseconds"] for row in rows)
        rates = [
            _steps_per_second(program.replace(num_workers=n), arguments.seconds, "auto")[0] / 5
            for n in (1, 2)
        ]
        print(f"{count:<10,}{step:>10.2f}{exchange:>13.2f}{rates[0]:>23,.0f}{rates[1]:>11,.0f}", flush=True)  # fmt: skip


def _print_tasks(arguments: Arguments) -> None:
    print("\ntask                     threads: steps/s   on Ray   ratio   step ms  exchange ms")
    for name in arguments.tasks:
        program = a3c_jax.build(dataclasses.replace(TASKS[name], num_workers=2))
        pairs = []
        for _ in range(arguments.repetitions):
            threads, _ = _steps_per_second(program, arguments.seconds, None)
            on_ray, rows = _steps_per_second(program, arguments.seconds, "auto")
            pairs.append((threads, on_ray))
        ratio = statistics.median(b / a for a, b in pairs)
        threads, on_ray = (statistics.median(column) for column in zip(*pairs, strict=True))
        step = statistics.median(row["step_milliseconds"] for row in rows)
        exchange = statistics.median(row["exchange_milliseconds"] for row in rows)
        print(f"{name:<25}{threads:>16,.0f}{on_ray:>9,.0f}{ratio:>8.2f}{step:>10.2f}{exchange:>13.2f}", flush=True)  # fmt: skip


def _steps_per_second(program: Any, seconds: float, ray: Any) -> tuple[float, list[Any]]:
    """The rate of a run of so many seconds from its first steps on, and its rows since then."""
    from experiments.measurements import timing

    _, rows = timing.train_for(program, seconds, ray=ray)
    first, last = rows[0], rows[-1]
    played = last["environment_steps"] - first["environment_steps"]
    rows = [row for row in rows[1:] if "loss" in row]
    return played / (last["seconds"] - first["seconds"]), rows


if __name__ == "__main__":
    main()
