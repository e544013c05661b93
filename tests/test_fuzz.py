"""Anything thrown at the reader of checkpoints, the losses and the configuration."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_checkpoints import assert_equal_checkpoints, make_checkpoint

from a3c_jax import A3CConfig, CheckpointError, load_checkpoint
from a3c_jax.asynchrony.checkpoint_files import save_checkpoint
from a3c_jax.losses import explained_variance, n_step_advantages, n_step_returns

moderate = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# The reader of checkpoints.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, its file's bytes, and a path to write other bytes to."""
    folder = tmp_path_factory.mktemp("fuzz")
    checkpoint = make_checkpoint()
    save_checkpoint(folder / "whole", checkpoint)
    return checkpoint, (folder / "whole").read_bytes(), folder / "other"


def assert_refused_or_the_same(whole, content):
    checkpoint, _, path = whole
    path.write_bytes(content)
    try:
        read = load_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert_equal_checkpoints(read, checkpoint)
        return True
    return False


positions = st.floats(0.0, 1.0, exclude_max=True)
in_the_header = st.floats(0.0, 0.25)  # positions are drawn there as often as in the arrays


@moderate
@given(where=st.lists(positions | in_the_header, min_size=1, max_size=4), xor=st.integers(1, 255))
def test_bytes_that_changed_are_refused(whole, where, xor):
    content = bytearray(whole[1])
    for position in where:
        content[int(position * len(content))] ^= xor
    assert_refused_or_the_same(whole, bytes(content))


def test_every_single_bit_of_the_arrays_counts(whole):
    _, content, _ = whole
    begin = content.index(b"\n") + 1
    for position in range(begin, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        assert not assert_refused_or_the_same(whole, bytes(changed)), position


@moderate
@given(length=positions | in_the_header)
@example(length=0.0)
def test_a_file_that_was_cut_off_is_refused(whole, length):
    content = whole[1]
    assert not assert_refused_or_the_same(whole, content[: int(length * len(content))])


@moderate
@given(where=positions | in_the_header, more=st.binary(min_size=1, max_size=40))
@example(where=0.999999, more=b"\0")
def test_bytes_that_were_added_are_refused(whole, where, more):
    content = whole[1]
    at = int(where * (len(content) + 1))
    assert_refused_or_the_same(whole, content[:at] + more + content[at:])
    assert not assert_refused_or_the_same(whole, content + more)


@moderate
@given(a=positions, b=positions, size=st.integers(1, 64))
def test_pieces_that_changed_places_are_refused(whole, a, b, size):
    content = whole[1]
    a, b = sorted(int(x * (len(content) - size)) for x in (a, b))
    if b < a + size:
        return
    piece, other = content[a : a + size], content[b : b + size]
    swapped = content[:a] + other + content[a + size : b] + piece + content[b + size :]
    same = assert_refused_or_the_same(whole, swapped)
    assert same == (piece == other) or swapped[:200] != content[:200]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@moderate
@given(
    path=st.sampled_from(
        [("what",), ("format",), ("sha256",), ("run",), ("run", "version"), ("run", "config"),
         ("run", "skipped"), ("run", "best_mean_return"), ("run", "seconds"), ("run", "versions"),
         ("run", "config", "seed"), ("run", "config", "hidden_sizes"), ("run", "new")]
    ),
    value=json_values,
)  # fmt: skip
def test_a_first_line_that_says_something_else_is_refused(whole, path, value):
    first, _, payload = whole[1].partition(b"\n")
    header = json.loads(first)
    inner = header
    for key in path[:-1]:
        inner = inner[key]
    before = inner.get(path[-1], "nothing")
    inner[path[-1]] = value
    same = assert_refused_or_the_same(whole, json.dumps(header).encode() + b"\n" + payload)
    assert same == (json.dumps(before) == json.dumps(value))


@moderate
@given(content=st.binary(max_size=200))
def test_a_file_of_anything_else_is_refused(whole, content):
    assert not assert_refused_or_the_same(whole, content)


# The losses, against the recursion in float64, one step of one environment at a time.


def recursion(r_t, discount_t, v_t, lambda_t):
    returns = np.zeros(r_t.shape, np.float64)
    g = v_t[-1].astype(np.float64)
    for t in reversed(range(len(r_t))):
        g = r_t[t] + discount_t[t] * ((1.0 - lambda_t[t]) * v_t[t] + lambda_t[t] * g)
        returns[t] = g
    return returns


@st.composite
def segments(draw):
    shape = draw(st.sampled_from([(1,), (2,), (17,), (1, 3), (5, 1), (6, 4), (3, 2, 2), (40,)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e15]))

    def ends():
        chance = draw(st.sampled_from([0.0, 0.2, 1.0]))
        return rng.random(shape) < chance

    discount = draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    dtype = draw(st.sampled_from([np.float32, jnp.bfloat16, np.float16]))
    terminated, truncated = ends(), ends()
    if dtype is np.float16:
        scale = min(scale, 1.0)
    columns = (
        scale * rng.normal(size=shape),
        discount * (1.0 - terminated),
        scale * rng.normal(size=shape),
        1.0 - truncated,
        scale * rng.normal(size=shape),
    )
    # Rounded first: the oracle sees the very same numbers.
    return dtype, scale, [np.asarray(jnp.asarray(c, dtype)).astype(np.float64) for c in columns]


EPSILON = {np.float32: 1.2e-7, np.float16: 9.8e-4, jnp.bfloat16: 7.8e-3}
returns_of, advantages_of, explained_of = map(
    jax.jit, (n_step_returns, n_step_advantages, explained_variance)
)


@settings(moderate, max_examples=80)
@given(segments())
def test_returns_and_advantages_are_the_recursion(segment):
    dtype, _, (r_t, discount_t, v_t, lambda_t, v_tm1) = segment
    expected = recursion(r_t, discount_t, v_t, lambda_t)
    args = [jnp.asarray(x, dtype) for x in (r_t, discount_t, v_t, lambda_t)]
    returns = returns_of(*args)
    advantages = advantages_of(*args[:2], jnp.asarray(v_tm1, dtype), *args[2:])
    assert returns.dtype == advantages.dtype == dtype
    assert returns.shape == advantages.shape == r_t.shape
    # Rounding grows with the sums of what is added.
    size = recursion(np.abs(r_t), discount_t, np.abs(v_t), lambda_t).max(initial=1e-37)
    error = 4.0 * (len(r_t) + 2) * EPSILON[dtype] * size
    np.testing.assert_allclose(np.float64(returns), expected, rtol=0, atol=error)
    np.testing.assert_allclose(
        np.float64(advantages), expected - v_tm1, rtol=0, atol=error + 4 * EPSILON[dtype] * size
        + EPSILON[dtype] * np.abs(v_tm1).max(),
    )  # fmt: skip


@settings(moderate, max_examples=40)
@given(segments(), st.sampled_from(["terminated", "truncated", "single"]))
def test_where_every_step_ends_each_return_stands_alone(segment, how):
    _, _, (r_t, _, v_t, _, _) = segment
    r_t, v_t = (np.clip(x, -1e15, 1e15).astype(np.float32) for x in (r_t, v_t))
    ones = np.ones_like(r_t)
    if how == "terminated":
        discount_t, lambda_t, expected = 0 * ones, ones, r_t
    elif how == "truncated":
        discount_t, lambda_t, expected = 0.5 * ones, 0 * ones, r_t + 0.5 * v_t
    else:
        r_t, v_t, ones = r_t[:1], v_t[:1], ones[:1]
        discount_t, lambda_t, expected = 0.5 * ones, ones, r_t + 0.5 * v_t
    np.testing.assert_allclose(
        returns_of(*map(jnp.asarray, (r_t, discount_t, v_t, lambda_t))), expected, rtol=1e-5,
        atol=1e-6 * max(1e-30, np.abs(r_t).max(), np.abs(v_t).max()),
    )  # fmt: skip


@settings(moderate, max_examples=60)
@given(segments())
def test_the_explained_variance_is_at_most_one_and_finite(segment):
    _, scale, (r_t, _, v_t, _, _) = segment
    r_t, v_t = r_t.astype(np.float32), v_t.astype(np.float32)
    value = float(explained_of(jnp.asarray(v_t), jnp.asarray(r_t)))
    assert np.isfinite(value)
    assert value <= 1.0 + 1e-6
    if 1e-3 <= scale <= 1e6 and np.ptp(r_t) > 0:
        residual = np.var(np.float64(r_t) - v_t)
        expected = 1.0 - residual / np.var(np.float64(r_t))
        np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-2)


array_shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
array_dtypes = st.sampled_from([np.float32, np.float16, np.int32, np.bool_])


@pytest.mark.slow
@settings(moderate, max_examples=60)
@given(
    st.lists(st.tuples(array_shapes, array_dtypes), min_size=3, max_size=3)
    | st.tuples(array_shapes, array_dtypes).map(lambda one: [one] * 3)
)
def test_arrays_that_do_not_go_together_are_refused_and_others_are_not(kinds):
    arrays = [jnp.zeros(shape, dtype) for shape, dtype in kinds]
    (shape, dtype), fit = kinds[0], len(set(kinds)) == 1
    fit = fit and dtype in (np.float32, np.float16) and len(shape) > 0 and 0 not in shape
    if fit:
        assert n_step_returns(*arrays).shape == shape
    else:
        with pytest.raises(AssertionError, match=r"r_t and discount_t and v_t and lambda_t must"):
            n_step_returns(*arrays)


# The configuration.

FIELDS = [field.name for field in dataclasses.fields(A3CConfig)]
BOOLEANS = {name for name in FIELDS if isinstance(getattr(A3CConfig(), name), bool)}
anything = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.integers()
    | st.floats(-1.5, 1.5)
    | st.floats()
    | st.sampled_from(["adam", "rmsprop", "linear", "constant", "relu", "tanh", "skip", "", "x"])
    | st.text(max_size=5)
    | st.lists(st.integers(-1, 9) | st.floats() | st.booleans(), max_size=3)
    | st.lists(st.integers(1, 9), max_size=3).map(tuple)
    | st.sampled_from([b"", {}, object(), np.float32(0.5), np.int64(3), 10**400, 1j])
)


@settings(moderate, max_examples=400)
@given(st.dictionaries(st.sampled_from(FIELDS), anything, min_size=1, max_size=3))
@example({"learning_rate": 10**400})
@example({"seed": 10**400})
@example({"optimizer": []})
@example({"activation": {}})
@example({"max_steps": None, "max_episodes": None, "solved_return": None})
def test_a_configuration_is_made_or_the_field_is_named(values):
    try:
        config = A3CConfig(**values)
    except (ValueError, TypeError) as error:
        assert type(error) in (ValueError, TypeError)
        assert any(f"A3CConfig.{name}" in str(error) for name in values), (values, error)
        return
    for name, value in values.items():
        kept = getattr(config, name)
        assert isinstance(value, bool) == (name in BOOLEANS), "a truth is no number"
        assert kept == (tuple(value) if name == "hidden_sizes" else value)
    # What is made can be written down and made again.
    again = A3CConfig(**json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert config.steps_per_update >= 1
    assert config.max_updates is None or config.max_updates >= 1
