"""`load` and the evaluate command: what a run has learnt, and the objects that it has to be given again."""

import functools
import pickle

import chex
import jax
import numpy as np
import optax
import pytest
from probes import Probe
from small_runs import WALK, small, train

import a3c_jax
from a3c_jax import A3CConfig, CheckpointFolder, find_checkpoint, load
from a3c_jax.asynchrony import objects
from a3c_jax.losses import a3c_loss
from experiments import evaluate
from experiments import replay as replay_command

TINY = {"num_workers": 1, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,), "max_steps": 80}
PROBE = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)
loss = functools.partial(a3c_loss, entropy_cost=0.02)


def assert_equal_returns(policy, *runs):
    """The policy gets the same returns with the parameters of each run."""
    returns = [
        a3c_jax.evaluate(
            policy(run.network), run.params, run.environment, run.evaluation_key, 5
        ).returns
        for run in runs
    ]
    np.testing.assert_array_equal(*returns)


def test_a_run_comes_back_ready_to_act_and_to_go_on(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    result = train(small(max_steps=400, normalize_observations=True), checkpoints=folder)
    run = load(tmp_path, environment=WALK)
    assert run.config == result.config
    chex.assert_trees_all_equal(run.params, result.params)
    chex.assert_trees_all_equal(run.best_params, result.best_params)
    assert_equal_returns(a3c_jax.greedy_policy, run, result)
    assert run.checkpoint.version == result.version


@pytest.mark.slow
def test_a_result_can_be_pickled():
    result = a3c_jax.train(A3CConfig(**TINY))
    again = pickle.loads(pickle.dumps(result))
    chex.assert_trees_all_equal(again.params, result.params)
    assert_equal_returns(a3c_jax.sampled_policy, again, result)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that was given everything as an object."""
    path = tmp_path_factory.mktemp("run")
    a3c_jax.train(
        A3CConfig(**TINY),
        environment=PROBE,
        loss=loss,
        optimizer=optax.sgd(0.1),
        checkpoints=CheckpointFolder(path),
    )
    return path


@pytest.mark.slow
def test_the_objects_of_a_run_are_named_in_its_checkpoint(folder):
    assert find_checkpoint(folder).objects == {
        "environment": "probes.Probe",
        "loss": "a3c_jax.losses.a3c_loss",
        "optimizer": f"{optax.GradientTransformation.__module__}.GradientTransformation"
        if type(optax.sgd(0.1)) is optax.GradientTransformation
        else f"{type(optax.sgd(0.1)).__module__}.{type(optax.sgd(0.1)).__qualname__}",
    }


def test_it_loads_and_goes_on_with_the_same_objects_and_not_without(folder, capsys):
    assert load(folder, environment=PROBE).environment is PROBE
    with pytest.raises(ValueError, match="environment must be probes.Probe, as in the run"):
        load(folder)
    checkpoint = find_checkpoint(folder)
    given = {"environment": PROBE, "loss": loss, "optimizer": optax.sgd(0.1)}
    longer = A3CConfig(**TINY | {"max_steps": 160})
    assert a3c_jax.train(longer, resume=checkpoint, **given).version == 20
    with pytest.raises(ValueError, match="loss must be a3c_jax.losses.a3c_loss, as in the run"):
        a3c_jax.train(longer, resume=checkpoint, **given | {"loss": None})
    with pytest.raises(ValueError, match="loss must be left out|got builtins.max"):
        objects.check_objects({}, {"loss": "builtins.max"})
    with pytest.raises(SystemExit):
        replay_command.main([str(folder)])
    assert "as in the run of the checkpoint" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )
    replay_command.main([str(folder)], **given)
    assert capsys.readouterr().out.startswith("identical")


@pytest.mark.slow
def test_the_command_prints_the_returns_of_a_run(tmp_path, capsys):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    a3c_jax.train(A3CConfig(**TINY | {"max_steps": 400}), checkpoints=folder)
    gif = tmp_path / "play.gif"
    evaluate.main([str(tmp_path), "--episodes", "3", "--best", "--gif", str(gif)])
    printed = capsys.readouterr().out
    assert printed.startswith("CartPole-v1, best parameters, 3 episodes for each policy\n")
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == [
        "greedy",
        "sampled",
        "random",
    ]
    assert gif.exists() or "no GIF" in printed


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "--episodes", "0"]])
def test_bad_input_ends_in_a_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    a3c_jax.train(A3CConfig(**TINY), checkpoints=CheckpointFolder(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    changed = checkpoint._replace(params={**checkpoint.params, "more": np.zeros(2)})
    from a3c_jax.asynchrony.checkpoint_files import save_checkpoint

    save_checkpoint(tmp_path / "changed", changed)
    with pytest.raises(a3c_jax.CheckpointError, match="the checkpoint does not fit"):
        load(tmp_path / "changed")
    assert jax.tree.leaves(load(tmp_path).params)
