"""Recurrent networks: the segment's gradient by hand, where the carry is reset, what goes on from where."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initial import initialize
from probes import Probe
from small_runs import assert_equal_runs, cut_short, replay, small, train

from a3c_jax import CheckpointFolder, evaluate, find_checkpoint, greedy_policy, rollout
from a3c_jax.cells import GRUCell, LSTMCell
from a3c_jax.distributions import Categorical
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import ActorCritic, network_functions, trajectory_apply

T, N = 7, 3
NETWORKS = [
    pytest.param(
        {"core": core, "shared_torso": shared},
        id=f"{core}-{'shared' if shared else 'separate'}",
        marks=() if shared == (core == "lstm") else pytest.mark.slow,
    )
    for core in ("lstm", "gru")
    for shared in (True, False)
]


def make_network(core, shared_torso):
    return ActorCritic(
        3, (5,), activation="tanh", core=core, core_size=4, shared_torso=shared_torso
    )


def random_trajectory(network, seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.random((T, N))
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    carry = jax.tree.map(lambda x: normal(*x.shape), network.initialize_carry(N))
    return rollout.Trajectory(
        observation_tm1=normal(T, N, 2),
        action_tm1=jnp.asarray(rng.integers(0, 3, (T, N)), jnp.int32),
        reward_t=normal(T, N),
        terminated_t=jnp.asarray(ends < 0.2),
        truncated_t=jnp.asarray(ends > 0.75),
        observation_t=normal(T, N, 2),
        carry=carry,
    )


def cell_by_hand(core, weights, carry, x):
    """One step of the cell for one environment, from its weights."""
    dense = lambda name, x: x @ weights[name]["kernel"] + weights[name].get("bias", 0.0)  # noqa: E731
    if core == "lstm":
        c, h = carry
        i, f, g, o = (dense("i" + k, x) + dense("h" + k, h) for k in "ifgo")
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h
    r = nn.sigmoid(dense("ir", x) + dense("hr", carry))
    z = nn.sigmoid(dense("iz", x) + dense("hz", carry))
    n = jnp.tanh(dense("in", x) + r * dense("hn", carry))
    h = (1.0 - z) * n + z * carry
    return h, h


def loss_by_hand(params, trajectory, core, shared, settings):
    """A Python loop over environments and steps: no scan, no vmap, no reset by selection."""
    p = params["params"]
    dense = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731

    def trunk(name, observation, carry):
        layer = p[name]["torso"]["Dense_0"]
        x = jnp.tanh(observation @ layer["kernel"] + layer["bias"])
        return cell_by_hand(core, p[name]["cell"], carry, x)

    logits, v_tm1, v_t = (np.empty((T, N), object) for _ in range(3))
    for n in range(N):
        pick = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)  # noqa: E731
        actor, critic = (pick(trajectory.carry),) * 2 if shared else map(pick, trajectory.carry)
        zero = jax.tree.map(jnp.zeros_like, actor)
        critic_trunk = "actor_trunk" if shared else "critic_trunk"
        for t in range(T):
            observation = trajectory.observation_tm1[t, n]
            actor, features = trunk("actor_trunk", observation, actor)
            logits[t, n] = dense("policy_head", features)
            critic, features = trunk(critic_trunk, observation, critic)
            v_tm1[t, n] = dense("value_head", features)[0]
            ended = bool(trajectory.terminated_t[t, n] | trajectory.truncated_t[t, n])
            # The network goes on from what it remembers before the reset.
            _, features = trunk(critic_trunk, trajectory.observation_t[t, n], critic)
            v_t[t, n] = dense("value_head", features)[0]
            if ended:
                actor, critic = zero, zero
    for n in range(N):
        for t in range(T - 1):  # inside an episode the next value is that of the next step
            if not bool(trajectory.terminated_t[t, n] | trajectory.truncated_t[t, n]):
                v_t[t, n] = v_tm1[t + 1, n]
    stack = lambda x: jnp.stack([jnp.stack(list(row)) for row in x])  # noqa: E731
    outputs = Categorical(stack(logits)), stack(v_tm1), stack(v_t)
    return a3c_loss(params, lambda *_: outputs, trajectory, **settings)[0]


@pytest.mark.slow
@pytest.mark.parametrize("settings", NETWORKS)
def test_the_gradient_of_a_segment_is_that_of_back_propagation_through_time_by_hand(settings):
    network = make_network(**settings)
    trajectory = random_trajectory(network)
    ended = trajectory.terminated_t | trajectory.truncated_t
    assert ended[:-1].any() and ended[-1].any() and not ended[-1].all()
    params = network.init(jax.random.key(0), trajectory.observation_tm1[0])
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    options = {"discount": 0.9, "critic_cost": 0.7, "entropy_cost": 0.05}

    def compiled(params):
        return a3c_loss(params, trajectory_apply(network), trajectory, **options)[0]

    value, gradient = jax.jit(jax.value_and_grad(compiled))(params)
    core, shared = settings["core"], settings["shared_torso"]
    expected, by_hand = jax.value_and_grad(loss_by_hand)(params, trajectory, core, shared, options)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradient, by_hand, rtol=2e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("settings", NETWORKS)
def test_stepping_and_unrolling_remember_the_same(settings):
    network = make_network(**settings)
    functions, trajectory = network_functions(network), random_trajectory(network, 1)
    params = network.init(jax.random.key(0), trajectory.observation_tm1[0])
    starts = jnp.asarray(np.random.default_rng(2).random((T, N)) < 0.3)
    distribution, v, carries = functions.unroll(
        params, trajectory.observation_tm1, trajectory.carry, starts
    )
    carry, fresh = trajectory.carry, functions.initialize_carry(N)
    for t in range(T):
        carry = jax.tree.map(
            lambda new, old, t=t: jnp.where(starts[t][:, None], new, old), fresh, carry
        )
        observation = trajectory.observation_tm1[t]
        chex.assert_trees_all_close(functions.value(params, observation, carry), v[t], atol=1e-6)
        now, carry = functions.act(params, observation, carry)
        chex.assert_trees_all_close(now.logits, distribution.logits[t], atol=1e-6)
        chex.assert_trees_all_close(carry, jax.tree.map(lambda x, t=t: x[t], carries), atol=1e-6)


@pytest.mark.parametrize(
    ("own", "flax"),
    [(LSTMCell, nn.OptimizedLSTMCell), (GRUCell, nn.GRUCell)],
    ids=["lstm", "gru"],
)
def test_the_cells_compute_what_flax_s_compute_from_the_same_parameters(own, flax):
    x, h = jax.random.normal(jax.random.key(1), (2, N, 4))
    carry = (h, 0.5 * h) if own is LSTMCell else h
    first = own(4, forget_bias=0.0).init(jax.random.key(0), carry, x)
    expected = flax(4).init(jax.random.key(0), carry, x)
    chex.assert_trees_all_equal(first, expected)  # names, shapes and initial bits
    params = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), first
    )
    got, output = own(4).apply(params, carry, x)
    chex.assert_trees_all_close(
        (got, output), flax(4).apply(params, carry, x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("cell", "gate"), [(LSTMCell, "hf"), (GRUCell, "iz")], ids=["lstm", "gru"])
def test_the_forget_bias_is_the_initial_bias_of_one_gate_and_changes_no_other_parameter(cell, gate):
    x = jnp.ones((N, 4))
    carry = (x, x) if cell is LSTMCell else x
    zero, two = (cell(4, bias).init(jax.random.key(0), carry, x)["params"] for bias in (0.0, 2.0))
    np.testing.assert_array_equal(two[gate]["bias"], 2.0)
    two[gate]["bias"] = zero[gate]["bias"]
    chex.assert_trees_all_equal(two, zero)


def test_only_a_network_with_a_core_is_recurrent():
    assert ActorCritic(3, core="gru").is_recurrent
    assert not ActorCritic(3).is_recurrent


def recalls(sign, action, last):
    """Pays for the sign that was shown at the start."""
    return jnp.where(last, jnp.where(action == (sign > 0), 1.0, -1.0), 0.0)


@pytest.mark.parametrize(
    ("core", "bias"), [("lstm", 0.0), ("lstm", 1.0), ("lstm", 3.0), ("gru", 20.0)]
)
def test_the_first_network_keeps_as_much_of_its_memory_as_the_bias_says(core, bias):
    network = ActorCritic(3, (5,), core=core, core_size=4, forget_bias=bias)
    observation = jnp.zeros((N, 2))  # every gate is at its bias
    params = network.init(jax.random.key(0), observation)

    def memory(add):
        carry = network.initialize_carry(N)
        carry = [(x[0] + add, x[1]) if core == "lstm" else x + add for x in carry]
        _, carry = network.apply(params, observation, carry, method="act")
        return np.stack([c[0] if core == "lstm" else c for c in carry])

    np.testing.assert_allclose(memory(1.0) - memory(0.0), nn.sigmoid(bias), rtol=1e-5)


class Recall(Probe):
    """Shows its sign in an episode's first observation only."""

    def observe(self, sign, remaining):
        shown = jnp.where(remaining == self.length, sign, 0.0)
        return jnp.stack([shown, remaining.astype(jnp.float32)], axis=-1)


# At the default entropy cost, 0.01, some runs settle on one action before the memory has formed.
RECALL = {
    "hidden_sizes": (16,),
    "t_max": 5,
    "envs_per_worker": 32,
    "learning_rate": 5e-3,
    "entropy_cost": 0.05,
}


@pytest.mark.slow
def test_memory_learns_what_no_policy_without_it_can():
    environment = Recall(4, recalls)
    means = {}
    for core in ("gru", None):
        config = small(num_workers=2, core=core, core_size=16, max_steps=100_000, **RECALL)
        result = train(config, environment)
        policy = greedy_policy(result.network)
        returns, _ = evaluate(policy, result.params, environment, result.evaluation_key, 400)
        means[core] = returns.mean()
    assert means["gru"] > 0.95
    assert abs(means[None]) < 0.2


@pytest.mark.slow
def test_the_carry_goes_on_from_segment_to_segment_and_is_fresh_where_an_episode_ended():
    config = small(core="lstm", core_size=4, t_max=3, envs_per_worker=4)
    blueprint, params, (state, *_) = initialize(config, environment=Recall(5, recalls))
    step = jax.jit(blueprint.worker_step)
    chex.assert_trees_all_equal(
        state.carry, network_functions(blueprint.network).initialize_carry(config.envs_per_worker)
    )
    for segment in range(1, 6):
        _, state, _ = step(params, state)
        at_a_start = 3 * segment % 5 == 0
        for leaf in jax.tree.leaves(state.carry):
            assert (not np.asarray(leaf).any()) == at_a_start


@pytest.mark.parametrize("core", [pytest.param("lstm", marks=pytest.mark.slow), "gru"])
def test_a_run_with_memory_resumes_and_replays_bit_for_bit(tmp_path, core):
    config = small(core=core, core_size=4, max_steps=400)
    whole = train(config)
    checkpoint = cut_short(config, 13, tmp_path)
    assert_equal_runs(train(config, resume=checkpoint), whole)
    several = small(core=core, core_size=4, num_workers=3, max_steps=400)
    result = train(several, checkpoints=CheckpointFolder(tmp_path / "several"))
    assert_equal_runs(replay(several, result.schedule), result)
    assert find_checkpoint(tmp_path / "several").version == result.version
