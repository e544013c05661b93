"""The process settings: set before JAX starts, only where the user has not, and said where too late."""

import json
import os
import subprocess
import sys

import pytest


def python(program, **environment):
    """Runs a program in a fresh process and reads the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


DISPATCH = """
import json, jax
from jax._src import xla_bridge
print(json.dumps(bool(xla_bridge._CPU_ENABLE_ASYNC_DISPATCH.value)))
"""


def test_environments_turn_asynchronous_dispatch_off_before_the_backend_starts():
    enabled, errors = python("import a3c_jax.environments" + DISPATCH)
    assert not enabled
    assert "RuntimeWarning" not in errors


def test_the_user_may_keep_asynchronous_dispatch():
    enabled, errors = python("import a3c_jax.environments" + DISPATCH, A3C_JAX_ASYNC_DISPATCH="1")
    assert enabled
    assert "RuntimeWarning" not in errors


def test_losses_leave_the_process_alone():
    enabled, _ = python("import a3c_jax.losses" + DISPATCH)
    assert enabled


def test_it_warns_where_jax_has_started_already():
    program = "import jax.numpy as jnp; jnp.zeros(1) + 1\nimport a3c_jax.environments" + DISPATCH
    enabled, errors = python(program)
    assert enabled
    assert "JAX was already initialised when a3c_jax was imported" in errors


@pytest.mark.parametrize("used", ["matplotlib.pyplot.figure()", "seaborn.color_palette()"])
def test_plotting_libraries_load_only_when_they_are_used_and_then_work(used):
    loaded = "'seaborn.utils' in sys.modules, 'matplotlib.axes' in sys.modules"
    before_and_after, _ = python(
        "import json, sys\n"
        "import a3c_jax.environments\n"
        f"before = [{loaded}]\n"
        "import matplotlib.pyplot, seaborn\n"
        f"{used}\n"
        f"print(json.dumps([before, [{loaded}]]))",
        MPLBACKEND="Agg",
    )
    before, after = before_and_after
    assert before == [False, False]
    assert any(after)


def test_a_missing_module_says_so_when_it_is_used_and_a_loaded_one_is_left_alone():
    (kind, loaded), _ = python(
        "import json, sys, string\n"
        "from a3c_jax import runtime\n"
        "runtime.defer_import('no_such_module'); runtime.defer_import('string')\n"
        "import no_such_module\n"
        "try: no_such_module.anything\n"
        "except ModuleNotFoundError as error: kind = error.name\n"
        "print(json.dumps([kind, sys.modules['string'] is string]))"
    )
    assert kind == "no_such_module"
    assert loaded
