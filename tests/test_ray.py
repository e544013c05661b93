"""Workers on Ray: the same run as in one process, bit for bit, whatever dies meanwhile."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
from small_runs import SMALL, assert_equal_runs, program

import a3c_jax
from a3c_jax import (
    A3CConfig,
    CheckpointFolder,
    RayOptions,
    TrainingInterrupted,
    WorkerError,
    replay,
    train,
)
from a3c_jax.asynchrony import ray_nodes
from a3c_jax.asynchrony.step_process import Form, StepProcess, recipe_of
from experiments.measurements import ray_cost

ray = pytest.importorskip("ray")


SYNC_CARTPOLE = "gymnasium:CartPole-v1?vectorization_mode='sync'"
"""Its running episodes can be played again from their seeds."""


STORE_BYTES = 100 * 2**20


@pytest.fixture(scope="module")
def cluster():
    """One cluster for all tests, with room for three processes."""
    for attempts_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=3,
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
            )
            break
        except Exception as error:
            # Ray gives its processes 30 seconds to start, which a busy machine may exceed.
            ray.shutdown()
            if not attempts_left or "timed out" not in str(error):
                raise
    yield
    ray.shutdown()


def config_of(environment="CartPole-v1", **changes):
    return A3CConfig(**(SMALL | {"environment": environment, "max_steps": 8 * 40} | changes))


def processes():
    """The ids of the processes that make steps: those of Ray's that descend from this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if is_step_process(path.name) and parent(parent(int(path.name))) == os.getpid():
                found.append(int(path.name))
    return found


def is_step_process(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::StepProcess")


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["CartPole-v1", "gymnasium:CartPole-v1"])
def test_one_worker_on_ray_is_one_worker_in_a_thread(cluster, environment):
    built = program(config_of(environment, max_steps=8 * 12))
    assert_equal_runs(train(built, ray="auto"), train(built))


@pytest.mark.parametrize(
    "environment",
    [
        "CartPole-v1",
        pytest.param("gymnasium:CartPole-v1", marks=pytest.mark.slow),
        pytest.param("ale:pong", marks=pytest.mark.slow),
    ],
)
def test_the_schedule_of_a_run_on_ray_repeats_it_in_one_thread(cluster, environment):
    if environment.startswith("ale:"):
        pytest.importorskip("ale_py")
    built = program(config_of(environment, num_workers=3))
    result = train(built, ray="auto")
    assert len(set(result.schedule.worker.tolist())) > 1
    assert len(result.episodes.worker) > 0 or environment == "ale:pong"
    assert_equal_runs(result, replay(built, result.schedule))


@pytest.mark.slow
def test_workers_can_share_a_process(cluster):
    built = program(config_of(num_workers=4))
    result = train(built, ray=RayOptions(workers_per_process=2))
    assert_equal_runs(result, replay(built, result.schedule))


@pytest.mark.slow
def test_rows_show_what_an_exchange_takes(cluster):
    rows = []
    train(program(config_of()), ray="auto", on_progress=rows.append)
    assert rows[-1]["exchange_milliseconds"] > 0
    assert rows[-1]["step_milliseconds"] > 0
    (node,) = ray.nodes()
    name = f"{node['NodeManagerAddress']}-{node['NodeID'][:6]}"
    assert rows[-1][f"steps_per_second/{name}"] > 0
    assert rows[-1][f"exchange_milliseconds/{name}"] > 0


def test_the_rates_of_a_machine_are_those_of_the_last_seconds(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(ray_nodes.time, "monotonic", lambda: clock[0])
    nodes = ray_nodes.Nodes(steps_per_update=20)
    clock[0] = 102.0
    for exchange in (0.001, 0.003):
        nodes.count("a", exchange)
    nodes.count("b", 0.005)
    # In the 2 seconds of the run: 2 x 20 and 1 x 20 steps.
    assert nodes.metrics() == {
        "steps_per_second/a": 20.0,
        "exchange_milliseconds/a": pytest.approx(2.0),
        "steps_per_second/b": 10.0,
        "exchange_milliseconds/b": pytest.approx(5.0),
    }
    clock[0] = 112.5
    nodes.count("a", 0.004)
    # In the last 10 seconds b has made no step, and a one.
    assert nodes.metrics() == {
        "steps_per_second/a": 2.0,
        "exchange_milliseconds/a": pytest.approx(4.0),
        "steps_per_second/b": 0.0,
    }


@pytest.mark.parametrize("by", ["option", "variable"])
def test_an_address_where_nothing_answers_is_refused_at_once(tmp_path, by):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"  # free again after the block
    variables = {"RAY_ADDRESS": address} if by == "variable" else {}
    source, given = ("RAY_ADDRESS", "auto") if by == "variable" else ("RayOptions.address", address)
    command = [sys.executable, "-m", "experiments.cartpole", "--ray", given]
    run = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        env=os.environ | variables, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert f"error: {source} must be that of a running Ray cluster, got '{address}'" in run.stderr


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_room_for_share_what_there_is(cluster):
    built = program(config_of(num_workers=4))
    with pytest.warns(RuntimeWarning, match="has no place for some"):
        result = train(built, ray=RayOptions(patience=1.0))
    assert_equal_runs(result, replay(built, result.schedule))


@pytest.mark.slow
def test_a_run_on_ray_goes_on_from_its_checkpoint_in_threads_and_back(cluster, tmp_path):
    short, whole = (program(config_of(max_steps=8 * n)) for n in (20, 40))
    train(short, ray="auto", checkpoints=CheckpointFolder(tmp_path))
    resumed = train(whole, ray="auto", resume=a3c_jax.find_checkpoint(tmp_path))
    assert_equal_runs(resumed, train(whole))


@pytest.mark.slow
def test_a_worker_that_raises_ends_the_run_with_its_own_exception(cluster):
    from a3c_jax.host_environment import HostEnvironment

    environment = HostEnvironment("Breaks", make_breaking)
    with pytest.raises(WorkerError, match="worker 0 failed with ZeroDivisionError: broken") as info:
        train(config_of(), environment=environment, ray="auto")
    assert isinstance(info.value.__cause__, ZeroDivisionError)
    assert info.value.result.version > 0


def make_breaking(num_envs):
    import gymnasium

    made = gymnasium.make_vec("CartPole-v1", num_envs)
    steps = [0]
    step = made.step

    def counted(action):
        steps[0] += 1
        if steps[0] > 20:
            raise ZeroDivisionError("broken")
        return step(action)

    made.step = counted
    return made


def test_what_cannot_be_sent_is_refused_before_anything_starts(tmp_path):
    import gymnasium

    opened = gymnasium.make_vec("CartPole-v1", 2)
    folder = CheckpointFolder(tmp_path / "checkpoints")
    with pytest.raises(TypeError, match=r"cannot be pickled \(environment .*give a function"):
        train(config_of(), environment=opened, ray="local", checkpoints=folder)
    assert not list(folder.path.glob("*.checkpoint"))
    opened.close()


def test_without_ray_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[ray\]'"):
        train(program(config_of()), ray="auto")


def test_an_option_out_of_range_is_refused():
    with pytest.raises(ValueError, match="RayOptions.workers_per_process must be >= 1, got 0"):
        RayOptions(workers_per_process=0)
    with pytest.raises(TypeError, match="workers_per_process must be an integer >= 1, got 1.5"):
        RayOptions(workers_per_process=1.5)


@pytest.mark.slow
def test_ctrl_c_is_ours_again_after_a_run(cluster):
    def ours(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ours)
    try:
        train(program(config_of(max_steps=8)), ray="auto")
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_messages_do_not_pile_up_in_the_object_store(cluster, monkeypatch):
    sizes = []
    copied = Form.bare
    monkeypatch.setattr(Form, "bare", lambda form, tree: sizes.append(nbytes(copied(form, tree))) or copied(form, tree))  # fmt: skip
    train(program(config_of(hidden_sizes=(300, 300), max_steps=8 * 400)), ray="auto")
    assert sum(sizes) > STORE_BYTES  # so that Ray would have had to write some of them to files
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert not list(session.glob("ray_spilled_objects*/*"))


def nbytes(bare):
    return sum(x.nbytes for x in ([bare] if isinstance(bare, np.ndarray) else bare))


@pytest.mark.slow
def test_the_command_line_plays_on_ray(cluster, tmp_path, capsys):
    from experiments import command_line

    small = ["--num-workers", "2", "--max-steps", "2000"]
    options = ["--ray", "auto", "--no-progress", "--evaluation-episodes", "2"]
    folder = command_line.main(
        "small", "", {"small": config_of(solved_return=None)}, arguments=[*small, *options, "--run-dir", str(tmp_path / "run")]
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["exchange_milliseconds"] > 0


@pytest.mark.slow
def test_the_measurement_of_ray_prints_its_tables(cluster, capsys, monkeypatch):
    monkeypatch.setitem(ray_cost.TASKS, "tiny", config_of())
    ray_cost.main(["--seconds", "0.3", "--repetitions", "1", "--sizes", "2 k", "--tasks", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line] == ["parameters", "2,005", "task", "tiny"]


# Without Ray: what runs in its processes


def test_trees_pass_between_processes_bit_for_bit():
    tree = {"key": jax.random.key(3), "x": np.float32([1, np.nan]), "flag": np.array([True])}
    form = Form(tree)
    again = form.dressed(form.bare(tree))
    assert jax.random.key_data(again["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
    assert np.asarray(again["x"]).tobytes() == tree["x"].tobytes()
    assert again["flag"].dtype == bool


def test_a_process_takes_the_steps_that_the_program_takes():
    built = program(config_of())
    process = StepProcess({})
    process.build(recipe_of(built))
    params, state = built.initial_params(), built.initial_states()[0]
    forms = process._forms
    sent = forms.state.bare(state)
    for _ in range(3):
        gradients, state, _ = built.step(params, state)
        bare, new, _, seconds = process.step(0, forms.params.bare(params), sent)
        jax.tree.map(np.testing.assert_array_equal, bare, forms.gradients.bare(gradients))
        jax.tree.map(np.testing.assert_array_equal, new, forms.state.bare(state))
        assert seconds > 0
        sent = None  # it has the newest
    process.close()


CLOSED = []
"""The numbers of environments in the vectors that `make_noting` made and that were closed."""


def make_noting(num_envs):
    vector = gymnasium.make_vec(
        "CartPole-v1", num_envs, "sync", vector_kwargs={"autoreset_mode": "Disabled"}
    )
    close = vector.close

    def note_and_close():
        CLOSED.append(num_envs)
        close()

    vector.close = note_and_close
    return vector


def test_a_process_closes_the_environments_that_it_leaves():
    built = program(config_of(envs_per_worker=3), make_noting)
    params, state = built.initial_params(), built.initial_states()[0]
    process = StepProcess({})
    process.build(recipe_of(built))
    forms = process._forms
    params, sent = forms.params.bare(params), forms.state.bare(state)
    process.step(0, params, sent)
    before = CLOSED.count(3)
    process.step(0, params, sent)  # from the first state again, in environments made anew
    assert CLOSED.count(3) == before + 1
    process.close()
    assert CLOSED.count(3) == before + 2


# What dies


def train_under_fire(built, kills, options="auto", seconds=(0.1, 0.5), then=None):
    """A run during which processes of its are killed at random moments, once it has begun.

    Args:
      built: the program.
      kills: how many to kill.
      options: for Ray.
      seconds: between two kills, at least and at most.
      then: what ends the run when all were killed; None lets it come to its end.

    Returns:
      The result, and how many were killed.
    """
    random = np.random.default_rng(0)
    begun, finished, killed = threading.Event(), threading.Event(), []

    def on_progress(row):
        begun.set()
        if then is not None and len(killed) == kills and not finished.is_set():
            finished.set()
            raise then

    def kill():
        begun.wait()
        while len(killed) < kills and not finished.wait(random.uniform(*seconds)):
            if pids := processes():
                killed.append(int(random.choice(pids)))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = train(built, ray=options, on_progress=on_progress, interval=0.1)
        return result, len(killed)
    finally:
        finished.set()
        begun.set()
        killer.join()


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_trace_in_the_run(cluster):
    built = program(config_of(num_workers=2, max_steps=8 * 1_000))
    result, killed = train_under_fire(built, 1)
    assert killed == 1
    assert result.version == 1_000
    assert_equal_runs(result, replay(built, result.schedule))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("environment", [SYNC_CARTPOLE])
def test_ten_processes_that_are_killed_leave_no_trace_in_the_run(cluster, environment):
    built = program(config_of(environment, num_workers=3, max_steps=10**7))
    with pytest.raises(TrainingInterrupted) as info:
        train_under_fire(built, 10, seconds=(0.3, 4.0), then=KeyboardInterrupt)
    result = info.value.result
    assert set(result.schedule.worker.tolist()) == {0, 1, 2}
    assert_equal_runs(result, replay(built, result.schedule))


@pytest.mark.slow
def test_a_process_that_always_dies_ends_the_run(cluster):
    from a3c_jax.host_environment import HostEnvironment

    environment = HostEnvironment("Dies", make_dying)
    with pytest.raises(WorkerError, match="its process died 2 times in a row"):
        train(config_of(), environment=environment, ray=RayOptions(max_deaths=1))


def make_dying(num_envs):
    import gymnasium

    made = gymnasium.make_vec("CartPole-v1", num_envs)
    made.reset = lambda **options: os.kill(os.getpid(), signal.SIGKILL)
    return made


SCRIPT = """
import sys
from a3c_jax import A3CConfig, CheckpointFolder, TrainingInterrupted, train

config = A3CConfig(num_workers=2, envs_per_worker=2, t_max=4, hidden_sizes=(8,), seed=3, max_steps=10**9)
try:
    train(config, ray="local", checkpoints=CheckpointFolder(sys.argv[1], every_seconds=0.5),
          on_progress=lambda row: print(row["updates"], flush=True))
except TrainingInterrupted as error:
    print("interrupted", error.signal, error.result.version, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_behind_and_can_go_on(tmp_path, number):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        rows = [driver.stdout.readline() for _ in range(4)]
        family = descendants(driver.pid)
        assert len(family) > 2
        if (
            number == signal.SIGKILL
        ):  # Ray's own agents notice after a minute that their parent is gone
            family = [process for process in family if is_step_process(process[0])]
            assert len(family) == 2
        driver.send_signal(number)
        rest = driver.stdout.read()
        driver.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(is_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in family if is_alive(pid)] == []
    checkpoint = a3c_jax.find_checkpoint(tmp_path)
    if number == signal.SIGKILL:
        assert checkpoint.version > 0
    else:
        assert f"interrupted {number.value} {checkpoint.version}" in rest
    config = dataclasses.replace(checkpoint.config, max_steps=8 * (checkpoint.version + 100))
    resumed = a3c_jax.train(program(config), resume=checkpoint)
    assert resumed.version == checkpoint.version + 100, rows


def descendants(pid):
    """The processes below one, by their ids and starting times."""
    children = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(parent(int(path.name)), []).append(int(path.name))
    found, new = [], [pid]
    while new:
        new = [child for one in new for child in children.get(one, [])]
        found += new
    return [(child, started(child)) for child in found]


def started(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def is_alive(process):
    pid, since = process
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and started(pid) == since
    except OSError:
        return False


NODES = """
import threading
from a3c_jax import A3CConfig, RayOptions, build, replay, train
from ray.cluster_utils import Cluster
import jax, numpy, ray

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address)
config = A3CConfig(num_workers=2, envs_per_worker=2, t_max=4, hidden_sizes=(8,), seed=3, max_steps=8 * 4000)
program = build(config)
rows = []

def on_progress(row):
    rows.append(row)
    if len(rows) == 2:
        threading.Thread(target=cluster.remove_node, args=(node,)).start()

result = train(program, ray=RayOptions(patience=2.0), on_progress=on_progress, interval=0.2)
assert result.version == 4000, result.version
again = replay(program, result.schedule)
for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(again.params)):
    assert numpy.asarray(a).tobytes() == numpy.asarray(b).tobytes()
assert len(rows) > 2, rows
print("equal", (result.schedule.worker[-400:] == 0).mean())
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_the_workers_of_a_machine_that_is_gone_move_to_another():
    run = subprocess.run([sys.executable, "-c", NODES], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "equal" in run.stdout
    assert "has no place for some" in run.stderr
