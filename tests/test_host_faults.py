"""Environments on the host that fail, hang, lie or cannot be made; and what is left when they have."""

import functools
import gc
import os
import resource
import signal
import threading
import time

import chex
import gymnasium
import jax
import numpy as np
import pytest
from faults import usual_ctrl_c
from host_games import Factory, Stairs, Vector, environment_threads, make_vector
from small_runs import (
    StopAt,
    assert_equal_runs,
    assert_exact_counters,
    program,
    replay,
    small,
    words,
)

import a3c_jax
from a3c_jax import (
    CheckpointFolder,
    NonFiniteError,
    TrainingInterrupted,
    WorkerError,
    _compiled,
    evaluate,
    find_checkpoint,
    random_policy,
)
from a3c_jax.asynchrony.signals import noted_signals
from a3c_jax.autoreset import VectorPlayer
from a3c_jax.environments import HostEnvironment, adapt
from a3c_jax.host_state import Live, WatchedPlayer


class Game(Factory):
    """Makes vectors of `Stairs`, one of which does something else in one of its calls.

    Attributes:
      fault: `(method, instead, number, call)`: the vector of that number, counted from zero, does `instead(method)`
        from that call of that method on; `make` stands for making it. None if nothing goes wrong.
    """

    def __init__(self):
        super().__init__(self._make_one)
        self.fault = None

    def _make_one(self, num_envs):
        method, instead, number, first = self.fault or (None, None, None, None)
        is_bad = number in (self.made - 1, "all")
        if method == "make" and is_bad:
            return instead(num_envs)
        vector = make_vector("sync", "Disabled", Stairs, num_envs)
        if is_bad:
            usual, calls = getattr(vector, method), iter(range(10**9))

            def called(*arguments, **options):
                bad = next(calls) >= first
                return (instead if bad else lambda f, *a, **o: f(*a, **o))(
                    usual, *arguments, **options
                )

            setattr(vector, method, called)
        return vector


GAME = Game()
ENVIRONMENT = HostEnvironment("Stairs", GAME, step_seconds=60)
IMPATIENT = HostEnvironment("Stairs", GAME, step_seconds=0.3)


def live_threads():
    workers = [t for t in threading.enumerate() if t.name.startswith("a3c-worker")]
    return [*workers, *(t for t in environment_threads() if t not in workers)]


@pytest.fixture(autouse=True)
def all_is_well_before_and_after():
    program(small(), ENVIRONMENT)
    GAME.fault, GAME.made = None, 0
    yield
    GAME.fault = None
    for thread in live_threads():
        thread.join(10)
    assert not live_threads()
    assert GAME.open == 0


def throw(*_, **__):
    raise OSError("as told")


def train(config, environment=ENVIRONMENT, **options):
    return a3c_jax.train(program(config, environment), **options)


# Errors


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize(
    ("method", "call"),
    [("make", 0), ("reset", 0), ("reset", 2), ("step", 0), ("step", 30)],
)
def test_one_worker_s_environment_raises(tmp_path, method, call, num_workers):
    GAME.fault = (method, throw, num_workers - 1, call)
    config = small(num_workers=num_workers, max_steps=80_000)
    with pytest.raises(WorkerError, match=r"worker \d failed with OSError: as told") as caught:
        train(config, checkpoints=CheckpointFolder(tmp_path))
    assert isinstance(caught.value.__cause__, OSError)
    assert GAME.open == 0 and not live_threads()
    result, checkpoint = caught.value.result, find_checkpoint(tmp_path)
    assert result.stop_reason == "failed" and result.version == checkpoint.version
    if num_workers == 1:
        assert (result.version == 0) == (call == 0)
    assert_exact_counters(checkpoint)
    GAME.fault = None
    longer = small(num_workers=num_workers, max_steps=8 * (checkpoint.version + 30))
    went_on = train(longer, resume=checkpoint)
    assert went_on.version == checkpoint.version + 30
    assert_equal_runs(replay(longer, went_on.schedule, ENVIRONMENT), went_on)


def test_an_error_in_the_middle_of_a_segment_loses_only_that_segment(tmp_path):
    whole = train(small())
    GAME.fault, GAME.made = ("step", throw, 0, 4 * 20 + 2), 0
    with pytest.raises(WorkerError):
        train(small(), checkpoints=CheckpointFolder(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.version == 20
    GAME.fault = None
    assert_equal_runs(train(small(), resume=checkpoint), whole)


def test_an_environment_that_wants_to_end_the_process_ends_the_run():
    def leave(*_, **__):
        raise SystemExit(3)

    GAME.fault = ("step", leave, 0, 5)
    with pytest.raises(WorkerError, match="failed with SystemExit: 3"):
        train(small())


def test_an_error_while_a_run_is_put_back_ends_it_with_what_was_saved(tmp_path):
    train(small(max_steps=168), checkpoints=CheckpointFolder(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.states["episode_length"].max() > 0
    GAME.fault, GAME.made = ("step", throw, 0, 0), 0
    with pytest.raises(WorkerError, match="as told") as caught:
        train(small(), resume=checkpoint, checkpoints=CheckpointFolder(tmp_path))
    assert caught.value.result.version == checkpoint.version
    GAME.fault = None
    assert_equal_runs(train(small(), resume=find_checkpoint(tmp_path)), train(small()))


@pytest.mark.parametrize("where", [0, 1], ids=["observation", "reward"])
def test_what_is_not_a_number_stops_a_run_or_is_skipped(where):
    def not_a_number(step, *arguments):
        results = list(step(*arguments))
        results[where] = np.full_like(results[where], np.nan)
        return tuple(results)

    GAME.fault = ("step", not_a_number, 0, 50)
    with pytest.raises(WorkerError, match="NonFiniteError") as caught:
        train(small())
    assert isinstance(caught.value.__cause__, NonFiniteError)
    assert caught.value.result.version == 12  # 48 steps of each environment are good
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(caught.value.result.params))
    GAME.made = 0
    config = small(nonfinite="skip")
    result = train(config)
    assert result.version == 50 and result.skipped == 38
    GAME.made = 0
    again = replay(config, result.schedule, ENVIRONMENT)
    assert words(again.params) == words(result.params) and again.skipped == 38


# Hanging


class Hang:
    """Does not return until it may."""

    def __init__(self):
        self.may, self.hangs = threading.Event(), threading.Event()

    def __call__(self, method, *arguments, **options):
        self.hangs.set()
        assert self.may.wait(60)
        return method(*arguments, **options)

    def making(self, num_envs):
        return self(make_vector, "sync", "Disabled", Stairs, num_envs)


@pytest.mark.parametrize(("method", "call"), [("step", 30), ("reset", 0), ("reset", 1)])
def test_a_worker_whose_environment_hangs_is_given_up(method, call):
    program(small(), IMPATIENT)
    hang = Hang()
    GAME.fault, GAME.made = (method, hang, 1, call), 0
    began = time.monotonic()
    try:
        with pytest.raises(
            WorkerError, match=r"worker \d failed with TimeoutError: environment 'Stairs' has not"
        ) as caught:
            train(small(num_workers=3, max_steps=None, max_episodes=10**9), IMPATIENT)
        assert time.monotonic() - began < 20
        assert isinstance(caught.value.__cause__, TimeoutError)
        assert "for 0.3 s; if it may take so long, make it with a larger step_seconds" in str(
            caught.value
        )
        assert live_threads() == environment_threads() and len(live_threads()) == 1
        assert GAME.open == 1
    finally:
        hang.may.set()
    # If it returns after all, it is closed, and its thread ends; see the fixture.


def test_the_making_of_environments_has_as_many_times_the_limit_as_there_are_copies():
    program(small(), IMPATIENT)
    hang = Hang()
    GAME.fault, GAME.made = ("make", hang.making, 0, 0), 0
    began = time.monotonic()
    try:
        with pytest.raises(
            WorkerError, match="'Stairs' has not returned from making 2 copies for 0.6 s; if it may"
        ):
            train(small(num_workers=1), IMPATIENT)
        assert 0.6 <= time.monotonic() - began < 20
        assert len(live_threads()) == 1
    finally:
        hang.may.set()
    # What is made after all is closed, and its thread ends; see the fixture.


def test_an_environment_that_hangs_while_it_is_put_back_is_given_up(tmp_path):
    train(small(max_steps=168), checkpoints=CheckpointFolder(tmp_path))
    program(small(), IMPATIENT)
    hang = Hang()
    GAME.fault, GAME.made = ("step", hang, 0, 0), 0
    try:
        with pytest.raises(WorkerError, match="TimeoutError: environment 'Stairs' has not"):
            train(small(), IMPATIENT, resume=find_checkpoint(tmp_path))
    finally:
        hang.may.set()


def test_a_state_whose_environments_hung_is_of_no_use_any_more_but_a_copy_of_it_is():
    built = program(small(), IMPATIENT)
    params, (state,) = built.initial_params(), built.initial_states()
    state = built.step(params, state)[1]
    expected = built.step(params, state)
    hang = Hang()
    GAME.fault = ("step", hang, "all", 0)
    copy = jax.tree.map(lambda x: x, state)
    try:
        with pytest.raises(TimeoutError):
            built.step(params, copy)
        GAME.fault = None
        with pytest.raises(TimeoutError, match="environment 'Stairs' has not returned"):
            built.step(params, copy)
        another = jax.tree.map(lambda x: x, copy)
        found = built.step(params, another)
        chex.assert_trees_all_equal(*(tuple(map(_compiled.unpack, x)) for x in (found, expected)))
    finally:
        hang.may.set()
        built.release([state, copy, another])


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("step", "a step for 0.3 s"),
        ("reset", "a step for 0.3 s"),
        ("make", "making 3 copies for 0.9 s"),
    ],
)
def test_an_environment_that_hangs_in_an_evaluation_is_given_up(method, what):
    hang, policy = Hang(), random_policy(IMPATIENT)
    GAME.fault = (method, hang.making if method == "make" else hang, "all", 0)
    try:
        with pytest.raises(TimeoutError, match=f"'Stairs' has not returned from {what}"):
            evaluate(policy, None, IMPATIENT, jax.random.key(0), 3)
    finally:
        hang.may.set()


def test_an_interrupt_ends_an_evaluation_at_its_next_step():
    with noted_signals() as noted:
        interrupt = lambda step, *arguments: (noted.append(2), step(*arguments))[1]  # noqa: E731
        GAME.fault = ("step", interrupt, "all", 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(random_policy(ENVIRONMENT), None, ENVIRONMENT, jax.random.key(0), 3)
        assert noted == [2]


def test_processes_that_hang_are_ended():
    ended = []

    class Process:
        def terminate(self):
            ended.append("terminated")
            hang.may.set()

    hang = Hang()
    player = VectorPlayer(make_vector("sync", "Disabled", Stairs, 2))
    player._innermost.processes = [Process()]
    live = Live()
    live.player = player
    watched = WatchedPlayer(live, "Stairs", 0.1)
    player.step = lambda action: hang(lambda: None)
    with pytest.raises(TimeoutError):
        watched.step(None)
    assert ended[0] == "terminated"


def test_without_a_limit_a_step_may_take_its_time():
    endless = HostEnvironment("Stairs", GAME, step_seconds=None)
    built = program(small(), endless)
    slow = lambda step, *arguments: (time.sleep(0.01), step(*arguments))[1]  # noqa: E731
    GAME.fault, GAME.made = ("step", slow, 0, 0), 0
    assert a3c_jax.train(built.replace(max_steps=80)).version == 10


# Closing


def test_an_environment_that_does_not_close_costs_nothing_but_itself(monkeypatch):
    expected = train(small())
    GAME.fault, GAME.made = ("close", throw, 0, 0), 0
    assert_equal_runs(train(small()), expected)
    monkeypatch.setattr("a3c_jax.host_state._CLOSE_SECONDS", 0.2)
    hang = Hang()
    GAME.fault, GAME.made = ("close", hang, 0, 0), 0
    try:
        assert_equal_runs(train(small()), expected)
        assert hang.hangs.wait(60)
    finally:
        hang.may.set()


def test_an_environment_that_does_not_close_after_an_evaluation_or_a_look_at_its_spaces():
    GAME.fault = ("close", throw, "all", 0)
    environment = HostEnvironment("Stairs", GAME)
    policy = random_policy(environment)
    assert len(evaluate(policy, None, environment, jax.random.key(0), 3).returns) == 3


# What is no environment


def test_another_number_of_environments_is_refused():
    GAME.fault = ("make", lambda n: make_vector("sync", "Disabled", Stairs, n + 1), 0, 0)
    message = "must be made with the number of copies that is asked for, 2, got 3; pass the function's argument on"
    with pytest.raises(WorkerError, match=message):
        train(small())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (gymnasium.make("CartPole-v1"), r"got TimeLimit, whose observation_space is no method, .*make_vec"),
        (lambda num_envs: gymnasium.make("CartPole-v1"), "got TimeLimit without num_envs, single_obs.*use gymnasium"),
        (lambda num_envs: None, "got NoneType without reset, step, num_envs"),
        (gymnasium.vector.SyncVectorEnv, "got the class SyncVectorEnv; make an object of it"),
        (lambda: gymnasium.make_vec("CartPole-v1", 2), "takes 0 positional arguments"),
        (3, "got int without reset"),
    ],
    ids=["single", "function of a single", "nothing", "class", "without argument", "number"],
)  # fmt: skip
def test_what_is_no_vector_is_refused_before_anything_starts(environment, message):
    with pytest.raises(TypeError, match=message):
        a3c_jax.train(small(), environment=environment)
    assert not live_threads()


def wrong(method, change, num_envs):
    """A vector whose method returns something else."""
    vector = make_vector("sync", "Disabled", Stairs, num_envs)
    usual = getattr(vector, method)
    setattr(vector, method, lambda *arguments, **options: change(*usual(*arguments, **options)))
    return vector


STEP = r"step of environment 'Wrong' must return \(observation, reward\[2\], terminated\[2\], truncated\[2\], info\)"
RESET = r"reset of environment 'Wrong' must return \(observation, info\)"
SHOW = (
    r"environment 'Wrong' must show observations like its space in reset and step, float32\[2, 3\],"
)


@pytest.mark.parametrize("given", ["function", "object"])
@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("reset", lambda o, i: o, RESET + r" in this order, got \(float32\[2, 3\]\); correct"),
        ("reset", lambda o, i: (o[:, :2], i), SHOW + r" got float32\[2, 2\]; correct"),
        ("step", lambda o, r, t, u, i: (o, r, t | u, i), STEP + r".*, float64\[2\], bool\[2\], dict\); correct"),
        ("step", lambda o, r, t, u, i: (o, r[:, None], t, u, i), STEP + r".*, float64\[2, 1\], bool"),
        ("step", lambda o, r, t, u, i: (o, r, t, i, u), STEP + r".*, bool\[2\], dict, bool\[2\]\)"),
        ("step", lambda o, r, t, u, i: (o[:, :2], r, t, u, i), SHOW + r" got float32\[2, 2\]; correct"),
        ("step", lambda o, r, t, u, i: (o + 1j, r, t, u, i), SHOW + r" got complex64\[2, 3\]; correct"),
    ],
    ids=["no info", "shape after reset", "four", "rewards", "order", "shape after step", "dtype"],
)  # fmt: skip
def test_wrong_results_end_a_run_with_the_environment_and_what_came(method, change, message, given):
    make = functools.partial(wrong, method, change)
    environment = HostEnvironment("Wrong", make if given == "function" else make(2))
    with pytest.raises(WorkerError, match="worker 0 failed with ValueError: " + message):
        train(small(num_workers=1), environment)


def test_what_is_refused_is_closed():
    def silent(num_envs):
        vector = Vector(Stairs, num_envs)
        vector.metadata = {}
        return vector

    def strange(num_envs):
        vector = Vector(Stairs, num_envs)
        vector.single_observation_space = gymnasium.spaces.Text(3)
        return vector

    for make in (silent, strange):
        factory = Factory(make)
        with pytest.raises(ValueError, match="must say in metadata|has the observation space"):
            adapt(factory)
        assert factory.made == 1 and factory.open == 0
    # And if only the one that a worker gets is wrong.
    GAME.fault = ("make", silent, 0, 0)
    with pytest.raises(WorkerError, match="must say in metadata"):
        train(small())
    assert GAME.made == 1 and GAME.open == 0


# Interruptions


def test_ctrl_c_ends_a_run_which_goes_on_where_it_was(tmp_path):
    config = small(max_steps=8_000)
    with pytest.raises(TrainingInterrupted) as caught:
        train(config, checkpoints=CheckpointFolder(tmp_path), sinks=[StopAt(20)], interval=0.001)
    checkpoint = find_checkpoint(tmp_path)
    assert 20 <= caught.value.result.version == checkpoint.version < 1_000
    later = small(max_steps=8 * (checkpoint.version + 20))
    assert_equal_runs(train(later, resume=checkpoint), train(later))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step_ends_a_run_after_the_segment(tmp_path, number):
    def send(step, *arguments):
        GAME.fault = None
        if not sent:
            sent.append(os.kill(os.getpid(), number))
        return step(*arguments)

    sent = []
    GAME.fault = ("step", send, 1, 30)
    config = small(num_workers=3, max_steps=None, max_episodes=10**9)
    with usual_ctrl_c(), pytest.raises(TrainingInterrupted) as caught:
        train(config, checkpoints=CheckpointFolder(tmp_path))
    assert caught.value.signal == number
    assert_exact_counters(find_checkpoint(tmp_path))


# Again and again


def leftovers():
    gc.collect()
    kinds = (Live, VectorPlayer, Stairs, gymnasium.vector.VectorEnv)
    return sum(isinstance(x, kinds) for x in gc.get_objects())


@pytest.mark.slow
def test_a_hundred_runs_and_a_hundred_failures_leave_nothing_behind():
    config, failing = small(num_workers=2, max_steps=80), small(num_workers=2, max_steps=80_000)

    def once():
        train(config)
        GAME.fault, GAME.made = ("step", throw, 1, 7), 0
        with pytest.raises(WorkerError):
            train(failing)
        GAME.fault = None

    for _ in range(5):
        once()
    before, threads = leftovers(), threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        once()
    assert GAME.open == 0
    assert threading.active_count() == threads
    assert leftovers() == before
    assert len(os.listdir("/proc/self/fd")) <= files
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 10_000, f"{grown} kB"
