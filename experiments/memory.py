"""A3C with a recurrent core, where a policy without memory stays at chance: `python -m experiments.memory`.

`--core None` trains the same without the core, to see that it does.
"""

from a3c_jax.config import A3CConfig
from experiments.runner import main

PRESETS = {
    "chain": A3CConfig(
        environment="MemoryChain-bsuite?memory_length=10&num_bits=2",
        envs_per_worker=16,
        t_max=32,  # no gradient reaches what an earlier segment showed, so that two episodes should fit in
        core="lstm",
        core_size=32,
        forget_bias=3.0,
        entropy_cost=0.3,  # with less, some runs are soon sure of an answer that is right for most bits only
        learning_rate_schedule="linear",
        max_steps=2_000_000,
    ),
    "cartpole": A3CConfig(
        environment="CartPole-positions",  # the velocities are hidden
        t_max=16,
        core="lstm",
        core_size=64,
        max_steps=2_000_000,
    ),
}

if __name__ == "__main__":
    main("memory", "Train A3C with an LSTM on a task that needs memory.", PRESETS)
