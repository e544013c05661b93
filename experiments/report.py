"""What a finished run leaves in its folder: parameters, evaluation, summary, picture."""

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

import a3c_jax
import experiments
from a3c_jax.asynchrony.evaluation import Policy
from a3c_jax.asynchrony.signals import number_of, raise_noted
from a3c_jax.asynchrony.whole_files import writing_whole
from a3c_jax.host_environment import HostEnvironment
from experiments.aggregate import decimals
from experiments.run_folder import print_training, write_json

Evaluations = dict[str, dict[str, float]]


def report(
    result: a3c_jax.TrainResult,
    run_dir: Path,
    *,
    evaluation_episodes: int,
    gif: bool,
    import_seconds: float,
    steps_before: int,
    plot_options: Mapping[str, Any],
) -> None:
    """Saves the parameters, evaluates them, writes and prints the summary, draws the learning curve.

    Args:
      result: what `a3c_jax.train` returned.
      run_dir: where all of it goes.
      evaluation_episodes: how many each policy plays.
      gif: whether to write play.gif as well.
      import_seconds: how long the imports took.
      steps_before: the environment steps of the run that this one went on with.
      plot_options: options of `experiments.plotting.learning_curve`.
    """
    seconds = {
        "import": import_seconds,
        **result.wall_clock,
        "until_trained": time.perf_counter() - experiments.STARTED,
    }
    trained_at = time.time()  # seconds since the epoch, for whoever started this process
    summary = summarize(result) | {"seconds": seconds, "trained_at": trained_at}
    print_training(result, steps_before)
    parts = {name: seconds[name] for name in ("import", "setup", "compile", "train")}
    parts["other"] = max(0.0, seconds["until_trained"] - sum(parts.values()))
    terms = " + ".join(f"{name} {part:.1f}" for name, part in parts.items())
    print(f"  seconds: {terms} = {seconds['until_trained']:.1f}")
    writer = _Writer(run_dir)
    # Before the evaluation, so that they are there if that is interrupted.
    writer.write(lambda: save_params(result, run_dir))
    writer.write(lambda: write_json(run_dir / "summary.json", summary))
    # Loading what draws the picture takes as long as compiling an evaluation.
    threading.Thread(target=importlib.import_module, args=["experiments.plotting"]).start()
    with _saying_what_is_saved(run_dir):
        evaluations = evaluate_policies(result, evaluation_episodes)
        print_evaluation(evaluations)
        writer.write(lambda: _draw(result, run_dir, evaluations, plot_options))
        if gif:
            from experiments.animation import animate

            writer.write(lambda: animate(run_dir / "play.gif", result))
        raise_noted()
    writer.write(
        lambda: write_json(run_dir / "summary.json", summary | {"evaluation": evaluations})
    )
    writer.end()
    print(f"run folder: {run_dir}")


class _Writer:
    """Writes one thing after the other to the run folder, and notes what cannot be written."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lost: list[tuple[Callable[[], Any], OSError]] = []

    def write(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            self._lost.append((write, error))

    def end(self) -> None:
        """Tries once more to write what could not be written, and ends the process if something is lost.

        Raises:
          SystemExit: with exit code 1.
        """
        before, self._lost = self._lost, []
        for write, _ in before:
            self.write(write)
        if self._lost:
            problems = "; ".join(dict.fromkeys(str(error) for _, error in self._lost))
            print(
                f"error: not everything could be written to {self._run_dir}: {problems}\n"
                "Checkpoints that were written hold the parameters: python -m experiments.evaluate "
                f"{self._run_dir}",
                file=sys.stderr,
            )
            raise SystemExit(1)


@contextlib.contextmanager
def _saying_what_is_saved(run_dir: Path) -> Iterator[None]:
    """Adds to an interruption in the block that the training is done."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(
            number_of(interruption),
            f"the training is done, and what it has learnt is in {run_dir}",
            f"evaluate it with: python -m experiments.evaluate {run_dir}",
        ) from None


def save_params(result: a3c_jax.TrainResult, run_dir: Path) -> None:
    """Saves the final and the best parameters."""
    for name, params in (("final", result.params), ("best", result.best_params)):
        with writing_whole(run_dir / f"{name}.msgpack") as file:
            file.write(serialization.to_bytes(params))


def evaluate_policies(
    result: "a3c_jax.TrainResult | a3c_jax.LoadedRun", num_episodes: int
) -> Evaluations:
    """The returns of the final policy, greedy and sampled, and of the random one, over fresh episodes."""
    environment: Any = result.environment
    policies = {
        "greedy": a3c_jax.greedy_policy(result.network),
        "sampled": a3c_jax.sampled_policy(result.network),
        "random": a3c_jax.random_policy(environment),
    }

    def play(policy: Policy, num_episodes: int) -> np.ndarray:
        raise_noted()
        return a3c_jax.evaluate(
            policy, result.params, environment, result.evaluation_key, num_episodes
        ).returns

    if isinstance(environment, HostEnvironment):
        returns = [play(policy, num_episodes) for policy in policies.values()]
    else:  # as one program, because compiling takes longer than playing
        beside = _side_by_side(list(policies.values()))
        returns = np.split(play(beside, num_episodes * len(policies)), len(policies))
    raise_noted()
    return {
        name: {of: float(getattr(own, of)()) for of in ("mean", "std", "min", "max")}
        for name, own in zip(policies, returns, strict=True)
    }


def _side_by_side(policies: Sequence[Policy]) -> Policy:
    """A policy by which the first environments are played by the first policy, as many by the second, and so on."""

    def act(params: Any, key: Any, observation: Any, carries: Any) -> tuple[Any, Any]:
        each = len(jax.tree.leaves(observation)[0]) // len(policies)
        actions, new_carries = [], []
        for n, (policy, carry) in enumerate(zip(policies, carries, strict=True)):
            own = jax.tree.map(lambda x, n=n: x[n * each : (n + 1) * each], observation)
            action, carry = policy.act(params, key, own, carry)
            actions.append(action)
            new_carries.append(carry)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *actions), new_carries

    return Policy(
        act, lambda num_envs: [p.initialize_carry(num_envs // len(policies)) for p in policies]
    )


def summarize(result: a3c_jax.TrainResult) -> dict[str, Any]:
    """The figures of a run, as plain values."""
    last = result.episodes.episode_return[-result.config.solved_window :]
    staleness, _ = result.schedule.summarize_staleness()
    return {
        "stop_reason": result.stop_reason,
        "environment_steps": result.environment_steps,
        "overshoot": result.overshoot,
        "episodes": len(result.episodes.episode_return),
        "updates": result.version,
        "skipped_updates": result.skipped,
        "last_mean_return": float(last.mean()) if last.size else None,
        "best_mean_return": result.best_mean_return,
        "mean_staleness": staleness / result.version if result.version else None,
    }


def print_evaluation(evaluations: Evaluations) -> None:
    """Prints a table with a row for each policy."""
    columns = ("mean", "std", "min", "max")
    digits = decimals([e[of] for e in evaluations.values() for of in columns])
    print("  evaluation   " + "".join(f"{of:>8}" for of in columns))
    for label, e in evaluations.items():
        print(f"  {label:<13}" + "".join(f"{e[of]:>8.{digits}f}" for of in columns))


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
