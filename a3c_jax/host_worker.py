"""A worker's step in environments on the host: what `a3c_jax.worker.make_worker_step` makes in environments written in JAX.

The segment is a loop in Python: a compiled function chooses the actions, the environments are stepped, and after
`t_max` steps another compiled function takes the gradient of the loss. Both are the functions that the pure path is
made of, and random keys are used in the same way. An environment that exists in both forms gives the same segments.

(parameters, worker state)  ->  (gradients, worker state, report)

Seen from outside it is a pure function, although the environments change in it: a state says where its environments
stand, and if the open ones stand elsewhere, they are put back there first.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax import rollout
from a3c_jax.algorithm import Algorithm
from a3c_jax.cells import where_tree
from a3c_jax.host_environment import HostEnvironment
from a3c_jax.host_segment import HostSegment
from a3c_jax.host_state import ActionLog, HostState, Live
from a3c_jax.over_leaves import OverLeaves
from a3c_jax.worker import SegmentReport, learn

Array = jax.Array


def rehearse(step: Any, params: Any, state: Any) -> tuple[Any, Any, Any]:
    """Gradients, state and report like those of a worker step. If its environments are on the host, none is made."""
    results: tuple[Any, Any, Any] = getattr(step, "rehearse", step)(params, state)
    return results


class HostStepFunctions:
    """What a worker's step consists of besides the environments: pure functions, which `CompiledHostStep` compiles.

    Args:
      environment: what to play.
      algorithm: how to choose actions, and what to minimise.
      t_max: the number of steps played in each environment between two updates.
      **rewards: see `a3c_jax.worker.learn`.
    """

    def __init__(
        self, environment: HostEnvironment, algorithm: Algorithm, *, t_max: int, **rewards: Any
    ) -> None:
        self.environment, self.algorithm, self.t_max = environment, algorithm, t_max
        self._rewards = rewards

    def act(
        self,
        params: Any,
        key: Array,
        t: Array,
        ended: Array,
        observation: Any,
        carry: Any,
        own: Any,
    ) -> tuple[Array, Array, Any]:
        """Chooses the actions of one step of a segment.

        Args:
          params: the parameters.
          key: the key of the state that the segment begins with.
          t: which step it is.
          ended: where the step before ended an episode, so that the carry is reset, `[N]` bool.
          observation: what to act upon.
          carry: what a recurrent network remembers.
          own: what the algorithm keeps for this worker.

        Returns:
          Actions, their log-probabilities and the carry; see `a3c_jax.algorithm.Algorithm.act`.
        """
        _, segment_key = jax.random.split(key)
        step_key = jax.random.split(segment_key, self.t_max)[t]
        action_key, _ = jax.random.split(step_key)
        fresh = self.algorithm.initialize_carry(ended.shape[0])
        carry = where_tree(ended, fresh, carry)
        return self.algorithm.act(params, action_key, observation, carry, own)

    def learn(
        self,
        params: Any,
        state: rollout.RolloutState,
        ended: Array,
        trajectory: rollout.Trajectory,
        episodes: rollout.Episodes,
    ) -> tuple[Any, rollout.RolloutState, SegmentReport]:
        """From a segment to its gradients, and to what of the state is computed in compiled code.

        Args:
          params: the parameters.
          state: as at the segment's start, but with the carry at its end.
          ended: where the last step ended an episode, `[N]` bool.
          trajectory: the steps.
          episodes: the episodes that ended.
        """
        key, _ = jax.random.split(state.key)
        fresh = self.algorithm.initialize_carry(ended.shape[0])
        state = state._replace(key=key, carry=where_tree(ended, fresh, state.carry))
        return learn(self.algorithm, params, state, trajectory, episodes, **self._rewards)

    def rehearse(
        self, params: Any, state: rollout.RolloutState
    ) -> tuple[Any, rollout.RolloutState, SegmentReport]:
        """A step in which all observations are zeros. It needs no environment, and may be traced.

        The state that it returns has no environments and no observations.
        """
        ended = jnp.zeros(len(state.episode_return), bool)
        action, log_prob, carry = self.act(
            params, state.key, jnp.int32(0), ended, state.observation, state.carry, state.own
        )
        return self.learn(params, *self.example_segment(state, action, log_prob, carry))

    def example_segment(
        self, state: rollout.RolloutState, action: Any, log_prob: Any, carry: Any
    ) -> tuple[rollout.RolloutState, Array, rollout.Trajectory, rollout.Episodes]:
        """A segment of zeros, as `learn` takes it, from what `act` returned for the state."""

        def zeros(x: Any) -> Array:
            return jnp.zeros((self.t_max, *x.shape), x.dtype)

        reward, flags = zeros(state.episode_return), zeros(state.episode_return > 0)
        observation = jax.tree.map(zeros, state.observation)
        trajectory = rollout.Trajectory(
            observation_tm1=observation,
            action_tm1=zeros(action),
            reward_t=reward,
            terminated_t=flags,
            truncated_t=flags,
            observation_t=observation,
            carry=state.carry,
            log_prob_tm1=zeros(log_prob),
            valid_tm1=~flags if self.environment.marks_beginnings else None,
        )
        episodes = rollout.Episodes(flags, reward, reward.astype(jnp.int32))
        return _learning_part(state._replace(carry=carry)), flags[0], trajectory, episodes


class CompiledHostStep:
    """A worker's step in environments on the host, ready to be called.

    Args:
      step: the functions.
      compile: `compile(function, *examples, **options)` compiles a pure function.
      params: parameters like those to come.
      state: a state like those to come.
      **options: for the function that learns.

    Attributes:
      in_single_kernel: whether the function that learns is a single kernel.
    """

    def __init__(
        self,
        step: HostStepFunctions,
        compile: Callable[..., Any],
        params: Any,
        state: Any,
        **options: Any,
    ) -> None:
        self._environment, self._t_max = step.environment, step.t_max
        ended = np.zeros(len(state.episode_return), bool)
        moment = (state.key, np.int32(0), ended, state.observation, state.carry, state.own)
        self._act = OverLeaves(compile, step.act, params, moment)
        chosen = self._act(params, *moment)
        self._fresh_carry = step.algorithm.initialize_carry(len(ended))
        self._rehearsal = step.example_segment(state, *chosen)
        # The gradients and the report go on as they are packed, to the store.
        self._learn = OverLeaves(
            compile, step.learn, params, self._rehearsal, packed=(0, 2), **options
        )
        self.in_single_kernel = self._learn.in_single_kernel

    def max_concurrent_calls(self, num_threads: int, *arguments: Any) -> int | None:
        """How many threads should call it at the same time: as many as there are."""
        return None

    def rehearse(self, params: Any, state: Any) -> tuple[Any, Any, SegmentReport]:
        """A step in which all observations are zeros. It needs no environment."""
        results: Any = self._learn(params, *self._rehearsal)
        return results

    def __call__(self, params: Any, state: Any) -> tuple[Any, Any, SegmentReport]:
        live = state.environment.live
        environment = self._environment
        play = functools.partial(self._play, live, params, state)
        return live.call(play, environment.name, environment.step_seconds)

    def _play(self, live: Live, params: Any, state: Any) -> tuple[Any, Any, SegmentReport]:
        state = self._where_it_stands(live, state)
        name, marks_beginnings = self._environment.name, self._environment.marks_beginnings
        segment = HostSegment(name, self._t_max, state, marks_beginnings)
        ended, carry = np.zeros(len(state.episode_return), bool), state.carry
        for t in range(self._t_max):
            action, log_prob, carry = self._act(
                params, state.key, np.int32(t), ended, segment.observation(), carry, state.own
            )
            action = np.asarray(action)
            with live.watched():
                stepped = live.player.step(self._environment.decode(action))  # type: ignore[union-attr]
            stepped = stepped._replace(
                observation=self._environment.encode(stepped.observation),
                final_observation=self._environment.encode(stepped.final_observation),
            )
            ended = segment.append(action, np.asarray(log_prob), stepped)

        trajectory, episodes = segment.read(state.carry)
        now = _learning_part(state._replace(carry=carry))
        # Calls with large NumPy arrays return before they are computed, whatever the settings of the process are.
        gradients, learned, report = jax.block_until_ready(
            self._learn(params, now, ended, trajectory, episodes)
        )
        return gradients, self._next_state(live, segment, learned), report

    def _next_state(self, live: Live, segment: "HostSegment", learned: Any) -> Any:
        """The state at a segment's end."""
        assert live.player is not None and live.log is not None
        longest = int(segment.episode_length.max())
        dtype = self._environment.action_example(1).dtype
        live.log.append(segment.actions().astype(dtype), longest)
        where = HostState(
            segment.entropy, live.player.episode, live.log.snapshot(longest), live, live.clock
        )
        return learned._replace(
            environment=where,
            observation=segment.observation(),
            episode_return=segment.episode_return,
            episode_length=segment.episode_length,
        )

    def _where_it_stands(self, live: Live, state: Any) -> Any:
        """The state with arrays on the host, and its environments open where it says that they stand."""
        saved = state.environment
        stands_there = live.player is not None and saved.clock == live.clock
        # First of all, so that a saved clock never equals it again if they fail on the way.
        live.clock += 1
        if stands_there:
            return state
        num_envs = len(state.episode_return)
        state = state._replace(
            environment=jax.tree.map(np.asarray, saved),
            observation=jax.tree.map(np.asarray, state.observation),
            episode_return=np.asarray(state.episode_return),
            episode_length=np.asarray(state.episode_length),
        )
        if live.player is None:
            make = functools.partial(self._environment.make, num_envs, state.environment.entropy)
            live.open(make, num_envs)
        assert live.player is not None
        begins = bool((state.environment.episode < 0).all())
        if not begins and self._put_back(live, state):
            return state
        episode = state.environment.episode + 1
        with live.watched():
            first = self._environment.begin(live.player, episode)
        live.log = ActionLog(state.environment.actions[:0])
        anew = jax.tree.map(lambda x: jnp.zeros_like(x), state.discounted_return)
        return state._replace(
            environment=HostState(
                state.environment.entropy, episode, state.environment.actions[:0]
            ),
            observation=first,
            episode_return=np.zeros(num_envs, np.float32),
            episode_length=np.zeros(num_envs, np.int32),
            carry=self._fresh_carry,
            discounted_return=anew,
        )

    def _put_back(self, live: Live, state: Any) -> bool:
        """Puts the environments where a state says that they stand; False, with a warning, if that is not possible."""
        assert live.player is not None
        where, length = state.environment, state.episode_length
        steps = int(length.max())
        actions = where.actions[len(where.actions) - steps :] if steps else where.actions[:0]
        if not live.player.can_put_back:
            why = "it cannot begin an episode with a seed of its own"
        elif len(actions) < steps:
            why = "an episode was too long to be remembered"
        else:
            decoded = [self._environment.decode(action) for action in actions]
            observation, paid = live.player.put_back(where.episode, decoded, length, live.watched)
            found = jax.tree.leaves((self._environment.encode(observation), paid))
            expected = jax.tree.leaves((state.observation, state.episode_return))
            if all(
                np.array_equal(*pair, equal_nan=True) for pair in zip(found, expected, strict=True)
            ):
                live.log = ActionLog(actions)
                return True
            why = "it does not do the same again with the same seed and the same actions"
        warnings.warn(
            f"environment {self._environment.name!r} cannot be put back into the middle of an episode, because {why}: "
            "running episodes begin anew, and a replay of the run from here on will differ.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False


def _learning_part(state: Any) -> Any:
    """Of a state what the compiled function that learns reads."""
    nothing: Any = ()
    return state._replace(
        environment=(), observation=(), episode_return=nothing, episode_length=nothing
    )
