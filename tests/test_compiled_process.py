"""The process settings and gymnax's import: set before JAX starts, only where the user has not, nothing replaced."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1", reason="the machine room is switched off"
)


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


PREPARE = "from a3c_jax import _compiled\n_compiled.prepare_process()\n"
IS_ASYNCHRONOUS = """
import json, jax
print(json.dumps(bool(jax.config.values["jax_cpu_enable_async_dispatch"])))
"""


def test_asynchronous_dispatch_is_turned_off_before_the_backend_starts():
    is_asynchronous, errors = python(PREPARE + IS_ASYNCHRONOUS)
    assert not is_asynchronous
    assert "RuntimeWarning" not in errors


@pytest.mark.parametrize("variable", ["A3C_JAX_ASYNC_DISPATCH", "A3C_JAX_PLAIN"])
def test_the_user_may_keep_asynchronous_dispatch(variable):
    is_asynchronous, errors = python(PREPARE + IS_ASYNCHRONOUS, **{variable: "1"})
    assert is_asynchronous
    assert "RuntimeWarning" not in errors


def test_it_warns_if_jax_has_started_already():
    program = "import jax.numpy as jnp; jnp.zeros(1) + 1\n" + PREPARE + IS_ASYNCHRONOUS
    is_asynchronous, errors = python(program)
    assert is_asynchronous
    assert "JAX was already initialised when a3c_jax was imported" in errors


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("import a3c_jax.environments", marks=pytest.mark.slow),
        pytest.param("from a3c_jax import train", marks=pytest.mark.slow),
        "import a3c_jax; a3c_jax.make",
    ],
)
def test_the_warning_names_the_users_own_line(line, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(f"import jax.numpy as jnp\njnp.zeros(1) + 1\n\n{line}\n")
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0
    assert "mine.py:4: RuntimeWarning: JAX was already initialised" in done.stderr


@pytest.mark.parametrize(
    "gone", ["the module", pytest.param("its function", marks=pytest.mark.slow)]
)
def test_it_works_without_the_private_module_that_knows_whether_jax_has_started(gone):
    take_away = {
        "the module": "sys.modules['jax._src.xla_bridge'] = None; del jax._src.xla_bridge",
        "its function": "del jax._src.xla_bridge.backends_are_initialized",
    }[gone]
    program = (
        "import sys, jax\nimport jax._src.xla_bridge\nfrom a3c_jax import _compiled\n"
        f"{take_away}\n_compiled.prepare_process()\n" + IS_ASYNCHRONOUS
    )
    is_asynchronous, errors = python(program)
    assert not is_asynchronous
    assert "RuntimeWarning" not in errors


@pytest.mark.parametrize("variables", [{}, {"A3C_JAX_ASYNC_DISPATCH": "1"}])
def test_results_are_there_when_a_call_returns(variables):
    program = (
        PREPARE + "import json, jax, jax.numpy as jnp\n"
        "step = lambda x, n: (x @ x, {'a': x @ (x + n), 'b': n})\n"
        "x, n = jnp.ones((700, 700)) / 700, jnp.int32(1)\n"
        "compiled = _compiled.compile(step, x, n, single_kernel=False)\n"
        'results = [[getattr(y, "vector", y) for y in compiled(x, n)] for _ in range(5)]\n'
        "print(json.dumps(all(x.is_ready() for x in jax.tree.leaves(results))))"
    )
    assert python(program, **variables)[0]


IMPORT = "import json, sys\n" + PREPARE + "_compiled.import_gymnax()\n"
LOADED = "'seaborn.utils' in sys.modules, 'matplotlib.axes' in sys.modules"
IS_REAL = (
    "import matplotlib, matplotlib.pyplot as plt, seaborn\n"
    "real = [bool(m.__spec__ and m.__file__) for m in (plt, matplotlib.pyplot, seaborn)]\n"
)


def test_gymnax_loads_no_plotting_library_and_leaves_no_stand_in():
    left, _ = python(
        IMPORT + "import matplotlib\n"
        "left = [n for n in ('matplotlib.pyplot', 'seaborn') if n in sys.modules]\n"
        f"print(json.dumps([left, hasattr(matplotlib, 'pyplot'), {LOADED}]))",
        MPLBACKEND="Agg",
    )
    assert left == [[], False, False, False]


@pytest.mark.slow
def test_the_users_own_import_afterwards_gives_the_real_modules():
    real, _ = python(IMPORT + IS_REAL + "plt.figure()\nprint(json.dumps(real))", MPLBACKEND="Agg")
    assert real == [True, True, True]


def test_the_users_own_import_before_is_what_gymnax_gets():
    same, _ = python(
        "import matplotlib.pyplot as mine, seaborn as theirs\n"
        + IMPORT
        + IS_REAL
        + "from gymnax.environments.misc import pong\n"
        "print(json.dumps([plt is mine, pong.plt is mine, pong.sns is theirs]))",
        MPLBACKEND="Agg",
    )
    assert same == [True, True, True]


@pytest.mark.slow
def test_gymnax_still_draws():
    drawn, _ = python(
        IMPORT + "import gymnax, jax\n"
        "env, params = gymnax.make('Pong-misc')\n"
        "before = 'matplotlib.axes' in sys.modules\n"
        "_, state = env.reset(jax.random.key(0), params)\n"
        "figure = env.render(state, params)\n"
        "print(json.dumps([before, 'matplotlib.axes' in sys.modules]))",
        MPLBACKEND="Agg",
    )
    assert drawn == [False, True]


@pytest.mark.slow
def test_switched_off_gymnax_is_imported_as_it_is():
    kinds, _ = python(
        IMPORT + "from gymnax.environments.misc import pong\n"
        "import matplotlib.pyplot as plt\n"
        "print(json.dumps(pong.plt is plt))",
        MPLBACKEND="Agg",
        A3C_JAX_PLAIN="1",
    )
    assert kinds
