"""Other libraries' agents, for `experiments.measurements.host_peers`, which runs this file with their own Python.

It imports nothing of this project: `python peer_agents.py sb3 LunarLander-v3 16 5 10` prints environment steps per second.
"""

import multiprocessing
import sys
import tempfile
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")


def stable_baselines3(environment: str, num_envs: int, t_max: int, seconds: float) -> float:
    """Steps per second of Stable-Baselines3's A2C with an MLP and its vector of environments in one process."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return time.perf_counter() - began < seconds

    agent = A2C(
        "MlpPolicy", make_vec_env(environment, n_envs=num_envs), n_steps=t_max, device="cpu"
    )
    agent.learn(4 * num_envs * t_max)
    began = time.perf_counter()
    agent.learn(10**9, callback=Stop(), reset_num_timesteps=True)
    return agent.num_timesteps / (time.perf_counter() - began)


def pfrl_a3c(game: str, num_processes: int, t_max: int, seconds: float) -> float:
    """Agent steps per second of PFRL's A3C on an Atari game: its example's network, one environment for each process."""
    import numpy as np
    import pfrl
    import torch
    from ale_py.vector_env import AtariVectorEnv
    from pfrl.agents import a3c
    from pfrl.optimizers import SharedRMSpropEpsInsideSqrt
    from pfrl.policies import SoftmaxCategoricalHead
    from torch import nn

    class Game:
        """One game with the interface that PFRL expects."""

        def __init__(self) -> None:
            self.env = AtariVectorEnv(game, 1, num_threads=1)

        def reset(self) -> np.ndarray:
            return self.env.reset()[0][0]

        def step(self, action: int) -> tuple:
            observation, reward, terminated, truncated, _ = self.env.step(np.array([action]))
            return (
                observation[0],
                float(reward[0]),
                bool(terminated[0]),
                {"needs_reset": truncated[0]},
            )

        def close(self) -> None:
            self.env.close()

    num_actions = int(Game().env.single_action_space.n)  # type: ignore[attr-defined]
    model = nn.Sequential(
        nn.Conv2d(4, 16, 8, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(2592, 256), nn.ReLU(),
        pfrl.nn.Branched(nn.Sequential(nn.Linear(256, num_actions), SoftmaxCategoricalHead()), nn.Linear(256, 1)),
    )  # fmt: skip
    optimizer = SharedRMSpropEpsInsideSqrt(model.parameters(), lr=7e-4, eps=1e-1, alpha=0.99)
    agent = a3c.A3C(
        model, optimizer, t_max=t_max, gamma=0.99, beta=1e-2, max_grad_norm=40.0,
        phi=lambda x: np.asarray(x, dtype=np.float32) / 255,
    )  # fmt: skip
    # Like ours, the clock runs while all processes play.
    began, ended = multiprocessing.Value("d", 0.0), multiprocessing.Value("d", 0.0)
    played, enough = multiprocessing.Value("q", 0), multiprocessing.Event()
    first = 100 * num_processes

    def count(env: Any, agent: Any, step: int) -> None:
        with played.get_lock():
            now = time.perf_counter()
            if step < first:
                began.value = now
            elif not enough.is_set():
                played.value, ended.value = played.value + 1, now
                if now > began.value + seconds:
                    enough.set()

    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        pfrl.experiments.train_agent_async(
            agent=agent, outdir=folder, processes=num_processes, make_env=lambda *_, **__: Game(), profile=False,
            steps=10**9, eval_interval=None, random_seeds=list(range(num_processes)), global_step_hooks=[count],
            stop_event=enough,
        )  # fmt: skip
    return float(played.value / (ended.value - began.value))


if __name__ == "__main__":
    who, name, number, length, duration = sys.argv[1:]
    agents = {"sb3": stable_baselines3, "pfrl": pfrl_a3c}
    print(f"STEPS_PER_SECOND {agents[who](name, int(number), int(length), float(duration)):.1f}")
