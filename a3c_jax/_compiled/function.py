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
    return _unpackers[value.layout](value.vector)


def packed_type(example: Any) -> type[Packed] | None:
    """The class of packed trees like the example, which may be packed; None if they are never packed."""
    layout = layout_of(example)
    return None if layout is None else layout.packed


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
        On two cores or more, two threads may always call at the same time, because with less nothing is asynchronous.
        Other programs are computed by XLA's thread pool, which more threads keep busy.

        Args:
          num_threads: how many threads there are.
          *arguments: arguments like those to come. The function is called with them to see how long it takes.
        """
        if not self.in_single_kernel:
            return None
        return threads_at_once(num_threads, available_cores(), lambda: self._seconds(arguments))

    def _seconds(self, arguments: tuple[Any, ...]) -> float:
        """What a call takes while nobody else calls: the shortest of ten."""
        return min(choice.seconds(lambda: self(*arguments)) for _ in range(10))


def threads_at_once(num_threads: int, cores: int, seconds: Callable[[], float]) -> int:
    """How many of the threads may call a single kernel at the same time.

    Args:
      num_threads: how many threads there are.
      cores: how many cores there are.
      seconds: what a call takes.
    """
    if min(cores, num_threads) <= 2:
        return cores
    return min(cores, max(2, round(seconds() / SECONDS_FOR_EACH_THREAD)))


class PlainFunction(CompiledFunction):
    """What `jax.jit` makes of the function: trees in, trees out."""

    def __init__(self, function: Callable[..., Any], examples: tuple[Any, ...]) -> None:
        self._function = jax.jit(function)
        self(*examples)  # compiles

    def __call__(self, *arguments: Any) -> Any:
        return jax.block_until_ready(self._function(*map(unpack, arguments)))


class DebuggedFunction(PlainFunction):
    """The function under the debugging settings of JAX with which it was made, whichever thread calls it.

    `jax.disable_jit()` holds only for the thread that enters it, but worker threads make the calls.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._is_uncompiled, self._looks_for_nans = process.debugging_settings()
        self._function = jax.jit(function)

    def __call__(self, *arguments: Any) -> Any:
        with jax.disable_jit(self._is_uncompiled), jax.debug_nans(self._looks_for_nans):
            return super().__call__(*arguments)


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
        self._layouts = [layout_of(example) for example in examples]
        self._types = tuple(
            type(x) if layout is None else layout.packed
            for x, layout in zip(examples, self._layouts, strict=True)
        )
        inputs = self._enter(examples)
        over_vectors = _OverVectors(function, self._layouts)
        program, shapes = jax.make_jaxpr(over_vectors, return_shape=True)(*inputs)
        execute, self.in_single_kernel = choice.compile_program(
            program, jax.tree.structure(shapes), inputs, single_kernel
        )
        if not process.calls_are_inline():
            execute = _waiting(execute)
        self._call = _caller(self._enter, self._types, execute, over_vectors.result_classes)

    def _enter(self, arguments: tuple[Any, ...]) -> list[Any]:
        """The arguments as the program takes them."""
        return [
            x
            if layout is None
            else (x if type(x) is layout.packed else pack(unpack(x), layout)).vector
            for x, layout in zip(arguments, self._layouts, strict=True)
        ]

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def _waiting(execute: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which also waits for its results."""
    return lambda *inputs: jax.block_until_ready(execute(*inputs))


_SOURCE = """
def call({arguments}):
    if {are_expected}:
        {results} = execute({vectors})
    else:
        {results} = execute(*enter(({arguments})))
    return {packed}
"""


def _caller(
    enter: Callable[..., Any], types: tuple[type, ...], execute: Callable[..., Any], classes: Any
) -> Callable[..., Any]:
    """Makes the function around a compiled program that takes the vectors out of its arguments and packs its results.

    It is written out for the number and the types of its arguments and results, as `collections.namedtuple` writes
    its methods, because a loop over them would take as long as a fifth of the compiled program of an update.
    """
    is_tuple = type(classes) is tuple
    made = classes if is_tuple else (classes,)
    x = [f"x{n}" for n in range(len(types))]
    y = [f"y{n}" for n in range(len(made))]
    packed = [n if c is None else f"class_{n}({n})" for n, c in zip(y, made, strict=True)]
    values: dict[str, Any] = {"enter": enter, "execute": execute}
    values |= {f"type_{n}": t for n, t in zip(x, types, strict=True)}
    values |= {f"class_{n}": c for n, c in zip(y, made, strict=True)}
    are_packed = [issubclass(t, Packed) for t in types]
    source = _SOURCE.format(
        arguments="".join(f"{n}, " for n in x),
        are_expected=" and ".join(f"type({n}) is type_{n}" for n in x) or "True",
        vectors=", ".join(f"{n}.vector" if p else n for n, p in zip(x, are_packed, strict=True)),
        results="".join(f"{n}, " for n in y) if is_tuple and y else "y0",
        packed=f"({''.join(f'{n}, ' for n in packed)})" if is_tuple else packed[0],
    )
    exec(source, values)
    return values["call"]


class _OverVectors:
    """A function with vectors in place of trees of several arrays, for JAX to trace.

    Attributes:
      result_classes: for each result, once it is traced: the class of the packed tree, or None if the result
        passes as it is. One alone if the function does not return a tuple.
    """

    def __init__(self, function: Callable[..., Any], layouts: list[Layout | None]) -> None:
        self._function, self._layouts = function, layouts
        self.result_classes: Any = None

    def __call__(self, *inputs: Any) -> Any:
        results = self._function(
            *(
                x if layout is None else layout.unpack(x)
                for x, layout in zip(inputs, self._layouts, strict=True)
            )
        )
        if type(results) is not tuple:
            result, self.result_classes = self._pack(results)
            return result
        pairs = list(map(self._pack, results))
        self.result_classes = tuple(packed for _, packed in pairs)
        return tuple(result for result, _ in pairs)

    @staticmethod
    def _pack(result: Any) -> tuple[Any, type[Packed] | None]:
        result = jax.tree.map(jnp.asarray, result)
        layout = layout_of(result)
        return (result, None) if layout is None else (layout.pack(result), layout.packed)
