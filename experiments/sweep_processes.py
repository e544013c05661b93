"""The processes of a sweep. Each of them takes one run after the other, and keeps its program as long as it fits."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from a3c_jax.config import A3CConfig, changes_needing_compilation
from experiments.run_folder import read_json


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
      label: the values in which its configuration differs from the others, as text.
      config: its configuration, with its seed.
      folder: its run folder.
    """

    label: str
    config: A3CConfig
    folder: Path

    @property
    def has_ended(self) -> bool:
        """Whether the run has come to its end."""
        return read_json(self.folder / "summary.json") is not None

    @property
    def has_failed(self) -> bool:
        """Whether a worker of the run has failed, for instance because its parameters diverged."""
        return (self.folder / "failure.json").exists()


Group = list[Run]
"""Runs that one compiled worker step can run."""


def group_by_program(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups: those of a group differ only in what a program can change without much compiling."""
    groups: list[Group] = []
    group_of: dict[A3CConfig, Group] = {}
    for run in runs:
        config = dataclasses.replace(run.config, seed=0)  # so that one look is enough for all seeds
        if config not in group_of:
            fitting = (g for g in groups if not changes_needing_compilation(g[0].config, config))
            group_of[config] = next(fitting, [])
            if not group_of[config]:
                groups.append(group_of[config])
        group_of[config].append(run)
    return groups


def run_all(
    runs: Sequence[Run], num_processes: int, cache: Path | None
) -> Iterator[tuple[Run, str | None]]:
    """Runs everything, several runs at a time. If the generator is closed early, running ones are saved and ended.

    A process stays with one group of runs as long as the group has any left, because it has compiled their worker
    step. After that it helps with the largest group. So all processes are busy until the end.

    Args:
      runs: what to run.
      num_processes: how many runs go on at a time.
      cache: the folder of compiled programs, which all processes share; None keeps none.

    Yields:
      Each run as soon as it is over, and why it failed; None if it did not.
    """
    groups = group_by_program(runs)
    processes: list[_Process] = []
    try:
        for _ in range(min(num_processes, len(runs))):
            processes.append(_Process(cache))
            processes[-1].start_next(groups)
        while busy := {p.connection: p for p in processes if p.run is not None}:
            for connection in wait(list(busy)):
                process = busy[connection]  # type: ignore[index]
                run, error = process.receive()
                if process.has_died:
                    processes.remove(process)
                    processes.append(process := _Process(cache))
                process.start_next(groups)
                yield run, error
    finally:
        for process in processes:
            process.end()
        for process in processes:
            process.join()


class _Process:
    """A process, as the one that started it sees it.

    Attributes:
      connection: sends runs to it, and receives why they failed.
      run: what it is running; None if there is nothing left.
      has_died: whether it ended before its run did.
    """

    def __init__(self, cache: Path | None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would not copy JAX's threads
        self.connection, theirs = context.Pipe()
        self.run: Run | None = None
        self.has_died = False
        self._group: Group = []
        self._process = context.Process(target=_work, args=(theirs, cache), daemon=True)
        # A terminal sends Ctrl-C to all processes. New ones inherit that it is ignored: their parent ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()  # so that the connection ends when the process does

    def start_next(self, groups: Sequence[Group]) -> None:
        """Takes a run out of its group, or of the largest one if its own is empty, and starts it."""
        self.run = None
        self._group = self._group or max(groups, key=len)
        if self._group:
            self.run = self._group.pop(0)
            self.connection.send(self.run)

    def receive(self) -> tuple[Run, str | None]:
        """Waits until the run is over; the run, and why it failed."""
        assert self.run is not None
        try:
            return self.run, self.connection.recv()
        except (EOFError, OSError):
            self.has_died = True
            self._process.join()
            return self.run, f"its process ended with exit code {self._process.exitcode}"

    def end(self) -> None:
        """Makes the process end, after it has saved its run if it has one."""
        self.connection.close()
        if self.run is not None:
            self._process.terminate()

    def join(self) -> None:
        """Waits until the process has ended."""
        self._process.join(timeout=60)
        self._process.kill()


def _work(connection: Connection, cache: Path | None) -> None:
    """What a process does: it runs what it is sent, and answers why the run failed, or None."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import a3c_jax
    from experiments import tasks  # noqa: F401 (registers its environments)
    from experiments.compilation_cache import keep_compiled_programs

    keep_compiled_programs(cache)
    program = None
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the connection
        while True:
            run = connection.recv()
            error = None
            try:
                checkpoints = a3c_jax.CheckpointFolder(run.folder / "checkpoints", keep=1)
                with checkpoints.locked():
                    checkpoint = _latest_in(checkpoints.path)
                    program = _program_for(run.config, program, checkpoint)
                    _train(program, run.folder, checkpoints, checkpoint)
            except a3c_jax.TrainingInterrupted as interruption:
                raise SystemExit(128 + interruption.signal) from None
            except Exception as failure:
                error = str(failure) or repr(failure)
            connection.send(error)


def _end_with_parent() -> None:
    """Ends the process when its parent is killed. Otherwise it would write into a run that somebody has resumed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _latest_in(folder: Path) -> Any:
    """The checkpoint that an earlier attempt has left in a folder of checkpoints; None if there is none."""
    from a3c_jax import find_checkpoint

    return find_checkpoint(folder) if any(folder.glob("*.checkpoint")) else None


def _program_for(config: A3CConfig, program: Any, checkpoint: Any) -> Any:
    """The program at hand with another configuration if that is possible, else a new one, to go on as the run began."""
    import a3c_jax

    single_kernel = None if checkpoint is None else checkpoint.single_kernel
    if (
        program is None
        or changes_needing_compilation(program.config, config)
        or single_kernel not in (None, program.single_kernel)
    ):
        return a3c_jax.build(config, single_kernel=single_kernel)
    return program.replace(**config.as_dict())


def _train(program: Any, folder: Path, checkpoints: Any, checkpoint: Any) -> None:
    """Trains and writes the run folder, from the folder's checkpoint on if there is one."""
    from experiments import report, run_folder

    run_folder.continue_in(folder, 0 if checkpoint is None else checkpoint.environment_steps)
    result = run_folder.train_in_folder(
        program, folder, checkpoints, checkpoint, progress=False, updates_per_row=100
    )
    report.save_params(result, folder)
    summary = report.summarize(result) | {"seconds": result.wall_clock}
    run_folder.write_json(folder / "summary.json", summary)  # last, because it marks the end
