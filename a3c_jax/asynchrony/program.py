"""`build`: what a configuration describes, compiled once as a value, and run as often as one likes."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from a3c_jax import _compiled
from a3c_jax.asynchrony.checkpoint_files import Checkpoint
from a3c_jax.asynchrony.checkpoints import check_same_run
from a3c_jax.asynchrony.objects import check_objects, name_objects
from a3c_jax.blueprint import Blueprint, describe, make_parts
from a3c_jax.config import (
    BUILT_IN_OPTIMIZER_FIELDS,
    A3CConfig,
    changes_needing_compilation,
    is_same_optimizer,
)
from a3c_jax.environments import Environment, HostEnvironment
from a3c_jax.host_worker import CompiledHostStep, HostStepFunctions, rehearse
from a3c_jax.optimizers import Updater
from a3c_jax.own_checks import check_config


@dataclasses.dataclass(frozen=True)
class Program:
    """A training program, compiled and ready to run: give it to `train` or `replay`.

    Attributes:
      config: the configuration.
      blueprint: what the configuration describes, as pure functions.
      describe: gives the blueprint of another configuration with the same objects.
      step: the worker step, compiled: `step(params, state) -> (gradients, state, report)`.
      updater: the optimizer's update, compiled.
      init: `init(seed, observation)` gives the initial parameters, Flax variables.
      start: `start(seed, worker)` gives a worker's initial state.
      max_concurrent_calls: how many threads should call the step at the same time, as a function of the
        number of threads and the step's arguments; None sets no limit.
      single_kernel: whether the step is a single kernel, on which the last bits of a run depend.
      objects: what `build` was given as an object, by the name of its class or function.
      seconds: wall-clock seconds that building took, for `setup` and `compile`.
    """

    config: A3CConfig
    blueprint: Blueprint
    describe: Callable[[A3CConfig], Blueprint]
    step: Callable[[Any, Any], tuple[Any, Any, Any]]
    updater: Updater
    init: Callable[[Any, Any], Any]
    start: Callable[[Any, Any], Any]
    max_concurrent_calls: Callable[..., int | None]
    single_kernel: bool
    objects: dict[str, str]
    seconds: dict[str, float]

    @property
    def environment(self) -> Environment:
        """What is played."""
        return self.blueprint.environment

    @property
    def network(self) -> Any:
        """The network; `network.apply(params, observation)` gives a distribution and values."""
        return self.blueprint.network

    def replace(self, **changes: Any) -> "Program":
        """The same program under a changed configuration, without compiling the worker step again.

        >>> program = build(A3CConfig(max_steps=1_000))
        >>> program.replace(seed=7).config.seed
        7

        Args:
          **changes: fields of the configuration that the worker step does not depend on: the seed, the budgets,
            the number of workers, the optimizer. If the optimizer changes, its update is compiled again.

        Raises:
          ValueError: if a changed field needs another program, or other environments than were given as an object.
        """
        config = dataclasses.replace(self.config, **changes)
        refused = list(changes_needing_compilation(self.config, config))
        if "optimizer" in self.objects:
            fields = BUILT_IN_OPTIMIZER_FIELDS
            refused += [f for f in fields if getattr(config, f) != getattr(self.config, f)]
        if refused:
            raise ValueError(
                f"Program.replace must not change {', '.join(refused)}, on which the compiled worker step or your own "
                "optimizer depends; build another program."
            )
        if isinstance(self.environment, HostEnvironment):
            self.environment.check_copies(config.num_workers, config.envs_per_worker)
        program = dataclasses.replace(self, config=config)
        if is_same_optimizer(self.config, config):
            return program
        blueprint = self.describe(config)
        params, state = program.initial_params(), program.initial_states()[0]
        gradients, _, _ = rehearse(self.step, params, state)
        updater = compile_updater(blueprint.updater(config.learning_rate), params, gradients)
        return dataclasses.replace(program, blueprint=blueprint, updater=updater)

    def initial_states(self) -> list[Any]:
        """Each worker's initial state."""
        seed = np.uint32(self.config.seed)
        return [self.start(seed, np.int32(w)) for w in range(self.config.num_workers)]

    def initial_params(self) -> Any:
        """The initial parameters."""
        seed = np.uint32(self.config.seed)
        return self.init(seed, self.start(seed, np.int32(0)).observation)

    def release(self, states: list[Any]) -> None:
        """Closes what workers' states hold besides arrays; see the function of that name."""
        release(self.environment, states)

    def evaluation_key(self) -> jax.Array:
        """A random key for evaluation, which no worker uses."""
        return self.blueprint.evaluation_key(self.config.seed)


def build(
    config: A3CConfig,
    *,
    environment: Any = None,
    network: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    algorithm: Any = None,
    single_kernel: bool | None = None,
) -> Program:
    """Builds and compiles what a configuration describes.

    >>> from a3c_jax import A3CConfig, build, train
    >>> program = build(A3CConfig(num_workers=2, max_steps=1_000))
    >>> [train(program.replace(seed=seed)).version for seed in range(3)]
    [8, 8, 8]

    Args:
      config: the configuration.
      environment: what to play instead of the environment that the configuration names: an object with
        gymnax's interface, or one of the protocol `a3c_jax.environments.Environment`; a
        `gymnasium.vector.VectorEnv`, or a function `make(num_envs)` that makes one.
      network: what to train instead of the network that the configuration describes: a module like
        `a3c_jax.networks.ActorCritic`, or anything with `init` and `apply`
        (`a3c_jax.networks.network_functions`).
      loss: what to minimise instead of A3C's loss: `loss(params, apply_fn, trajectory) -> (scalar, metrics)`,
        like `a3c_jax.losses.a3c_loss`.
      optimizer: an optax transformation of the parameter tree instead of the optimizer that the
        configuration describes, or a function that makes one of the learning rate.
      algorithm: what the workers do instead of the algorithm that the configuration names:
        `algorithm(config, environment, network) -> a3c_jax.algorithm.Algorithm`.
      single_kernel: whether to compile the worker step into a single kernel, if that is possible; None takes
        what is faster, which for some networks is found by timing. The two differ in the last bits, so that
        a replay by another program needs what the run had (`TrainResult.single_kernel`).

    Returns:
      The program.

    Raises:
      ValueError: if the environment is unknown or not supported, or if what is given and the
        configuration do not fit together.
      TypeError: if an object lacks a method, or the loss or the optimizer is of another kind.
    """
    began = time.perf_counter()
    objects = {"environment": environment, "network": network}
    objects |= {"loss": loss, "optimizer": optimizer, "algorithm": algorithm}
    parts = make_parts(config, **objects)
    blueprint = describe(config, parts)
    init = _compiled.compile_for_few_calls(blueprint.init)
    start = _compiled.compile_for_few_calls(blueprint.start)
    seed = np.uint32(config.seed)
    state = start(seed, np.int32(0))
    params = init(seed, state.observation)
    set_up = time.perf_counter()

    step = compile_step(blueprint.worker_step, params, state, single_kernel)
    gradients, _, _ = rehearse(step, params, state)
    updater = compile_updater(blueprint.updater(config.learning_rate), params, gradients)
    return Program(
        config=config,
        blueprint=blueprint,
        describe=functools.partial(describe, parts=parts),
        step=step,
        updater=updater,
        init=init,
        start=start,
        max_concurrent_calls=step.max_concurrent_calls,
        single_kernel=step.in_single_kernel,
        objects=name_objects(objects),
        seconds={"setup": set_up - began, "compile": time.perf_counter() - set_up},
    )


def compile_step(worker_step: Any, params: Any, state: Any, single_kernel: bool | None) -> Any:
    """The worker step, compiled. If its environments are on the host, they are not made yet."""
    if isinstance(worker_step, HostStepFunctions):
        return CompiledHostStep(
            worker_step, _compiled.compile, params, state, single_kernel=single_kernel
        )
    return _compiled.compile(worker_step, params, state, single_kernel=single_kernel)


def release(environment: Environment, states: Iterable[Any]) -> None:
    """Closes what workers' states hold besides arrays: the environments of each, if they are on the host."""
    if isinstance(environment, HostEnvironment):
        for state in states:
            state.environment.live.close()


def compile_updater(updater: Updater, params: Any, gradients: Any) -> Updater:
    """An updater with its functions compiled for parameters and gradients like these."""
    init = _compiled.compile(updater.init, params)
    return Updater(init, _compiled.compile(updater.update, gradients, init(params), params, 0))


def as_program(
    config: A3CConfig | Program,
    single_kernel: bool | None = None,
    start: Checkpoint | None = None,
    **objects: Any,
) -> Program:
    """A program as it is; a configuration built, with the objects that `build` takes.

    Args:
      config: the program, or the configuration.
      single_kernel: as in `build`.
      start: the checkpoint that will be gone on from, if any. It is compared before anything is compiled.
      **objects: as in `build`.

    Raises:
      ValueError: if a program is given together with an object; if the checkpoint's configuration differs in more
        than the budgets, or if its run was given other objects.
    """
    settings: Any = config
    named = name_objects(objects)
    if isinstance(config, Program):
        if named:
            raise ValueError(
                f"{' and '.join(named)} must not be given beside a Program, which is compiled already; give "
                "them to build."
            )
        settings, named = config.config, config.objects
    check_config(settings)
    if start is not None:
        check_same_run(start.config, settings)
        check_objects(start.objects, named)
    if isinstance(config, Program):
        return config
    return build(config, single_kernel=single_kernel, **objects)
