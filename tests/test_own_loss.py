"""Own losses and optimizers: through `train`, `replay`, `resume` and the simulation, and refused if they cannot work."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from probes import Probe

import a3c_jax
from a3c_jax import A3CConfig, CheckpointFolder, find_checkpoint, fixed_delay
from a3c_jax.algorithm import a3c
from a3c_jax.losses import a3c_loss

TINY = {"num_workers": 2, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,), "max_steps": 160}
PROBE = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)


def config(**changes):
    return A3CConfig(**TINY | changes)


def clipped_loss(params, apply_fn, trajectory, epsilon=0.2):
    """PPO's clipped actor loss with A3C's critic: it reads the behaviour's log-probabilities."""
    loss, metrics = a3c_loss(params, apply_fn, trajectory)
    distribution, v_tm1, _ = apply_fn(params, trajectory)
    ratio = jnp.exp(distribution.log_prob(trajectory.action_tm1) - trajectory.log_prob_tm1)
    advantage = jax.lax.stop_gradient(trajectory.reward_t - v_tm1)
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
    actor = -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))
    return actor + 0.5 * metrics["critic_loss"], {"actor_loss": actor, "max_ratio": ratio.max()}


def assert_same(one, other):
    for name in ("params", "opt_state"):
        chex.assert_trees_all_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.episodes.episode_return, other.episodes.episode_return)


def test_a3cs_own_loss_passed_in_gives_the_same_run_bit_for_bit():
    settings = {"num_workers": 1}
    default = a3c_jax.train(config(**settings), environment=PROBE)
    passed = a3c_jax.train(
        config(**settings),
        environment=PROBE,
        loss=functools.partial(a3c_loss, discount=0.99, critic_cost=0.5, entropy_cost=0.01),
    )
    assert_same(default, passed)


def test_the_trajectory_holds_the_log_probability_of_each_action_under_the_policy_that_chose_it():
    def loss(params, apply_fn, trajectory):
        log_prob = apply_fn(params, trajectory)[0].log_prob(trajectory.action_tm1)
        difference = jnp.abs(log_prob - trajectory.log_prob_tm1).max()
        return -100 * jnp.mean(log_prob), {"difference": difference, "log_prob": log_prob.mean()}

    rows = []
    a3c_jax.replay(
        config(),
        fixed_delay(1, num_updates=6),  # the parameters have moved on when the gradients arrive
        environment=PROBE,
        loss=loss,
        on_update=lambda *seen: rows.append(seen[-1]),
    )
    assert max(row["difference"] for row in rows) < 1e-5
    assert len({round(row["log_prob"], 4) for row in rows}) > 2, "the policy never changed"


@pytest.fixture(scope="module")
def own():
    return {
        "environment": PROBE,
        "loss": clipped_loss,
        "optimizer": optax.chain(optax.clip(0.1), optax.adamw(1e-2, weight_decay=1e-3)),
    }


@pytest.fixture(scope="module")
def program(own):
    return a3c_jax.build(config(), **own)


@pytest.mark.slow
def test_a_run_with_own_loss_and_optimizer_replays_and_goes_on_bit_for_bit(program, own, tmp_path):
    result = a3c_jax.train(program)
    assert_same(a3c_jax.replay(program, result.schedule), result)
    again = a3c_jax.replay(config(), result.schedule, single_kernel=result.single_kernel, **own)
    assert_same(again, result)

    alone = program.replace(num_workers=1)
    whole = a3c_jax.train(alone)
    a3c_jax.train(alone.replace(max_steps=80), checkpoints=CheckpointFolder(tmp_path))
    assert_same(a3c_jax.train(alone, resume=find_checkpoint(tmp_path)), whole)


def test_the_metrics_are_those_of_the_own_loss(program):
    metrics = []
    schedule = fixed_delay(0, num_updates=3)
    a3c_jax.replay(
        program.replace(num_workers=1), schedule, on_update=lambda *seen: metrics.append(seen[-1])
    )
    assert set(metrics[0]) == {"actor_loss", "max_ratio", "gradient_norm"}
    assert metrics[0]["max_ratio"] == pytest.approx(1.0, abs=1e-5), "nobody came in between"


@pytest.mark.slow
def test_the_simulation_makes_the_same_updates(program, own):
    schedule = fixed_delay(2, num_updates=6)
    simulated = a3c_jax.make_simulation(config(num_workers=3), 2, **own)(0, 1e-3, schedule)
    replayed = a3c_jax.replay(program.replace(num_workers=3), schedule)
    chex.assert_trees_all_close(simulated.params, replayed.params, rtol=1e-4, atol=1e-6)


OPTIMIZERS = {
    "a mask": lambda: optax.masked(optax.sgd(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "frozen critic": lambda: optax.multi_transform(
        {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "freeze" if "critic" in str(path) else "train", params
        ),
    ),
    "a schedule": lambda: optax.sgd(optax.linear_schedule(1e-2, 0.0, 20)),
    "muon": lambda: optax.contrib.muon(1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_over_the_tree_makes_the_updates_that_optax_makes(name):
    program = a3c_jax.build(config(num_workers=1), environment=PROBE, optimizer=OPTIMIZERS[name]())
    optimizer = OPTIMIZERS[name]()
    params = program.initial_params()
    state = optimizer.init(params)

    def check(k, snapshot, gradients, metrics):
        nonlocal params, state
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(snapshot.params, params, rtol=1e-4, atol=1e-6)

    initial = params
    result = a3c_jax.replay(program, fixed_delay(0, num_updates=8), on_update=check)
    assert result.version == 8
    if name == "frozen critic":
        chex.assert_trees_all_equal(
            result.params["params"]["critic_trunk"], initial["params"]["critic_trunk"]
        )
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(result.params, initial)


def test_a_function_of_the_learning_rate_gets_the_configurations():
    schedule = fixed_delay(0, num_updates=5)
    results = [
        a3c_jax.replay(config(num_workers=1, **given), schedule, environment=PROBE, optimizer=made)
        for given, made in [
            ({"learning_rate": 3e-2}, lambda learning_rate: optax.sgd(learning_rate)),
            ({}, optax.sgd(3e-2)),
        ]
    ]
    assert_same(*results)


@pytest.mark.parametrize(
    ("fields", "objects", "message"),
    [
        ({"entropy_cost": 0.5}, {"loss": a3c_loss}, "entropy_cost belongs to the built-in loss"),
        ({"discount": 0.9}, {"loss": a3c_loss}, "discount belongs to the built-in loss"),
        ({"momentum": 0.5}, {"optimizer": optax.sgd(0.1)}, "momentum belongs to the built-in optim"),
        ({"learning_rate": 0.5}, {"optimizer": optax.sgd(0.1)}, "learning_rate belongs to the"),
        ({}, {"optimizer": "adam"}, "optimizer must be an optax transformation"),
        ({}, {"optimizer": lambda rate: rate}, "optimizer must be an optax transformation"),
        ({}, {"loss": "a3c"}, "loss must be a function"),
        ({}, {"loss": lambda *_: jnp.float32(0)}, r"loss must return a pair .*, got float32\[\]; return"),
        ({}, {"loss": lambda *_: ({}, jnp.float32(0))}, r"got \(dict, float32\[\]\); return the scalar first"),
        ({}, {"loss": lambda *_: (jnp.zeros(3), {})}, "loss must return a scalar"),
        ({}, {"loss": lambda *_: (jnp.float32(0), {"a": jnp.zeros(3)})}, "metrics of loss must be"),
        ({}, {"loss": lambda *_: (jnp.float32(0), [1.0])}, "metrics of loss must be"),
        ({}, {"loss": lambda *_: (jnp.float32(0), {"a": {"b": 1.0}})}, "metrics of loss must be"),
        ({"entropy_cost": 0.5}, {"algorithm": functools.partial(a3c, loss=a3c_loss)}, "built-in loss"),
        ({}, {"algorithm": "one_step_q"}, r"name one in A3CConfig\(algorithm=...\)"),
        ({}, {"loss": lambda *_: (jnp.float32(0), {"updates": 1.0})}, "must not be called .* 'updates'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_compiled(fields, objects, message):
    with pytest.raises((ValueError, TypeError), match=message):
        a3c_jax.build(config(**fields), environment=PROBE, **objects)


def test_objects_beside_a_program_are_refused(program):
    with pytest.raises(ValueError, match="loss and optimizer must not be given beside a Program"):
        a3c_jax.train(program, loss=a3c_loss, optimizer=optax.sgd(0.1))
