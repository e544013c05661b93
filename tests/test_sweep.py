"""Sweeps: what they are planned to be, what they leave behind, and how they go on after every kind of end."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import files_in

import a3c_jax
from a3c_jax import CheckpointFolder, find_checkpoint
from a3c_jax.config import A3CConfig
from experiments import run_folder, sweep, sweep_processes
from experiments.sweep_processes import group_by_program

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--num-workers", "1", "--envs-per-worker", "2", "--t-max", "4", "--hidden-sizes", "4"),
    *("--max-steps", "400", "--no-progress", "--processes", "2"),
]


def asked(**values):
    """What a sweep's sweep.json holds."""
    grid = {name: [value] for name, value in A3CConfig().as_dict().items() if name != "seed"}
    return {"example": "cartpole", "seeds": 2, "first_seed": 3, "grid": grid | values}


def rows_of(table):
    """The printed table by configuration: runs, failed, solved, and the rest."""
    return {words[0]: words[1:] for words in map(str.split, table.splitlines()) if words}


def test_a_plan_is_the_product_of_all_values_and_seeds(tmp_path):
    rates, widths = [1e-3, 0.001, 2e-3], [[4], [8, 8]]
    runs = sweep.plan(asked(learning_rate=rates, hidden_sizes=widths), tmp_path)
    assert [run.config.seed for run in runs] == [3, 4] * 4
    assert list(dict.fromkeys(run.label for run in runs)) == [
        "learning_rate=0.001, hidden_sizes=4",
        "learning_rate=0.001, hidden_sizes=8x8",
        "learning_rate=0.002, hidden_sizes=4",
        "learning_rate=0.002, hidden_sizes=8x8",
    ]
    assert runs[2].folder == tmp_path / "learning_rate=0.001,hidden_sizes=8x8" / "seed3"
    assert runs[2].config == A3CConfig(learning_rate=1e-3, hidden_sizes=(8, 8), seed=3)


def test_any_value_gives_a_folder_of_its_own_right_below_that_of_the_sweep(tmp_path):
    names = ["a:B?x=1", "a:B?x=2", "a/B", "a-B", "../B"]
    folders = {run.folder.parent for run in sweep.plan(asked(environment=names), tmp_path)}
    assert len(folders) == 5 and {folder.parent for folder in folders} == {tmp_path}


def test_runs_are_grouped_by_the_program_that_can_run_them(tmp_path):
    grid = {"learning_rate": [1e-3, 2e-3], "discount": [0.9, 0.99], "max_steps": [1000, 2000]}
    groups = group_by_program(sweep.plan(asked(**grid), tmp_path))
    assert [{run.config.discount for run in group} for group in groups] == [{0.9}, {0.99}]
    assert [len(group) for group in groups] == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "an example must come first"),
        (["nonsense"], "example must be one of article, cartpole"),
        (["minatar:nonsense"], "the preset must be one of breakout"),
        (["cartpole", "--discount", "0.9", "2"], "A3CConfig.discount must be a number in [0, 1]"),
        (["cartpole", "--discount"], "each field must have at least one value"),
        (["cartpole", "--discount", "high"], "high"),
        (["cartpole", "--hidden-sizes", "8x"], "8x"),
        (["cartpole", "--seeds", "0"], "seeds must be >= 1, got 0"),
        (["cartpole", "--processes", "0"], "processes must be >= 1, got 0"),
        (["cartpole", "--environment", "Nonsense"], "must be a registered gymnax environment"),
        (["cartpole", "--torso", "mlp", "conv"], "A3CConfig.torso must be 'mlp' or 'auto'"),
        (["--resume", "nowhere"], "resume must be the folder of a sweep, got nowhere"),
        (["--resume", "nowhere", "--seeds", "3"], "seeds must not be given with resume"),
        (["cartpole", "--resume", "nowhere"], "example must not be given with resume"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path, capsys, arguments, message):
    resuming = "--resume" in arguments or not arguments
    folder = [] if resuming else ["--run-dir", str(tmp_path / "sweep")]
    with pytest.raises(SystemExit) as caught:
        sweep.main([*arguments, *folder])
    assert caught.value.code == 2
    errors = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in errors and "Traceback" not in errors
    assert not (tmp_path / "sweep").exists()


def test_a_folder_whose_request_is_incomplete_is_no_sweep(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        sweep.main(["--resume", str(tmp_path)])
    assert caught.value.code == 2
    assert "resume must be the folder of a sweep" in capsys.readouterr().err.replace("\n", " ")


def test_the_options_begin_with_the_values_of_the_preset():
    values = sweep._parse(["memory:cartpole", "--core", "None", "gru"]).grid
    assert values.environment == ("CartPole-positions",) and values.core_size == (64,)
    assert values.core == (None, "gru") and values.num_workers == (2,)


@pytest.mark.slow
def test_a_sweep_leaves_run_folders_a_table_and_a_picture(tmp_path, capsys):
    # The second rate makes the parameters overflow. Its runs fail, and the others go on.
    arguments = ["cartpole", "--learning-rate", "1e-3", "1e38", "--optimizer", "momentum"]
    arguments += [*SMALL, "--seeds", "2", "--run-dir", str(tmp_path / "sweep")]
    arguments += ["--max-gradient-norm", "None", "--solved-return", "5", "--solved-window", "5"]
    folder = sweep.main(arguments)
    printed = capsys.readouterr()
    assert rows_of(printed.out)["learning_rate=0.001"][:3] == ["2", "0", "2"]
    assert rows_of(printed.out)["learning_rate=1e+38"][:4] == ["0", "2", "0", "-"]
    assert printed.err.count("failed: ") == 2
    for seed in range(2):
        run = folder / "learning_rate=0.001" / f"seed{seed}"
        names = {path.name for path in run.iterdir()}
        assert names == {
            *("config.json", "metrics.jsonl", "summary.json", "checkpoints"),
            *("final.msgpack", "best.msgpack"),
        }
        config = json.loads((run / "config.json").read_text())
        assert (config["seed"], config["learning_rate"], config["t_max"]) == (seed, 1e-3, 4)
        assert len(find_checkpoint(run).episodes.episode_return) >= 1
        failed = folder / "learning_rate=1e+38" / f"seed{seed}"
        assert "finite" in json.loads((failed / "failure.json").read_text())["error"]
    assert (folder / "curves.png").stat().st_size > 10_000

    before = contents(folder)
    assert sweep.main(arguments) == folder  # the same folder again: nothing is missing
    assert rows_of(capsys.readouterr().out)["learning_rate=0.001"][:3] == ["2", "0", "2"]
    assert contents(folder) == before
    with pytest.raises(SystemExit):  # another sweep does not go there
        sweep.main([*arguments, "--discount", "0.9"])


@pytest.mark.slow
def test_a_process_that_dies_ends_one_run_and_is_replaced(tmp_path, capsys, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import multiprocessing, os\n"
        "import gymnax\n"
        "if multiprocessing.parent_process() is not None:\n"
        "    os._exit(3)\n"
        "from gymnax.environments.classic_control.cartpole import CartPole\n"
        "gymnax.register('Deadly', CartPole)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["cartpole", "--environment", "deadly:Deadly", "CartPole-v1", *SMALL]
    arguments += ["--seeds", "1", "--processes", "1", "--run-dir", str(tmp_path / "sweep")]
    with pytest.raises(SystemExit) as caught:
        sweep.main(arguments)
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "its process ended with exit code 3" in printed.err
    assert "1 of 2 runs are missing; go on with: python -m experiments.sweep" in printed.err
    assert rows_of(printed.out)["environment=CartPole-v1"][:2] == ["1", "0"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_ctrl_c_does_not_reach_a_process_that_has_just_started():
    before = signal.getsignal(signal.SIGINT)
    process = sweep_processes._Process(None)
    status = Path(f"/proc/{process._process.pid}/status").read_text()
    process.end()
    process.join()
    ignored = int(status.split("SigIgn:")[1].split()[0], 16)
    assert ignored >> signal.SIGINT - 1 & 1
    assert signal.getsignal(signal.SIGINT) is before


def contents(folder):
    """When each file of the runs was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/seed*/**/*")}


def wait_until(condition, process):
    """Waits for what a process is expected to do next."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def kill_all(process):
    """Ends what a test that failed has left: the process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_for_all(process):
    """What a process printed, once every process that could still print there has ended."""
    return process.communicate(timeout=100)


class Sends:
    """What a process of a sweep is connected with: sends it runs, and keeps why they failed."""

    def __init__(self, *runs):
        self.runs, self.errors = list(runs), []

    def recv(self):
        if not self.runs:
            raise EOFError
        return self.runs.pop(0)

    def send(self, error):
        self.errors.append(error)


@pytest.fixture
def cut_short(tmp_path):
    """A run of a sweep of which a sixth has been played, by a program compiled in another way than usual."""
    config = A3CConfig(num_workers=1, envs_per_worker=2, t_max=4, hidden_sizes=(4,), max_steps=2400)
    folder = tmp_path / "seed0"
    run_folder.train_in_folder(
        a3c_jax.build(dataclasses.replace(config, max_steps=400), single_kernel=False),
        folder,
        CheckpointFolder(folder / "checkpoints", every_updates=1),
        progress=False,
        updates_per_row=10,
    )
    return sweep_processes.Run("", config, folder)


def go_on(run):
    """Why the run failed in a process of a sweep; None if it did not."""
    connection = Sends(run)
    sweep_processes._work(connection, Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    return connection.errors[0]


def test_a_run_goes_on_however_its_program_was_compiled(cut_short):
    rows = (cut_short.folder / "metrics.jsonl").read_text()
    assert go_on(cut_short) is None
    assert (cut_short.folder / "metrics.jsonl").read_text().startswith(rows)
    checkpoint = find_checkpoint(cut_short.folder)
    assert (checkpoint.environment_steps, checkpoint.single_kernel) == (2400, False)


def test_a_damaged_checkpoint_is_the_failure_of_its_run_and_nothing_is_deleted(cut_short):
    saved = sorted(cut_short.folder.glob("checkpoints/*.checkpoint"))
    saved[-1].write_bytes(b"")
    before = files_in(cut_short.folder)
    error = go_on(cut_short)
    assert str(saved[-1]) in error and f"{saved[-2]}, is good" in error
    assert files_in(cut_short.folder) == before


def test_a_run_that_goes_on_elsewhere_is_left_alone(cut_short):
    before = files_in(cut_short.folder)
    with CheckpointFolder(cut_short.folder / "checkpoints").locked():
        assert "must not be in use" in go_on(cut_short)
    assert files_in(cut_short.folder) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize(
    ("send", "number", "code"),
    [
        (os.killpg, signal.SIGINT, 130),  # as a terminal does
        (os.kill, signal.SIGTERM, 143),
        (os.kill, signal.SIGKILL, -9),
        (os.killpg, signal.SIGKILL, -9),
    ],
)
def test_a_sweep_that_was_cut_short_goes_on_with_what_is_missing(
    request, tmp_path, send, number, code
):
    folder, endless = tmp_path / "sweep", 10**12
    command = [sys.executable, "-m", "experiments.sweep"]
    begin = ["cartpole", *SMALL, "--max-steps", "400", str(endless), "--seeds", "2"]
    begin += ["--solved-return", "None", "--run-dir", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([*command, *begin], start_new_session=True, **pipes)
    request.addfinalizer(lambda: kill_all(process))
    cut_short = [folder / f"max_steps={endless}" / f"seed{seed}" for seed in range(2)]
    metrics = [run / "metrics.jsonl" for run in cut_short]
    wait_until(lambda: all(m.exists() and m.stat().st_size for m in metrics), process)
    send(process.pid, number)
    _, errors = wait_for_all(process)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    goes_on = f"go on with: python -m experiments.sweep --resume {folder}"
    assert (goes_on in errors) == (number != signal.SIGKILL)
    done = {p: t for p, t in contents(folder).items() if "max_steps=400" in p.parts}
    assert sum(path.name == "summary.json" for path in done) == 2

    # Now an end for those without one: a little later than they have come.
    rows = [m.read_text().splitlines() for m in metrics]
    reached = [json.loads(row)["environment_steps"] for lines in rows for row in lines[:-1]]
    end = max(reached, default=0) + 4000  # the last row may be half of one
    sweep_json = json.loads((folder / "sweep.json").read_text())
    sweep_json["grid"]["max_steps"] = [400, end]
    (folder / "sweep.json").write_text(json.dumps(sweep_json))
    cut_short[0].parent.rename(folder / f"max_steps={end}")
    again = [*command, "--resume", str(folder), "--no-progress", "--processes", "2"]
    resumed = subprocess.run(again, capture_output=True, text=True, cwd=ROOT)
    assert resumed.returncode == 0, resumed.stderr
    assert {p: t for p, t in contents(folder).items() if "max_steps=400" in p.parts} == done
    assert rows_of(resumed.stdout)[f"max_steps={end}"][:3] == ["2", "0", "-"]
    for seed, before in enumerate(rows):
        run = folder / f"max_steps={end}" / f"seed{seed}"
        assert json.loads((run / "summary.json").read_text())["environment_steps"] >= end
        if number != signal.SIGKILL:  # it went on where it was
            assert (run / "metrics.jsonl").read_text().splitlines()[: len(before)] == before
