"""Evaluate what a run has learnt, in fresh episodes: `python -m experiments.evaluate runs/...`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

import a3c_jax
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to evaluate."""

    run: tyro.conf.Positional[Path]
    """The run folder, or one of its checkpoints."""
    episodes: int = 100
    """How many fresh episodes to play with each policy."""
    best: bool = False
    """Evaluate the parameters at the highest mean return instead of the last ones."""
    gif: Path | None = None
    """Write an episode of the policy to this file: greedy, or sampled if the environment is Gymnasium's or Atari's. It needs an environment that can be drawn."""
    cache: Annotated[CompilationCache, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=CompilationCache
    )


def main(arguments: Sequence[str] | None = None, **objects: Any) -> None:
    """Prints the returns of the greedy, the sampled and the random policy.

    Args:
      arguments: the command line; by default that of the process.
      **objects: the environment or the network, if the run was given an object instead of a name.
    """
    with exit_on_bad_input():
        parsed = parse("evaluate", Arguments, __doc__, arguments)
        from experiments import tasks  # noqa: F401 (registers its environments)

        parsed.cache.use()
        run = a3c_jax.load(parsed.run, **objects)
        if parsed.best:
            run = run._replace(params=run.best_params)
        from experiments.report import evaluate_policies, print_evaluation

        evaluations = evaluate_policies(run, parsed.episodes)
    which = "best parameters" if parsed.best else f"parameters of update {run.checkpoint.version:,}"
    print(f"{run.environment.name}, {which}, {parsed.episodes} episodes for each policy")
    print_evaluation(evaluations)
    if parsed.gif is not None:
        from experiments.animation import animate

        animate(parsed.gif, run)


if __name__ == "__main__":
    main()
