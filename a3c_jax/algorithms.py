"""Algorithms by name: `a3c`, the paper's other three methods, and your own."""

import functools
import inspect
from typing import Any

from a3c_jax.algorithm import MakeAlgorithm, a3c
from a3c_jax.names import import_named, parse_name
from a3c_jax.q_learning import n_step_q, one_step_q, one_step_sarsa

ALGORITHMS: dict[str, MakeAlgorithm] = {
    "a3c": a3c,
    "one_step_q": one_step_q,
    "one_step_sarsa": one_step_sarsa,
    "n_step_q": n_step_q,
}


def find_algorithm(name: str) -> MakeAlgorithm:
    """Finds an algorithm by its name.

    >>> find_algorithm("n_step_q?target_interval=2000").keywords
    {'target_interval': 2000}

    Args:
      name: a key of `ALGORITHMS`; or `module:function`, of which the module is imported. Arguments of the
        algorithm may follow as in a URL.

    Returns:
      `algorithm(config, environment, network) -> Algorithm`.

    Raises:
      ValueError: if there is no such algorithm, or if it does not take an argument.
    """
    module, base, arguments = parse_name("algorithm", name, "n_step_q?target_interval=2000")
    known: Any = vars(import_named("algorithm", name, module)) if module else ALGORITHMS
    if not callable(known.get(base)):
        what = (
            f"a function of {module}"
            if module
            else f"one of {', '.join(ALGORITHMS)}, or module:function"
        )
        raise ValueError(f"A3CConfig.algorithm must be {what}, got {name!r}; use 'a3c'.")
    if not arguments:
        return known[base]
    signature = inspect.signature(known[base])
    try:
        signature.bind("config", "environment", "network", **arguments)
    except TypeError as error:
        takes = ", ".join([*signature.parameters][3:]) or "none"
        raise ValueError(
            f"A3CConfig.algorithm must give only arguments that the algorithm takes, which are {takes}, got {name!r} "
            f"({error}); correct them."
        ) from None
    return functools.partial(known[base], **arguments)
