"""Settings of the whole process: whether the machine room is on, and how JAX dispatches its calls on a CPU."""

import os
import sys
import warnings
from typing import Any

import jax

PLAIN = "A3C_JAX_PLAIN"
"""Environment variable: `1` switches the whole machine room off."""

ASYNC_DISPATCH = "A3C_JAX_ASYNC_DISPATCH"
"""Environment variable: `1` keeps JAX's asynchronous dispatch on CPU."""


_inline = False


def calls_are_inline() -> bool:
    """Whether a call's results are there as soon as it returns, because it was computed in the calling thread."""
    return _inline


def switched_off() -> bool:
    """Whether the user has switched the machine room off. Does not start JAX's backend."""
    return os.environ.get(PLAIN) == "1"


def debugging() -> bool:
    """Whether the user looks for a mistake in the functions themselves, by `jax.disable_jit` or `jax_debug_nans`."""
    return any(debugging_settings())


def debugging_settings() -> tuple[bool, bool]:
    """Whether compilation is disabled in this thread, and whether JAX looks for NaNs."""
    settings: Any = jax.config
    return bool(settings.jax_disable_jit), bool(settings.jax_debug_nans)


def enabled() -> bool:
    """Whether programs are made faster than `jax.jit` makes them.

    They are on a CPU, unless `A3C_JAX_PLAIN=1`, or the user is debugging.
    """
    return not switched_off() and not debugging() and jax.default_backend() == "cpu"


def prepare_process() -> None:
    """Makes compiled calls on CPU run in the thread that calls them. Call it before gymnax is imported.

    By default JAX hands each call to a thread pool, which pays if the caller has something else to do
    meanwhile. A worker thread has not, because it waits for its gradients. Running the call in the worker's own
    thread saves two thread switches a call.

    With `A3C_JAX_ASYNC_DISPATCH=1` or `A3C_JAX_PLAIN=1` the process is left as it is.

    Warns:
      RuntimeWarning: if JAX's backend has started already, because the setting cannot take effect any more.
    """
    if switched_off() or os.environ.get(ASYNC_DISPATCH) == "1":
        return
    if _backend_has_started():
        _warn_the_importer(
            "JAX was already initialised when a3c_jax was imported, so its calls on a CPU stay asynchronous, "
            "and A3C with small batches is several times slower. Write `from a3c_jax import train` before the "
            f"first JAX computation (importing gymnax makes one), or set {ASYNC_DISPATCH}=1 to accept this."
        )
        return
    global _inline
    try:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _inline = True
    except AttributeError:  # a version of JAX that has no such setting
        pass


def _warn_the_importer(message: str) -> None:
    """Warns at the line outside this package whose import led here, because only the user can move that line."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "<unknown>")
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        message, RuntimeWarning, frame.f_code.co_filename, frame.f_lineno, module, registry
    )


def _is_ours(module: str) -> bool:
    """Whether a module is part of this package, or of the import system between it and the user."""
    return module.partition(".")[0] in ("a3c_jax", "importlib")


def _backend_has_started() -> bool:
    """Whether JAX has started its backend. JAX has no public way to ask; if the private one is gone, no."""
    try:
        from jax._src import xla_bridge

        return bool(xla_bridge.backends_are_initialized())
    except (ImportError, AttributeError):
        return False
