"""A GIF of a policy playing, drawn by gymnax or by the environment on the host itself."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax import environments, greedy_policy, sampled_policy
from a3c_jax.asynchrony.signals import raise_noted
from a3c_jax.environments import HostEnvironment


def animate(path: Path, result: Any, max_steps: int = 200) -> None:
    """Writes an episode that the trained policy plays greedily, or its first `max_steps` steps.

    If the environment cannot be drawn, or if pygame is missing, which many are drawn with, the reason is printed.
    """
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")  # pygame looks for a sound card otherwise
    if isinstance(result.environment, HostEnvironment):
        _animate_on_host(path, result)
        return
    states, rewards = greedy_episode(result, max_steps)
    states = [getattr(state, "env_state", state) for state in states]  # if actions are sticky
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


def _animate_on_host(
    path: Path, result: Any, max_steps: int = 1_000, max_frames: int = 400
) -> None:
    from PIL import Image

    try:
        frames = _frames_on_host(result, max_steps)
        every = -(-len(frames) // max_frames)
        images = [Image.fromarray(frame).quantize(64) for frame in frames[::every]]
        images[0].save(path, save_all=True, append_images=images[1:], duration=50, loop=0)
    except Exception as error:  # the run is complete without it
        print(f"no GIF: {type(error).__name__}: {error}")


def _frames_on_host(result: Any, max_steps: int) -> list[np.ndarray]:
    """Pictures of an episode of the policy as it was trained, which samples its actions.

    Atari is played twice: as the policy sees it, and in colour, with the same seed and the same actions.
    """
    environment, policy = result.environment, sampled_policy(result.network)
    is_atari = environment.name.startswith("ale:")
    colours = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    shown = environments.make(
        environment.name, **(colours if is_atari else {"render_mode": "rgb_array"})
    )
    seed_key, action_key = jax.random.split(result.evaluation_key)
    entropy, act, frames = jax.random.key_data(seed_key), jax.jit(policy.act), []
    with shown.playing(1, entropy) as player, environment.playing(1, entropy) as seen:
        first = np.zeros(1, np.int32)
        shown_observation, observation = player.begin(first), seen.begin(first)
        carry, ended, step = policy.initialize_carry(1), False, 0
        while not ended and step < max_steps:
            raise_noted()
            frames.append(shown_observation[0, -1] if is_atari else player.render())
            action, carry = act(
                result.params,
                jax.random.fold_in(action_key, step),
                environment.encode(observation),
                carry,
            )
            own_action = environment.decode(np.asarray(action))
            stepped = seen.step(own_action)
            observation, shown_observation = (
                stepped.observation,
                player.step(own_action).observation,
            )
            ended, step = bool(stepped.terminated[0] | stepped.truncated[0]), step + 1
    return frames
