"""The layers: modules import only from those above them in the package docstring's table."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import a3c_jax

PACKAGE = Path(a3c_jax.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
TABLE = re.findall(r"^\| `(\w+)` +\|", a3c_jax.__doc__, re.MULTILINE)


def imports(module):
    """All names that the module imports, wherever in the file, as dotted paths."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "a3c_jax." if node.level else ""
            source = prefix + (node.module or "")
            yield from (f"{source.rstrip('.')}.{alias.name}" for alias in node.names)


def imports_of_the_package(module):
    """The modules of this package that it imports; "" stands for the package itself."""
    parts = (name.split(".") for name in imports(module))
    return {next(iter(p[1:]), "") for p in parts if p[0] == "a3c_jax"} - {"__version__"}


def imports_of_others(module):
    return {name.split(".")[0] for name in imports(module)} - {"a3c_jax"}


def in_a_fresh_process(code):
    """Runs code that prints nothing where all is well."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_table_names_every_module_once_and_no_other():
    assert len(TABLE) > 10
    assert sorted(TABLE) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_above_it_in_the_table(module):
    above = set(TABLE[: TABLE.index(module)])
    assert imports_of_the_package(module) <= above


@pytest.mark.parametrize("module", ["losses", "distributions", "config"])
def test_the_lowest_modules_import_nothing_of_the_package(module):
    assert imports_of_the_package(module) == set()


def test_threads_know_nothing_of_environments_networks_or_losses():
    assert imports_of_the_package("threads") == {"parameters"}
    assert imports_of_others("threads") <= sys.stdlib_module_names


def test_losses_need_no_more_than_jax_and_chex():
    assert imports_of_others("losses") <= {"jax", "chex", "collections", "typing"}


def test_importing_the_losses_loads_jax_and_nothing_more_and_leaves_the_process_alone():
    code = """
import os, sys
before = dict(os.environ)
import jax
from jax._src import xla_bridge
asynchronous = jax.config.values["jax_cpu_enable_async_dispatch"]
import a3c_jax.losses
assert dict(os.environ) == before, "the environment variables were changed"
assert jax.config.values["jax_cpu_enable_async_dispatch"] == asynchronous, "JAX was configured"
heavy = {"gymnax", "gymnasium", "flax", "optax", "matplotlib", "tqdm"} & set(sys.modules)
assert not heavy, f"loaded {sorted(heavy)}"
assert not xla_bridge._backends, "the backend was started"
"""
    assert in_a_fresh_process(code) == ""


def test_importing_the_package_alone_loads_none_of_its_modules_but_lists_their_names():
    code = """
import sys
import a3c_jax
assert "jax" not in sys.modules
assert set(a3c_jax.__all__) <= set(dir(a3c_jax))
"""
    assert in_a_fresh_process(code) == ""


@pytest.mark.parametrize("name", a3c_jax.__all__)
def test_every_public_name_can_be_had_from_the_package(name):
    value = getattr(a3c_jax, name)
    assert value.__name__ == name
    assert value.__module__.startswith("a3c_jax.")


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'a3c_jax' has no attribute 'nonsense'"):
        _ = a3c_jax.nonsense
