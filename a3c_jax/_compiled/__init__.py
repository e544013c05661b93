"""The machine room: what exists only for speed on a CPU, behind one door.

The rest of the package hands pure functions over trees of arrays to `compile`, and gets back functions that compute the
same, but faster. Nothing else in the package imports from inside this subpackage. The reasons for the tricks and their
ratios are below; docs/machine-room.md has the figures, with dates, and the commands that measure them again.

**Switching everything off.** With the environment variable `A3C_JAX_PLAIN=1`, `compile` is `jax.jit` on trees and nothing
else, convolutions and medians are XLA's, and the process is left alone. If JAX's backend is not a CPU, that holds but for two settings
of the process, which are made before the backend is known: how JAX calls a CPU, and that gymnax does not load its drawing
libraries. Every test of the package passes then, but for the tests of this subpackage, which are skipped. Under
`jax.disable_jit()` and `jax_debug_nans` it is off as well, and what `compile` returns keeps these settings in the threads
that call it.

**Packing** (`packing.py`; always on). Passing an array between Python and a compiled call costs microseconds,
however small the array is, and a worker's state has a dozen. So a tree of several arrays passes as one vector, which
the compiled program takes apart, at no cost. The caller gets a `Packed`, whose fields can be read on the host one by
one. It matters for small segments: with one environment for five steps a call takes 0.4 of the time, with 64 for 20
steps 0.85.

**A single kernel** (`single_kernel.py`; on if it is possible and pays, see below). XLA runs a program on a CPU as a
graph of many small kernels, functions in machine code, and passes some of them to a pool of threads. (They have
nothing to do with Pallas, nor with the weights that Flax calls kernels.) A small program spends most of its time in
passing them. As a single kernel, the whole program is one function, which the calling thread runs from start to end.
The default's segment takes 0.4 to 0.6 of the time then, with one thread as with two. It uses an experimental mark of
XLA's. Some operations cannot be part of a kernel, and some make XLA end the process. So only programs whose operations
are all on a list of tested ones are tried, and XLA is kept from noticing that an input does not matter, which it cannot
bear either. Every other program is compiled as `jax.jit` does, but unsplit (see below).

**Matrix products** (`products.py`; in single kernels). XLA's own matrix products cannot be part of a kernel, and the
loops that it writes instead leave the processor's vector units idle. So the traced program is rewritten, after JAX
has differentiated it: each product of two float32 matrices becomes a sum of outer products. With 64
environments for 20 steps the default's segment takes 0.45 of the time that a single kernel without it takes; with
one for five it makes no difference. It works for any network, with plain `nn.Dense`.

**The choice between the two** (`choice.py`). If all matrix products of a segment are thin, as they are with one
hidden layer, a single kernel is faster without doubt, and only that is compiled. If the matrix products are large in
all, or the function has no loop, as an optimizer's update has none, it is compiled plainly. In between both are
compiled, timed in turn, and the faster one is kept. `single_kernel=True` or `False` decides instead. The two differ
in the last bits of floats, so a run that has to give the same bits in another process has to give the same choice.

**Unsplit programs** (`single_kernel.py`; for every program that is not a single kernel). XLA splits loops over long
arrays into a part for each core, and passes the parts to its pool of threads. With a worker on each core they wait for
each other. Without the splitting, the worker steps of networks for images take 0.4 to 1 of the processor time. The
results are the same bit for bit.

**Convolutions** (`convolution.py`; `convolve`, if the kernel's sides are multiples of the stride). The built-in networks
for images call it in place of Flax's layer. It computes a convolution as one matrix product. XLA's own convolutions are
about as fast, but not their gradient in a loop, as in a simulation: there a worker step of MinAtar takes 0.2 to 0.3
of the time that it takes with them, and one of the paper's Atari network less than 0.1. Elsewhere it takes 0.5 to 1.2.

**Frames** (`convolution.py` and `medians.py`; `convolve_frames` and `median`, for bytes). Atari's frames come one after the
other, and the product needs the pixels of all frames side by side. XLA takes longer to reorder pixels than to multiply them,
so four bytes move as one number. The brightness of a background is a median, for which XLA sorts. It is found bit by bit
instead. The forward pass of Atari's network takes half of the time with both, its gradient 0.55.

**Chunks** (`convolution.py`; `in_chunks`, for more than 32 images of which equal parts of 16 to 32 can be made). The
arrays that the gradient needs for many images fill the processor's caches many times over. And if a program needs more
than 32 MB, the C library gives the memory back after each call, and the next one has to get it page by page from the
operating system. So the Atari network looks at one chunk of the images after the other. For the gradient it keeps the
results of the convolutions and the reordered frames, and computes again what lies between them. The gradient of 16
environments and 20 steps takes 0.6 of the time.

**Calls in the calling thread** (`process.py`; on unless `A3C_JAX_ASYNC_DISPATCH=1`). JAX hands each call on a CPU to
another thread by default. A worker has nothing to do but wait for it, so calls are made to run in the thread that
makes them, which saves two switches of threads. A small segment takes 0.5 to 0.8 of the time.

**How many threads call at a time** (`CompiledFunction.max_concurrent_calls`). A single kernel needs its caller's
thread. More threads than cores only fight for Python's interpreter lock, and so do several threads with short calls.

**Compiling quickly** (`compile_for_few_calls`). What runs only once, such as the initialization of the parameters, is
compiled without optimization, which takes 0.4 to 0.65 of the time.

**gymnax without plotting libraries** (`plotting.py`). gymnax imports matplotlib and seaborn for its drawings. They
are imported when gymnax first draws instead, and its own import takes a sixth of the time.
"""

from collections.abc import Callable
from typing import Any

from a3c_jax._compiled.convolution import convolve, convolve_frames, in_chunks
from a3c_jax._compiled.function import (
    CompiledFunction,
    DebuggedFunction,
    PlainFunction,
    VectorFunction,
    compile_for_few_calls,
    packed_type,
    unpack,
)
from a3c_jax._compiled.medians import median
from a3c_jax._compiled.packing import Packed
from a3c_jax._compiled.plotting import import_gymnax
from a3c_jax._compiled.process import debugging, enabled, prepare_process

__all__ = [
    "CompiledFunction",
    "Packed",
    "compile",
    "compile_for_few_calls",
    "convolve",
    "convolve_frames",
    "enabled",
    "import_gymnax",
    "in_chunks",
    "median",
    "packed_type",
    "prepare_process",
    "unpack",
]


def compile(
    function: Callable[..., Any], *examples: Any, single_kernel: bool | None = None
) -> CompiledFunction:
    """Compiles a pure function. A call of the result waits until everything is computed.

    Args:
      function: a pure function of trees of arrays. If it returns a tuple, each element is a result of its own.
      *examples: arguments like those to come, as plain trees or as `Packed`. It is compiled, and called, with them.
      single_kernel: whether to make it a single kernel, if that is possible; None lets it be decided.

    Returns:
      The compiled function. It takes each tree of several arrays either plain or as a `Packed`, and returns such
      trees as `Packed`; if the machine room is off, it returns them plain.
    """
    if debugging():
        return DebuggedFunction(function)
    if not enabled():
        return PlainFunction(function, examples)
    return VectorFunction(function, examples, single_kernel)
