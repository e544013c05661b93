"""Random programs through the machine room: the results of `jax.jit`, no word on stderr, and no end of the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1", reason="the machine room is switched off"
)

SCRIPT = Path(__file__).with_name("compiled_fuzz.py")


def try_programs(first, last):
    """What became of the programs of these seeds, each tried in one process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(first), str(last)],
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"{lines[-1:]} ended the process: {done.stderr[-500:]}"
    assert done.stderr == ""
    return [line for line in lines if "begins" not in line]


def check(results):
    bad = [r for r in results if "invalid" not in r and (r["wrong"] or r["noise"])]
    assert not bad
    valid = [r for r in results if "invalid" not in r]
    assert len(valid) > 0.9 * len(results)
    assert 0.1 * len(valid) < sum(r["single"] for r in valid) < 0.8 * len(valid)


@pytest.mark.slow
def test_random_programs():
    check(try_programs(0, 8))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_programs():
    check(try_programs(8, 50))
