"""Shared set-up: programs that several tests compile are compiled once for the session."""

import os
import signal
import sys
import tempfile

# The processes that run tests, and those that tests start, inherit the folder of the first one, or the one that is given.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="a3c-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# A shell ignores Ctrl-C in what it runs in the background, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

import a3c_jax.environments  # noqa: E402, F401  (sets how JAX runs on CPU before a test starts it)


@pytest.fixture
def switching_often():
    """Lets threads take turns after every few bytecodes, so that what is not safe between them shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
