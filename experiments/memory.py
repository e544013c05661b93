"""A3C with an LSTM on tasks that need memory: `python -m experiments.memory`.

`chain` shows two bits at the start of an episode and asks for one of them ten steps later. `cartpole` hides the
velocities, so that they must be inferred from what was seen before. `--core None` trains the same network
without the LSTM, for comparison: it stays at chance.
"""

from a3c_jax.config import A3CConfig
from experiments.command_line import main

PRESETS = {
    "chain": A3CConfig(
        environment="MemoryChain-bsuite?memory_length=10&num_bits=2",
        envs_per_worker=16,
        t_max=32,  # two episodes: no gradient reaches what an earlier segment showed
        core="lstm",
        core_size=32,
        forget_bias=3.0,  # a new LSTM remembers about as long as an episode lasts
        entropy_cost=0.3,  # with less, some runs settle early for an answer that is right for most bits
        learning_rate_schedule="linear",
        max_steps=2_000_000,
    ),
    "cartpole": A3CConfig(
        environment="CartPole-positions",
        t_max=16,
        core="lstm",
        core_size=64,
        max_steps=2_000_000,
    ),
}

if __name__ == "__main__":
    main("memory", "Train A3C with an LSTM on a task that needs memory.", PRESETS)
