"""`train` as a whole: probes with known answers, budgets, reproducibility, errors, replay."""

import dataclasses
import signal
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import Probe
from small_runs import assert_equal_runs, program, train_together

import a3c_jax
from a3c_jax import (
    A3CConfig,
    SharedParameters,
    SinkError,
    TrainingInterrupted,
    _compiled,
    round_robin,
)
from a3c_jax.environments import Transition

SMALL = {"num_workers": 2, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,)}
LEARN = {
    "num_workers": 2,
    "envs_per_worker": 8,
    "t_max": 8,
    "hidden_sizes": (32,),
    "max_gradient_norm": None,
    "entropy_cost": 0.0,
    "critic_cost": 1.0,
    "learning_rate": 5e-3,
    "learning_rate_schedule": "linear",
    "discount": 0.5,
}


def small(**changes):
    return program(A3CConfig(**SMALL | changes))


def live_workers():
    return [t.name for t in threading.enumerate() if t.name.startswith("a3c-worker")]


def values(result, observations):
    return np.asarray(result.network.apply(result.params, jnp.array(observations))[1])


def probe(steps, **arguments):
    return a3c_jax.train(A3CConfig(**LEARN, max_steps=steps), environment=Probe(**arguments))


@pytest.mark.slow  # as is every learning test of a value here but for that of the time limit
def test_the_critic_learns_a_constant_and_an_observed_reward():
    result = probe(60_000, length=1, reward=lambda sign, action, last: 3.0 + sign)
    np.testing.assert_allclose(values(result, [[1.0, 1.0], [-1.0, 1.0]]), [4.0, 2.0], atol=0.05)


@pytest.mark.slow
def test_the_critic_discounts_a_reward_at_the_end():
    result = probe(60_000, length=3, reward=lambda sign, action, last: 1.0 * last)
    # One step before the end: 1. Two: 0.5. Three: 0.25.
    expected = [1.0, 0.5, 0.25]
    np.testing.assert_allclose(
        values(result, [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), expected, atol=0.05
    )


def test_a_time_limit_is_worth_the_future_and_a_termination_nothing():
    def reward(sign, action, last):
        return jnp.ones_like(sign)

    limited = probe(60_000, length=3, reward=reward, truncates=True, shows_time=False)
    # Reward 1 for ever: 1 / (1 - 0.5).
    np.testing.assert_allclose(values(limited, [[1.0, 0.0], [-1.0, 0.0]]), 2.0, atol=0.05)

    ended = probe(60_000, length=3, reward=reward)
    # With one, two and three steps to go: 1, 1 + 0.5, 1 + 0.5 + 0.25.
    np.testing.assert_allclose(
        values(ended, [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), [1.0, 1.5, 1.75], atol=0.06
    )


@pytest.mark.slow  # a delayed reward, below, needs this too
def test_the_actor_learns_to_answer_its_observation():
    result = probe(60_000, length=1, reward=lambda sign, action, last: sign * (2 * action - 1))
    evaluation = a3c_jax.evaluate(
        a3c_jax.sampled_policy(result.network),
        result.params,
        result.environment,
        result.evaluation_key,
        500,
    )
    assert evaluation.returns.mean() > 0.95
    assert (evaluation.lengths == 1).all()


def test_the_actor_acts_for_a_delayed_reward():
    # The first of two actions decides what the second step pays.
    class Delayed(Probe):
        def reset(self, key, num_envs):
            observation, state = super().reset(key, num_envs)
            return observation, (state, jnp.zeros(num_envs))

        def step(self, key, state, action):
            (sign, remaining), promised = state
            last = remaining == 1
            final = self.observe(sign, remaining - 1)
            fresh_observation, fresh = self.reset(key, len(sign))
            carried = ((sign, remaining - 1), 2.0 * action - 1.0)
            state = jax.tree.map(lambda a, b: jnp.where(last, a, b), fresh, carried)
            observation = jnp.where(last[:, None], fresh_observation, final)
            never = jnp.zeros_like(last)
            return Transition(
                observation, state, jnp.where(last, promised, 0.0), last, never, final
            )

    environment = Delayed(2, None)
    result = a3c_jax.train(A3CConfig(**LEARN, max_steps=60_000), environment=environment)
    policy = a3c_jax.sampled_policy(result.network)
    evaluation = a3c_jax.evaluate(policy, result.params, environment, result.evaluation_key, 500)
    assert evaluation.returns.mean() > 0.95


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_budget_of_steps_is_met_exactly_to_the_segment(num_workers):
    run = small(num_workers=num_workers, max_steps=203)
    result = a3c_jax.train(run)
    assert run.config.steps_per_update == 8
    assert result.config == run.config
    assert result.version == 26  # ceil(203 / 8)
    assert result.environment_steps == 208
    assert result.overshoot == 5
    assert result.stop_reason == "max_steps"
    assert len(result.schedule.worker) == 26
    assert (result.schedule.staleness >= 0).all()
    assert not live_workers()


def test_a_budget_of_episodes_ends_the_run_within_one_segment_a_worker():
    result = a3c_jax.train(small(max_steps=None, max_episodes=20))
    assert result.stop_reason == "max_episodes"
    # Each worker may be in the middle of one segment, in which 2 environments x 4 steps end.
    assert 20 <= len(result.episodes.episode_return) <= 20 + 2 * 8


def test_a_solved_task_ends_the_run():
    result = a3c_jax.train(small(solved_return=1.0, solved_window=5))
    assert result.stop_reason == "solved"
    assert result.best_mean_return >= 1.0
    assert result.environment_steps < 5_000


def test_every_step_played_is_in_an_episode_that_ended_or_is_still_running():
    result = a3c_jax.train(small(num_workers=3, max_steps=30_000))
    ended = result.episodes.length.sum()
    # CartPole-v1 pays 1 a step, and each of 3 x 2 environments has at most 500 steps unfinished.
    np.testing.assert_array_equal(result.episodes.episode_return, result.episodes.length)
    assert result.environment_steps - 6 * 500 < ended <= result.environment_steps


def test_one_worker_is_reproducible_bit_for_bit():
    run = small(num_workers=1, max_steps=4_000, seed=3)
    first, second = a3c_jax.train(run), a3c_jax.train(run)
    assert_equal_runs(first, second)

    other = a3c_jax.train(run.replace(seed=4))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first.params, other.params)


def test_workers_play_differently_from_the_start():
    # With parameters that hardly move, workers with equal keys would play equal episodes.
    run = small(num_workers=3, learning_rate=1e-12)
    episodes = a3c_jax.replay(run, round_robin(3, 600)).episodes
    returns = [tuple(episodes.episode_return[episodes.worker == w][:20]) for w in range(3)]
    assert all(len(r) == 20 for r in returns)
    assert len(set(returns)) == 3


def test_a_recorded_schedule_replays_bit_for_bit():
    config = A3CConfig(**SMALL | {"num_workers": 3}, max_steps=2_000)
    result = train_together(config)

    # The same run again, in one thread, worker by worker as the schedule says.
    run = program(config)
    states, store = run.initial_states(), SharedParameters(run.initial_params(), run.updater, 3)
    versions = [store.pull().params]
    for worker, pulled in zip(*result.schedule, strict=True):
        gradients, states[worker], _ = run.step(versions[pulled], states[worker])
        store.apply(gradients, int(pulled), int(worker))
        versions.append(store.pull().params)
    chex.assert_trees_all_equal(_compiled.unpack(versions[-1]), result.params)
    chex.assert_trees_all_equal(store.optimizer_state, result.opt_state)


def test_everything_is_traced_before_the_threads_start():
    traced_by = []

    class Noted(Probe):
        def step(self, key, state, action):
            traced_by.append(threading.current_thread().name)
            return super().step(key, state, action)

    environment = Noted(2, lambda sign, action, last: sign)
    result = a3c_jax.train(A3CConfig(**SMALL, max_steps=400), environment=environment)
    assert result.version == 50
    assert traced_by and not any(name.startswith("a3c-worker") for name in traced_by)


def watch_steps(run):
    """The program with a step that notes how many are being played at the same time."""
    lock, inside, most = threading.Lock(), [], []

    def step(params, state):
        with lock:
            inside.append(None)
            most.append(len(inside))
        try:
            return run.step(params, state)
        finally:
            with lock:
                inside.pop()

    return dataclasses.replace(run, step=step), most


def test_the_configuration_says_how_many_workers_play_at_the_same_time():
    def refuse(*_):
        raise AssertionError("asked how many although the configuration says it")

    run, most = watch_steps(small(num_workers=4, max_steps=2_000, max_concurrent_workers=1))
    result = a3c_jax.train(dataclasses.replace(run, max_concurrent_calls=refuse))
    assert max(most) == 1
    assert not result.schedule.staleness.any()


def test_where_the_configuration_does_not_say_it_the_compiled_step_does():
    asked = []

    def one(num_threads, params, state):
        run.step(params, state)  # these are what the step takes
        asked.append(num_threads)
        return 1

    run, most = watch_steps(small(num_workers=4, max_steps=2_000))
    a3c_jax.train(dataclasses.replace(run, max_concurrent_calls=one))
    assert asked == [4]
    assert max(most) == 1


def test_the_terminal_reward_changes_learning_and_not_the_reported_returns():
    a = a3c_jax.train(small(num_workers=1, max_steps=2_000))
    b = a3c_jax.train(small(num_workers=1, max_steps=2_000, terminal_reward=-1.0))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(a.params, b.params)
    np.testing.assert_array_equal(b.episodes.episode_return, b.episodes.length)


@pytest.mark.parametrize(
    ("shared_torso", "optimizer"),
    [
        (True, "momentum"),
        (False, "shared_rmsprop"),
        pytest.param(False, "adam", marks=pytest.mark.slow),
        pytest.param(True, "rmsprop", marks=pytest.mark.slow),
        pytest.param(True, "adam", marks=pytest.mark.slow),
        pytest.param(False, "momentum", marks=pytest.mark.slow),
        pytest.param(True, "shared_rmsprop", marks=pytest.mark.slow),
        pytest.param(False, "rmsprop", marks=pytest.mark.slow),
    ],
)
def test_every_optimizer_and_torso_trains(optimizer, shared_torso):
    config = A3CConfig(
        **SMALL,
        optimizer=optimizer,
        shared_torso=shared_torso,
        learning_rate_schedule="linear",
        max_steps=400,
    )
    result = a3c_jax.train(config)
    assert result.version == 50
    chex.assert_tree_all_finite(result.params)


def test_an_environment_that_fails_while_it_is_traced_fails_before_any_thread():
    class Broken(Probe):
        def step(self, key, state, action):
            raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        a3c_jax.train(A3CConfig(**SMALL), environment=Broken(1, None))
    assert not live_workers()


class FailingSink:
    """A sink that raises an error when it is written to."""

    def __init__(self, error):
        self.error, self.closed = error, False

    def write(self, row, episodes):
        raise self.error

    def close(self):
        self.closed = True


def test_a_sink_that_raises_ends_the_run_and_is_closed():
    sink = FailingSink(OSError("disk full"))
    with pytest.raises(SinkError, match=r"FailingSink\.write failed with OSError: disk full"):
        a3c_jax.train(small(max_steps=10**9), sinks=[sink], interval=0.01)
    assert sink.closed
    assert not live_workers()


@pytest.mark.parametrize("words", [(), ("enough",)])
def test_an_interrupt_carries_the_result_so_far(words):
    class Once(FailingSink):
        def write(self, row, episodes):
            error, self.error = self.error, None
            if error is not None:
                raise error

    sink = Once(KeyboardInterrupt(*words))
    with pytest.raises(KeyboardInterrupt) as caught:
        a3c_jax.train(small(max_steps=10**9), sinks=[sink], interval=0.05)
    result = caught.value.result
    assert (result.stop_reason, caught.value.signal) == ("interrupted", signal.SIGINT)
    assert result.version == len(result.schedule.worker)
    assert sink.closed
    assert not live_workers()


@pytest.mark.parametrize(
    ("interval", "max_steps", "reason"),
    [(0.001, 10**9, "interrupted"), (1e6, 400, "max_steps")],
)
def test_an_interrupt_at_every_row_carries_the_result_all_the_same(interval, max_steps, reason):
    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted) as caught:
        a3c_jax.train(small(max_steps=max_steps), on_progress=interrupt, interval=interval)
    result = caught.value.result
    assert result.version == len(result.schedule.worker)
    assert result.stop_reason == reason


@pytest.mark.parametrize("interval", [None, "x", 0, -1.0, float("nan")])
def test_an_interval_that_is_no_time_is_refused_before_anything_else(interval):
    with pytest.raises(
        ValueError, match=r"interval must be a number of seconds > 0, got .*; use 0.5"
    ):
        a3c_jax.train(None, interval=interval)


def test_sinks_see_every_episode_once_and_the_final_totals():
    class Collect:
        rows, numbers = [], []

        def write(self, row, episodes):
            self.rows.append(row)
            self.numbers.extend(episodes.episode_return)

        def close(self):
            self.rows.append("closed")

    result = a3c_jax.train(small(max_steps=20_000), sinks=[Collect()], interval=0.01)
    assert len(Collect.rows) > 2
    np.testing.assert_array_equal(Collect.numbers, result.episodes.episode_return)
    assert Collect.rows.pop() == "closed"
    assert Collect.rows[-1]["environment_steps"] == result.environment_steps
    assert Collect.rows[-1]["updates"] == result.version


def test_train_is_silent(capfd):
    a3c_jax.train(A3CConfig(**SMALL, max_steps=80))
    assert capfd.readouterr() == ("", "")


def test_an_unknown_environment_is_refused_with_near_matches_and_the_sinks_are_closed():
    sink = FailingSink(None)
    with pytest.raises(ValueError, match=r"did you mean .*CartPole-v1"):
        a3c_jax.train(A3CConfig(environment="Cartpole-v1"), sinks=[sink])
    assert sink.closed


def test_a_sink_that_cannot_be_closed_does_not_keep_the_others_open():
    class Stuck(FailingSink):
        def write(self, row, episodes):
            pass

        def close(self):
            super().close()
            raise self.error

    sinks = [Stuck(OSError("first")), Stuck(OSError("second"))]
    with pytest.raises(SinkError, match=r"Stuck\.close failed with OSError: first"):
        a3c_jax.train(small(max_steps=80), sinks=sinks)
    assert all(sink.closed for sink in sinks)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 4, 16])
def test_cartpole_is_solved_by_one_and_by_many_workers(num_workers):
    config = A3CConfig(num_workers=num_workers, solved_return=475.0, seed=11)
    result = a3c_jax.train(config)
    assert result.stop_reason == "solved"
    assert len(set(result.schedule.worker)) > 1 or num_workers == 1
    evaluation = a3c_jax.evaluate(
        a3c_jax.greedy_policy(result.network),
        result.params,
        result.environment,
        result.evaluation_key,
    )
    assert evaluation.returns.mean() >= 475.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": "runs/a"}, "must be an a3c_jax.CheckpointFolder, got 'runs/a'; give"),
        (
            {"resume": "runs/a"},
            r"must be an a3c_jax.Checkpoint, got 'runs/a'; give a3c_jax.find_ch",
        ),
    ],
)
def test_the_name_of_a_folder_is_refused_where_an_object_is_needed(options, message):
    with pytest.raises(TypeError, match=message):
        a3c_jax.train(A3CConfig(), **options)


@pytest.mark.parametrize(
    "call",
    [
        a3c_jax.train,
        a3c_jax.build,
        lambda config: a3c_jax.replay(config, a3c_jax.round_robin(1, 2)),
        lambda config: a3c_jax.make_simulation(config, 2),
    ],
    ids=["train", "build", "replay", "make_simulation"],
)
@pytest.mark.parametrize("config", [{"max_steps": 100}, None, A3CConfig], ids=str)
def test_what_is_no_configuration_is_refused(call, config):
    with pytest.raises(TypeError, match=r"config must be an a3c_jax\.A3CConfig, got .*; make one"):
        call(config)
