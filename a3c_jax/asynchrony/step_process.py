"""What runs in a process that only makes steps of workers: the program, compiled once, and the newest states.

Nothing here knows how messages pass between the processes.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax import _compiled
from a3c_jax.asynchrony.program import Program, compile_step, release
from a3c_jax.asynchrony.thread_pools import start_with
from a3c_jax.host_worker import rehearse


class Form:
    """How trees like an example pass between processes: as bare arrays, because both ends know their structure."""

    def __init__(self, example: Any) -> None:
        self._packed = _compiled.packed_type(example)
        leaves, self._structure = jax.tree.flatten(_compiled.unpack(example))
        self._dress = [_dressing(x) for x in leaves]

    def bare(self, tree: Any) -> Any:
        """The tree's arrays on the host: one vector if it is packed, a list otherwise."""
        if isinstance(tree, _compiled.Packed):
            return tree.host
        leaves = jax.tree.leaves(tree)
        return [np.asarray(jax.random.key_data(x) if _is_key(x) else x) for x in leaves]

    def dressed(self, bare: Any) -> Any:
        """The tree again."""
        if self._packed is not None and isinstance(bare, np.ndarray):
            return self._packed(jnp.asarray(bare))
        leaves = [dress(x) for dress, x in zip(self._dress, bare, strict=True)]
        return jax.tree.unflatten(self._structure, leaves)


def _dressing(example: Any) -> Callable[[Any], Any]:
    """What makes an array like the example from a bare one."""
    if _is_key(example):
        return functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(example))
    # What is empty at first has any length later. It stays on the host, because JAX would compile for every length.
    return np.asarray if example.shape[:1] == (0,) else jnp.asarray


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class Forms(NamedTuple):
    """The forms of what passes between the process of a run and one that makes its steps."""

    params: Form
    state: Form
    gradients: Form
    report: Form

    @classmethod
    def of(cls, step: Any, params: Any, state: Any) -> "Forms":
        """The forms for a compiled worker step and for parameters and a state like these."""
        gradients, _, report = rehearse(step, params, state)
        return cls(Form(params), Form(state), Form(gradients), Form(report))


def recipe_of(program: Program) -> bytes:
    """What a `StepProcess` needs to compile the program's worker step.

    Raises:
      TypeError: if something in the program cannot be pickled.
    """
    import cloudpickle

    try:
        what = (program.config, program.describe, program.single_kernel)
        pickled: bytes = cloudpickle.dumps(what)
    except Exception as error:
        given = ", ".join(f"{kind} {name}" for kind, name in program.objects.items())
        raise TypeError(
            "what a run plays and trains has to be sent to other processes, but it cannot be pickled "
            f"({given or program.config.environment}): {error}"
        ) from error
    return pickled


class StepProcess:
    """The steps of some workers, in one process.

    Args:
      threads: the numbers of threads that the process of the run computes with; this one takes the same.
      path: where that process finds its modules (`sys.path`), for objects that were passed in.
    """

    def __init__(self, threads: dict[str, str], path: Sequence[str] = ()) -> None:
        start_with(threads)
        sys.path += [folder for folder in path if folder not in sys.path]
        self._states: dict[int, Any] = {}

    def build(self, recipe: bytes) -> None:
        """Compiles the worker step; takes what `recipe_of` gave."""
        import cloudpickle

        config, describe, single_kernel = cloudpickle.loads(recipe)
        blueprint, seed = describe(config), np.uint32(config.seed)
        state = _compiled.compile_for_few_calls(blueprint.start)(seed, np.int32(0))
        params = _compiled.compile_for_few_calls(blueprint.init)(seed, state.observation)
        self._environment = blueprint.environment
        self._step = compile_step(blueprint.worker_step, params, state, single_kernel)
        self._forms = Forms.of(self._step, params, state)

    def step(self, worker: int, params: Any, state: Any = None) -> tuple[Any, Any, Any, float]:
        """One step of a worker.

        Args:
          worker: which worker.
          params: the parameters, bare.
          state: the worker's state, bare; None if it is the one that this worker's last step here led to.

        Returns:
          Gradients, state and report, bare, and the seconds that the step took.
        """
        if state is not None:
            self._release([worker])
            self._states[worker] = self._forms.state.dressed(state)
        dressed = self._forms.params.dressed(params)
        began = time.perf_counter()
        gradients, new_state, report = self._step(dressed, self._states[worker])
        seconds = time.perf_counter() - began
        self._states[worker] = new_state
        forms = self._forms
        bare = forms.gradients.bare(gradients), forms.state.bare(new_state)
        return *bare, forms.report.bare(report), seconds

    def close(self) -> None:
        """Closes the environments."""
        self._release(list(self._states))

    def _release(self, workers: Sequence[int]) -> None:
        states = [self._states.pop(worker) for worker in workers if worker in self._states]
        release(self._environment, states)
