"""People debug with `jax.disable_jit()` and `jax_debug_nans`: a small run works under both, in every thread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_games import stairs
from small_runs import Walk, assert_equal_runs, small

from a3c_jax import (
    WorkerError,
    _compiled,
    build,
    evaluate,
    greedy_policy,
    make_simulation,
    replay,
    round_robin,
    train,
)
from a3c_jax.losses import a3c_loss

WALK = Walk(5.0)  # the others have a NaN in their state
CONFIG = small(num_workers=2, max_steps=32)


@pytest.mark.slow
def test_without_compilation_a_loss_of_ones_own_sees_numbers_in_every_worker():
    seen = []

    def loss(params, apply_fn, trajectory):
        value, metrics = a3c_loss(params, apply_fn, trajectory)
        # Raises a ConcretizationTypeError if it is traced.
        seen.append((float(trajectory.reward_t.mean()), float(jax.lax.stop_gradient(value))))
        return value, metrics

    with jax.disable_jit():
        result = train(CONFIG, environment=WALK, loss=loss)
        assert len(seen) == result.version + 1  # once when it is built
        again = replay(CONFIG, result.schedule, environment=WALK, loss=loss)
    assert np.isfinite(seen).all()
    assert_equal_runs(again, result)
    compiled = replay(CONFIG, result.schedule, environment=WALK, loss=a3c_loss)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        result.params,
        compiled.params,
    )


@pytest.mark.slow
def test_without_compilation_evaluation_and_simulation_work():
    with jax.disable_jit():
        program = build(CONFIG, environment=WALK)
        params = program.initial_params()
        policy = greedy_policy(program.network)
        returns, lengths = evaluate(policy, params, program.environment, jax.random.key(0), 2)
        assert np.isfinite(returns).all() and (lengths >= 3).all()
        simulate = make_simulation(CONFIG, 1, environment=WALK)
        result = simulate(0, 1e-3, round_robin(2, num_updates=4))
    assert result.applied.all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.params))


@pytest.mark.slow
def test_a_program_compiled_before_still_runs_without_compilation():
    program = build(CONFIG, environment=WALK)
    expected = train(program)
    with jax.disable_jit():
        again = train(program)
    assert again.version == expected.version


@pytest.mark.slow
def test_a_normal_run_makes_no_nan_on_its_way():
    with jax.debug_nans(True):
        result = train(CONFIG, environment=WALK)
    assert result.version == 4


@pytest.mark.slow
def test_a_nan_in_a_loss_of_ones_own_is_raised_where_it_is_made():
    def makes_nan(trajectory):
        return jnp.log(jnp.where(jnp.any(trajectory.reward_t > 2.0), -1.0, 1.0))

    def loss(params, apply_fn, trajectory):
        value, metrics = a3c_loss(params, apply_fn, trajectory)
        return value * (1.0 + makes_nan(trajectory)), metrics

    config = small(num_workers=2, max_steps=400)
    with jax.debug_nans(True), pytest.raises(WorkerError, match=r"\(nan\) encountered in log") as e:
        train(config, environment=Walk(5.0, bad_from=42), loss=loss)
    cause = e.value.__cause__
    assert isinstance(cause, FloatingPointError)
    trace, places = cause.__traceback__, []
    while trace is not None:
        places.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "makes_nan" in places


def test_afterwards_everything_is_compiled_as_before():
    with jax.disable_jit():
        assert not _compiled.enabled()
    with jax.debug_nans(True):
        assert not _compiled.enabled()
    traced = []
    step = _compiled.compile(lambda x: traced.append(x) or x + 1.0, jnp.ones(2))
    count = len(traced)
    step(jnp.ones(2))
    assert len(traced) == count > 0


@pytest.mark.slow
def test_environments_on_the_host_work_without_compilation_and_with_a_look_at_every_number():
    game, config = stairs(), small(max_steps=16)
    with jax.disable_jit():
        result = train(config, environment=game)
        assert_equal_runs(replay(config, result.schedule, environment=game), result)
    with jax.debug_nans(True):
        assert train(config, environment=game).version == 2
    assert game.open == 0
