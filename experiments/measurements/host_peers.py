"""A3C beside other libraries in the same environments on the same cores: `python -m experiments.measurements.host_peers --python venv/bin/python`.

`--python` is a Python in whose environment the other libraries are installed: stable-baselines3, pfrl, gymnasium[box2d,classic-control]
and ale-py. Each run is a process of its own. Ours and theirs take turns, and ratios are taken within a round. With
Stable-Baselines3's A2C, ours has as many environments in all as it has. With PFRL's A3C, which plays one environment in each
process, ours has as many workers as it has processes.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from a3c_jax.config import available_cores
from experiments.command_line import exit_on_bad_input, parse

_PEERS = Path(__file__).with_name("peer_agents.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, and for how long."""

    python: Path
    """The Python of the other libraries."""
    tasks: tuple[str, ...] = ("cartpole", "lunar-lander", "pong")
    """Any of these."""
    rounds: int = 3
    """How often each is run."""
    seconds: float = 15.0
    """About how long each run takes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each task."""
    cores = available_cores()
    tasks = {
        "cartpole": (["sb3", "CartPole-v1", "16", "16"], ["gymnasium:CartPole-v1", 8, 16]),
        "lunar-lander": (["sb3", "LunarLander-v3", "16", "16"], ["gymnasium:LunarLander-v3", 8, 16]),
        "pong": (["pfrl", "pong", str(cores), "5"], ["ale:pong", 16, 5]),
    }  # fmt: skip
    with exit_on_bad_input():
        parsed = parse("measurements.host_peers", Arguments, __doc__, arguments)
        unknown = sorted({*parsed.tasks} - {*tasks})
        if unknown:
            raise ValueError(f"tasks must be among {', '.join(tasks)}, got {', '.join(unknown)}.")
    for task in parsed.tasks:
        theirs, (environment, num_envs, t_max) = tasks[task]
        rates: list[tuple[float, float]] = []
        for k in range(parsed.rounds):
            other = [str(parsed.python), str(_PEERS), *theirs, str(parsed.seconds)]
            own = [sys.executable, "-c", _OURS.format(**locals() | {"seconds": parsed.seconds})]
            pair = [_rate(own), _rate(other)] if k % 2 else [_rate(other), _rate(own)][::-1]
            rates.append((pair[0], pair[1]))
            print(f"  {task}, round {k + 1}: {pair[0]:,.0f} and {pair[1]:,.0f}", file=sys.stderr)
        ours, others = np.array(rates).T
        ratios = ours / others
        print(
            f"{task}: a3c_jax {np.median(ours):,.0f} steps/s, {theirs[0]} {np.median(others):,.0f}, "
            f"ratio {np.median(ratios):.1f} ({ratios.min():.1f} to {ratios.max():.1f})"
        )


_OURS = """
import dataclasses
from experiments import atari
from experiments.measurements import host_throughput
from a3c_jax.config import A3CConfig
base = atari.settings("ale:pong") if {environment!r}.startswith("ale:") else A3CConfig()
config = dataclasses.replace(
    base, environment={environment!r}, num_workers={cores}, envs_per_worker={num_envs}, t_max={t_max},
    learning_rate_schedule="constant",
)
run = host_throughput.Traced(config).run({cores}, {seconds})
print("STEPS_PER_SECOND", run.steps_per_second)
"""


def _rate(command: list[str]) -> float:
    """What a process prints as its steps per second."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "STEPS_PER_SECOND" not in done.stdout:
        raise SystemExit(f"error: {command[:3]} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.rsplit("STEPS_PER_SECOND", 1)[1])


if __name__ == "__main__":
    main()
