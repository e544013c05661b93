"""gymnax without the plotting libraries that it imports: they take most of the time of its import.

gymnax imports `matplotlib.pyplot` and `seaborn` at the top of its modules, and uses them to draw pictures alone.
While gymnax is imported, stand-ins take their places. Afterwards they are gone from `sys.modules`, so that
everybody else imports the real modules. What gymnax's modules hold becomes the real module when it is first used.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

from a3c_jax._compiled import process

_PLOTTING = ("matplotlib.pyplot", "seaborn")


class _StandIn(types.ModuleType):
    """Passes every use on to the real module, which it imports then."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # only the import system asks for these
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.__name__), attribute)


def import_gymnax() -> types.ModuleType:
    """Imports gymnax, whose own imports of plotting libraries get stand-ins if those are not loaded yet.

    At its end no stand-in is left in `sys.modules`, nor as an attribute of a package.
    """
    if not process.switched_off() and "gymnax" not in sys.modules:
        with _without_plotting():
            importlib.import_module("gymnax")
    return importlib.import_module("gymnax")


@contextlib.contextmanager
def _without_plotting() -> Iterator[None]:
    """Imports inside the block get the stand-ins."""
    stand_ins: list[tuple[_StandIn, Any]] = []
    for name in _PLOTTING:
        parent, _, child = name.rpartition(".")
        exists = parent and importlib.util.find_spec(parent) is not None
        package = importlib.import_module(parent) if exists else None
        if name in sys.modules or (parent and package is None):
            continue
        stand_in = sys.modules[name] = _StandIn(name)
        if package is not None:  # `import a.b as c` reads the attribute b of the module a
            setattr(package, child, stand_in)
        stand_ins.append((stand_in, package))
    try:
        yield
    finally:
        for stand_in, package in stand_ins:
            name, child = stand_in.__name__, stand_in.__name__.rpartition(".")[2]
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
            if package is not None and package.__dict__.get(child) is stand_in:
                delattr(package, child)
