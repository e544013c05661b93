"""The numbers of threads that a run computes with are recorded, and a replay or a resume starts with them."""

import json
import os
import subprocess
import sys
import warnings

import pytest
from small_runs import WALK, cut_short, small, train
from small_runs import program as small_program

import a3c_jax
from a3c_jax import find_checkpoint
from a3c_jax.asynchrony import thread_pools
from a3c_jax.asynchrony.checkpoint_files import save_checkpoint

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores on Linux")
MORE = str(int(thread_pools.thread_counts()["xla_threads"]) + 1)

PIN = "import os, runpy, sys; os.sched_setaffinity(0, {cores})\n"


def python(code, cores=CORES, **environment):
    """What a fresh process on these cores prints, of which the environment says nothing about threads."""
    unset = {"PJRT_NPROC", "NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", PIN.format(cores=cores) + code],
        capture_output=True,
        text=True,
        timeout=600,
        env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COUNT = """
import json, jax
from a3c_jax.asynchrony.thread_pools import start_with, thread_counts
start_with({recorded})
jax.block_until_ready(jax.jit(jax.numpy.linalg.qr)(jax.numpy.ones((2, 2))))
print(json.dumps(thread_counts()))
"""


def counts(recorded, *args, **environment):
    return json.loads(python(COUNT.format(recorded=recorded), *args, **environment))


@pytest.mark.slow
@needs_two_cores
def test_the_numbers_are_those_of_the_process():
    both = {"xla_threads": str(len(CORES)), "blas_threads": str(len(CORES))}
    assert counts({}) == both
    assert counts({}, CORES[:1]) == {"xla_threads": "1", "blas_threads": "1"}
    assert counts({}, PJRT_NPROC="5")["xla_threads"] == "5"
    assert counts({}, NPROC="5")["xla_threads"] == "5"


@needs_two_cores
def test_a_process_starts_with_what_a_run_had_whatever_its_cores_and_its_environment():
    recorded = {"xla_threads": "3", "blas_threads": "2"}
    assert counts(recorded, CORES[:1]) == recorded
    assert counts(recorded, PJRT_NPROC="7", OPENBLAS_NUM_THREADS="1") == recorded
    single = {"xla_threads": "1", "blas_threads": "1"}
    assert counts(single) == single


@pytest.mark.parametrize("recorded", [{}, {"xla_threads": "many"}, {"xla_threads": "0"}])
def test_what_was_not_recorded_or_is_no_number_changes_nothing(recorded):
    assert counts(recorded, PJRT_NPROC="3")["xla_threads"] == "3"


def test_a_process_that_has_started_keeps_its_number_and_its_environment():
    before = dict(os.environ), thread_pools.thread_counts()["xla_threads"]
    thread_pools.start_with({"xla_threads": MORE})
    assert (dict(os.environ), thread_pools.thread_counts()["xla_threads"]) == before


def test_checkpoints_record_them_and_those_that_do_not_still_load(tmp_path):
    config = small()
    checkpoint = cut_short(config, 10, tmp_path)
    now = thread_pools.thread_counts()
    assert checkpoint.versions["xla_threads"] == now["xla_threads"]
    old = {k: v for k, v in checkpoint.versions.items() if not k.endswith("_threads")}
    path = tmp_path / "old.checkpoint"
    save_checkpoint(path, checkpoint._replace(versions=old))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(config, resume=find_checkpoint(path))
        train(config, resume=checkpoint)


def test_resume_and_replay_warn_once_if_the_number_differs_and_only_then(tmp_path):
    config = small()
    checkpoint = cut_short(config, 10, tmp_path)
    other = checkpoint.versions | {"xla_threads": MORE}
    message = rf"made with xla_threads {MORE} and this process has .*set PJRT_NPROC={MORE} before"
    with pytest.warns(RuntimeWarning, match=message) as seen:
        train(config, resume=checkpoint._replace(versions=other))
    assert len(seen) == 1
    with pytest.warns(RuntimeWarning, match=message):
        a3c_jax.replay(small_program(config, WALK), checkpoint.schedule, versions=other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a3c_jax.replay(
            small_program(config, WALK), checkpoint.schedule, versions=checkpoint.versions
        )


# Whole runs, on one core and on two.

QUICK = ["--evaluation-episodes", "1", "--no-progress"]
TASKS = {
    "cartpole": ("cartpole", ["--hidden-sizes", "256", "256", "--solved-return", "None"], 1_280),
    "minatar": ("minatar", ["--learning-rate-schedule", "constant"], 6_400),
    "lstm": ("cartpole", ["--core", "lstm", "--solved-return", "None"], 1_280),
}


@needs_two_cores
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "made_on"),
    [("cartpole", "one core"), ("minatar", "two cores"), ("lstm", "two cores")],
)
def test_a_run_is_repeated_and_continued_on_another_number_of_cores_bit_for_bit(
    task, made_on, tmp_path
):
    module, options, steps = TASKS[task]
    two, one = CORES[:2], CORES[:1]
    own, other = (two, one) if made_on == "two cores" else (one, two)

    def run(cores, module, *arguments):
        words = [f"experiments.{module}", *map(str, arguments)]
        words += ["--compilation-cache", str(tmp_path / "cache")]
        code = f"sys.argv = {words}\nrunpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
        return python(code, cores)

    half, moved = tmp_path / "half", tmp_path / "moved"
    budget = ["--num-workers", 1, "--max-steps", steps // 2, *QUICK]
    run(own, module, *options, *budget, "--run-dir", half)
    file = max((half / "checkpoints").glob("*.checkpoint"))
    run(other, module, "--max-steps", steps, *QUICK, "--resume", file, "--run-dir", moved)
    before, after = find_checkpoint(half), find_checkpoint(moved)
    assert before.versions == after.versions
    assert after.versions["xla_threads"] == str(len(own))
    assert after.version > before.version > 0
    # The replay begins at the run's first update, as if nobody had interrupted it. It makes the updates of the one
    # machine and those of the other again, and compares all parameters.
    assert "identical" in run(other, "replay", moved)
