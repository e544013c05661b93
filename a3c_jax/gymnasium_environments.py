"""Gymnasium's and Atari's environments by name: `gymnasium:LunarLander-v3`, `ale:Pong`."""

import difflib
import functools
import inspect
import numbers
from typing import Any

from a3c_jax.host_environment import HostEnvironment, check_option
from a3c_jax.names import import_named, parse_name

_OWN_OPTIONS = ("life_loss", "step_seconds", "episodes_per_seed")
_ALE_SIZES = ("img_height", "img_width", "stack_num", "frameskip", "max_num_frames_per_episode")
_ALE_LEAST = dict.fromkeys(_ALE_SIZES, 1) | {"noop_max": 0}
_ALE_OPTIONS: dict[str, Any] = {
    "reward_clipping": False,
    "num_threads": 1,
    "autoreset_mode": "NextStep",
}
_ALE_EPISODES_PER_SEED = 16
"""Of how many episodes one begins with a seed. ale-py loads the game anew for it, which takes as long as 20 resets without."""
_ALE_REMEMBERS = (
    "hangman", "haunted_house", "ice_hockey", "sir_lancelot", "space_war", "surround", "time_pilot",
    "yars_revenge",
)  # fmt: skip
"""Games in which something of one episode is left in the next, after a reset without a seed."""


def make_host_environment(name: str, action_bounds: str = "clip", **params: Any) -> HostEnvironment:
    """Makes an environment of Gymnasium or of the Arcade Learning Environment.

    >>> make_host_environment("gymnasium:CartPole-v1").observation_shape
    (4,)

    Args:
      name: `gymnasium:` and an id that `gymnasium.make_vec` knows, which may begin with the module that registers it,
        as in `gymnasium:my.module:Maze-v0`. Parameters may follow as in a URL; they are `make_vec`'s. Or `ale:` and
        the name of a game, as in `ale:SpaceInvaders?size=42`, with the parameters of ale-py's `AtariVectorEnv`,
        `size` for both `img_height` and `img_width`, and `life_loss=True` to let the loss of a life count as a
        termination for learning. Rewards are never clipped by the environment, so that reported returns are the
        game's own; `A3CConfig.reward_clip` clips them for learning. Both take `step_seconds` and `episodes_per_seed`
        (`a3c_jax.host_environment`). Games without sticky actions, but for eight, have 16 `episodes_per_seed`, and all else has 1.
      action_bounds: how continuous actions are fitted into their bounds, `clip` or `tanh`.
      **params: more of these parameters.

    Raises:
      ValueError: if there is no such environment or parameter, or if the library that it needs is not installed.
    """
    library, _, rest = name.partition(":")
    module, base, named = parse_name("environment", rest, "gymnasium:LunarLander-v3?gravity=-9.0")
    params = named | params
    own = {key: params.pop(key) for key in _OWN_OPTIONS if key in params}
    if library == "ale":
        game, arguments = _ale_arguments(name, module, base, params)
        own = {"episodes_per_seed": _ale_episodes_per_seed(game, arguments)} | own
        make = functools.partial(_make_atari, name, game, arguments)
    else:
        make = functools.partial(_make_gymnasium, name, module, base, params)
    return HostEnvironment(name, make, action_bounds=action_bounds, **own)


def _make_gymnasium(
    name: str, module: str, base: str, params: dict[str, Any], num_envs: int
) -> Any:
    import gymnasium

    if module:  # each time, because it may be another process
        import_named("environment", name, module)
    try:
        return _make_vector(base, params, num_envs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(
            f"environment {name!r} needs a library that is not installed ({error}); run pip install "
            "-e '.[gymnasium]', or install that library."
        ) from error
    except Exception as error:  # environments check their arguments in many ways
        known = gymnasium.registry
        near = [] if base in known else difflib.get_close_matches(base, known, cutoff=0.6)
        raise ValueError(
            f"environment {name!r} cannot be made by gymnasium.make_vec: {_in_one_line(error)}"
            + (f"; did you mean {' or '.join(f'gymnasium:{n}' for n in near)}?" if near else "")
        ) from error


def _make_vector(base: str, params: dict[str, Any], num_envs: int) -> Any:
    import gymnasium
    from gymnasium.vector import AutoresetMode

    spec, options = gymnasium.spec(base), dict(params)
    mode = options.get("vectorization_mode")
    if mode == "vector_entry_point" or (mode is None and spec.vector_entry_point):
        # ale-py's clips rewards if it is not told otherwise.
        unclipped = {"reward_clipping": False} if spec.namespace == "ALE" else {}
        # Its own class seldom checks this, as gymnasium does for single environments.
        steps = options.get("max_episode_steps", 1)
        if not isinstance(steps, numbers.Integral) or steps < 1:
            raise ValueError(f"max_episode_steps must be a positive integer, got {steps!r}")
        return gymnasium.make_vec(base, num_envs, **unclipped | options)
    kwargs = {"autoreset_mode": AutoresetMode.DISABLED} | options.pop("vector_kwargs", {})
    return gymnasium.make_vec(base, num_envs, vector_kwargs=kwargs, **options)


def _ale_arguments(
    name: str, module: str, base: str, params: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The game, and what ale-py's vector is made with."""
    try:
        from ale_py import roms
        from ale_py.vector_env import AtariVectorEnv
    except ImportError as error:
        raise ValueError(
            f"environment {name!r} needs ale-py, which is not installed; run pip install -e '.[atari]'."
        ) from error
    known = {_plain(rom): rom for rom in roms.get_all_rom_ids()}
    if module or _plain(base) not in known:
        near = difflib.get_close_matches(_plain(base), known, cutoff=0.5)
        raise ValueError(
            f"environment must name a game of ale-py, got {name!r}; "
            f"did you mean {' or '.join(f'ale:{known[k]}' for k in near) or 'ale:pong'}?"
        )
    options = dict(params)
    size = options.pop("size", 84)
    options = {"img_height": size, "img_width": size} | options
    accepted = {*inspect.signature(AtariVectorEnv).parameters} - {
        "game", "num_envs", "reward_clipping", "autoreset_mode", "batch_size", "life_loss_info", "episodic_life",
    }  # fmt: skip
    unknown = sorted({*options} - accepted)
    if unknown:
        raise ValueError(
            f"environment {name!r} takes size, {', '.join([*_OWN_OPTIONS, *sorted(accepted)])}, got "
            f"{', '.join(unknown)}; "
            + ("use life_loss." if unknown == ["episodic_life"] else "leave it out.")
        )
    game, arguments = known[_plain(base)], _ALE_OPTIONS | options
    _check_ale(name, arguments)
    return game, arguments


def _ale_episodes_per_seed(game: str, arguments: dict[str, Any]) -> int:
    # With sticky actions, how many random numbers an episode takes depends on how long it is.
    if game in _ALE_REMEMBERS or arguments.get("repeat_action_probability", 0) > 0:
        return 1
    return _ALE_EPISODES_PER_SEED


def _check_ale(name: str, arguments: dict[str, Any]) -> None:
    """Refuses numbers at which the emulator crashes, or never returns from a step."""
    check = functools.partial(check_option, name)
    for key, least in _ALE_LEAST.items():
        value = arguments.get(key, least)
        is_right = isinstance(value, int) and value >= least
        check(key, value, is_right, f"an integer of at least {least}")
    value = arguments.get("repeat_action_probability", 0)
    is_right = isinstance(value, int | float) and 0 <= value <= 1
    check("repeat_action_probability", value, is_right, "in [0, 1]")
    value = arguments.get("max_num_frames_per_episode", 108_000)
    is_right = value > 2 * arguments.get("noop_max", 30)
    check("max_num_frames_per_episode", value, is_right, "larger than twice noop_max")


def _make_atari(name: str, game: str, arguments: dict[str, Any], num_envs: int) -> Any:
    from ale_py.vector_env import AtariVectorEnv

    try:
        return AtariVectorEnv(game, num_envs, **arguments)
    except Exception as error:
        raise ValueError(
            f"environment {name!r} cannot be made by ale-py: {_in_one_line(error)}"
        ) from error


def _in_one_line(error: Exception) -> str:
    """What an error says first."""
    return str(error).strip().partition("\n")[0]


def _plain(game: str) -> str:
    """A game's name without what people write differently: `SpaceInvaders`, `space-invaders`, `space_invaders`."""
    return "".join(filter(str.isalnum, game)).lower()
