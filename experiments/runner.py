"""What all experiments share: the command line, the run folder, the evaluation, the report."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import experiments
from a3c_jax.config import A3CConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to do around the training itself."""

    run_dir: Path | None = None
    """Folder to write to; it must not exist. By default a new one under runs/."""
    evaluation_episodes: int = 100
    """Fresh episodes for each evaluation: greedy, sampled and random."""
    progress: bool = True
    """Show a progress bar."""

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
    defaults: A3CConfig,
    *,
    arguments: Sequence[str] | None = None,
    sinks: Sequence[Any] = (),
    **plot_options: Any,
) -> Path:
    """Runs one experiment from its command line.

    Args:
      name: the experiment's name, for its run folder.
      description: what `--help` says first.
      defaults: the configuration that the command line may change.
      arguments: the command line; by default the process's.
      sinks: where rows go besides `metrics.jsonl` and the progress bar.
      **plot_options: options of `experiments.plotting.learning_curve`.

    Returns:
      The run folder.
    """
    try:
        parsed = tyro.cli(
            Arguments, default=Arguments(config=defaults), description=description, args=arguments
        )
        from a3c_jax import environments  # after the command line: --help answers at once

        environment = environments.make(parsed.config.environment)
        run_dir = _make_run_dir(name, parsed.config, parsed.options.run_dir)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    _run(parsed.config, parsed.options, environment, run_dir, sinks, plot_options)
    return run_dir


def _run(
    config: A3CConfig,
    options: Options,
    environment: Any,
    run_dir: Path,
    sinks: Sequence[Any],
    plot_options: dict[str, Any],
) -> None:
    from a3c_jax import training
    from a3c_jax.metrics import JsonLines, ProgressBar

    _write_json(run_dir / "config.json", config.as_dict())
    sinks = [*sinks, JsonLines(run_dir / "metrics.jsonl")]
    if options.progress:
        sinks.append(ProgressBar(config.max_steps, config.solved_window, desc=config.environment))
    imported = time.perf_counter() - experiments.STARTED
    try:
        result = training.train(config, environment=environment, sinks=sinks)
    except training.TrainingInterrupted as interruption:
        result = interruption.result
    seconds = {
        "import": imported,
        **result.wall_clock,
        "until_trained": time.perf_counter() - experiments.STARTED,
    }
    trained_at = time.time()
    _write_params(run_dir / "final.msgpack", result.params)
    _write_params(run_dir / "best.msgpack", result.best_params)
    np.savez_compressed(run_dir / "episodes.npz", **result.episodes._asdict())

    interrupted = result.stop_reason == "interrupted"
    evaluations = {} if interrupted else _evaluate(result, options.evaluation_episodes)
    last = result.episodes.episode_return[-config.solved_window :]
    staleness = result.schedule.staleness
    summary = {
        "stop_reason": result.stop_reason,
        "environment_steps": result.environment_steps,
        "overshoot": result.overshoot,
        "episodes": len(result.episodes.episode_return),
        "updates": result.version,
        "last_mean_return": float(last.mean()) if last.size else None,
        "best_mean_return": result.best_mean_return,
        "mean_staleness": float(staleness.mean()) if staleness.size else None,
        "seconds": seconds,
        "trained_at": trained_at,  # seconds since the epoch, for whoever started this process
        "evaluation": evaluations,
    }
    _write_json(run_dir / "summary.json", summary)
    _print(summary, config)

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
    print(f"run folder: {run_dir}")
    if interrupted:
        raise SystemExit(130)


def _evaluate(result: Any, num_episodes: int) -> dict[str, dict[str, float]]:
    """The final policy, greedy and sampled, and the random one, over fresh episodes."""
    from a3c_jax import evaluation

    evaluations = {}
    for name, policy in (
        ("greedy", evaluation.greedy_policy(result.network)),
        ("sampled", evaluation.sampled_policy(result.network)),
        ("random", evaluation.random_policy(result.environment.num_actions)),
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


def _make_run_dir(name: str, config: A3CConfig, wanted: Path | None) -> Path:
    """Makes a folder that did not exist before."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = wanted or Path("runs") / f"{name}-seed{config.seed}-{stamp}"
    for attempt in range(2, 1000):
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            if wanted is not None:
                raise FileExistsError(
                    f"run_dir must not exist, got {run_dir}; choose another name or remove it."
                ) from None
            run_dir = run_dir.with_name(f"{name}-seed{config.seed}-{stamp}-{attempt}")
    raise FileExistsError(f"run_dir {run_dir} and all its like exist; give --run-dir.")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_params(path: Path, params: Any) -> None:
    from flax import serialization

    path.write_bytes(serialization.to_bytes(params))


def _print(summary: dict[str, Any], config: A3CConfig) -> None:
    seconds = summary["seconds"]
    rate = summary["environment_steps"] / max(seconds["train"], 1e-9)
    mean = summary["last_mean_return"]
    print(
        f"\n{config.environment}, seed {config.seed}: stopped by {summary['stop_reason']} after "
        f"{summary['environment_steps']:,} steps, {summary['episodes']:,} episodes, "
        f"{summary['updates']:,} updates\n"
        f"  mean return of the last {config.solved_window} episodes: "
        f"{'-' if mean is None else f'{mean:.1f}'}"
        f", {rate:,.0f} steps/s, overshoot {summary['overshoot']:,} steps\n"
        f"  seconds: import {seconds['import']:.1f} + setup {seconds['setup']:.1f} + compile "
        f"{seconds['compile']:.1f} + train {seconds['train']:.1f} = {seconds['until_trained']:.1f}"
    )
    if summary["evaluation"]:
        print("  evaluation       mean     std     min     max")
    for label, e in summary["evaluation"].items():
        print(f"  {label:<12} {e['mean']:>8.1f}{e['std']:>8.1f}{e['min']:>8.1f}{e['max']:>8.1f}")
