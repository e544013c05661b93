"""What all experiments share: the command line, the run folder, the evaluation, the report."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import experiments
from a3c_jax.config import A3CConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to do around the training itself."""

    preset: str = ""
    """Start from this configuration instead of the first one; the description above names them all."""
    run_dir: Path | None = None
    """Folder to write to; it must not exist. By default a new one under runs/."""
    evaluation_episodes: int = 100
    """Fresh episodes for each evaluation: greedy, sampled and random."""
    progress: bool = True
    """Show a progress bar."""
    resume: Path | None = None
    """Go on from here: a run folder (its latest checkpoint, in the same folder) or a checkpoint file (in a new folder). The configuration is the run's; budgets can be given anew."""
    checkpoint_seconds: float | None = 30.0
    """Save a checkpoint when so many seconds have passed; None does not look at the time."""
    checkpoint_updates: int | None = None
    """Save a checkpoint when so many updates have been made; None does not count them."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints to keep; the one with the highest mean return is kept besides."""
    gif: bool = False
    """Write play.gif, an episode of the trained policy, where gymnax can draw the environment. CartPole and the other classic ones need pygame: pip install -e '.[gif]'."""
    compilation_cache: Path | None = None
    """Folder for compiled programs, so that the next run with the same shapes starts faster. None keeps none."""

    def __post_init__(self) -> None:
        if self.evaluation_episodes < 1:
            raise ValueError(
                f"evaluation_episodes must be >= 1, got {self.evaluation_episodes}; use 100."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of an experiment."""

    config: Annotated[A3CConfig, tyro.conf.arg(name="")]
    options: Annotated[Options, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Options)


def main(
    name: str,
    description: str,
    presets: Mapping[str, A3CConfig],
    *,
    arguments: Sequence[str] | None = None,
    sinks: Sequence[Any] = (),
    **plot_options: Any,
) -> Path:
    """Runs one experiment from its command line.

    Args:
      name: the experiment's name, for its run folder.
      description: what `--help` says first.
      presets: configurations by name that the command line may change; the first one unless `--preset` says
        otherwise.
      arguments: the command line; by default the process's.
      sinks: where rows go besides `metrics.jsonl` and the progress bar.
      **plot_options: options of `experiments.plotting.learning_curve`.

    Returns:
      The run folder.
    """

    preset = _chosen_preset(presets, arguments)

    def parse(config: A3CConfig) -> Arguments:
        return tyro.cli(
            Arguments,
            default=Arguments(config=config, options=Options(preset=preset)),
            description=f"{description} Presets: {', '.join(presets)}.",
            args=arguments,
        )

    try:
        if preset not in presets:
            raise ValueError(f"preset must be one of {', '.join(presets)}, got {preset!r}.")
        parsed = parse(presets[preset])
        from a3c_jax import environments  # after the command line: --help answers at once
        from a3c_jax.checkpoints import CheckpointFolder, check_same_run, find
        from experiments import tasks  # noqa: F401  (registers them)

        config, options, checkpoint = parsed.config, parsed.options, None
        if options.resume is not None:
            checkpoint = find(options.resume)
            config = parse(checkpoint.config).config
            check_same_run(checkpoint.config, config)
        environment = environments.make(config.environment, action_bounds=config.action_bounds)
        if options.resume is not None and checkpoint is not None and options.resume.is_dir():
            run_dir = _continue_in(options.resume, options.run_dir, checkpoint.environment_steps)
        else:
            run_dir = make_run_dir(f"{name}-seed{config.seed}", options.run_dir)
        checkpoints = CheckpointFolder(
            run_dir / "checkpoints",
            every_seconds=options.checkpoint_seconds,
            every_updates=options.checkpoint_updates,
            keep=options.keep_checkpoints,
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    _run(config, options, environment, run_dir, checkpoints, checkpoint, sinks, plot_options)
    return run_dir


def _chosen_preset(presets: Mapping[str, A3CConfig], arguments: Sequence[str] | None) -> str:
    """What `--preset` says, before the rest is parsed with that configuration's values as defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    return parser.parse_known_args(arguments)[0].preset


def _run(
    config: A3CConfig,
    options: Options,
    environment: Any,
    run_dir: Path,
    checkpoints: Any,
    resume: Any,
    sinks: Sequence[Any],
    plot_options: dict[str, Any],
) -> None:
    from a3c_jax import training
    from a3c_jax.metrics import JsonLines, ProgressBar
    from a3c_jax.threads import WorkerError

    if options.compilation_cache is not None:
        _keep_compiled_programs(options.compilation_cache)
    _write_json(run_dir / "config.json", config.as_dict())
    sinks = [*sinks, JsonLines(run_dir / "metrics.jsonl")]
    if options.progress:
        sinks.append(ProgressBar(config.max_steps, config.solved_window, desc=config.environment))
    steps_before = 0 if resume is None else resume.environment_steps
    imported = time.perf_counter() - experiments.STARTED
    try:
        result = training.train(
            config,
            environment=environment,
            sinks=sinks,
            checkpoints=checkpoints,
            resume=resume,
        )
    except training.TrainingInterrupted as interruption:
        _print_training(interruption.result, steps_before)
        print(f"run folder: {run_dir}\ngo on with: python -m {_module()} --resume {run_dir}")
        code = 128 + interruption.signal
        if any(thread.name.startswith("a3c-worker") for thread in threading.enumerate()):
            # A second Ctrl-C: JAX must not be taken down under threads that are still inside it.
            sys.stdout.flush()
            os._exit(code)
        raise SystemExit(code) from None
    except WorkerError as error:
        failure = {
            "error": str(error),
            "worker": error.worker,
            "pulled_version": error.pulled_version,
            "update": error.result.version,
        }
        _write_json(run_dir / "failure.json", failure)
        print(
            f"error: {error}\nrun folder: {run_dir}, with everything up to update "
            f"{error.result.version:,}\nlook at it with: python -m experiments.replay {run_dir}",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    seconds = {
        "import": imported,
        **result.wall_clock,
        "until_trained": time.perf_counter() - experiments.STARTED,
    }
    trained_at = time.time()
    _write_params(run_dir / "final.msgpack", result.params)
    _write_params(run_dir / "best.msgpack", result.best_params)
    np.savez_compressed(run_dir / "episodes.npz", **result.episodes._asdict())

    evaluations = _evaluate(result, options.evaluation_episodes)
    last = result.episodes.episode_return[-config.solved_window :]
    staleness = result.schedule.staleness
    summary = {
        "stop_reason": result.stop_reason,
        "environment_steps": result.environment_steps,
        "overshoot": result.overshoot,
        "episodes": len(result.episodes.episode_return),
        "updates": result.version,
        "skipped_updates": result.skipped,
        "last_mean_return": float(last.mean()) if last.size else None,
        "best_mean_return": result.best_mean_return,
        "mean_staleness": float(staleness.mean()) if staleness.size else None,
        "seconds": seconds,
        "trained_at": trained_at,  # seconds since the epoch, for whoever started this process
        "evaluation": evaluations,
    }
    _write_json(run_dir / "summary.json", summary)
    _print_training(result, steps_before)
    _print_evaluation(seconds, evaluations)

    from experiments.plotting import learning_curve

    learning_curve(
        run_dir / "learning_curve.png",
        result.episodes,
        title=f"A3C on {config.environment}: workers {config.num_workers}, "
        f"environments per worker {config.envs_per_worker}",
        window=config.solved_window,
        random_return=evaluations.get("random", {}).get("mean"),
        **({"solved": config.solved_return} | plot_options),
    )
    if options.gif:
        from experiments.animation import animate

        animate(run_dir / "play.gif", result)
    print(f"run folder: {run_dir}")


def _evaluate(result: Any, num_episodes: int) -> dict[str, dict[str, float]]:
    """The final policy, greedy and sampled, and the random one, over fresh episodes."""
    from a3c_jax import evaluation

    evaluations = {}
    for name, policy in (
        ("greedy", evaluation.greedy_policy(result.network)),
        ("sampled", evaluation.sampled_policy(result.network)),
        ("random", evaluation.random_policy(result.environment)),
    ):
        returns = evaluation.evaluate(
            policy, result.params, result.environment, result.evaluation_key, num_episodes
        ).returns
        evaluations[name] = {
            "mean": float(returns.mean()),
            "std": float(returns.std()),
            "min": float(returns.min()),
            "max": float(returns.max()),
        }
    return evaluations


def make_run_dir(name: str, wanted: Path | None) -> Path:
    """Makes a folder that did not exist before: the one wanted, or a new one under runs/."""
    fresh = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = wanted or Path("runs") / fresh
    for attempt in range(2, 1000):
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            if wanted is not None:
                raise FileExistsError(
                    f"run_dir must not exist, got {run_dir}; choose another name or remove it."
                ) from None
            run_dir = run_dir.with_name(f"{fresh}-{attempt}")
    raise FileExistsError(f"run_dir {run_dir} and all its like exist; give --run-dir.")


def _continue_in(run_dir: Path, wanted: Path | None, environment_steps: int) -> Path:
    """The run folder to go on in, its rows cut back to where the checkpoint stands."""
    if wanted not in (None, run_dir):
        raise ValueError(
            f"run_dir must not be given with a run folder to resume, got {wanted}; resume from a "
            "checkpoint file to go on in a new folder."
        )
    rows = run_dir / "metrics.jsonl"
    if rows.exists():
        kept = []
        for line in rows.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a process that was killed
                if json.loads(line)["environment_steps"] <= environment_steps:
                    kept.append(line + "\n")
        rows.write_text("".join(kept), encoding="utf-8")
    (run_dir / "failure.json").unlink(missing_ok=True)
    return run_dir


def _keep_compiled_programs(folder: Path) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _module() -> str:
    """The module that the user runs, as `python -m` takes it."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else "experiments.cartpole"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_params(path: Path, params: Any) -> None:
    from flax import serialization

    path.write_bytes(serialization.to_bytes(params))


def _print_training(result: Any, steps_before: int) -> None:
    config = result.config
    rate = (result.environment_steps - steps_before) / max(result.wall_clock["train"], 1e-9)
    returns = result.episodes.episode_return
    last = returns[-config.solved_window :]
    skipped = f", of which {result.skipped:,} were skipped" if result.skipped else ""
    print(
        f"\n{config.environment}, seed {config.seed}: stopped by {result.stop_reason} after "
        f"{result.environment_steps:,} steps, {len(returns):,} episodes, {result.version:,} updates{skipped}\n"
        f"  mean return of the last {config.solved_window} episodes: "
        f"{f'{last.mean():.1f}' if last.size else '-'}, "
        f"{rate:,.0f} steps/s, overshoot {result.overshoot:,} steps"
    )


def _print_evaluation(seconds: dict[str, float], evaluations: dict[str, dict[str, float]]) -> None:
    print(
        f"  seconds: import {seconds['import']:.1f} + setup {seconds['setup']:.1f} + compile "
        f"{seconds['compile']:.1f} + train {seconds['train']:.1f} = {seconds['until_trained']:.1f}"
    )
    print("  evaluation       mean     std     min     max")
    for label, e in evaluations.items():
        print(f"  {label:<12} {e['mean']:>8.1f}{e['std']:>8.1f}{e['min']:>8.1f}{e['max']:>8.1f}")
