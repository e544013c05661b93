"""The ends of a command: what each leaves in the run folder, what it says, and the exit code."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from faults import no_file_larger_than, usual_ctrl_c
from small_runs import files_in

import a3c_jax
from a3c_jax import CheckpointFolder, find_checkpoint
from a3c_jax.config import A3CConfig
from experiments import command_line, run_folder

TINY = A3CConfig(num_workers=2, envs_per_worker=2, t_max=4, hidden_sizes=(4,), max_steps=800)
LAST = 100
"""The run's last update."""


@pytest.fixture
def command(capsys, tmp_path):
    """`python -m experiments.cartpole ...` in this process: its exit code, what it prints, and what it complains of."""

    def run(*arguments, sinks=(), **options):
        if "--resume" not in arguments:
            arguments = ("--run-dir", tmp_path / "run", *arguments)
        try:
            command_line.main(
                "cartpole",
                "A test.",
                {"cartpole": TINY},
                arguments=[*map(str, arguments), "--evaluation-episodes", "2", "--no-progress"],
                sinks=sinks,
                **options,
            )
            code = 0
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


class Does:
    """A sink that does something at its last row."""

    def __init__(self, action):
        self.action = action

    def write(self, row, episodes):
        if row["updates"] == LAST:
            self.action()

    def close(self):
        pass


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_the_evaluation_keeps_what_was_learnt(command, tmp_path, monkeypatch):
    evaluate = a3c_jax.evaluate

    def interrupted(*arguments):
        interrupt()
        return evaluate(*arguments)

    monkeypatch.setattr("a3c_jax.evaluate", interrupted, raising=False)
    with usual_ctrl_c():
        code, output, errors = command()
    assert code == 130
    assert "stopped (max_steps)" in output
    assert errors.startswith("interrupted; the training is done, and what it has learnt is in")
    assert "python -m experiments.evaluate" in errors
    run = tmp_path / "run"
    assert {"final.msgpack", "best.msgpack", "summary.json"} <= {p.name for p in run.iterdir()}
    assert "evaluation" not in json.loads((run / "summary.json").read_text())
    assert find_checkpoint(run).version == LAST


def test_ctrl_c_at_the_last_update_says_how_to_go_on(command, tmp_path):
    with usual_ctrl_c():
        code, output, errors = command(sinks=[Does(interrupt)])
    assert (code, errors) == (130, "")
    assert "after 800 steps" in output and f"--resume {tmp_path / 'run'}" in output
    code, output, errors = command("--resume", tmp_path / "run")
    assert code == 0, errors
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["updates"] for row in rows] == [LAST], "missing, or there twice"


def test_a_run_that_has_ended_goes_on_with_a_larger_budget_only(command, tmp_path):
    run = tmp_path / "run"
    code, _, _ = command()
    assert code == 0
    before = files_in(run)
    for arguments, budget in (((), "800"), (("--max-steps", "100"), "100")):
        code, _, errors = command("--resume", run, *arguments)
        assert code == 2
        assert f"max_steps must be more than the 800 that the run has played, to go on from there, got {budget}; give a larger --max-steps." in errors  # fmt: skip
        assert files_in(run) == before
    code, _, errors = command("--resume", run, "--max-steps", "1600")
    assert code == 0, errors
    assert find_checkpoint(run).environment_steps == 1600


def test_a_folder_of_checkpoints_is_not_taken_for_a_run_folder(command, tmp_path):
    run = tmp_path / "run"
    command()
    before = files_in(run)
    code, _, errors = command("--resume", run / "checkpoints", "--max-steps", "1600")
    assert code == 2
    assert "resume must be a run folder or a checkpoint file, got" in errors
    assert files_in(run) == before


def test_a_run_folder_that_disappears_ends_in_a_sentence(command, tmp_path):
    code, output, errors = command(sinks=[Does(lambda: shutil.rmtree(tmp_path / "run"))])
    assert code == 1
    assert "greedy" in output, "the evaluation is shown all the same"
    assert errors.startswith("error: not everything could be written to")
    assert "No such file or directory" in errors and "Traceback" not in errors


def test_a_full_disk_ends_in_a_sentence_and_with_what_could_be_saved(command, tmp_path):
    with contextlib.ExitStack() as stack, pytest.warns(RuntimeWarning, match="too large"):
        fill = Does(lambda: stack.enter_context(no_file_larger_than(100)))
        code, output, errors = command("--updates-per-row", "50", sinks=[fill])
    assert code == 1
    assert "greedy" in output
    assert "not everything could be written" in errors and "too large" in errors
    assert "Traceback" not in errors
    assert find_checkpoint(tmp_path / "run").version == LAST  # saved before the disk was full


def test_a_disk_that_has_room_again_at_the_end_loses_nothing(command, tmp_path, monkeypatch):
    evaluate = a3c_jax.evaluate
    with contextlib.ExitStack() as stack:

        def make_room(*arguments):
            stack.close()
            return evaluate(*arguments)

        monkeypatch.setattr("a3c_jax.evaluate", make_room, raising=False)
        fill = Does(lambda: stack.enter_context(no_file_larger_than(100)))
        with pytest.warns(RuntimeWarning, match="too large"):
            code, _, errors = command("--updates-per-row", "50", sinks=[fill])
    assert (code, errors) == (0, "")
    run = tmp_path / "run"
    assert {"final.msgpack", "best.msgpack", "summary.json", "learning_curve.png"} <= {
        path.name for path in run.iterdir()
    }


def test_a_run_folder_in_use_is_refused_and_left_as_it_is(command, tmp_path):
    run = tmp_path / "run"
    assert command()[0] == 0
    (run / "failure.json").write_text("{}")  # going on would remove it
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with CheckpointFolder(run / "checkpoints").locked():
        code, _, errors = command("--resume", run, "--max-steps", "1600")
    assert code == 2
    assert "must not be in use" in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


GARBAGE = ["", "{", "{}", "[]", "null", "3", '{"environment_steps": "x"}', "\0\1\2", "[" * 9_000]


@pytest.mark.parametrize("content", GARBAGE)
def test_garbage_in_the_metrics_is_cut_out(tmp_path, content):
    rows = tmp_path / "metrics.jsonl"
    good = [json.dumps({"environment_steps": 8 * n}) + "\n" for n in range(4)]
    rows.write_text(good[0] + content + "\n" + good[1] + good[2] + good[3] + content)
    run_folder.continue_in(tmp_path, 16)
    assert rows.read_text() == "".join(good[:3])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_bytes_that_are_no_text_are_cut_out(tmp_path):
    rows = tmp_path / "metrics.jsonl"
    rows.write_bytes(b'\xff\xfe\n{"environment_steps": 0}\n\x80')
    run_folder.continue_in(tmp_path, 16)
    assert rows.read_text() == '{"environment_steps": 0}\n'


@pytest.mark.parametrize("content", GARBAGE)
def test_a_file_that_holds_no_object_reads_as_none(tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_text(content)
    assert run_folder.read_json(path) in (None, {}, {"environment_steps": "x"})
    assert run_folder.read_json(tmp_path / "missing.json") is None


def test_garbage_in_its_files_does_not_keep_a_run_from_going_on(command, tmp_path):
    run = tmp_path / "run"
    assert command()[0] == 0
    for name in ("config.json", "failure.json", "summary.json", "metrics.jsonl"):
        (run / name).write_bytes(b"\xff{[")
    code, _, errors = command("--resume", run, "--max-steps", "1600")
    assert code == 0, errors
    assert find_checkpoint(run).version == 2 * LAST
    assert json.loads((run / "summary.json").read_text())["updates"] == 2 * LAST
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["updates"] for row in rows] == [2 * LAST]


def test_a_file_is_as_it_was_if_writing_it_fails(tmp_path):
    path = Path(tmp_path / "value.json")
    run_folder.write_json(path, {"a": 1})
    with pytest.raises(OSError, match="too large"), no_file_larger_than(100):
        run_folder.write_json(path, {"a": list(range(1000))})
    with pytest.raises(TypeError):
        run_folder.write_json(path, {"a": np.zeros(2)})
    assert run_folder.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
