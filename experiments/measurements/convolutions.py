"""What convolutions as matrix products gain: `python -m experiments.measurements.convolutions`.

The built-in networks for images are compared with the same networks of `flax.linen.Conv`: the Atari torso alone, the
worker steps of MinAtar and of frames as large as Atari's, and MinAtar's training. The forms are run in turn. The tables
are in docs/machine-room.md.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import a3c_jax
from a3c_jax import A3CConfig, _compiled, torsos
from a3c_jax.algorithm import describe_network
from a3c_jax.blueprint import make_blueprint
from a3c_jax.protocol import Transition
from experiments import minatar
from experiments.command_line import exit_on_bad_input, parse
from experiments.measurements import timing
from experiments.measurements.torsos import Atari, PlainActorCritic

Part = Literal["torso", "step", "loop", "train"]
Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    parts: tuple[Part, ...] = ("torso", "step", "loop", "train")
    """The Atari torso; worker steps; worker steps in a compiled loop, as in simulations; and training on MinAtar."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads that call at the same time."""
    rounds: int = 7
    """The median of so many rounds is printed."""
    seconds: float = 0.3
    """How long each form is called in a round."""
    size: int = 84
    """Height and width of the frames."""
    games: tuple[str, ...] = ("breakout", "seaquest")
    """Presets of `experiments.minatar`."""
    segments: tuple[str, ...] = ("16x5", "16x20")
    """Environments x t_max of the worker steps with frames."""


class Frames:
    """Frames of noise that depend on the actions: as large as Atari's, and played in no time."""

    name, num_actions, continuous = "Frames", 6, False

    def __init__(self, size: int) -> None:
        self.observation_shape = (4, size, size)

    def reset(self, key: Any, num_envs: int) -> tuple[Any, Any]:
        frames = jax.random.bits(key, (num_envs, *self.observation_shape), jnp.uint8)
        return frames, frames

    def step(self, key: Any, frames: Any, action: Any) -> Transition:
        frames = jnp.roll(frames, 1, axis=1) ^ action.astype(jnp.uint8)[:, None, None, None]
        reward, ended = jnp.ones(len(frames)), jnp.zeros(len(frames), bool)
        return Transition(frames, frames, reward, ended, ended, frames)


class Whole(nn.Module):
    """The Atari torso with convolutions as matrix products, but without chunks."""

    hidden_size: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel, bias = torsos.ConvolutionParameters(16, 8, name="Conv_0")(x.shape[1])
        x = nn.relu(_compiled.convolve_frames(x, torsos.background(x), kernel / 255, 4) + bias)
        kernel, bias = torsos.ConvolutionParameters(32, 4, name="Conv_1")(16)
        x = nn.relu(_compiled.convolve(x, kernel, 2) + bias)
        return nn.relu(nn.Dense(self.hidden_size)(x.reshape(len(x), -1)))


FORMS: dict[str, nn.Module] = {
    "flax.linen.Conv": Atari((256,)),
    "products": Whole(256),
    "products, in chunks": torsos.Atari((256,), nn.relu),
}


def torso_calls(batch: int, size: int, gradient: bool) -> Calls:
    """The Atari torso in all its forms, forward or its gradient, for so many observations."""
    frames = np.random.default_rng(0).integers(0, 256, (batch, 4, size, size), np.uint8)
    params = torsos.Atari((256,), nn.relu).init(jax.random.key(0), frames[:1])
    packed = _compiled.compile(lambda params: params, params)(params)
    calls = {}
    for name, torso in FORMS.items():

        def loss(params: Any, frames: Any, torso: nn.Module = torso) -> Any:
            return jnp.mean(torso.apply(params, frames) ** 2)  # type: ignore[operator]

        function = jax.grad(loss) if gradient else torso.apply
        compiled = _compiled.compile(function, params, frames, single_kernel=False)
        calls[name] = _bound(compiled, packed, jnp.asarray(frames))
    return calls


def frames_config(segment: str) -> A3CConfig:
    """The paper's network for such a segment, written as `16x5`."""
    environments, t_max = timing.parse_segment(segment, "segments")
    return A3CConfig(
        envs_per_worker=environments, t_max=t_max, hidden_sizes=(256,), activation="relu",
        shared_torso=True,
    )  # fmt: skip


def both_networks(config: A3CConfig, environment: Any) -> dict[str, Any]:
    """The configuration's network as it is, and with `flax.linen.Conv`."""
    kinds = {"flax.linen.Conv": PlainActorCritic, "products": a3c_jax.ActorCritic}
    return {name: describe_network(config, environment, kind) for name, kind in kinds.items()}


def step_calls(config: A3CConfig, environment: Any, loop: int | None = None) -> Calls:
    """The worker step with both networks; in a compiled loop of so many steps, as in a simulation, if `loop` is given."""
    calls = {}
    for name, network in both_networks(config, environment).items():
        blueprint = make_blueprint(config, environment=environment, network=network)
        state = jax.jit(blueprint.start)(np.uint32(0), np.int32(0))
        params = jax.jit(blueprint.init)(np.uint32(0), state.observation)
        if loop is None:
            step = _compiled.compile(blueprint.worker_step, params, state)
            gradients, state, _ = step(params, state)  # packed, and gradients look as parameters do
            calls[name] = _bound(step, gradients, state)
        else:
            calls[name] = _bound(_looped(blueprint.worker_step, loop), params, state)
    return calls


def _looped(worker_step: Callable[..., Any], number: int) -> Callable[..., Any]:
    def body(carry: Any, _: Any) -> Any:
        params, state = carry
        gradients, state, _ = worker_step(params, state)
        params = jax.tree.map(lambda x, gradient: x - 1e-5 * gradient, params, gradients)
        return (params, state), None

    return jax.jit(lambda *carry: jax.lax.scan(body, carry, None, number)[0])


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*arguments))


def microseconds(calls: Calls, observations: int, threads: int, options: Arguments) -> list[float]:
    """Processor time for each observation, all threads of the process together: the median for each of the calls."""

    def repeat(call: Callable[[], Any], number: int) -> None:
        for _ in range(number):
            call()

    numbers = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        numbers[name] = max(1, round(options.seconds / (time.perf_counter() - began)))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(options.rounds + 1):  # the first warms the threads up
            for name, call in calls.items():
                began = time.process_time()
                list(pool.map(repeat, [call] * threads, [numbers[name]] * threads))
                elapsed = time.process_time() - began
                rounds[name].append(1e6 * elapsed / (numbers[name] * threads * observations))
    return [statistics.median(times[1:]) for times in rounds.values()]


def print_rows(title: str, calls: Calls, observations: int, options: Arguments) -> None:
    """Measures, and prints a row for each number of threads."""
    for threads in options.threads:
        found = microseconds(calls, observations, threads, options)
        row = " | ".join(f"{number:.0f}" for number in found)
        print(f"| {title} | {threads} | {row} |", flush=True)


def print_header(columns: Iterable[str]) -> None:
    """The head of a table."""
    columns = ["processor time", "threads", *columns]
    print(f"\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")


def train_ratio(game: str, options: Arguments) -> str:
    """Steps per second with products over those with `flax.linen.Conv`, in whole runs with two workers."""
    config = dataclasses.replace(minatar.PRESETS[game], num_workers=2)
    networks = both_networks(config, a3c_jax.make(config.environment))
    runs = {
        name: timing.asynchronous(a3c_jax.build(config, network=network))
        for name, network in networks.items()
    }
    measured = timing.interleave(runs, options.rounds, 10 * options.seconds)
    ratio = timing.ratio(measured["products"], measured["flax.linen.Conv"])
    rates = {
        name: statistics.median(m.steps_per_second for m in measurements)
        for name, measurements in measured.items()
    }
    return f"{game}: {ratio:.2f}; " + ", ".join(f"{n} {r:,.0f}/s" for n, r in rates.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints tables."""
    with exit_on_bad_input():
        options = parse("measurements.convolutions", Arguments, __doc__, arguments)
        timing.check(options, [(threads, 1, 1) for threads in options.threads])
        segments = {segment: frames_config(segment) for segment in options.segments}
        unknown = set(options.games) - set(minatar.PRESETS)
        if unknown:
            raise ValueError(
                f"games must be among {', '.join(minatar.PRESETS)}, got {sorted(unknown)}; leave them out."
            )
    timing.surroundings()
    if "torso" in options.parts:
        print_header(FORMS)
        for batch in (1, 8, 16, 32):
            print_rows(f"forward, {batch}", torso_calls(batch, options.size, False), batch, options)
        for segment, config in segments.items():
            batch = config.steps_per_update
            calls = torso_calls(batch, options.size, True)
            print_rows(f"gradient, {segment}", calls, batch, options)
    for part, loop in (("step", None), ("loop", 4)):
        if part not in options.parts:
            continue
        print_header(("flax.linen.Conv", "products"))
        tasks: dict[str, tuple[A3CConfig, Any]] = {
            f"frames {segment}": (config, Frames(options.size))
            for segment, config in segments.items()
        }
        for game in options.games:
            config = minatar.PRESETS[game]
            tasks[game] = config, a3c_jax.make(config.environment)
        for name, (config, environment) in tasks.items():
            observations = config.steps_per_update * (loop or 1)
            print_rows(
                f"{part}, {name}", step_calls(config, environment, loop), observations, options
            )
    if "train" in options.parts:
        print("\nsteps per second with products over those with flax.linen.Conv, 2 workers")
        for game in options.games:
            print(train_ratio(game, options), flush=True)


if __name__ == "__main__":
    main()
