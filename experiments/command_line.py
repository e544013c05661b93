"""The command line that all examples share: from the options to a run folder with everything in it."""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import a3c_jax
import experiments
from a3c_jax.asynchrony.signals import raise_noted
from a3c_jax.config import A3CConfig
from experiments.compilation_cache import CompilationCache
from experiments.recorded_threads import start_with_threads_of
from experiments.run_folder import (
    check_goes_on,
    check_is_new,
    continue_in,
    exit_if_cut_short,
    exit_on_interruption,
    make_run_dir,
    train_in_folder,
)

Logger = Literal["tensorboard", "wandb", "trackio"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to do besides training."""

    preset: str = ""
    """The configuration to start from. Its values are the defaults of all other options."""
    run_dir: Path | None = None
    """Folder for the results, which must not exist yet. By default a new one under runs/."""
    evaluation_episodes: int = 100
    """Number of fresh episodes for each evaluation of the trained policy: greedy, sampled, and random."""
    progress: bool = True
    """Show a progress bar."""
    resume: Path | None = None
    """Go on with an earlier run instead of starting a new one. Give a run folder, to go on from its latest checkpoint in the same folder, or a checkpoint file, to go on in a new folder. The configuration is that of the run; only its budgets, its solved return and max-concurrent-workers can be changed."""
    checkpoint_seconds: float | None = 30.0
    """Save a checkpoint every so many seconds; None saves none by time."""
    checkpoint_updates: int | None = None
    """Save a checkpoint every so many updates; None saves none by their number."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints to keep. The one with the highest mean return is always kept."""
    log_to: tuple[Logger, ...] = ()
    """Send the metrics there as well. TensorBoard's files go into the run folder. Each needs its library: pip install -e '.[tensorboard]', and likewise for the others."""
    updates_per_row: int | None = 100
    """Number of updates between two rows of the metrics. None writes a row every half second instead."""
    ray: str | None = None
    """Play in processes of a Ray cluster: "auto" takes the one at hand, or starts one on this machine; "local" always starts one; anything else is an address. It needs Ray: pip install -e '.[ray]'."""
    workers_per_process: int = 1
    """With --ray: how many workers share a process."""
    gif: bool = False
    """Write play.gif, an episode of the trained policy, if the environment can be drawn. CartPole and the other classic ones need pygame: pip install -e '.[gif]'."""

    def __post_init__(self) -> None:
        for name, example in (
            ("evaluation_episodes", 100), ("keep_checkpoints", 3),
            ("checkpoint_seconds", 30), ("checkpoint_updates", 1000), ("updates_per_row", 100),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}; use {example}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of an example."""

    config: Annotated[A3CConfig, tyro.conf.arg(name="")]
    options: Annotated[Options, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Options)
    cache: Annotated[CompilationCache, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=CompilationCache
    )


def main(
    name: str,
    description: str,
    presets: Mapping[str, A3CConfig],
    *,
    arguments: Sequence[str] | None = None,
    sinks: Sequence[Any] = (),
    evaluation_episodes: int = 100,
    **plot_options: Any,
) -> Path:
    """Runs one example from its command line.

    Args:
      name: the example's name, for its run folder.
      description: what `--help` says first.
      presets: configurations by name. The first one is used unless `--preset` names another, and every option
        of the command line changes a value of it.
      arguments: the command line; by default that of the process.
      sinks: where rows of metrics go, besides `metrics.jsonl` and the progress bar.
      evaluation_episodes: the default of that option.
      **plot_options: options of `experiments.plotting.learning_curve`.

    Returns:
      The run folder.
    """
    with exit_on_interruption():
        options = Options(evaluation_episodes=evaluation_episodes)
        return _run_example(name, description, presets, options, arguments, sinks, plot_options)


def _run_example(
    name: str,
    description: str,
    presets: Mapping[str, A3CConfig],
    defaults: Options,
    arguments: Sequence[str] | None,
    sinks: Sequence[Any],
    plot_options: Mapping[str, Any],
) -> Path:
    with exit_on_bad_input():
        config, options, cache = _parse_example(name, description, presets, defaults, arguments)
        if options.resume is not None:
            start_with_threads_of(options.resume)
        # Everything below loads JAX. Until here nothing has, so that --help answers at once.
        from a3c_jax import CheckpointError
        from a3c_jax.asynchrony.checkpoints import check_same_run
        from experiments import report, tasks  # noqa: F401 (registers its environments)

        checkpoint = None
        if options.resume is None:
            check_is_new(options.run_dir)
        else:
            checkpoint = a3c_jax.find_checkpoint(options.resume)
            presets = {options.preset: checkpoint.config}
            config, options, cache = _parse_example(name, description, presets, defaults, arguments)
            check_same_run(checkpoint.config, config)
            if options.resume is not None and options.resume.is_dir():
                check_goes_on(options.resume, checkpoint, config)
    import_seconds = time.perf_counter() - experiments.STARTED
    cache.use()
    with exit_on_bad_input(ValueError):  # of any other error, the traceback is of use
        single_kernel = None if checkpoint is None else checkpoint.single_kernel
        program = a3c_jax.build(config, single_kernel=single_kernel)
    raise_noted()
    with exit_on_bad_input(ImportError, ValueError, OSError):
        ray = _ray_options(options)
        run_dir, checkpoints = _folders(name, options, config.seed)
    with exit_on_bad_input(ImportError):
        sinks = [*sinks, *(_make_logger(logger, run_dir, config) for logger in options.log_to)]
    with (
        exit_if_cut_short(run_dir, checkpoint, _ray_words(options)),
        exit_on_bad_input(CheckpointError, ConnectionError),
        checkpoints.locked(),
    ):
        if checkpoint is not None and options.resume == run_dir:
            continue_in(run_dir, checkpoint.environment_steps)
        result = train_in_folder(
            program,
            run_dir,
            checkpoints,
            checkpoint,
            progress=options.progress,
            sinks=sinks,
            updates_per_row=options.updates_per_row,
            ray=ray,
        )
    steps_before = 0 if checkpoint is None else checkpoint.environment_steps
    report.report(
        result,
        run_dir,
        evaluation_episodes=options.evaluation_episodes,
        gif=options.gif,
        import_seconds=import_seconds,
        steps_before=steps_before,
        plot_options=plot_options,
    )
    return run_dir


def _ray_options(options: Options) -> "a3c_jax.RayOptions | None":
    if options.ray is None:
        return None
    from a3c_jax.asynchrony.ray_cluster import check_installed

    check_installed()
    return a3c_jax.RayOptions(address=options.ray, workers_per_process=options.workers_per_process)


def _ray_words(options: Options) -> list[str]:
    """The options of Ray as they were given."""
    if options.ray is None:
        return []
    return ["--ray", options.ray, "--workers-per-process", str(options.workers_per_process)]


def _make_logger(logger: Logger, run_dir: Path, config: A3CConfig) -> Any:
    if logger == "tensorboard":
        return a3c_jax.TensorBoard(run_dir / "tensorboard")
    named = {"project": "a3c_jax", "name": run_dir.name, "config": config.as_dict()}
    if logger == "wandb":
        return a3c_jax.WeightsAndBiases(dir=run_dir, **named)
    return a3c_jax.Trackio(**named)


@contextlib.contextmanager
def exit_on_bad_input(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the process with exit code 2 and one line instead of a traceback, if the block refuses its input."""
    refusals = kinds or (ValueError, TypeError, OSError)
    try:
        yield
    except refusals as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(
    name: str, kind: Any, description: str | None, arguments: Sequence[str] | None, **options: Any
) -> Any:
    """The command line of `python -m experiments.<name>`, as an object of a dataclass."""
    program = f"python -m experiments.{name}"
    return tyro.cli(kind, description=description, args=arguments, prog=program, **options)


def _parse_example(
    name: str,
    description: str,
    presets: Mapping[str, A3CConfig],
    defaults: Options,
    arguments: Sequence[str] | None,
) -> tuple[A3CConfig, Options, CompilationCache]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    preset = parser.parse_known_args(arguments)[0].preset
    if preset not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}, got {preset!r}.")
    options = dataclasses.replace(defaults, preset=preset)
    default = Arguments(config=presets[preset], options=options)
    description = f"{description} Presets: {', '.join(presets)}."
    parsed = parse(name, Arguments, description, arguments, default=default)
    return parsed.config, parsed.options, parsed.cache


def _folders(name: str, options: Options, seed: int) -> tuple[Path, Any]:
    """The run folder, new or that of the run to go on with, and the folder of checkpoints in it."""
    if options.resume is not None and options.resume.is_dir():
        if options.run_dir not in (None, options.resume):
            raise ValueError(
                f"run_dir must not be given with a run folder to resume, got {options.run_dir}; resume from a "
                "checkpoint file to go on in a new folder."
            )
        run_dir = options.resume
    else:
        run_dir = make_run_dir(f"{name}-seed{seed}", options.run_dir)
    return run_dir, a3c_jax.CheckpointFolder(
        run_dir / "checkpoints",
        every_seconds=options.checkpoint_seconds,
        every_updates=options.checkpoint_updates,
        keep=options.keep_checkpoints,
    )
