"""Refuses an algorithm, a loss or an optimizer of your own that cannot work, before anything is compiled."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from a3c_jax.algorithm import Algorithm, MakeAlgorithm
from a3c_jax.config import (
    BUILT_IN_OPTIMIZER_FIELDS,
    LOSS_FIELDS,
    OPTIMIZER_FIELDS,
    OPTIMIZERS_READING,
    A3CConfig,
    default_of,
)
from a3c_jax.protocol import kind_of

TAKEN = (
    *("seconds", "environment_steps", "episodes", "updates", "steps_per_second", "mean_return"),
    *("staleness", "max_staleness", "gradient_norm"),
)
"""What every row of metrics has, whatever the loss reports."""


def check_config(config: Any) -> None:
    """Checks that a configuration is one.

    Raises:
      TypeError: if it is not.
    """
    if not isinstance(config, A3CConfig):
        raise TypeError(
            f"config must be an a3c_jax.A3CConfig, got {config!r}; make one, as A3CConfig(max_steps=100_000)."
        )


def checked_algorithm(make_algorithm: Any) -> MakeAlgorithm:
    """The algorithm, checked when it is made; what its loss returns is checked when that is traced.

    Raises:
      TypeError: if it is no function; and when it is made, if it returns no `Algorithm`.
    """
    if not callable(make_algorithm):
        raise TypeError(
            "algorithm must be a function (config, environment, network) -> Algorithm, got "
            f"{make_algorithm!r}; give one like a3c_jax.algorithm.a3c, or name one in A3CConfig(algorithm=...)."
        )

    def make(config: A3CConfig, environment: Any, network: Any) -> Algorithm:
        made = make_algorithm(config, environment, network)
        if not isinstance(made, Algorithm):
            raise TypeError(
                "algorithm must return an a3c_jax.algorithm.Algorithm, got "
                f"{type(made).__name__}; see a3c_jax.algorithm.a3c."
            )
        return made._replace(loss=_with_checked_result(made.loss))

    return make


def check_loss(config: A3CConfig, loss: Any) -> None:
    """Checks a loss beside a configuration; what it returns is checked when it is traced.

    Raises:
      TypeError: if it is no function.
      ValueError: if an option of A3C's loss was set beside it.
    """
    if not callable(loss):
        raise TypeError(
            "loss must be a function (params, apply_fn, trajectory) -> (scalar, metrics), got "
            f"{loss!r}; give one like a3c_jax.losses.a3c_loss."
        )
    _check_defaults(
        config, _loss_fields(config), "loss", "bind it to your loss with functools.partial"
    )


def check_settings(
    config: A3CConfig, names: Collection[str], loss: Any = None, optimizer: Any = None
) -> None:
    """Checks that settings of a simulation have an effect on its loss and its optimizer.

    The value methods check by themselves that no setting is one of A3C's loss.

    Raises:
      ValueError: if one has none.
    """
    for what, given, fields in (
        ("loss", loss, _loss_fields(config)),
        ("optimizer", optimizer, BUILT_IN_OPTIMIZER_FIELDS),
    ):
        unread = [name for name in names if given is not None and name in fields]
        if unread:
            raise ValueError(
                f"A3CConfig.{unread[0]} belongs to the built-in {what} and must not be a setting beside {what}=..., which does "
                "not read it; leave it out."
            )
    for name in names:
        readers = OPTIMIZERS_READING.get(name, (config.optimizer,))
        if config.optimizer not in readers:
            raise ValueError(
                f"A3CConfig.{name} belongs to the optimizer {' and '.join(map(repr, readers))} and must not be a setting beside "
                f"{config.optimizer!r}, which does not read it; leave it out."
            )


def _loss_fields(config: A3CConfig) -> Sequence[str]:
    """The fields that belong to A3C's loss. Normalised rewards are divided by the deviation of discounted returns."""
    return LOSS_FIELDS if config.normalize_rewards else (*LOSS_FIELDS, "discount")


def _with_checked_result(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss; a TypeError when it is traced if it returns no pair of a scalar and a dict of scalars."""

    def checked(*arguments: Any) -> Any:
        result = loss(*arguments)
        is_pair = isinstance(result, tuple) and len(result) == 2
        if not is_pair or not jax.tree_util.all_leaves(result[:1]):
            raise TypeError(
                f"loss must return a pair (scalar, metrics), got {kind_of(result)}; return the scalar first, and then a dict "
                "of metrics, which may be empty."
            )
        value, metrics = result
        if jnp.shape(value) != ():
            raise TypeError(
                f"loss must return a scalar, got shape {list(jnp.shape(value))}; take the mean."
            )
        if not isinstance(metrics, dict) or not all(_is_scalar(x) for x in metrics.values()):
            raise TypeError(
                "the metrics of loss must be a dict of scalars, got "
                f"{jax.tree.map(jnp.shape, metrics)}; take means."
            )
        if taken := [name for name in metrics if name in TAKEN]:
            raise ValueError(
                f"the metrics of loss must not be called {', '.join(TAKEN)}, which a row of metrics has already, got "
                f"{taken[0]!r}; choose another name."
            )
        return result

    return checked


def _is_scalar(value: Any) -> bool:
    return jax.tree_util.all_leaves([value]) and jnp.shape(value) == ()


def checked_optimizer(
    config: A3CConfig, optimizer: Any
) -> Callable[[A3CConfig, Any], optax.GradientTransformation]:
    """The optimizer as a function of configuration and learning rate, which a fixed transformation does not read.

    Raises:
      TypeError: if it is neither an optax transformation nor a function of the learning rate that gives one.
      ValueError: if an option was set.
    """
    is_function = not isinstance(optimizer, optax.GradientTransformation) and callable(optimizer)
    made = optimizer(config.learning_rate) if is_function else optimizer
    if not isinstance(made, optax.GradientTransformation):
        raise TypeError(
            "optimizer must be an optax transformation, or a function that makes one of the learning rate, "
            f"got {made!r}; give optax.adam(1e-3), for instance."
        )
    fields = BUILT_IN_OPTIMIZER_FIELDS if is_function else OPTIMIZER_FIELDS
    _check_defaults(config, fields, "optimizer", "build it into your optimizer")

    def make(config: A3CConfig, learning_rate: Any) -> optax.GradientTransformation:
        if is_function:
            return optimizer(learning_rate)
        # `Program.replace` may have changed it. A simulation traces it.
        if isinstance(config.learning_rate, float):
            _check_defaults(config, ["learning_rate"], "optimizer", "build it into your optimizer")
        return made

    return make


def _check_defaults(config: A3CConfig, fields: Sequence[str], what: str, remedy: str) -> None:
    """Checks that options of the built-in `what` were left alone beside one that was passed in."""
    for field in fields:
        value, default = getattr(config, field), default_of(field)
        if value != default:
            raise ValueError(
                f"A3CConfig.{field} belongs to the built-in {what} and must stay {default!r} beside "
                f"{what}=..., got {value!r}; leave it out, and {remedy}."
            )
