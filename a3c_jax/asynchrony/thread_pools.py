"""How many threads XLA and the linear algebra library compute with, on which the last bits of a run depend.

XLA splits large programs over a pool of threads, and the number of pieces decides in which order sums are added. The
pool is made when JAX starts: it has as many threads as the environment variable `PJRT_NPROC` says, or `NPROC`, or as
the process has cores. QR decompositions, with which recurrent networks are initialized, come from the OpenBLAS that
SciPy brings along. It has a pool of its own, of as many threads as the process has cores when SciPy is loaded.

This module imports no JAX, so that a command line can use it before JAX starts.
"""

import ctypes
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from a3c_jax.config import available_cores

XLA, BLAS = "xla_threads", "blas_threads"

_VARIABLES = {XLA: "PJRT_NPROC", BLAS: "OPENBLAS_NUM_THREADS"}
_XLA_THREAD = "tf_XLAEigen"
_OPENBLAS_PREFIXES = ("scipy_openblas", "openblas")


def thread_counts() -> dict[str, str]:
    """The present numbers of threads, as a checkpoint records them; call it when JAX has started.

    Returns:
      `xla_threads`, and `blas_threads` if SciPy's OpenBLAS is loaded.
    """
    counts = {XLA: str(_count_xla_threads() or _xla_threads_by_rule())}
    get_num_threads = _openblas_function("get_num_threads")
    return counts if get_num_threads is None else counts | {BLAS: str(get_num_threads())}


def start_with(versions: Mapping[str, str]) -> None:
    """Makes JAX start with the numbers of threads that a run recorded, whatever the number of cores.

    It does nothing if JAX has started already, or if nothing was recorded.

    Args:
      versions: the run's `Checkpoint.versions`.
    """
    if _count_xla_threads():
        return
    if _is_number(versions.get(XLA)):
        os.environ[_VARIABLES[XLA]] = versions[XLA]
    if _is_number(versions.get(BLAS)):
        importlib.import_module("scipy.linalg")  # loads OpenBLAS
        # Its environment variable cannot ask for more threads than there are cores.
        set_num_threads = _openblas_function("set_num_threads")
        if set_num_threads is not None:
            set_num_threads(int(versions[BLAS]))


def warn_if_different(versions: Mapping[str, str]) -> None:
    """Warns if a run that is to be repeated was made with other numbers of threads than this process has.

    Args:
      versions: the run's `Checkpoint.versions`. What they do not hold is not compared.

    Warns:
      RuntimeWarning: if a number differs.
    """
    now = thread_counts()
    for name, variable in _VARIABLES.items():
        had, has = versions.get(name), now.get(name)
        if had is not None and has is not None and had != has:
            warnings.warn(
                f"the run was made with {name} {had} and this process has {has}, which it cannot change any "
                f"more, so that the last bits may differ; give it as many cores, or set {variable}={had} "
                "before Python starts.",
                RuntimeWarning,
                stacklevel=3,
            )


def _count_xla_threads() -> int:
    """The threads of XLA's pool, by their name; 0 if JAX has not started, or where they cannot be seen."""
    count = 0
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            count += file.read_text().strip() == _XLA_THREAD
        except OSError:  # the thread has ended
            continue
    return count


def _xla_threads_by_rule() -> int:
    """The number that XLA would take if it started now."""
    for variable in ("PJRT_NPROC", "NPROC"):
        if _is_number(os.environ.get(variable)):
            return int(os.environ[variable])
    return available_cores()


def _openblas_function(name: str) -> Callable[..., int] | None:
    """A function of the OpenBLAS that SciPy has loaded; None if there is none, or where that cannot be seen."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for path in sorted({line.split(maxsplit=5)[-1] for line in lines if "openblas" in line}):
        try:
            library: Any = ctypes.CDLL(path)
        except OSError:
            continue
        # NumPy's own OpenBLAS has other names than these, which end in 64_.
        for prefix in _OPENBLAS_PREFIXES:
            if hasattr(library, f"{prefix}_{name}"):
                function: Callable[..., int] = getattr(library, f"{prefix}_{name}")
                return function
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit() and int(value) > 0
