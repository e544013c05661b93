"""The objects that a run was given, by name: code is not saved, so it has to be handed over again."""

import functools
from collections.abc import Mapping
from typing import Any


def name_objects(objects: Mapping[str, Any]) -> dict[str, str]:
    """The names of the classes or functions of all objects that are not None.

    >>> name_objects({"loss": functools.partial(print, end=""), "network": None})
    {'loss': 'builtins.print'}
    """
    return {what: _name(value) for what, value in objects.items() if value is not None}


def check_objects(saved: Mapping[str, str] | None, given: Mapping[str, str]) -> None:
    """Checks that a run gets the objects again that it had.

    Args:
      saved: the names that the checkpoint holds; None, of an older checkpoint, passes.
      given: the names of those handed over now.

    Raises:
      ValueError: if one is missing, is one too many, or has another name.
    """
    if saved is None:
        return
    for what in [*saved, *given]:
        before, now = saved.get(what), given.get(what)
        if before != now:
            raise ValueError(
                f"{what} must be {before or 'left out'}, as in the run of the checkpoint, got {now or 'none'}; "
                "hand over what the run had."
            )


def _name(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "nnx_class", value)  # what nnx.bridge.to_linen has wrapped
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
