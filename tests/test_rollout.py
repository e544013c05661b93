"""Rollouts: no episode lost or counted twice, every return bootstrapped from the right place."""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3c_jax import losses, rollout
from a3c_jax.distributions import Categorical
from a3c_jax.environments import Transition
from a3c_jax.networks import trajectory_apply

TERMINATED, TRUNCATED, BOTH = range(3)


class Scripted:
    """Environments whose episodes are written down beforehand, and observations say where one is.

    Copy n's episode e takes `lengths[n][e % len(lengths[n])]` steps. Episodes end in turn by
    termination, by truncation, and by both at once. The observation is `(copy, episode, step)`, and
    a step earns `1 + action + 8 * copy + 64 * episode`.
    """

    name = "Scripted"
    num_actions = 2
    continuous = False
    observation_shape = (3,)

    class State(NamedTuple):
        episode: jax.Array
        step: jax.Array

    def __init__(self, lengths):
        self.lengths = lengths

    def reset(self, key, num_envs):
        assert num_envs == len(self.lengths)
        state = self.State(jnp.zeros(num_envs, jnp.int32), jnp.zeros(num_envs, jnp.int32))
        return self.observe(state), state

    def observe(self, state):
        copy = jnp.arange(len(self.lengths))
        return jnp.stack([copy, state.episode, state.step], axis=-1).astype(jnp.float32)

    def step(self, key, state, action):
        table, cycle = jnp.array(self.lengths), len(self.lengths[0])
        copy = jnp.arange(len(self.lengths))
        reward = 1.0 + action + 8.0 * copy + 64.0 * state.episode
        after = self.State(state.episode, state.step + 1)
        ended = after.step == table[copy, state.episode % cycle]
        reset = self.State(state.episode + 1, jnp.zeros_like(state.step))
        carried = jax.tree.map(lambda new, old: jnp.where(ended, new, old), reset, after)
        how = state.episode % 3
        return Transition(
            self.observe(carried),
            carried,
            reward,
            ended & (how != TRUNCATED),
            ended & (how != TERMINATED),
            self.observe(after),
        )


LENGTHS = ((3, 1, 7, 2), (5, 5, 1, 1), (1, 2, 3, 4), (11, 2, 1, 6))


def parity(key, observation, carry):
    """A deterministic policy: the parity of the step."""
    return (observation[:, 2] % 2).astype(jnp.int32), jnp.zeros(len(observation)), carry


def expected_episodes(lengths, num_steps):
    """`(copy, return, length, index of the last step)` of all that end within `num_steps`."""
    result = []
    for copy, cycle in enumerate(lengths):
        end, episode = 0, 0
        while (end := end + (length := cycle[episode % len(cycle)])) <= num_steps:
            total = sum(1 + step % 2 + 8 * copy + 64 * episode for step in range(length))
            result.append((copy, float(total), length, end - 1))
            episode += 1
    return sorted(result)


def play_segments(environment, policy, num_segments, t_max, seed=0, wrap=jax.jit):
    """Consecutive segments: the states in between, and trajectories and episodes joined in time."""
    unroll = wrap(lambda state: rollout.unroll(environment, policy, state, t_max))
    state = rollout.start(environment, jax.random.key(seed), len(environment.lengths))
    states, segments = [state], []
    for _ in range(num_segments):
        state, *segment = unroll(state)
        states.append(state)
        segments.append(segment)
    trajectory, episodes = jax.tree.map(lambda *x: np.concatenate(x), *segments)
    return states, trajectory, episodes


@pytest.mark.parametrize("t_max", [1, 5, 16])
def test_every_episode_is_reported_once_with_its_exact_return_and_length(t_max):
    num_segments = 80 // t_max
    _, _, episodes = play_segments(Scripted(LENGTHS), parity, num_segments, t_max)
    actual = sorted(
        (int(n), float(episodes.episode_return[t, n]), int(episodes.length[t, n]), int(t))
        for t, n in np.argwhere(episodes.ended)
    )
    expected = expected_episodes(LENGTHS, 80)
    assert len(expected) == 24 + 26 + 32 + 15  # copy 0, for instance: 13 steps make 4 episodes
    assert actual == expected


def test_running_returns_and_lengths_are_carried_over_and_begin_again_after_an_end():
    states, _, _ = play_segments(Scripted(LENGTHS), parity, num_segments=3, t_max=4)
    # Copy 3's first episode takes 11 steps of 25, and 1 more where the step is odd.
    np.testing.assert_array_equal([s.episode_length[3] for s in states], [0, 4, 8, 1])
    np.testing.assert_array_equal(
        [s.episode_return[3] for s in states],
        [0.0, 4 * 25 + 2, 8 * 25 + 4, 25 + 64],  # the twelfth step is the next episode's first
    )


def test_what_followed_is_the_true_final_observation_and_what_comes_next_is_the_reset_one():
    _, trajectory, episodes = play_segments(Scripted(LENGTHS), parity, num_segments=8, t_max=5)
    copy, episode, step = np.moveaxis(trajectory.observation_tm1, -1, 0)
    np.testing.assert_array_equal(
        trajectory.observation_t, np.stack([copy, episode, step + 1], axis=-1)
    )
    ended = episodes.ended[:-1]
    assert ended.any(axis=0).all()
    np.testing.assert_array_equal(episode[1:], np.where(ended, episode[:-1] + 1, episode[:-1]))
    np.testing.assert_array_equal(step[1:], np.where(ended, 0, step[:-1] + 1))


def test_the_flags_of_an_end_are_those_of_the_environment():
    _, trajectory, episodes = play_segments(Scripted(LENGTHS), parity, num_segments=8, t_max=5)
    how = trajectory.observation_tm1[..., 1] % 3
    np.testing.assert_array_equal(trajectory.terminated_t, episodes.ended & (how != TRUNCATED))
    np.testing.assert_array_equal(trajectory.truncated_t, episodes.ended & (how != TERMINATED))
    for kind in (TERMINATED, TRUNCATED, BOTH):
        assert (episodes.ended & (how == kind)).any()


def test_actions_are_recorded_beside_the_observation_they_were_chosen_for():
    _, trajectory, _ = play_segments(Scripted(LENGTHS), parity, num_segments=4, t_max=5)
    np.testing.assert_array_equal(trajectory.action_tm1, trajectory.observation_tm1[..., 2] % 2)
    copy, episode, step = np.moveaxis(trajectory.observation_tm1, -1, 0)
    np.testing.assert_array_equal(trajectory.reward_t, 1 + step % 2 + 8 * copy + 64 * episode)


def test_consecutive_segments_are_one_long_one_cut_into_pieces():
    states, *pieces = play_segments(Scripted(LENGTHS), parity, num_segments=8, t_max=5)
    long_states, *whole = play_segments(Scripted(LENGTHS), parity, num_segments=1, t_max=40)
    chex.assert_trees_all_equal(pieces, whole)
    chex.assert_trees_all_equal(states[-1]._replace(key=0), long_states[-1]._replace(key=0))


def test_compiled_and_uncompiled_agree():
    arguments = Scripted(LENGTHS), parity, 3, 5
    compiled = play_segments(*arguments)
    plain = play_segments(*arguments, wrap=lambda f: f)
    chex.assert_trees_all_equal(
        jax.tree.map(raw, compiled, is_leaf=is_key), jax.tree.map(raw, plain, is_leaf=is_key)
    )


def is_key(x):
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def raw(x):
    return jax.random.key_data(x) if is_key(x) else x


class Noise(Scripted):
    """One whose observation is a draw from each key that it is given."""

    def draw(self, key, num_envs):
        return jax.random.bits(key, (num_envs,), jnp.uint32)

    def reset(self, key, num_envs):
        return self.draw(key, num_envs), super().reset(key, num_envs)[1]

    def step(self, key, state, action):
        transition = super().step(key, state, action)
        draw = self.draw(key, action.shape[0])
        return transition._replace(observation=draw, final_observation=draw)


def noisy(key, observation, carry):
    return jax.random.bits(key, observation.shape, jnp.uint32), (), carry


def test_no_two_steps_copies_segments_or_workers_share_random_numbers():
    draws = []
    for seed in range(2):
        states, trajectory, _ = play_segments(Noise(LENGTHS), noisy, 10, t_max=7, seed=seed)
        # 10 segments of 7 steps of 4 copies, an action and an observation each, and the resets.
        draws += [trajectory.action_tm1, trajectory.observation_t, states[0].observation]
        draws.append(np.stack([jax.random.key_data(s.key) for s in states]))
    draws = np.concatenate([np.asarray(d).ravel() for d in draws])
    assert draws.size == 2 * (2 * 10 * 7 * 4 + 4 + 11 * 2)
    assert np.unique(draws).size == draws.size


def test_equal_keys_give_equal_segments():
    first = play_segments(Noise(LENGTHS), noisy, 2, t_max=7, seed=3)[1]
    second = play_segments(Noise(LENGTHS), noisy, 2, t_max=7, seed=3)[1]
    chex.assert_trees_all_equal(first, second)


class Lookup(nn.Module):
    """The value `1000 * copy + 100 * episode + 10 * step + 5`, read off the observation."""

    def setup(self):
        init = nn.initializers.constant(jnp.array([1000.0, 100.0, 10.0]))
        self.weights = self.param("weights", init, (3,))

    def actor(self, observation):
        return Categorical(jnp.zeros((*observation.shape[:-1], 2)))

    def critic(self, observation):
        return observation @ self.weights + 5.0

    def __call__(self, observation):
        return self.actor(observation), self.critic(observation)


def segment_and_values(lengths, t_max, num_segments=1):
    """The last segment with the values that the losses see of it."""
    _, trajectory, _ = play_segments(Scripted(lengths), parity, num_segments, t_max)
    trajectory = jax.tree.map(lambda x: jnp.asarray(x[-t_max:]), trajectory)
    network = Lookup()
    params = network.init(jax.random.key(0), trajectory.observation_tm1)
    apply_fn = trajectory_apply(network)
    return trajectory, params, apply_fn, *jax.jit(apply_fn)(params, trajectory)[1:]


def returns(trajectory, v_t, discount):
    return losses.n_step_returns(
        trajectory.reward_t,
        discount * (1.0 - trajectory.terminated_t),
        v_t,
        1.0 - trajectory.truncated_t,
    )


def test_returns_across_a_termination_a_time_limit_and_both_worked_by_hand():
    # Three episodes of two steps, and the first step of a fourth. Rewards of episode e: 1 + 64 e at
    # its first step, 2 + 64 e at its second. V(0, e, s) = 100 e + 10 s + 5. The discount is 1/2.
    trajectory, _, _, _, v_t = segment_and_values(((2, 2, 2),), t_max=7)
    np.testing.assert_array_equal(trajectory.terminated_t[:, 0], [0, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(trajectory.truncated_t[:, 0], [0, 0, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(
        returns(trajectory, v_t, 0.5)[:, 0],
        [
            1 + 0.5 * 2,  # looks one step ahead, to the termination
            2,  # terminated: the future is worth nothing
            65 + 0.5 * 128.5,  # looks one step ahead, to the time limit
            66 + 0.5 * 125,  # truncated: V of the final observation (0, 1, 2), not of (0, 2, 0)
            129 + 0.5 * 130,
            130,  # both: termination wins
            193 + 0.5 * 315,  # the segment's end: V(0, 3, 1)
        ],
    )


@pytest.mark.parametrize("t_max", [1, 8])
def test_returns_are_the_forward_sums_up_to_the_nearest_end_for_every_copy(t_max):
    discount = 0.9
    trajectory, params, apply_fn, v_tm1, v_t = segment_and_values(LENGTHS, t_max, num_segments=4)
    flags = np.asarray(trajectory.terminated_t), np.asarray(trajectory.truncated_t)
    rewards = np.asarray(trajectory.reward_t, np.float64)
    following = np.asarray(trajectory.observation_t, np.float64)
    expected = np.zeros_like(rewards)
    for begin, copy in np.ndindex(*expected.shape):
        factor = 1.0
        for t in range(begin, t_max):
            expected[begin, copy] += factor * rewards[t, copy]
            factor *= discount
            if flags[0][t, copy]:
                break
            if flags[1][t, copy] or t == t_max - 1:
                value = following[t, copy] @ [1000, 100, 10] + 5
                expected[begin, copy] += factor * value
                break
    np.testing.assert_allclose(returns(trajectory, v_t, discount), expected, rtol=1e-5)

    # The whole loss reads the flags in the same way.
    loss = jax.jit(lambda *x: losses.a3c_loss(x[0], apply_fn, x[1], discount=discount))
    metrics = loss(params, trajectory)[1]
    advantage = expected - np.asarray(v_tm1, np.float64)
    np.testing.assert_allclose(metrics["mean_advantage"], advantage.mean(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(metrics["critic_loss"], 0.5 * (advantage**2).mean(), rtol=1e-4)


def test_values_of_what_followed_are_those_of_the_network_wherever_they_are_read():
    trajectory, _, _, v_tm1, v_t = segment_and_values(LENGTHS, t_max=12, num_segments=3)
    weights = np.array([1000.0, 100.0, 10.0])
    np.testing.assert_array_equal(v_tm1, trajectory.observation_tm1 @ weights + 5)
    read = ~np.asarray(trajectory.terminated_t)
    expected = np.asarray(trajectory.observation_t) @ weights + 5
    np.testing.assert_array_equal(np.asarray(v_t)[read], expected[read])
