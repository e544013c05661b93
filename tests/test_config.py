"""A3CConfig: every rule, every message, and that no JAX work happens at import."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

from a3c_jax.config import (
    OPTIMIZER_FIELDS,
    TRACEABLE,
    A3CConfig,
    available_cores,
    changes_needing_compilation,
    is_same_optimizer,
)

NAN, INFINITY = math.nan, math.inf

WRONG_VALUES = [
    ("seed", -1),
    ("seed", 2**32),
    ("num_workers", 0),
    ("num_workers", -3),
    ("envs_per_worker", 0),
    ("t_max", 0),
    ("t_max", -5),
    ("solved_window", 0),
    ("max_steps", 0),
    ("max_episodes", 0),
    ("max_episodes", -1),
    ("discount", 1.5),
    ("discount", -0.1),
    ("discount", NAN),
    ("critic_cost", -0.5),
    ("critic_cost", INFINITY),
    ("entropy_cost", -0.01),
    ("entropy_cost", NAN),
    ("learning_rate", 0.0),
    ("learning_rate", -1e-3),
    ("learning_rate", NAN),
    ("learning_rate", INFINITY),
    ("adam_epsilon", 0.0),
    ("adam_epsilon", -1e-5),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("rmsprop_decay", 1.0),
    ("rmsprop_decay", -0.1),
    ("rmsprop_epsilon", 0.0),
    ("rmsprop_epsilon", -1e-5),
    ("max_gradient_norm", 0.0),
    ("max_gradient_norm", -1.0),
    ("max_gradient_norm", INFINITY),
    ("terminal_reward", NAN),
    ("terminal_reward", -INFINITY),
    ("solved_return", NAN),
    ("solved_return", INFINITY),
    ("optimizer", "adamw"),
    ("optimizer", "Adam"),
    ("learning_rate_schedule", "cosine"),
    ("activation", "sigmoid"),
    ("environment", ""),
    ("hidden_sizes", (128, 0)),
    ("hidden_sizes", (-1,)),
]

WRONG_TYPES = [
    ("seed", 1.0),
    ("seed", None),
    ("num_workers", True),
    ("num_workers", 2.0),
    ("num_workers", "4"),
    ("envs_per_worker", False),
    ("t_max", 5.0),
    ("t_max", None),
    ("solved_window", 100.0),
    ("max_steps", 1e6),
    ("max_steps", True),
    ("max_episodes", 10.0),
    ("discount", "0.99"),
    ("discount", True),
    ("critic_cost", None),
    ("entropy_cost", "none"),
    ("learning_rate", "1e-3"),
    ("learning_rate", None),
    ("momentum", None),
    ("rmsprop_decay", True),
    ("adam_epsilon", None),
    ("rmsprop_epsilon", "small"),
    ("max_gradient_norm", "0.5"),
    ("max_gradient_norm", True),
    ("terminal_reward", "-1"),
    ("solved_return", True),
    ("environment", None),
    ("environment", 3),
    ("shared_torso", 1),
    ("shared_torso", None),
    ("hidden_sizes", 128),
    ("hidden_sizes", "128"),
]


def message(field: str, value: object) -> str:
    """The form of every message: field, rule, value, remedy."""
    return rf"^A3CConfig\.{field} must .+, got {re.escape(repr(value))}; use .+\.$"


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES)
def test_a_value_that_breaks_its_rule_raises_value_error_with_a_remedy(field, value):
    with pytest.raises(ValueError, match=message(field, value)):
        A3CConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_a_value_of_the_wrong_type_raises_type_error_with_a_remedy(field, value):
    with pytest.raises(TypeError, match=message(field, value)):
        A3CConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("max_steps", 1e6, "use 1_000_000"),
        ("num_workers", 2.0, "use 2"),
        ("t_max", 0.0, "use 1 or more"),
        ("max_steps", 1.5, "use 1 or more"),
        ("optimizer", object(), "use a name, or pass the object to train(..., optimizer=...)"),
        ("environment", object(), "use a name, or pass the object to train(..., environment=...)"),
        ("algorithm", print, "use a name, or pass the object to train(..., algorithm=...)"),
        ("torso", object(), "use 'auto'"),
    ],
)
def test_the_remedy_fits_the_value(field, value, remedy):
    with pytest.raises(TypeError, match=re.escape(f"got {value!r}; {remedy}.") + "$"):
        A3CConfig(**{field: value})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(A3CConfig)])
def test_no_field_goes_unvalidated(field):
    with pytest.raises((TypeError, ValueError), match=rf"^A3CConfig\.{field} must "):
        A3CConfig(**{field: object()})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2**32 - 1),
        ("discount", 0),
        ("discount", 1),
        ("critic_cost", 0),
        ("entropy_cost", 0.0),
        ("momentum", 0.0),
        ("rmsprop_decay", 0.0),
        ("max_gradient_norm", None),
        ("terminal_reward", -1),
        ("solved_return", -100.0),
        ("hidden_sizes", (64, 64)),
        ("max_steps", 1),
    ],
)
def test_values_at_the_edge_of_their_rule_are_accepted(field, value):
    assert getattr(A3CConfig(**{field: value}), field) == value


def test_a_run_without_any_budget_is_refused():
    with pytest.raises(ValueError, match=r"^A3CConfig\.max_steps.* None.*; .*\.$"):
        A3CConfig(max_steps=None, max_episodes=None, solved_return=None)


@pytest.mark.parametrize("budget", [{"max_episodes": 10}, {"solved_return": 195.0}])
def test_one_budget_is_enough(budget):
    assert A3CConfig(max_steps=None, learning_rate_schedule="constant", **budget).max_steps is None


def test_a_linear_schedule_needs_max_steps_to_anneal_over():
    message = r"^A3CConfig\.learning_rate_schedule .*max_steps.*; .*\.$"
    with pytest.raises(ValueError, match=message):
        A3CConfig(learning_rate_schedule="linear", max_steps=None, max_episodes=10)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="num_worker"):
        A3CConfig(num_worker=2)


def test_fields_must_be_named():
    with pytest.raises(TypeError, match="positional"):
        A3CConfig("CartPole-v1")


def test_a_config_is_frozen_and_replace_validates_again():
    config = A3CConfig(num_workers=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_workers = 4
    assert dataclasses.replace(config, num_workers=4).num_workers == 4
    with pytest.raises(ValueError, match=message("num_workers", 0)):
        dataclasses.replace(config, num_workers=0)


def test_a_list_of_hidden_sizes_becomes_a_tuple_so_that_configs_hash_and_compare():
    from_list, from_tuple = A3CConfig(hidden_sizes=[64, 32]), A3CConfig(hidden_sizes=(64, 32))
    assert from_list.hidden_sizes == (64, 32)
    assert type(from_list.hidden_sizes) is tuple
    assert from_list == from_tuple
    assert hash(from_list) == hash(from_tuple)


def test_the_default_number_of_workers_is_that_of_the_cores_this_process_may_use():
    assert A3CConfig().num_workers == available_cores() >= 1


@pytest.mark.parametrize(
    ("envs", "t_max", "max_steps", "steps_per_update", "max_updates"),
    [
        (1, 5, 100, 5, 20),  # 100 / 5 exactly
        (1, 5, 101, 5, 21),  # 20.2 rounds up
        (8, 20, 1, 160, 1),  # less than one segment still takes one
        (3, 7, 43, 21, 3),  # 43 / 21 = 2.05
        (2, 5, None, 10, None),
    ],
)
def test_steps_per_update_and_max_updates(envs, t_max, max_steps, steps_per_update, max_updates):
    config = A3CConfig(
        envs_per_worker=envs,
        t_max=t_max,
        max_steps=max_steps,
        max_episodes=1,
        learning_rate_schedule="constant",
    )
    assert config.steps_per_update == steps_per_update
    assert config.max_updates == max_updates


def test_as_dict_goes_through_json_and_makes_an_equal_config():
    config = A3CConfig(seed=7, hidden_sizes=(64, 32), terminal_reward=-1.0)
    assert A3CConfig(**json.loads(json.dumps(config.as_dict()))) == config


def test_importing_the_config_does_not_import_jax():
    code = (
        "import sys, a3c_jax.config;"
        "heavy = {'jax', 'jaxlib', 'numpy', 'flax', 'optax', 'gymnax'} & set(sys.modules);"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


# What needs another compiled program.

RUN_ONLY = {
    "seed": 7, "max_steps": 10, "max_episodes": 3, "solved_return": 1.0, "solved_window": 7,
    "num_workers": 9, "max_concurrent_workers": 2, "nonfinite": "skip",
}  # fmt: skip


def test_a_seed_budgets_and_workers_change_without_compiling():
    assert changes_needing_compilation(A3CConfig(), A3CConfig(**RUN_ONLY)) == {}


OTHER = {
    "environment": "Catch-bsuite", "algorithm": "n_step_q", "envs_per_worker": 3, "t_max": 3, "hidden_sizes": (3,),
    "optimizer": "momentum", "learning_rate_schedule": "linear", "activation": "elu", "torso": "mlp",
    "core": "gru", "action_bounds": "tanh",
}  # fmt: skip


def other_values():
    """Another value for every field but those of a run."""
    other = dict(OTHER)
    for field in dataclasses.fields(A3CConfig):
        default = getattr(A3CConfig(), field.name)
        if isinstance(default, bool):
            other[field.name] = not default
        elif field.name not in other and field.name not in RUN_ONLY:
            other[field.name] = 0.5 if type(default) is not int else 3
            if default == 0.5:
                other[field.name] = 0.25
    return other


def test_every_other_field_needs_another_step_or_another_update_and_is_named_with_both_values():
    other = other_values()
    assert set(other) | set(RUN_ONLY) == {field.name for field in dataclasses.fields(A3CConfig)}
    for name, value in other.items():
        now = A3CConfig(**{name: value})
        found = changes_needing_compilation(A3CConfig(), now)
        of_optimizer = name in OPTIMIZER_FIELDS
        assert found == ({} if of_optimizer else {name: (getattr(A3CConfig(), name), value)})
        assert is_same_optimizer(A3CConfig(), now) == (not of_optimizer)


def test_what_an_optimizer_does_not_depend_on_leaves_its_update_as_it_is():
    assert is_same_optimizer(A3CConfig(), A3CConfig(**RUN_ONLY))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"learning_rate_schedule": "linear"}, "max_steps"),
        ({"optimizer": "rmsprop"}, "num_workers"),
    ],
    ids=["annealed over max_steps", "statistics for each worker"],
)
def test_what_the_schedule_or_the_optimizer_s_state_depends_on_needs_another_update(fields, name):
    before = A3CConfig(**fields, num_workers=2)
    now = dataclasses.replace(before, **{name: 5})
    assert changes_needing_compilation(before, now) == {}
    assert not is_same_optimizer(before, now)


@pytest.mark.parametrize("name", TRACEABLE)
def test_a_number_can_be_replaced_by_one_that_is_not_checked(name):
    config = A3CConfig(reward_clip=1.0, terminal_reward=-1.0)
    number = object()
    traced = config.with_traced(**{name: number})
    assert getattr(traced, name) is number
    assert getattr(config, name) is not number
    assert traced.with_traced(**{name: getattr(config, name)}) == config


@pytest.mark.parametrize("name", ["t_max", "seed", "reward_clip"])
def test_what_is_no_number_in_the_program_cannot_be_traced(name):
    with pytest.raises(ValueError, match=f"{name} must be one of learning_rate, .*not None"):
        A3CConfig().with_traced(**{name: 1.0})


# What people read.


def test_the_docstring_describes_every_field_and_the_command_line_shows_the_same_texts(capsys):
    import docstring_parser
    import tyro

    described = {
        p.arg_name: p.description for p in docstring_parser.parse(A3CConfig.__doc__).params
    }
    assert set(described) == {field.name for field in dataclasses.fields(A3CConfig)}
    with pytest.raises(SystemExit):
        tyro.cli(A3CConfig, args=["--help"])
    shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    for text in described.values():
        assert re.sub(r"\s+", "", text) in shown
