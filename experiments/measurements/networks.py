"""How networks as users write them are compiled, and what that gains: `python -m experiments.measurements.networks`.

Each network's worker step is compiled as a single kernel, plainly, and as the package chooses, and compared with
`jax.jit` of the same step. The programs are called in turn, each by one thread per core. The table is in
docs/machine-room.md.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from a3c_jax import A3CConfig, _compiled
from a3c_jax.blueprint import make_blueprint
from a3c_jax.config import available_cores
from a3c_jax.distributions import Categorical
from experiments.command_line import exit_on_bad_input, parse
from experiments.measurements.torsos import TORSOS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    networks: tuple[str, ...] = ("default", *TORSOS, "lstm of 32", "gru of 64")
    """Names of networks, as in the table."""
    environments: int = 8
    """Environments per worker."""
    t_max: int = 16
    """Steps of a segment."""
    rounds: int = 7
    """The median of so many rounds is printed."""
    seconds: float = 0.05
    """How long a round of each program lasts."""


class Separate(nn.Module):
    """An actor and a critic with a torso each."""

    make_torso: Callable[[], nn.Module]

    def setup(self) -> None:
        self.torsos = self.make_torso(), self.make_torso()
        self.logits, self.value = nn.Dense(2), nn.Dense(1)

    def actor(self, observation: Any) -> Categorical:
        return Categorical(self.logits(self.torsos[0](observation)))

    def critic(self, observation: Any) -> Any:
        return self.value(self.torsos[1](observation))[..., 0]

    def __call__(self, observation: Any) -> tuple[Categorical, Any]:
        return self.actor(observation), self.critic(observation)


def programs(name: str, environments: int, t_max: int) -> tuple[dict[str, Any], bool, Any, Any]:
    """The worker step of a network in all its forms, which of them is chosen, and its arguments."""
    config = A3CConfig(envs_per_worker=environments, t_max=t_max)
    if " of " in name:
        core, size = name.split(" of ")
        config = dataclasses.replace(config, core=core, core_size=int(size))  # type: ignore[arg-type]
    network = Separate(TORSOS[name]) if name in TORSOS else None
    blueprint = make_blueprint(config, network=network)
    state = jax.jit(blueprint.start)(np.uint32(0), np.int32(0))
    params = jax.jit(blueprint.init)(np.uint32(0), state.observation)
    step = blueprint.worker_step
    forms = {
        form: _compiled.compile(step, params, state, single_kernel=form == "single")
        for form in ("single", "plain")
    }
    chosen = _compiled.compile(step, params, state).in_single_kernel
    return forms | {"jit": jax.jit(step)}, chosen, params, state


def seconds_of(form: Callable[..., Any], number: int, arguments: tuple[Any, ...]) -> float:
    """How long a thread on each core takes for so many calls."""

    def play(_: int) -> None:
        for _ in range(number):
            jax.block_until_ready(form(*arguments))

    began = time.perf_counter()
    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(play, range(available_cores())))
    return (time.perf_counter() - began) / number


def measure(name: str, options: Arguments) -> tuple[float, float, bool]:
    """The time of the plain program, and of `jax.jit`, over that of a single kernel; and whether one is chosen."""
    forms, chosen, params, state = programs(name, options.environments, options.t_max)
    gradients, packed, _ = forms["single"](params, state)  # gradients look as parameters do
    arguments = {form: (gradients, packed) for form in forms} | {"jit": (params, state)}
    once = {
        form: min(seconds_of(f, 2, arguments[form]) for _ in range(3)) for form, f in forms.items()
    }
    rounds = [
        {
            form: seconds_of(f, max(1, round(options.seconds / once[form])), arguments[form])
            for form, f in forms.items()
        }
        for _ in range(options.rounds)
    ]
    plain, jit = (
        statistics.median(r[form] / r["single"] for r in rounds) for form in ("plain", "jit")
    )
    return plain, jit, chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a row for each network."""
    with exit_on_bad_input():
        options = parse("measurements.networks", Arguments, __doc__, arguments)
        unknown = set(options.networks) - set(Arguments.networks)
        if unknown:
            raise ValueError(
                f"networks must be among {Arguments.networks}, got {sorted(unknown)}; leave them out."
            )
    print("| network | plain | jax.jit | chosen | chosen over jax.jit |\n|---|---:|---:|---|---:|")
    for name in options.networks:
        plain, jit, chosen = measure(name, options)
        best = (1.0 if chosen else plain) / jit
        word = "single kernel" if chosen else "plain"
        print(f"| {name} | {plain:.2f} | {jit:.2f} | {word} | {best:.2f} |", flush=True)


if __name__ == "__main__":
    main()
