"""A pure function over trees of arrays, compiled into a program over vectors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from a3c_jax._compiled import choice, process
from a3c_jax._compiled.packing import Layout, Packed, layout_of
from a3c_jax.config import available_cores

SECONDS_FOR_EACH_THREAD = 80e-6
"""How long a call has to take for each thread that makes calls at the same time as others."""


def unpack(value: Any) -> Any:
    """The plain tree of a `Packed`; any other value is returned as it is."""
    if not isinstance(value, Packed):
        return value
    if value.layout not in _unpackers:
        _unpackers[value.layout] = compile_for_few_calls(value.layout.unpack)
    return _unpackers[value.layout](value[0])


def pack(value: Any, layout: Layout) -> Packed:
    """A plain tree as a `Packed`."""
    if layout not in _packers:
        _packers[layout] = compile_for_few_calls(layout.pack)
    return layout.packed(_packers[layout](value))


_unpackers: dict[Layout, Callable[..., Any]] = {}
_packers: dict[Layout, Callable[..., Any]] = {}


def compile_for_few_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `jax.jit`, for what is called only a few times: compiled quickly instead of well."""
    if not process.enabled():
        return jax.jit(function)
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


class CompiledFunction:
    """A pure function, compiled. Calling it waits until the results are there.

    Attributes:
      in_single_kernel: whether it is a single kernel, which computes in the thread that calls it.
    """

    in_single_kernel = False

    def __call__(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def max_concurrent_calls(self, num_threads: int, *arguments: Any) -> int | None:
        """How many threads should call it at the same time; None sets no limit.

        A single kernel is computed by the thread that calls it, so that more threads than cores only fight for
        Python's interpreter lock. Short calls do not even leave room for all cores: each call gives the lock back
        several times, and if another thread always waits for it, every time costs a thread's sleep and waking.
        Two threads may always call at the same time, because with less nothing is asynchronous. Other programs
        are computed by XLA's thread pool, which more threads keep busy.

        Args:
          num_threads: how many threads there are.
          *arguments: arguments like those to come. The function is called with them to see how long it takes.
        """
        if not self.in_single_kernel:
            return None
        cores = available_cores()
        if min(cores, num_threads) <= 2:
            return cores
        return threads_at_once(self._seconds(arguments), cores)

    def _seconds(self, arguments: tuple[Any, ...]) -> float:
        """What a call takes while nobody else calls: the shortest of ten."""
        return min(choice.seconds(lambda: self(*arguments)) for _ in range(10))


def threads_at_once(seconds: float, cores: int) -> int:
    """How many threads may make calls of so many seconds, each a single kernel, at the same time."""
    return min(cores, max(2, round(seconds / SECONDS_FOR_EACH_THREAD)))


class PlainFunction(CompiledFunction):
    """What `jax.jit` makes of the function: trees in, trees out."""

    def __init__(self, function: Callable[..., Any], examples: tuple[Any, ...]) -> None:
        self._function = jax.jit(function)
        self(*examples)  # compiles

    def __call__(self, *arguments: Any) -> Any:
        return jax.block_until_ready(self._function(*map(unpack, arguments)))


class VectorFunction(CompiledFunction):
    """The function as a program over vectors, a single kernel if that is possible and pays.

    Args:
      function: the function.
      examples: arguments like those to come.
      single_kernel: whether to make it a single kernel if that is possible; None lets it be decided.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        examples: tuple[Any, ...],
        single_kernel: bool | None = None,
    ) -> None:
        layouts = [layout_of(example) for example in examples]
        self._packed = [None if layout is None else layout.packed for layout in layouts]
        self._types = tuple(
            packed or type(x) for x, packed in zip(examples, self._packed, strict=True)
        )
        inputs = self._enter(examples)
        program, shapes = jax.make_jaxpr(_over_vectors(function), return_shape=True)(*inputs)
        self._execute, self.in_single_kernel = choice.compile_program(
            program, jax.tree.structure(shapes), inputs, single_kernel
        )
        self._wait = _wait_for(shapes)

    def _enter(self, arguments: tuple[Any, ...]) -> list[Any]:
        """The arguments as the program takes them."""
        return [
            x if packed is None or type(x) is packed else pack(unpack(x), packed.layout)
            for x, packed in zip(arguments, self._packed, strict=True)
        ]

    def __call__(self, *arguments: Any) -> Any:
        if tuple(map(type, arguments)) != self._types:
            arguments = tuple(self._enter(arguments))
        results = self._execute(*arguments)
        self._wait(results)
        return results


def _wait_for(results: Any) -> Callable[[Any], Any]:
    """The cheapest function that waits for results like these. All results of a call come together."""
    if process.calls_are_inline():
        return lambda results: None
    if type(results) is not tuple or not results or not isinstance(results[-1], Packed):
        return jax.block_until_ready
    return lambda results: results[-1][0].block_until_ready()


def _over_vectors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with packed trees in place of trees of several arrays."""

    def pack(result: Any) -> Any:
        result = jax.tree.map(jnp.asarray, result)
        layout = layout_of(result)
        return result if layout is None else layout.packed(layout.pack(result))

    def over_vectors(*inputs: Any) -> Any:
        results = function(*(x.layout.unpack(x[0]) if isinstance(x, Packed) else x for x in inputs))
        return tuple(map(pack, results)) if type(results) is tuple else pack(results)

    return over_vectors
