"""Random programs for the machine room: each is compiled into a single kernel if that is possible, and compared.

Run as a script, it tries the programs of a range of seeds, and prints a line of JSON for each: first that it
begins, so that whoever reads along knows which one ended the process, and then what became of it.

    python tests/compiled_fuzz.py 0 200
"""

import json
import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from a3c_jax import _compiled


def _decaying_maximum(x):  # a reduction whose reducer is not a plain operation
    return lax.reduce(x, 0.0, lambda a, b: jnp.where(b > a, b, a * 0.5), (0,))


def _first_minimum(x):  # a reduction of pairs
    def smaller(a, b):
        keep = b[0] < a[0]
        return jnp.where(keep, b[0], a[0]), jnp.where(keep, b[1], a[1])

    x = lax.stop_gradient(x)  # JAX cannot differentiate it
    return lax.reduce((x, jnp.arange(len(x))), (jnp.inf, 0), smaller, (0,))[1]


# Each takes and returns an array [N, D] of floats and a vector [N] of integers. SIMPLE is what environments and
# networks are mostly made of. HARD holds what XLA cannot put into a single kernel, or ended the process with.
SIMPLE = {
    "dense": lambda x, i, k: (jnp.tanh(x @ jax.random.normal(k, (x.shape[1],) * 2)), i),
    "few_outputs": lambda x, i, k: (x * (x @ jax.random.normal(k, (x.shape[1], 2)))[:, :1], i),
    "transposed": lambda x, i, k: (jnp.sin(x.T @ x)[: x.shape[0] // 99 + 1] + x, i),
    "batched": lambda x, i, k: (jnp.tanh(jnp.einsum("nd,ne->nde", x, x).sum(1)), i),
    "normalize": lambda x, i, k: (
        (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1),
        i,
    ),
    "softmax": lambda x, i, k: (jax.nn.softmax(x), jnp.argmax(x, -1)),
    "noise": lambda x, i, k: (x + jax.random.normal(k, x.shape), i),
    "categorical": lambda x, i, k: (x, jax.random.categorical(k, x)),
    "randint": lambda x, i, k: (x, jax.random.randint(k, i.shape, -5, 5)),
    "gather": lambda x, i, k: (x[i % x.shape[0]], i),
    "one_hot": lambda x, i, k: (x + jax.nn.one_hot(i % x.shape[1], x.shape[1]), i),
    "dynamic_slice": lambda x, i, k: (x + lax.dynamic_slice(x, (i[0], 0), (1, x.shape[1])), i),
    "dynamic_update": lambda x, i, k: (lax.dynamic_update_slice(x, x[:1] * 2, (i[0], 0)), i),
    "cumsum": lambda x, i, k: (jnp.tanh(jnp.cumsum(x, 0)), jnp.cumsum(i)),
    "where": lambda x, i, k: (jnp.where(i[:, None] > 0, x, -x), jnp.where(i > 2, 0, i + 1)),
    "cond": lambda x, i, k: (lax.cond(i[0] > 0, lambda x: x * 2, lambda x: x - 1, x), i),
    "while": lambda x, i, k: (
        lax.while_loop(lambda c: c.max() < 5, lambda c: jnp.abs(c) * 1.5 + 0.1, x),
        i,
    ),
    "integers": lambda x, i, k: (x, (i * 7919 // 3) % 11),
    "bits": lambda x, i, k: (x, (i.astype(jnp.uint32) * jnp.uint32(2654435761) >> 7).astype(int)),
    "small_types": lambda x, i, k: (x.astype(jnp.bfloat16).astype(x.dtype), i.astype(jnp.int8) + i),
    "pad": lambda x, i, k: (jnp.pad(x, ((0, 0), (1, 1)))[:, 1:-1], jnp.roll(i, 1)),
    "gradient": lambda x, i, k: (jax.grad(lambda y: jnp.sum(jnp.tanh(y @ y.T)))(x), i),
    "checkpointed": lambda x, i, k: (jax.grad(lambda y: jax.checkpoint(jnp.sin)(y).sum())(x), i),
    "gelu": lambda x, i, k: (jax.nn.gelu(x), i),
    "bound": lambda x, i, k: (jnp.clip(x, -1, 1), jnp.clip(i, 0, 3)),
}
HARD = {
    "sort": lambda x, i, k: (jnp.sort(x, -1), i),
    "top_k": lambda x, i, k: (x + lax.top_k(x, 1)[0], i),
    "scatter": lambda x, i, k: (x.at[i % x.shape[0]].add(1.0), i),
    "set": lambda x, i, k: (x.at[i[0] % x.shape[0]].set(0.5), i.at[0].set(3)),
    "set_only_element": lambda x, i, k: (x + x[:1, 0].at[i[0] * 0].set(1.0), i),
    "only_element": lambda x, i, k: (x + x[:1, 0][i[:1]], jnp.argmax(i[:1])[None] + i),
    "segment_sum": lambda x, i, k: (jax.ops.segment_sum(x, i % x.shape[0], x.shape[0]), i),
    "cholesky": lambda x, i, k: (
        x @ jnp.linalg.cholesky(x.T @ x + 9 * jnp.eye(x.shape[1])) / 99,
        i,
    ),
    "solve": lambda x, i, k: (
        jnp.linalg.solve(x.T @ x + 9 * jnp.eye(x.shape[1]), x.T).T,
        i,
    ),
    "fft": lambda x, i, k: (jnp.fft.fft(x).real / x.shape[1], i),
    "permutation": lambda x, i, k: (jax.random.permutation(k, x), i),
    "decaying_maximum": lambda x, i, k: (x + jax.vmap(_decaying_maximum)(x)[:, None], i),
    "first_minimum": lambda x, i, k: (x, i + jax.vmap(_first_minimum)(x)),
    "window": lambda x, i, k: (lax.reduce_window(x, -9.0, lax.max, (1, 2), (1, 1), "SAME"), i),
    "convolution": lambda x, i, k: (
        lax.conv(x[None, None], jnp.ones((1, 1, 3, 3)) / 9, (1, 1), "SAME")[0, 0],
        i,
    ),
    "long": lambda x, i, k: (x + jnp.tanh(jnp.arange(300_000.0) * x[0, 0]).mean(), i),
    "callback": lambda x, i, k: (jax.pure_callback(lambda x: np.asarray(x) * 2, x, x), i),
    "nothing": lambda x, i, k: (x + jnp.sum(x[:0]), i * 0),
    "constant": lambda x, i, k: (jnp.ones_like(x), i),
    "complex": lambda x, i, k: (jnp.abs(jnp.exp(1j * x)) * x, i),
    "median": lambda x, i, k: (x - jnp.median(x, axis=0), i),
}


def make_program(seed):
    """A function, and arguments for it: a dict of arrays, a number, and a typed key."""
    random = np.random.default_rng(seed)
    names = list(random.choice(list(SIMPLE), random.integers(2, 6)))
    if random.random() < 0.5:
        names.insert(int(random.integers(len(names) + 1)), random.choice(list(HARD)))
    operations = [(SIMPLE | HARD)[name] for name in names]
    loop, what = random.choice(["none", "scan", "vmap"]), random.choice(["all", "one", "gradient"])
    if "callback" in names:
        what = "all"

    def steps(x, i, key):
        for number, operation in enumerate(operations):
            x, i = operation(x, i, jax.random.fold_in(key, number))
            i = i.astype(jnp.int32)
        return x, i

    def run(x, i, key):
        if loop == "scan":
            (x, i), sums = lax.scan(
                lambda c, k: (steps(*c, k), c[0].sum()), (x, i), jax.random.split(key, 3)
            )
            return x, i, sums
        if loop == "vmap":
            return jax.vmap(steps, (0, None, None))(jnp.stack([x, x * 2]), i, key)
        return steps(x, i, key)

    def program(state, scale, key):
        if what == "gradient":
            gradient = jax.jacfwd(lambda s: run(state["x"] * s, state["i"], key)[0].sum())(scale)
            return gradient, {"x": state["x"] * gradient, "i": state["i"]}
        results = run(state["x"] * scale, state["i"], key)
        return results[-1] if what == "one" else (dict(enumerate(results)), key)

    rows, width = random.choice([1, 2, 5, 8]), random.choice([1, 3, 16, 33])
    x = jnp.asarray(random.normal(size=(rows, width)), jnp.float32)
    i = jnp.asarray(random.integers(-9, 9, rows), jnp.int32)
    arguments = ({"x": x, "i": i}, jnp.float32(0.7), jax.random.key(seed))
    return program, arguments, [str(loop), str(what), *map(str, names)]


def _numbers(tree):
    """The leaves of a tree as NumPy arrays, keys as their bits."""

    def number(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [number(x) for x in jax.tree.leaves(jax.tree.map(jnp.asarray, tree))]


def difference(actual, expected, nearby):
    """What is different but for the last bits of floats; an empty string if nothing is.

    Some programs blow up small differences. So a difference counts only if it is larger than what a small change of
    the arguments makes: `nearby` are the results for those.
    """
    triples = zip(*map(_numbers, (actual, expected, nearby)), strict=True)
    for number, (x, y, z) in enumerate(triples):
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return f"leaf {number} is {x.dtype}{x.shape}, not {y.dtype}{y.shape}"
        both = np.isfinite(y) & np.isfinite(z)
        scale = np.max(np.abs(y[both]), initial=1.0) if x.dtype.kind == "f" else 0
        change = np.max(np.abs(z[both].astype(float) - y[both]), initial=0.0)
        if not np.allclose(x, y, rtol=1e-3, atol=1e-3 * scale + 10 * change, equal_nan=True):
            return f"leaf {number} is off by {np.max(np.abs(x.astype(float) - y))}"
    return ""


def try_program(seed):
    """Compiles and runs a program with the machine room and without: what is wrong, and whether it is one kernel."""
    program, arguments, names = make_program(seed)
    try:
        plain = jax.jit(program)
        expected = plain(*arguments)
        state, scale, key = arguments
        nearby = jax.block_until_ready(plain(state, scale * (1 + 1e-6), key))
    except Exception as error:  # some operations cannot be differentiated, or not in a loop
        return {"seed": seed, "program": names, "invalid": repr(error)[:200]}
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught:
        stderr = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            compiled = _compiled.compile(program, *arguments, single_kernel=True)
            actual = compiled(*arguments)
            actual = tuple(map(_compiled.unpack, actual)) if type(actual) is tuple else actual
            wrong = difference(_compiled.unpack(actual), expected, nearby)
        except Exception as error:
            compiled, wrong = None, repr(error)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        caught.seek(0)
        noise = caught.read().decode(errors="replace")[:200]
    return {
        "seed": seed,
        "program": names,
        "wrong": wrong,
        "noise": noise,
        "single": compiled is not None and compiled.in_single_kernel,
    }


if __name__ == "__main__":
    _compiled.prepare_process()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        print(json.dumps({"begins": seed}), flush=True)
        print(json.dumps(try_program(seed)), flush=True)
