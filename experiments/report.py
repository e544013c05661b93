"""What a finished run leaves in its folder: parameters, evaluation, summary, picture."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

import a3c_jax
import experiments
from experiments.command_line import Options
from experiments.run_folder import write_json

Evaluations = dict[str, dict[str, float]]


def report(
    result: a3c_jax.TrainResult,
    run_dir: Path,
    options: Options,
    import_seconds: float,
    steps_before: int,
    plot_options: Mapping[str, Any],
) -> None:
    """Saves the parameters, evaluates them, writes and prints the summary, draws the learning curve.

    Args:
      result: what `a3c_jax.train` returned.
      run_dir: where all of it goes.
      options: of the command line.
      import_seconds: how long the imports took.
      steps_before: the environment steps of the run that this one went on with.
      plot_options: options of `experiments.plotting.learning_curve`.
    """
    seconds = {
        "import": import_seconds,
        **result.wall_clock,
        "until_trained": time.perf_counter() - experiments.STARTED,
    }
    trained_at = time.time()
    save_arrays(result, run_dir)
    evaluations = evaluate_policies(result, options.evaluation_episodes)
    summary = summarize(result) | {
        "seconds": seconds,
        "trained_at": trained_at,  # seconds since the epoch, for whoever started this process
        "evaluation": evaluations,
    }
    write_json(run_dir / "summary.json", summary)
    print_training(result, steps_before)
    parts = " + ".join(f"{n} {seconds[n]:.1f}" for n in ("import", "setup", "compile", "train"))
    print(f"  seconds: {parts} = {seconds['until_trained']:.1f}")
    print_evaluation(evaluations)
    _draw(result, run_dir, evaluations, plot_options)
    if options.gif:
        from experiments.animation import animate

        animate(run_dir / "play.gif", result)
    print(f"run folder: {run_dir}")


def save_arrays(result: a3c_jax.TrainResult, run_dir: Path) -> None:
    """Saves the final and the best parameters, and every episode."""
    for name, params in (("final", result.params), ("best", result.best_params)):
        (run_dir / f"{name}.msgpack").write_bytes(serialization.to_bytes(params))
    np.savez_compressed(run_dir / "episodes.npz", **result.episodes._asdict())


def evaluate_policies(
    result: "a3c_jax.TrainResult | a3c_jax.LoadedRun", num_episodes: int
) -> Evaluations:
    """The returns of the final policy, greedy and sampled, and of the random one, over fresh episodes."""
    evaluations = {}
    environment: Any = result.environment
    for name, policy in (
        ("greedy", a3c_jax.greedy_policy(result.network)),
        ("sampled", a3c_jax.sampled_policy(result.network)),
        ("random", a3c_jax.random_policy(environment)),
    ):
        returns = a3c_jax.evaluate(
            policy, result.params, environment, result.evaluation_key, num_episodes
        ).returns
        evaluations[name] = {
            statistic: float(getattr(returns, statistic)())
            for statistic in ("mean", "std", "min", "max")
        }
    return evaluations


def summarize(result: a3c_jax.TrainResult) -> dict[str, Any]:
    """The figures of a run, as plain values."""
    last = result.episodes.episode_return[-result.config.solved_window :]
    staleness = result.schedule.staleness
    return {
        "stop_reason": result.stop_reason,
        "environment_steps": result.environment_steps,
        "overshoot": result.overshoot,
        "episodes": len(result.episodes.episode_return),
        "updates": result.version,
        "skipped_updates": result.skipped,
        "last_mean_return": float(last.mean()) if last.size else None,
        "best_mean_return": result.best_mean_return,
        "mean_staleness": float(staleness.mean()) if staleness.size else None,
    }


def print_training(result: a3c_jax.TrainResult, steps_before: int = 0) -> None:
    """Prints why a run ended, and the mean return of its last episodes."""
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


def print_evaluation(evaluations: Evaluations) -> None:
    """Prints a table with a row for each policy."""
    print("  evaluation       mean     std     min     max")
    for label, e in evaluations.items():
        print(f"  {label:<12} {e['mean']:>8.1f}{e['std']:>8.1f}{e['min']:>8.1f}{e['max']:>8.1f}")


def _draw(
    result: a3c_jax.TrainResult,
    run_dir: Path,
    evaluations: Evaluations,
    plot_options: Mapping[str, Any],
) -> None:
    from experiments.plotting import learning_curve

    config = result.config
    learning_curve(
        run_dir / "learning_curve.png",
        result.episodes,
        title=f"A3C on {config.environment}: workers {config.num_workers}, "
        f"environments per worker {config.envs_per_worker}",
        window=config.solved_window,
        random_return=evaluations["random"]["mean"],
        **{"solved": config.solved_return, **plot_options},
    )
