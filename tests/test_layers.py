"""The storeys: what a module may import, how long a file and a function may be, and what an import loads."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import a3c_jax
import a3c_jax.asynchrony
from a3c_jax import _compiled

PACKAGE = Path(a3c_jax.__file__).parent


def table(module):
    return re.findall(r"^\| `(\w+)` +\|", module.__doc__, re.MULTILINE)


def files(folder):
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


ALGORITHM = table(a3c_jax)
ASYNCHRONY = table(a3c_jax.asynchrony)
MACHINE_ROOM = "_compiled"
MODULES = [f"a3c_jax.{name}" for name in ALGORITHM]
MODULES += [f"a3c_jax.asynchrony.{name}" for name in ASYNCHRONY]
SOURCES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def source_of(module):
    """A module's file, by its full name."""
    return PACKAGE / (module.removeprefix("a3c_jax.").replace(".", "/") + ".py")


def imports(path, is_guarded=None):
    """All names that a file imports, wherever in it, as dotted paths.

    Args:
      path: the file.
      is_guarded: if it is a bool, only imports that are, or are not, in a `try` that catches ImportError.
    """

    def visit(node, guarded):
        if isinstance(node, ast.Try) and any(catches_import_error(h) for h in node.handlers):
            for child in node.body:
                yield from visit(child, True)
            for child in [*node.handlers, *node.orelse, *node.finalbody]:
                yield from visit(child, guarded)
            return
        if is_guarded is None or is_guarded == guarded:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, "a relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, guarded)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def catches_import_error(handler):
    names = (
        {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else set()
    )
    return handler.type is None or bool(names & {"ImportError", "Exception"})


def imports_of_the_package(module):
    """The modules of this package that a module imports, as in `asynchrony.threads`."""
    found = set()
    for name in imports(source_of(module)):
        first, *rest = name.split(".")
        if first != "a3c_jax" or rest == ["__version__"]:
            continue
        depth = 2 if rest[0] in ("asynchrony", MACHINE_ROOM) else 1
        found.add(".".join(rest[:depth]))
    return found


def imports_of_others(module):
    return {name.split(".")[0] for name in imports(source_of(module))} - {"a3c_jax"}


def in_a_fresh_process(code):
    """Runs code that prints nothing if all is well."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# The tables


def test_the_tables_name_every_module_once_and_no_other():
    assert len(ALGORITHM) > 10 and len(ASYNCHRONY) > 10
    assert sorted(ALGORITHM) == files(PACKAGE)
    assert sorted(ASYNCHRONY) == files(PACKAGE / "asynchrony")
    folders = {path.parent for path in SOURCES.values()}
    assert folders == {PACKAGE, PACKAGE / "asynchrony", PACKAGE / MACHINE_ROOM}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_above_it(module):
    names = [name.removeprefix("a3c_jax.") for name in MODULES]
    above = names[: MODULES.index(module)]
    # Of the machine room the door alone: `from a3c_jax import _compiled`.
    assert imports_of_the_package(module) <= {*above, MACHINE_ROOM}


def test_the_algorithm_uses_the_machine_room_only_for_environments_and_convolutions():
    users = {
        name for name in ALGORITHM if MACHINE_ROOM in imports_of_the_package(f"a3c_jax.{name}")
    }
    assert users == {"gymnax_environment", "torsos"} & {*ALGORITHM}


def test_the_machine_room_imports_nothing_of_the_asynchrony_and_of_the_algorithm_only_this():
    for path in (PACKAGE / MACHINE_ROOM).glob("*.py"):
        of_package = {name for name in imports(path) if name.startswith("a3c_jax.")}
        inside = {name for name in of_package if name.startswith(f"a3c_jax.{MACHINE_ROOM}")}
        assert of_package - inside <= {"a3c_jax.config.available_cores"}, path.name


def test_nothing_outside_the_machine_room_reaches_past_its_door():
    door = {name for name in vars(_compiled) if not name.startswith("_")}
    submodules = set(files(PACKAGE / MACHINE_ROOM))
    for name, path in SOURCES.items():
        if name.startswith(MACHINE_ROOM):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if node.value.id == MACHINE_ROOM:
                assert node.attr in door - submodules, f"{name} uses _compiled.{node.attr}"


@pytest.mark.parametrize("name", ["array_checks", "distributions", "rules", "names"])
def test_the_lowest_modules_import_nothing_of_the_package(name):
    assert imports_of_the_package(f"a3c_jax.{name}") == set()


def test_the_losses_need_nothing_but_what_checks_their_arrays():
    assert imports_of_the_package("a3c_jax.losses") == {"array_checks"}


def test_threads_know_only_the_store_signals_and_turns():
    threads = "a3c_jax.asynchrony.threads"
    assert imports_of_the_package(threads) == {
        "asynchrony.parameters", "asynchrony.signals", "asynchrony.turns",
    }  # fmt: skip
    assert imports_of_others(threads) <= sys.stdlib_module_names
    for name in ("signals", "turns"):
        module = f"a3c_jax.asynchrony.{name}"
        assert imports_of_the_package(module) == set()
        assert imports_of_others(module) <= sys.stdlib_module_names


def test_losses_need_no_more_than_jax_and_chex():
    assert imports_of_others("a3c_jax.losses") <= {"jax", "chex", "collections", "typing"}


@pytest.mark.parametrize("name", SOURCES)
def test_a_private_module_of_jax_is_imported_under_guard_only(name):
    unguarded = [m for m in imports(SOURCES[name], is_guarded=False) if "._" in m]
    private = [m for m in unguarded if not m.startswith("a3c_jax.")]
    assert private == []


# Sizes


@pytest.mark.parametrize("name", SOURCES)
def test_files_and_functions_are_short(name):
    text = SOURCES[name].read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= 320, f"{name} has {lines} lines; move a part into a module of its own"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # About 50, without the docstring, which may be as long as its reader needs.
            docstring = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1
            lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            assert lines < 60, f"{node.name} has {lines} lines"


# Imports as they happen


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
assert "losses" in dir(a3c_jax)
"""
    assert in_a_fresh_process(code) == ""


def test_the_losses_can_be_used_after_importing_the_package():
    code = """
import a3c_jax
assert a3c_jax.losses.n_step_returns
"""
    assert in_a_fresh_process(code) == ""


def test_the_package_can_be_used_without_the_private_module_of_jax():
    code = """
import sys
import jax, jax.extend, flax.linen, optax
sys.modules["jax._src.xla_bridge"] = None  # importing it now raises ImportError
vars(sys.modules["jax._src"]).pop("xla_bridge")
from a3c_jax import _compiled
_compiled.prepare_process()
import a3c_jax.networks, a3c_jax.asynchrony.parameters
"""
    assert in_a_fresh_process(code) == ""


@pytest.mark.parametrize("name", [*ALGORITHM, "asynchrony"])
def test_every_module_can_be_had_from_the_package(name):
    assert getattr(a3c_jax, name) is importlib.import_module(f"a3c_jax.{name}")
    assert name in dir(a3c_jax)


@pytest.mark.parametrize("name", a3c_jax.__all__)
def test_every_public_name_can_be_had_from_the_package(name):
    value = getattr(a3c_jax, name)
    assert value.__name__ == name
    assert value.__module__.startswith("a3c_jax.")


def test_the_names_for_type_checkers_are_those_that_can_be_had():
    tree = ast.parse(Path(a3c_jax.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    listed = {
        alias.name: node.module.removeprefix("a3c_jax.")
        for node in block.body
        for alias in node.names
    }
    assert listed == a3c_jax._MODULE_OF


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'a3c_jax' has no attribute 'nonsense'"):
        _ = a3c_jax.nonsense
