"""Asynchronous Advantage Actor-Critic (Mnih et al. 2016, arXiv:1602.01783) in functional JAX.

A worker is a pure function; asynchrony is a thin shell around it. Each module imports only from those
above it (a test reads the imports and holds this table to it):

| module          | what lives there                                                                |
|-----------------|---------------------------------------------------------------------------------|
| `losses`        | pure functions: n-step returns and advantages, actor, critic and entropy losses |
| `distributions` | categorical and diagonal Gaussian                                               |
| `config`        | `A3CConfig`, checked when it is made                                            |
| `runtime`       | process settings for CPU, set before JAX starts                                 |
| `packing`       | trees of small arrays as one vector, bit for bit                                |
| `columns`       | vectors that grow at the end: the schedule, the log of episodes                 |
| `moments`       | running mean and variance, to normalise by, shared by all workers               |
| `kernels`       | compiling a small program into a single kernel                                  |
| `networks`      | Flax modules: torsos, heads, actor-critic                                       |
| `environments`  | `make(name)`: one batched protocol over gymnax                                  |
| `rollout`       | the n-step unroll, `Trajectory`, episode statistics                             |
| `worker`        | `worker_step`: unroll, loss and gradients                                       |
| `parameters`    | `SharedParameters`: lock, optimizer, version, schedule of updates               |
| `threads`       | the worker threads over an opaque step function                                 |
| `agent`         | what a configuration describes, built                                           |
| `evaluation`    | whole episodes by a fixed policy                                                |
| `metrics`       | exact counters, the log of episodes, sinks                                      |
| `checkpoints`   | one consistent cut of a whole run in one file, atomically written               |
| `simulation`    | any schedule of updates as one compiled program, without threads                |
| `training`      | `train(config)`: wires the above together; `replay`: does a run again           |

The names below are imported when first used, so that `import a3c_jax.losses` in a notebook loads JAX and
nothing more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a3c_jax.checkpoints import CheckpointError, CheckpointFolder
    from a3c_jax.config import A3CConfig
    from a3c_jax.environments import make
    from a3c_jax.evaluation import evaluate, greedy_policy, random_policy, sampled_policy
    from a3c_jax.networks import ActorCritic
    from a3c_jax.parameters import NonFiniteError, Schedule, SharedParameters, Snapshot
    from a3c_jax.simulation import (
        SimulationResult,
        fixed_delay,
        make_simulation,
        random_delays,
        round_robin,
        straggler,
    )
    from a3c_jax.threads import WorkerError
    from a3c_jax.training import TrainingInterrupted, TrainResult, replay, train

__version__ = "0.1.0"

__all__ = [
    "A3CConfig",
    "ActorCritic",
    "CheckpointError",
    "CheckpointFolder",
    "NonFiniteError",
    "Schedule",
    "SharedParameters",
    "SimulationResult",
    "Snapshot",
    "TrainResult",
    "TrainingInterrupted",
    "WorkerError",
    "evaluate",
    "fixed_delay",
    "greedy_policy",
    "make",
    "make_simulation",
    "random_delays",
    "random_policy",
    "replay",
    "round_robin",
    "sampled_policy",
    "straggler",
    "train",
]

_HOME = {
    "A3CConfig": "config",
    "ActorCritic": "networks",
    "CheckpointError": "checkpoints",
    "CheckpointFolder": "checkpoints",
    "NonFiniteError": "parameters",
    "Schedule": "parameters",
    "SharedParameters": "parameters",
    "SimulationResult": "simulation",
    "Snapshot": "parameters",
    "TrainResult": "training",
    "TrainingInterrupted": "training",
    "WorkerError": "threads",
    "evaluate": "evaluation",
    "fixed_delay": "simulation",
    "greedy_policy": "evaluation",
    "make": "environments",
    "make_simulation": "simulation",
    "random_delays": "simulation",
    "random_policy": "evaluation",
    "replay": "training",
    "round_robin": "simulation",
    "sampled_policy": "evaluation",
    "straggler": "simulation",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"a3c_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'a3c_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
