"""Shared set-up: what the tests compile is kept for the next test and the next session, until `--cache-clear`."""

import gc
import os
import signal
import sys

import pytest

# A shell ignores Ctrl-C in what it runs in the background, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Says where JAX keeps what it compiles, before JAX is imported, and how it runs on a CPU, before a test starts it.

    The processes that run tests, and those that tests start, inherit the folder of the first one, or the one that
    is given.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

    # Each process comes to hold gigabytes of compiled programs, which the garbage collector would go over and over again.
    gc.set_threshold(100_000, 50, 100)

    import a3c_jax.environments  # noqa: F401


@pytest.fixture
def switching_often():
    """Lets threads take turns after every few bytecodes, so that what is not safe between them shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
