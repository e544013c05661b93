"""PPO and PQN of rejax, for `experiments.measurements.minatar_agents`, which runs this file with their own Python.

It imports nothing of this project: `python minatar_peers.py ppo Breakout-MinAtar 0 5000000` prints the mean return of 100 fresh
episodes by the final policy.
"""

import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")

PPO: dict[str, Any] = {
    "num_envs": 64,
    "num_steps": 128,
    "num_epochs": 4,
    "num_minibatches": 8,
    "agent_kwargs": {"activation": "relu", "hidden_layer_sizes": (64, 64)},
}
"""What purejaxrl chose for MinAtar, in examples/brax_minatar.ipynb."""

PQN: dict[str, Any] = {
    "num_envs": 128,
    "num_steps": 32,
    "num_epochs": 2,
    "num_minibatches": 32,
    "td_lambda": 0.65,
}
"""What PureJaxQL chose for MinAtar, in config/alg/pqn_minatar.yaml."""


def lambda_returns(algorithm: Any, trajectories: Any, max_last_q: Any) -> Any:
    """The targets of PQN. Those of rejax 0.1.3 take the value of one observation too late, and that behind a death."""
    import jax
    import jax.numpy as jnp

    def step(target: Any, t: Any) -> tuple[Any, Any]:
        next_value = t.next_q.max(axis=1)
        mixed = next_value + algorithm.td_lambda * (target - next_value)
        target = t.reward + (1 - t.done) * algorithm.gamma * mixed
        return target, target

    last = trajectories.next_q[-1].max(axis=1)  # what follows the last step is not known: its value
    _, targets = jax.lax.scan(step, jnp.asarray(last), trajectories, reverse=True)
    return targets


class AsBefore:
    """An environment of gymnax 1.0, whose `step` returns one `done` as it did before, which is what rejax expects."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment

    def __getattr__(self, name: str) -> Any:
        if name == "environment":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.environment, name)

    def step(self, key: Any, state: Any, action: Any, params: Any) -> tuple[Any, ...]:
        """One step, and a reset behind the end of an episode."""
        after = self.environment.step(key, state, action, params)
        observation, state, reward, terminated, truncated, info = after
        return observation, state, reward, terminated | truncated, info


def play(agent: str, environment: str, seed: int, max_steps: int) -> float:
    """Trains an agent, and lets it play 100 fresh episodes; their mean return."""
    import gymnax
    import jax
    import optax
    from flax.training.train_state import TrainState
    from rejax import PPO as Ppo
    from rejax import PQN as Pqn
    from rejax.evaluate import evaluate

    class Right(Pqn):
        calculate_targets = lambda_returns

    kind, settings, rate = {"ppo": (Ppo, PPO, 5e-3), "pqn": (Right, PQN, 5e-4)}[agent]
    made, params = gymnax.make(environment)
    algorithm = kind.create(
        env=AsBefore(made),
        env_params=params,
        total_timesteps=max_steps,
        eval_freq=max_steps,
        skip_initial_evaluation=True,
        **settings,
    )
    algorithm = algorithm.replace(eval_callback=lambda *_: ())

    # rejax clips each number, where the sources of the settings clip the global norm, and has Adam for PQN.
    updates = settings["num_epochs"] * settings["num_minibatches"] * max_steps
    updates //= settings["num_envs"] * settings["num_steps"]
    schedule = optax.linear_schedule(rate, 0.0, updates)
    optimizer = {
        "ppo": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule, eps=1e-5)),
        "pqn": lambda: optax.chain(optax.clip_by_global_norm(10.0), optax.radam(schedule)),
    }[agent]()
    state = algorithm.init_state(jax.random.key(seed))
    names = {"ppo": ("actor_ts", "critic_ts"), "pqn": ("q_ts",)}[agent]
    state = state.replace(
        **{
            name: TrainState.create(apply_fn=(), params=getattr(state, name).params, tx=optimizer)
            for name in names
        }
    )
    state, _ = jax.jit(lambda state: algorithm.train(train_state=state))(state)

    act, key = algorithm.make_act(state), jax.random.key(seed + 1_000_000)
    _, returns = evaluate(act, key, algorithm.env, algorithm.env_params, 100)
    return float(returns.mean())


if __name__ == "__main__":
    who, name, number, steps = sys.argv[1:]
    print(f"RETURN {play(who, name, int(number), int(steps)):.3f}")
