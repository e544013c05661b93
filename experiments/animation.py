"""A GIF of a policy playing, drawn by gymnax."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def animate(path: Path, result: Any, max_steps: int = 200) -> None:
    """Writes an episode that the trained policy plays greedily, or its first `max_steps` steps.

    If gymnax cannot draw the environment, or if pygame is missing, which it draws with, the reason is printed.
    """
    states, rewards = greedy_episode(result, max_steps)
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")  # pygame looks for a sound card otherwise
    from gymnax.visualize import Visualizer

    environment = result.environment
    try:
        visualizer = Visualizer(environment.gymnax, environment.params, states, np.cumsum(rewards))
        visualizer.init()
        if not hasattr(visualizer, "im"):  # it draws empty axes for what it does not know
            raise ValueError(f"gymnax cannot draw {environment.name}")
        visualizer.animate(str(path))
    except Exception as error:  # whatever a drawing library raises, the run is complete without it
        print(f"no GIF: {type(error).__name__}: {error}")


def greedy_episode(result: Any, max_steps: int) -> tuple[list[Any], np.ndarray]:
    """The first episode's states, one before each step, and rewards, for at most `max_steps` steps."""
    from a3c_jax import greedy_policy

    policy, environment = greedy_policy(result.network), result.environment
    reset_key, key = jax.random.split(result.evaluation_key)
    observation, state = environment.reset(reset_key, 1)

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        observation, state, memory, running = carry
        action_key, environment_key = jax.random.split(key)
        action, memory = policy.act(result.params, action_key, observation, memory)
        transition = environment.step(environment_key, state, action)
        ended = (transition.terminated | transition.truncated)[0]
        carry = (transition.observation, transition.state, memory, running & ~ended)
        return carry, (state, transition.reward[0], running)

    carry = (observation, state, policy.initialize_carry(1), jnp.bool_(True))
    _, (states, rewards, running) = jax.lax.scan(step, carry, jax.random.split(key, max_steps))
    length = int(running.sum())
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, states))
    moments = [jax.tree.unflatten(structure, [x[k, 0] for x in leaves]) for k in range(length)]
    return moments, np.asarray(rewards)[:length]
