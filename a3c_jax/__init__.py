"""Asynchronous Advantage Actor-Critic (Mnih et al. 2016, arXiv:1602.01783) in functional JAX.

A worker is a pure function; asynchrony is a thin shell around it. The package has three layers.

**The algorithm**, pure functions. To understand A3C read `losses`, `rollout`, `networks`, `algorithm`, `worker` and
`optimizers`, in this order. All modules, each of which imports only from those above it:

| module                | what lives there                                                              |
|-----------------------|-------------------------------------------------------------------------------|
| `array_checks`        | what losses demand of their arrays: shapes, dtypes, masks                     |
| `losses`              | n-step returns and advantages; actor, critic and entropy losses               |
| `distributions`       | one or several categoricals, and the diagonal Gaussian                        |
| `value_losses`        | one-step Q-learning and Sarsa, n-step Q-learning                              |
| `rules`               | what each field of the configuration must be                                  |
| `config`              | `A3CConfig`, checked when it is made                                          |
| `names`               | names with parameters, as in `Catch-bsuite?rows=5`                            |
| `normalization`       | running mean and variance of observations and rewards                         |
| `protocol`            | what an environment is to the rest of the package                             |
| `cells`               | recurrent cells: LSTM and GRU                                                 |
| `torsos`              | the first layers of a network: dense, or convolutional for MinAtar and Atari  |
| `networks`            | `ActorCritic`: torso, recurrent core, heads                                   |
| `action_values`       | a network that gives the value of every action; epsilon-greedy                |
| `spaces`              | spaces of observations and actions in this package's terms                    |
| `gymnax_environment`  | an environment of gymnax, side by side                                        |
| `autoreset`           | Gymnasium's vector environments, however their episodes begin anew            |
| `host_state`          | where the environments of a worker stand, if they are on the host             |
| `host_environment`    | an environment of Gymnasium, stepped from Python                              |
| `gymnasium_environments` | environments of Gymnasium and Atari by name                                |
| `environments`        | `make(name)`: environments of gymnax and your own                             |
| `rollout`             | the n-step unroll, `Trajectory`, the episodes that ended                      |
| `algorithm`           | what a worker does: `Algorithm`, and A3C as one                               |
| `q_learning`          | the paper's other three methods                                               |
| `algorithms`          | algorithms by name                                                            |
| `worker`              | `worker_step`: unroll, loss, gradients                                        |
| `over_leaves`         | compiled functions of trees that hold large arrays                            |
| `host_segment`        | a segment in environments on the host, while it is played                     |
| `host_worker`         | the worker's step in environments on the host                                 |
| `optimizers`          | optimizers by name, and one update as a pure function                         |
| `gymnax_checks`       | environments of your own in gymnax's form that cannot be played, refused      |
| `reset_check`         | whether an environment begins anew when an episode has ended                  |
| `network_checks`      | networks that do not fit their environment, refused                           |
| `checks`              | set-ups that would train without learning, refused                            |
| `own_checks`          | algorithms, losses, optimizers of your own that cannot work, refused          |
| `blueprint`           | what a configuration describes, as pure functions                             |

**The asynchrony**, `a3c_jax.asynchrony`: the store, the worker threads, training, replay, simulation,
checkpoints. It takes a worker step as an opaque function.

**The machine room**, `a3c_jax._compiled`: everything that exists only for speed on a CPU, entered only through
`_compiled.compile` and a few functions beside it. Nothing of it is needed to understand the rest, and all
of it can be switched off.

A module imports only from those above it; a test reads the imports and holds the tables to that. The
names below are imported when they are first used, so that `import a3c_jax.losses` loads JAX and little more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a3c_jax.asynchrony.checkpoint_files import Checkpoint, CheckpointError, load_checkpoint
    from a3c_jax.asynchrony.checkpoints import CheckpointFolder, find_checkpoint
    from a3c_jax.asynchrony.evaluation import (
        evaluate,
        greedy_policy,
        random_policy,
        sampled_policy,
    )
    from a3c_jax.asynchrony.json_lines import JsonLines
    from a3c_jax.asynchrony.loading import LoadedRun, load
    from a3c_jax.asynchrony.metrics import ProgressBar, Sink
    from a3c_jax.asynchrony.parameters import (
        NonFiniteError,
        SharedParameters,
        Snapshot,
    )
    from a3c_jax.asynchrony.program import Program, build
    from a3c_jax.asynchrony.ray_cluster import RayOptions
    from a3c_jax.asynchrony.records import EpisodeLog, Schedule
    from a3c_jax.asynchrony.replaying import replay
    from a3c_jax.asynchrony.reporting import SinkError
    from a3c_jax.asynchrony.result import TrainResult
    from a3c_jax.asynchrony.schedules import (
        fixed_delay,
        random_delays,
        round_robin,
        straggler,
    )
    from a3c_jax.asynchrony.simulation import make_simulation
    from a3c_jax.asynchrony.simulation_result import SimulationResult
    from a3c_jax.asynchrony.sinks import TensorBoard, Trackio, WeightsAndBiases
    from a3c_jax.asynchrony.threads import WorkerError, WorkerThreads
    from a3c_jax.asynchrony.training import TrainingInterrupted, train
    from a3c_jax.config import A3CConfig
    from a3c_jax.environments import make
    from a3c_jax.networks import ActorCritic

__version__ = "0.1.0"

_NAMES = {
    "config": ["A3CConfig"],
    "networks": ["ActorCritic"],
    "environments": ["make"],
    "asynchrony.checkpoint_files": ["Checkpoint", "CheckpointError", "load_checkpoint"],
    "asynchrony.checkpoints": ["CheckpointFolder", "find_checkpoint"],
    "asynchrony.evaluation": ["evaluate", "greedy_policy", "random_policy", "sampled_policy"],
    "asynchrony.loading": ["LoadedRun", "load"],
    "asynchrony.json_lines": ["JsonLines"],
    "asynchrony.metrics": ["ProgressBar", "Sink"],
    "asynchrony.parameters": ["NonFiniteError", "SharedParameters", "Snapshot"],
    "asynchrony.program": ["Program", "build"],
    "asynchrony.ray_cluster": ["RayOptions"],
    "asynchrony.replaying": ["replay"],
    "asynchrony.records": ["EpisodeLog", "Schedule"],
    "asynchrony.reporting": ["SinkError"],
    "asynchrony.result": ["TrainResult"],
    "asynchrony.schedules": ["fixed_delay", "random_delays", "round_robin", "straggler"],
    "asynchrony.simulation": ["make_simulation"],
    "asynchrony.simulation_result": ["SimulationResult"],
    "asynchrony.sinks": ["TensorBoard", "Trackio", "WeightsAndBiases"],
    "asynchrony.threads": ["WorkerError", "WorkerThreads"],
    "asynchrony.training": ["TrainingInterrupted", "train"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = [
    "action_values", "algorithm", "algorithms", "array_checks", "asynchrony", "autoreset", "blueprint", "cells", "checks",
    "config", "distributions", "environments", "gymnasium_environments", "gymnax_checks", "gymnax_environment", "host_environment",
    "host_segment", "host_state", "host_worker", "losses", "names", "network_checks", "networks", "normalization",
    "optimizers", "over_leaves", "own_checks", "protocol", "q_learning", "reset_check", "rollout", "rules",
    "spaces", "torsos", "value_losses", "worker",
]  # fmt: skip

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"a3c_jax.{_MODULE_OF[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"a3c_jax.{name}")
    raise AttributeError(f"module 'a3c_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
