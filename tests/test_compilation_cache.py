"""Compiled programs are kept between the runs of the scripts, and change nothing but the time."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import serialization

from a3c_jax import find_checkpoint
from experiments import command_line, compilation_cache
from experiments.cartpole import DEFAULTS
from experiments.compilation_cache import CompilationCache, default_folder

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--num-workers", "1", "--envs-per-worker", "2", "--t-max", "4", "--hidden-sizes", "4"),
    *("--max-steps", "400", "--evaluation-episodes", "2", "--no-progress"),
]


@pytest.fixture
def restored():
    """What JAX keeps, and where, is afterwards as it was."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "caches/a3c_jax"),
        ("linux", None, "home/.cache/a3c_jax"),
        ("darwin", None, "home/Library/Caches/a3c_jax"),
        ("win32", "LOCALAPPDATA", "caches/a3c_jax"),
    ],
)
def test_the_folder_is_in_the_users_cache(monkeypatch, tmp_path, platform, variable, expected):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path / "caches"))
    assert default_folder() == tmp_path / expected


def test_jaxs_own_variables_decide_if_they_are_set(restored):
    # conftest.py sets them. So no test writes into the cache of whoever runs the tests.
    assert default_folder() == Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert CompilationCache().use() == default_folder()
    assert jax.config.jax_compilation_cache_dir == str(default_folder())
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.2


def test_nothing_is_kept_if_that_is_asked_for(restored, tmp_path):
    cache = CompilationCache(compilation_cache=tmp_path / "cache", no_compilation_cache=True)
    assert cache.use() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_does_not_end_the_run(restored, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"  # below a file, where not even root can make one
    arguments = ["--run-dir", str(tmp_path / "run"), "--compilation-cache", str(folder), *SMALL]
    command_line.main("cartpole", "", {"cartpole": DEFAULTS}, arguments=arguments)
    assert (tmp_path / "run" / "summary.json").exists()
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1
    assert f"compilation_cache must be a folder that can be written, got {folder}" in warning
    assert jax.config.jax_compilation_cache_dir is None


def run(tmp_path, name, *options):
    """Runs the example in a process of its own, with a cache for users in the folder; its parameters and episodes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "caches")
    command = [sys.executable, "-m", "experiments.cartpole", *SMALL, *options]
    command += ["--run-dir", str(tmp_path / name)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "warning" not in done.stderr
    params = serialization.msgpack_restore((tmp_path / name / "final.msgpack").read_bytes())
    episodes = find_checkpoint(tmp_path / name).episodes._asdict()
    del episodes["seconds"]  # of the clock
    return params, episodes


def kept(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-cache")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="the cache is in another folder")
def test_a_second_run_compiles_nothing_and_has_the_same_bits(tmp_path):
    folder = tmp_path / "caches" / "a3c_jax"
    without = run(tmp_path, "without", "--no-compilation-cache")
    assert not folder.exists()
    first = run(tmp_path, "first")
    written = kept(folder)
    assert len(written) > 10
    second = run(tmp_path, "second")
    assert kept(folder) == written
    given = run(tmp_path, "given", "--compilation-cache", str(tmp_path / "given_cache"))
    assert kept(tmp_path / "given_cache").keys() and kept(folder) == written
    for other in (first, second, given):
        for ours, theirs in zip(jax.tree.leaves(without), jax.tree.leaves(other), strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_the_folder_is_for_the_user_alone(tmp_path):
    folder = compilation_cache._writable(tmp_path / "a" / "cache")
    assert folder is not None
    if os.name != "nt":
        assert folder.stat().st_mode & 0o077 == 0
