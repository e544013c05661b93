"""What a configuration describes, with its first parameters and states, for the tests of pure functions."""

from typing import Any, NamedTuple

import numpy as np

from a3c_jax import _compiled
from a3c_jax.blueprint import Blueprint, make_blueprint


class Initial(NamedTuple):
    """A blueprint, its initial parameters, and the initial state of each worker."""

    blueprint: Blueprint
    params: Any
    states: list[Any]


def initialize(config, *, environment=None, network=None):
    blueprint = make_blueprint(config, environment=environment, network=network)
    start = _compiled.compile_for_few_calls(blueprint.start)
    init = _compiled.compile_for_few_calls(blueprint.init)
    seed = np.uint32(config.seed)
    states = [start(seed, np.int32(worker)) for worker in range(config.num_workers)]
    return Initial(blueprint, init(seed, states[0].observation), states)
