"""Shared set-up: programs that several tests compile are compiled once for the session."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="a3c-jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name  # also read by the processes that tests start
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import a3c_jax.environments  # noqa: E402, F401  (sets how JAX runs on CPU before a test starts it)
