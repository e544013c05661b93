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
    "max_grad_norm": 0.5,
    "agent_kwargs": {"activation": "relu", "hidden_layer_sizes": (64, 64)},
}
"""What purejaxrl chose for MinAtar, in examples/brax_minatar.ipynb."""

PQN: dict[str, Any] = {
    "num_envs": 128,
    "num_steps": 32,
    "num_epochs": 2,
    "num_minibatches": 32,
    "max_grad_norm": 10.0,
    "td_lambda": 0.65,
}
"""What PureJaxQL chose for MinAtar, in config/alg/pqn_minatar.yaml, but for its convolution."""


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
    from rejax import get_algo
    from rejax.evaluate import evaluate

    settings, rate = {"ppo": (PPO, 5e-3), "pqn": (PQN, 5e-4)}[agent]
    updates = settings["num_epochs"] * settings["num_minibatches"] * max_steps
    updates //= settings["num_envs"] * settings["num_steps"]
    made, params = gymnax.make(environment)
    algorithm = (
        get_algo(agent)
        .create(
            env=AsBefore(made),
            env_params=params,
            total_timesteps=max_steps,
            eval_freq=max_steps,
            skip_initial_evaluation=True,
            learning_rate=optax.linear_schedule(rate, 0.0, updates),
            **settings,
        )
        .replace(eval_callback=lambda *_: ())
    )
    state, _ = jax.jit(algorithm.train)(jax.random.key(seed))
    act, key = algorithm.make_act(state), jax.random.key(seed + 1_000_000)
    _, returns = evaluate(act, key, algorithm.env, algorithm.env_params, 100)
    return float(returns.mean())


if __name__ == "__main__":
    who, name, number, steps = sys.argv[1:]
    print(f"RETURN {play(who, name, int(number), int(steps)):.3f}")
