"""Train an example with every combination of some values, with several seeds each.

    python -m experiments.sweep cartpole --learning-rate 1e-3 2e-3 4e-3 --seeds 10

The first argument names the example, or one of its presets: `minatar:breakout`. Every field of the configuration
takes one value or several. Runs go on side by side in processes of their own, and each leaves a run folder. At the
end come a table and a picture. A sweep that was interrupted or killed goes on with --resume.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import signal
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import tyro

from a3c_jax.asynchrony.signals import number_of
from a3c_jax.config import A3CConfig, available_cores
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.run_folder import make_run_dir, read_json, write_json
from experiments.sweep_processes import Run, group_by_program, run_all

EXAMPLES = ("article", "cartpole", "memory", "minatar", "pendulum", "q_learning")

_WIDTHS = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT[xINT...]",
    instance_from_str=lambda texts: tuple(int(width) for width in texts[0].split("x")),
    is_instance=lambda widths: isinstance(widths, tuple),
    str_from_instance=lambda widths: [_as_text(widths)],
)
"""How the widths of several layers are written as one word, 64x64, so that several of them can follow each other."""


def _fields_of_grid() -> Iterator[tuple[str, Any, Any]]:
    """The fields of the configuration, each with several values. The seed is missing, because it has its own options."""
    kinds: dict[str, Any] = typing.get_type_hints(A3CConfig)
    for name, kind in kinds.items():
        if name != "seed":
            value: Any = Annotated[kind, _WIDTHS] if name == "hidden_sizes" else kind
            yield name, tuple[value, ...], dataclasses.field(default=(getattr(A3CConfig(), name),))


Grid: Any = dataclasses.make_dataclass(
    "Grid", _fields_of_grid(), frozen=True, kw_only=True, namespace={"__doc__": A3CConfig.__doc__}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to run."""

    example: tyro.conf.Positional[str] = ""
    """Name of an example, or example:preset. Its values are the defaults of all other options. Only the number of workers is always 2, the smallest that is asynchronous, so that the results do not depend on the number of cores."""
    seeds: int = 5
    """Number of runs with each configuration."""
    first_seed: int = 0
    """The first run's seed. The others follow it."""
    processes: int | None = None
    """Number of runs at the same time. None takes as many as there are cores for their workers."""
    run_dir: Path | None = None
    """Folder for the results. By default a new one under runs/. If it holds the same sweep already, that one goes on."""
    resume: Path | None = None
    """Go on with the sweep in this folder. Runs that were cut short go on from their checkpoints; runs that failed are not repeated. What to run is known, so that no example, no seeds and no fields can be given."""
    progress: bool = True
    """Show a progress bar."""
    grid: Annotated[Any, tyro.conf.arg(name="", constructor=Grid)] = dataclasses.field(
        default_factory=Grid
    )
    cache: Annotated[CompilationCache, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=CompilationCache
    )

    def __post_init__(self) -> None:
        for name in ("seeds", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}; use 1 or more.")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs what is missing of a sweep, and shows what all its runs reached; returns the folder.

    Args:
      arguments: the command line; by default that of the process.
    """
    with exit_on_bad_input():
        parsed = _parse(sys.argv[1:] if arguments is None else arguments)
        sweep_dir = _folder(parsed)
        runs = plan(read_json(sweep_dir / "sweep.json") or {}, sweep_dir)
    workers = max(run.config.num_workers for run in runs)
    processes = parsed.processes or max(1, available_cores() // workers)
    go_on = f"go on with: python -m experiments.sweep --resume {sweep_dir}"
    try:
        _run(runs, processes, parsed)
    except KeyboardInterrupt as interruption:
        print(f"\ninterrupted; {go_on}", file=sys.stderr)
        raise SystemExit(128 + number_of(interruption)) from None
    from experiments import sweep_report

    print(sweep_report.table(runs))
    if sweep_report.draw(runs, sweep_dir / "curves.png"):
        print(f"picture: {sweep_dir / 'curves.png'}")
    print(f"folder: {sweep_dir}")
    missing = sum(not (run.has_ended or run.has_failed) for run in runs)
    if missing:
        print(f"{missing} of {len(runs)} runs are missing; {go_on}", file=sys.stderr)
        raise SystemExit(1)
    return sweep_dir


def _parse(arguments: Sequence[str]) -> Arguments:
    """The command line. The example, which comes first, decides over the defaults of all other options."""
    default = Arguments()
    if arguments and not arguments[0].startswith("-"):
        default = Arguments(example=arguments[0], grid=_grid_of(arguments[0]))
    parsed = parse("sweep", Arguments, __doc__, arguments, default=default)
    if not arguments or (parsed.resume is None and parsed.example != default.example):
        raise ValueError(f"an example must come first; give one of {', '.join(EXAMPLES)}.")
    if parsed.resume is not None:
        for name in ("example", "seeds", "first_seed", "run_dir", "grid"):
            if getattr(parsed, name) != getattr(Arguments(), name):
                raise ValueError(
                    f"{name} must not be given with resume, which has it; leave it out."
                )
    return parsed


def _grid_of(example: str) -> Any:
    """The values of an example, `name` or `name:preset`: one for each field."""
    name, _, preset = example.partition(":")
    if name not in EXAMPLES:
        raise ValueError(f"example must be one of {', '.join(EXAMPLES)}, got {name!r}.")
    module = importlib.import_module(f"experiments.{name}")
    presets = getattr(module, "PRESETS", None) or {name: module.DEFAULTS}
    preset = preset or next(iter(presets))
    if preset not in presets:
        raise ValueError(f"the preset must be one of {', '.join(presets)}, got {preset!r}.")
    config = dataclasses.replace(presets[preset], num_workers=2)
    return Grid(**{field: (getattr(config, field),) for field in Grid.__dataclass_fields__})


def _folder(parsed: Arguments) -> Path:
    """The folder of the sweep: the one to go on with, or a new one with what was asked for, if that can be run.

    Raises:
      ValueError, TypeError: if a combination of values is no configuration, or does not fit its environment.
      OSError: if the folder to go on with holds no sweep, or if the one wanted holds something else.
    """
    if parsed.resume is not None:
        asked = read_json(parsed.resume / "sweep.json")
        if asked is None or not asked.keys() >= {"example", "seeds", "first_seed", "grid"}:
            raise FileNotFoundError(
                f"resume must be the folder of a sweep, got {parsed.resume}, which has no sweep.json that can be read; "
                "give a folder that python -m experiments.sweep has made."
            )
        return parsed.resume
    asked = {name: getattr(parsed, name) for name in ("example", "seeds", "first_seed")}
    asked = json.loads(json.dumps(asked | {"grid": dataclasses.asdict(parsed.grid)}))
    request = None if parsed.run_dir is None else parsed.run_dir / "sweep.json"
    if request is not None and request.exists() and read_json(request) == asked:
        return request.parent
    _check_programs(plan(asked, Path()))
    sweep_dir = make_run_dir(f"sweep-{parsed.example.replace(':', '-')}", parsed.run_dir)
    write_json(sweep_dir / "sweep.json", asked)
    return sweep_dir


def plan(asked: Mapping[str, Any], sweep_dir: Path) -> list[Run]:
    """All runs of a sweep, each in a folder that is named after the values in which it differs from the others.

    Raises:
      ValueError, TypeError: if a combination of values is no configuration.
    """
    grid = {
        name: list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in values))
        for name, values in asked["grid"].items()
    }
    varied = [name for name, values in grid.items() if len(values) > 1]
    runs = []
    for values in itertools.product(*grid.values()):
        fields = dict(zip(grid, values, strict=True))
        differing = [f"{name}={_as_text(fields[name])}" for name in varied]
        folder = sweep_dir / quote(",".join(differing), safe="=,+")
        for seed in range(asked["first_seed"], asked["first_seed"] + asked["seeds"]):
            config = A3CConfig(**fields, seed=seed)
            label = ", ".join(differing) or asked["example"]
            runs.append(Run(label, config, folder / f"seed{seed}"))
    if not runs:
        raise ValueError("each field must have at least one value, got none; leave the option out.")
    return runs


def _as_text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_programs(runs: Sequence[Run]) -> None:
    """Refuses configurations that do not fit their environments."""
    from a3c_jax.blueprint import make_blueprint
    from experiments import tasks  # noqa: F401 (registers its environments)

    for group in group_by_program(runs):
        make_blueprint(group[0].config)


def _run(runs: Sequence[Run], processes: int, parsed: Arguments) -> None:
    """Runs what has neither ended nor failed, and shows how far it is."""
    from tqdm import tqdm

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    waiting = [run for run in runs if not (run.has_ended or run.has_failed)]
    before = len(runs) - len(waiting)
    usual = signal.signal(signal.SIGTERM, interrupt)
    try:
        with (
            tqdm(total=len(runs), initial=before, unit=" runs", disable=not parsed.progress) as bar,
            contextlib.closing(run_all(waiting, processes, parsed.cache.use())) as over,  # type: ignore[type-var]
        ):
            for run, error in over:
                bar.set_postfix_str(f"{run.label}, seed {run.config.seed}", refresh=False)
                bar.update()
                if error is not None:
                    bar.write(f"failed: {run.folder}: {error}", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, usual)


if __name__ == "__main__":
    main()
