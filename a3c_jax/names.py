"""Names with parameters, as the configuration holds them: `CartPole-v1`, `Catch-bsuite?rows=5`, `my.module:id`."""

import ast
import importlib
import urllib.parse
from typing import Any, NamedTuple


class Name(NamedTuple):
    """A name in its parts.

    Attributes:
      module: what to import before the name is known; empty if nothing.
      base: the name itself.
      params: the parameters, as Python's numbers, booleans and tuples.
    """

    module: str
    base: str
    params: dict[str, Any]


def parse_name(what: str, name: str, example: str) -> Name:
    """Takes a name apart.

    >>> parse_name("environment", "my.tasks:Maze?size=5", "CartPole-v1")
    Name(module='my.tasks', base='Maze', params={'size': 5})

    Args:
      what: what it is a name of, for the error message.
      name: `[module:]base[?parameter=value&...]`.
      example: a name with parameters, for the error message.

    Raises:
      ValueError: if the parameters are no Python literals, or if one is given twice.
    """
    base, _, query = str(name).partition("?")
    module, _, base = base.rpartition(":")
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True) if query else []
        params = {key: ast.literal_eval(value) for key, value in pairs}
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"the parameters of {what} {name!r} must be numbers, or words in quotes, as in {example!r}, got "
            f"{query!r}; correct it."
        ) from error
    if len(params) < len(pairs):
        raise ValueError(
            f"each parameter of {what} {name!r} must be given once, got {query!r}; leave one of them out."
        )
    return Name(module, base, params)


def import_named(what: str, name: str, module: str) -> Any:
    """Imports the module that a name begins with.

    Raises:
      ValueError: if it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} {name!r} names the module {module!r}, which cannot be imported ({error}); "
            "start Python in its folder, or install it."
        ) from error
