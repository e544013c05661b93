"""`load`: what a run has learnt, ready to act and to be evaluated."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from a3c_jax import _compiled
from a3c_jax.asynchrony.checkpoint_files import Checkpoint
from a3c_jax.asynchrony.checkpoints import find_checkpoint, restore_tree
from a3c_jax.asynchrony.objects import check_objects, name_objects
from a3c_jax.blueprint import make_blueprint
from a3c_jax.config import A3CConfig
from a3c_jax.environments import Environment


class LoadedRun(NamedTuple):
    """What a checkpoint holds, with the environment and the network that belong to it.

    Attributes:
      checkpoint: the checkpoint: schedule, episodes, counters. `train(config, resume=checkpoint)` goes on from it.
      environment: what was played.
      network: what was trained.
      params: the parameters, Flax variables.
      best_params: those at the highest mean return.
      evaluation_key: a random key for evaluation, which no worker has used.
    """

    checkpoint: Checkpoint
    environment: Environment
    network: Any
    params: Any
    best_params: Any
    evaluation_key: jax.Array

    @property
    def config(self) -> A3CConfig:
        """The run's configuration."""
        return self.checkpoint.config


def load(
    path: str | Path, *, environment: Any = None, network: Any = None, algorithm: Any = None
) -> LoadedRun:
    """Loads what a run has learnt.

    >>> import tempfile
    >>> from a3c_jax import A3CConfig, CheckpointFolder, evaluate, greedy_policy, train
    >>> folder = tempfile.mkdtemp()
    >>> _ = train(A3CConfig(max_steps=1_000), checkpoints=CheckpointFolder(folder))
    >>> run = load(folder)
    >>> policy = greedy_policy(run.network)
    >>> len(evaluate(policy, run.params, run.environment, run.evaluation_key, 10).returns)
    10

    Args:
      path: a run folder, a folder of checkpoints, or one checkpoint.
      environment: what the run played, if it was given as an object.
      network: what the run trained, if it was given as an object.
      algorithm: what the run's workers did, if it was given as a function.

    Raises:
      CheckpointError: if there is no checkpoint, if it cannot be read, or if it does not fit the network.
      ValueError: if the run had an environment, a network or an algorithm of its own, and another one or none is given.
    """
    checkpoint = find_checkpoint(path)
    given = {"environment": environment, "network": network, "algorithm": algorithm}
    saved = checkpoint.objects
    check_objects(
        saved and {what: name for what, name in saved.items() if what in given}, name_objects(given)
    )
    blueprint = make_blueprint(checkpoint.config, **given)
    seed = np.uint32(checkpoint.config.seed)
    state = _compiled.compile_for_few_calls(blueprint.start)(seed, np.int32(0))
    like = _compiled.compile_for_few_calls(blueprint.init)(seed, state.observation)

    return LoadedRun(
        checkpoint=checkpoint,
        environment=blueprint.environment,
        network=blueprint.network,
        params=restore_tree("params", checkpoint.params, like),
        best_params=restore_tree("best_params", checkpoint.best_params, like),
        evaluation_key=blueprint.evaluation_key(checkpoint.config.seed),
    )
