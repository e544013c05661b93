"""The process settings that make JAX fast on CPU: set in this one place, and only where the user has not.

Importing `a3c_jax.losses`, `distributions` or `config` leaves the process alone. Importing
`a3c_jax.environments`, and so everything that plays, calls `configure`, since gymnax itself starts
JAX's backend when it is imported and the settings must come first.
"""

import importlib
import os
import sys
import types
import warnings
from typing import Any

import jax
from jax._src import xla_bridge

ASYNC_DISPATCH = "A3C_JAX_ASYNC_DISPATCH"
"""Environment variable: `1` keeps JAX's asynchronous dispatch on CPU."""


def configure() -> None:
    """Makes compiled calls on CPU run in the thread that calls them.

    By default JAX hands each call to a thread pool: worth it where the host has something else to do
    meanwhile. A worker thread has not: it waits for its gradients. Running inline spares two thread
    switches a call.

    Warns:
      RuntimeWarning: where JAX's backend has started already, so that the setting cannot take effect.
    """
    if os.environ.get(ASYNC_DISPATCH) == "1":
        return
    if xla_bridge.backends_are_initialized():
        warnings.warn(
            "JAX was already initialised when a3c_jax was imported, so that its CPU calls stay "
            "asynchronous and A3C runs several times slower with small batches; import a3c_jax before "
            f"the first JAX computation, or set {ASYNC_DISPATCH}=1 to accept this.",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)


class _Deferred(types.ModuleType):
    """Stands for a module until something in it is used."""

    def __getattr__(self, attribute: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, attribute)


def defer_import(name: str) -> None:
    """Makes `import name` take no time: the module loads when something in it is first used.

    gymnax imports matplotlib.pyplot and seaborn for its renderings alone, which is more than half of the
    time that its own import takes. A module that is loaded already is left as it is.
    """
    if name in sys.modules:
        return
    parent, _, child = name.rpartition(".")
    module = sys.modules[name] = _Deferred(name)
    if parent:
        setattr(importlib.import_module(parent), child, module)  # as importing the child does
