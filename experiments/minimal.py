"""A3C on one page: `python -m experiments.minimal` solves CartPole-v1 with four threads.

Every worker thread repeats four steps: take the current parameters, play a few steps with them, compute the
gradients of the loss on those steps, and apply the gradients to the parameters that all workers share. Nobody waits
for another's gradients, so others may have changed the parameters in between. That is the asynchrony of A3C.
"""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from a3c_jax import losses

NUM_WORKERS, ENVS_PER_WORKER, NUM_STEPS, DISCOUNT = 4, 8, 16, 0.99

env, _ = gymnax.make("CartPole-v1")
actor: Any = nn.Sequential([nn.Dense(128), nn.tanh, nn.Dense(env.num_actions)])  # gives logits
critic: Any = nn.Sequential([nn.Dense(128), nn.tanh, nn.Dense(1)])  # gives the value
optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(2e-3, eps=1e-5))
apply_gradients = jax.jit(TrainState.apply_gradients)


def unroll(params: Any, state: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Plays NUM_STEPS steps in one environment. `_tm1` is what comes before a step, `_t` what after it."""

    def step(state: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
        key, obs_tm1, env_state, total = state
        key, action_key, env_key = jax.random.split(key, 3)
        action_tm1 = jax.random.categorical(action_key, actor.apply(params["actor"], obs_tm1))
        # When an episode ends, the environment resets itself: `obs` then begins the next episode.
        obs, env_state, r_t, terminated, truncated, info = env.step(env_key, env_state, action_tm1)
        ended, total = terminated | truncated, total + r_t
        seen = {
            "obs_tm1": obs_tm1, "action_tm1": action_tm1, "r_t": r_t,
            "obs_t": info["final_observation"],  # what the action led to, before any reset
            "discount_t": DISCOUNT * (1.0 - terminated),  # nothing follows a terminal state
            "lambda_t": 1.0 - truncated,  # at a time limit, take the critic's word for what follows
            "ended": ended, "episode_return": total,
        }  # fmt: skip
        return (key, obs, env_state, total * ~ended), seen

    return jax.lax.scan(step, state, length=NUM_STEPS)


def loss(params: Any, seen: dict[str, jax.Array]) -> jax.Array:
    """The loss of A3C on a batch of segments, arrays of `[time, environments]`."""
    v_tm1 = critic.apply(params["critic"], seen["obs_tm1"])[..., 0]
    v_t = critic.apply(params["critic"], seen["obs_t"])[..., 0]
    return_tm1 = losses.n_step_returns(seen["r_t"], seen["discount_t"], v_t, seen["lambda_t"])
    log_pi = jax.nn.log_softmax(actor.apply(params["actor"], seen["obs_tm1"]))
    log_prob_tm1 = jnp.take_along_axis(log_pi, seen["action_tm1"][..., None], -1)[..., 0]
    actor_loss = losses.actor_loss(log_prob_tm1, return_tm1 - v_tm1)
    entropy_loss = losses.entropy_loss(-jnp.sum(jnp.exp(log_pi) * log_pi, -1))
    return actor_loss + 0.5 * losses.critic_loss(v_tm1, return_tm1) + 0.01 * entropy_loss


@jax.jit
def worker_step(params: Any, states: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Plays a segment in each environment; returns the gradients, the new states and what was seen."""
    states, seen = jax.vmap(unroll, in_axes=(None, 0), out_axes=(0, 1))(params, states)
    return jax.grad(loss)(params, seen), states, seen


def train(seed: int = 0, solved: float = 475.0, max_updates: int = 20_000) -> tuple[float, int]:
    """Trains until the last 100 episodes have the mean return `solved`; returns it and the steps."""
    keys = jax.random.split(jax.random.key(seed), 2 + NUM_WORKERS)
    obs = jnp.zeros(4)  # only its shape matters
    params = {"actor": actor.init(keys[0], obs), "critic": critic.init(keys[1], obs)}
    shared = TrainState.create(apply_fn=None, params=params, tx=optimizer)
    lock, returns = threading.Lock(), deque[float](maxlen=100)

    def work(key: jax.Array) -> None:
        nonlocal shared
        reset_keys, keys = jax.random.split(key, (2, ENVS_PER_WORKER))
        states = (keys, *jax.vmap(env.reset)(reset_keys), jnp.zeros(ENVS_PER_WORKER))
        while True:
            params = shared.params  # a snapshot: arrays never change, an update makes new ones
            gradients, states, seen = jax.block_until_ready(worker_step(params, states))
            ended, episode_return = jax.device_get((seen["ended"], seen["episode_return"]))
            with lock:
                if sum(returns) >= 100 * solved or shared.step >= max_updates:
                    return
                shared = apply_gradients(shared, grads=gradients)
                returns.extend(episode_return[ended])

    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        list(threads.map(work, keys[2:]))
    return sum(returns) / max(1, len(returns)), int(shared.step) * ENVS_PER_WORKER * NUM_STEPS


if __name__ == "__main__":
    print("mean return of the last 100 episodes: {:.1f}, after {:,} steps".format(*train()))
