"""Worker threads: an exact budget, prompt ends, no thread left behind, a schedule that replays."""

import itertools
import os
import signal
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults import usual_ctrl_c
from test_parameters import is_held

from a3c_jax.asynchrony.parameters import SharedParameters
from a3c_jax.asynchrony.threads import WorkerError, WorkerThreads
from a3c_jax.optimizers import Updater, make_optimizer, make_updater

pytestmark = pytest.mark.usefixtures("switching_often")

TIMEOUT = 20.0
SGD = Updater(*map(jax.jit, make_updater(optax.sgd(1.0))))  # compiled once for all tests


def make_store(params=None):
    return SharedParameters(jnp.zeros(()) if params is None else params, SGD)


def count(params, state):
    """Adds one to the parameters and to the worker's state; reports the old state."""
    return np.float32(-1.0), state + 1, state


def run(threads, on_tick=None, interval=0.01):
    """Runs the threads, raises what `run` raises; fails if it hangs or leaves a thread alive."""
    outcome, before = [], set(threading.enumerate())

    def target():
        try:
            outcome.append(threads.run(on_tick, interval))
        except BaseException as error:
            outcome.append(error)

    runner = threading.Thread(target=target, daemon=True)
    runner.start()
    runner.join(TIMEOUT)
    if runner.is_alive():
        threads.stop()  # lest it slow down the tests after this one
        pytest.fail("the run does not end")
    assert_no_worker_is_alive(before)
    if outcome[0] is not None:
        raise outcome[0]


def assert_no_worker_is_alive(before=()):
    alive = set(threading.enumerate()) - set(before)
    assert [t.name for t in alive if t.name.startswith("a3c-worker-")] == []


def worker_of_this_thread():
    return int(threading.current_thread().name.removeprefix("a3c-worker-"))


class Boom(Exception):
    pass


@pytest.mark.parametrize("num_workers", [1, 3, 8])
@pytest.mark.parametrize("max_updates", [0, 1, 2, 100])
def test_the_budget_is_met_exactly_and_no_more_segments_are_played(num_workers, max_updates):
    store, states, played = make_store(), [0] * num_workers, itertools.count()

    def step(params, state):
        next(played)
        return count(params, state)

    run(WorkerThreads(step, store, states, max_updates=max_updates))
    params, version = store.pull()
    assert float(params) == version == sum(states) == next(played) == max_updates


@pytest.mark.parametrize("places", [1, 2])
def test_no_more_threads_than_may_run_are_in_a_step_and_all_have_their_turn(places):
    lock, inside, most, played = threading.Lock(), [], [], [0] * 5
    all_wait, together = threading.Event(), threading.Barrier(places)

    def step(params, state):
        worker = worker_of_this_thread()
        with lock:
            inside.append(worker)
            most.append(len(inside))
            played[worker] += 1
        # Who comes first waits for the rest to queue.
        while len(threads._turns._waiting) < 5 - places:
            if all_wait.wait(0.001):
                break
        all_wait.set()
        together.wait(TIMEOUT)  # those that may run play in step, so that none can fall behind
        with lock:
            inside.remove(worker)
        return count(params, state)

    store = make_store()
    threads = WorkerThreads(
        step, store, [0] * 5, max_updates=50, max_running=places, turn_seconds=0.0
    )
    run(threads)
    assert max(most) == places
    assert store.pull().version == 50
    assert min(played) >= 8
    if places == 1:  # strictly one after the other
        first = store.schedule.worker[:5].tolist()
        assert sorted(first) == list(range(5))
        assert store.schedule.worker.tolist() == first * 10
        assert not store.schedule.staleness.any()


@pytest.mark.parametrize("places", [1, 2])
def test_threads_that_wait_for_a_turn_end_when_another_fails_or_stops(places):
    def fail(params, state):
        raise Boom

    with pytest.raises(WorkerError) as caught:
        run(WorkerThreads(fail, make_store(), [0] * 6, max_running=places))
    assert isinstance(caught.value.__cause__, Boom)

    def third(update, report):
        return update.snapshot.version == 3

    store = make_store()
    run(WorkerThreads(count, store, [0] * 6, on_update=third, max_running=places))
    assert 3 <= store.pull().version < 3 + places


def test_every_update_is_told_once_in_order_just_before_it_becomes_visible():
    store, states, told = make_store(), [0] * 4, []

    def on_update(update, report):
        assert is_held(store), "the lock is free"
        params, version = store.pull()
        assert version == sum(states) == int(params)
        assert update.snapshot.version == int(update.snapshot.params) == version + 1
        assert states[update.worker] == report
        told.append((update.worker, update.snapshot.version, update.staleness, report))

    run(WorkerThreads(count, store, states, on_update=on_update, max_updates=200))
    workers, versions, staleness, reports = map(np.array, zip(*told, strict=True))
    np.testing.assert_array_equal(versions, np.arange(1, 201))
    np.testing.assert_array_equal(workers, store.schedule.worker)
    np.testing.assert_array_equal(staleness, store.schedule.staleness)
    for worker, state in enumerate(states):
        own = reports[workers == worker]
        np.testing.assert_array_equal(own, np.arange(len(own)))
        assert state == len(own)


def test_the_states_at_any_moment_are_those_of_that_version():
    store, states, seen = make_store(), [0] * 3, []

    def look():
        state, (numbers, updates) = store.freeze(lambda: (list(states), store.log.seal()))
        seen.append((state.snapshot.version, updates, sum(numbers)))
        if len({version for version, _, _ in seen}) == 30:
            threads.stop()

    threads = WorkerThreads(count, store, states)
    run(threads, on_tick=look, interval=0.001)
    assert all(version == rows == total for version, rows, total in seen)


def test_workers_play_at_the_same_time_and_without_the_lock():
    store, states, num_workers = make_store(), [0] * 3, 3
    together = threading.Barrier(num_workers)

    def step(params, state):
        together.wait(TIMEOUT)  # passes only if all are inside their step at once
        return count(params, state)

    run(WorkerThreads(step, store, states, max_updates=num_workers))
    assert states == [1, 1, 1]
    np.testing.assert_array_equal(store.schedule.pulled_version, [0, 0, 0])
    np.testing.assert_array_equal(store.schedule.staleness, [0, 1, 2])


@pytest.mark.parametrize("num_workers", [1, 8])
@pytest.mark.parametrize("returns_true", [True, False])
def test_a_stop_at_an_update_ends_the_run_after_the_segments_being_played(
    num_workers, returns_true
):
    store, states = make_store(), [0] * num_workers

    def on_update(update, report):
        if update.snapshot.version == 50:
            if returns_true:
                return True
            threads.stop()
        return False

    threads = WorkerThreads(count, store, states, on_update=on_update)
    run(threads)
    # Each of the others may have been in the middle of one segment.
    assert 50 <= store.pull().version <= 50 + num_workers - 1
    assert sum(states) == store.pull().version


def test_stop_from_another_thread_ends_a_run_without_a_budget():
    store, going = make_store(), threading.Event()

    def on_update(update, report):
        if update.snapshot.version >= 20:
            going.set()

    def stop_when_going():
        assert going.wait(TIMEOUT)
        threads.stop()

    threads = WorkerThreads(count, store, [0] * 4, on_update=on_update)
    stopper = threading.Thread(target=stop_when_going, daemon=True)
    stopper.start()
    run(threads)
    stopper.join(TIMEOUT)
    assert store.pull().version >= 20


def test_stop_from_the_tick_ends_the_run():
    threads = WorkerThreads(count, make_store(), [0] * 2)
    run(threads, on_tick=lambda: threads.stop())


def test_a_segment_that_is_being_played_when_the_run_is_stopped_still_counts():
    store, states = make_store(), [0]
    playing, go_on = threading.Event(), threading.Event()

    def step(params, state):
        playing.set()
        assert go_on.wait(TIMEOUT)
        return count(params, state)

    def stop_in_the_middle():
        assert playing.wait(TIMEOUT)
        threads.stop()
        go_on.set()

    threads = WorkerThreads(step, store, states)
    stopper = threading.Thread(target=stop_in_the_middle, daemon=True)
    stopper.start()
    run(threads)
    stopper.join(TIMEOUT)
    assert store.pull().version == 1
    assert states == [1]


def test_a_run_that_is_stopped_before_it_begins_plays_nothing():
    store = make_store()
    threads = WorkerThreads(count, store, [0] * 3)
    threads.stop()
    run(threads)
    assert store.pull().version == 0


def test_the_tick_is_called_by_the_thread_that_runs_and_again_and_again():
    callers, ticked = [], threading.Event()

    def step(params, state):
        assert ticked.wait(TIMEOUT)
        return count(params, state)

    def on_tick():
        callers.append(threading.current_thread())
        if len(callers) == 3:
            ticked.set()

    WorkerThreads(step, make_store(), [0], max_updates=1).run(on_tick, interval=0.001)
    assert len(callers) >= 3
    assert set(callers) == {threading.current_thread()}


def test_a_run_in_the_main_thread_does_the_same_as_in_another():
    assert threading.current_thread() is threading.main_thread()
    store, before = make_store(), set(threading.enumerate())
    WorkerThreads(count, store, [0] * 3, max_updates=30).run()
    assert store.pull().version == 30
    assert_no_worker_is_alive(before)


@pytest.mark.parametrize("max_updates", [100, None])
@pytest.mark.parametrize("failing", [0, 50, 99])
def test_a_worker_that_raises_stops_the_others(failing, max_updates):
    store, states, played, raised = make_store(), [0] * 4, itertools.count(), []

    def step(params, state):
        if next(played) == failing:
            raised.append((worker_of_this_thread(), int(params), Boom("lost a wheel")))
            raise raised[0][-1]
        return count(params, state)

    with pytest.raises(WorkerError) as caught:
        run(WorkerThreads(step, store, states, max_updates=max_updates))
    ((worker, pulled_version, error),) = raised
    assert caught.value.__cause__ is error
    assert (caught.value.worker, caught.value.pulled_version) == (worker, pulled_version)
    assert caught.value.report is None
    assert str(caught.value) == f"worker {worker} failed with Boom: lost a wheel"
    # The failed segment left no trace, and those of the others are whole.
    params, version = store.pull()
    assert float(params) == version == sum(states)
    if max_updates is not None:
        assert version <= 99
        assert failing != 99 or version == 99


def test_the_others_finish_their_segment_after_a_failure_and_begin_no_other():
    store, states, playing, played = make_store(), [0, 0], threading.Event(), []

    def step(params, state):
        if worker_of_this_thread() == 0:
            assert playing.wait(TIMEOUT)
            raise Boom
        playing.set()
        played.append(worker_of_this_thread())
        assert threads._stop.wait(TIMEOUT)  # set by the failure, in the middle of this segment
        return count(params, state)

    threads = WorkerThreads(step, store, states)
    with pytest.raises(WorkerError, match="^worker 0 failed with Boom"):
        run(threads)
    assert played == [1]
    assert states == [0, 1]
    assert store.pull().version == 1


def test_a_failure_and_the_end_of_the_budget_wake_the_run_however_long_the_interval():
    def step(params, state):
        raise Boom

    with pytest.raises(WorkerError):
        run(WorkerThreads(step, make_store(), [0] * 2), interval=100 * TIMEOUT)
    run(WorkerThreads(count, make_store(), [0] * 2, max_updates=5), interval=100 * TIMEOUT)


def test_of_several_failures_the_first_is_reported():
    def step(params, state):
        if worker_of_this_thread() == 0:
            assert threads._stop.wait(TIMEOUT)  # worker 1 has failed
            raise Boom("second")
        raise Boom("first")

    threads = WorkerThreads(step, make_store(), [0, 0])
    with pytest.raises(WorkerError, match="^worker 1 failed with Boom: first$"):
        run(threads)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_whatever_a_worker_raises_is_reported_not_only_exceptions(kind):
    played = itertools.count()

    def step(params, state):
        if next(played) == 5:
            raise kind("the reason")
        return count(params, state)

    message = f"failed with {kind.__name__}: the reason"
    with pytest.raises(WorkerError, match=message) as caught:
        run(WorkerThreads(step, make_store(), [0] * 3))
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("kind", [Boom, StopIteration, GeneratorExit])
def test_an_error_while_an_update_is_told_is_reported_and_there_is_no_update(kind):
    store, states = make_store(), [0] * 3

    def on_update(update, report):
        if update.snapshot.version == 7:
            raise kind("told")

    with pytest.raises(WorkerError, match=f"{kind.__name__}: told") as caught:
        run(WorkerThreads(count, store, states, on_update=on_update))
    error = caught.value
    assert isinstance(error.__cause__, kind)
    # The worker's report is that of the segment that came to nothing.
    assert error.report <= states[error.worker]
    assert error.pulled_version <= 6
    # Another worker may make the seventh update, and fails as well.
    assert store.pull().version == sum(states) == len(store.schedule.worker) == 6
    assert not is_held(store), "the lock must be free again"


def test_an_error_before_the_pull_has_no_version_and_no_report():
    class Unreachable:
        def pull(self, worker):
            raise Boom("no store")

    with pytest.raises(WorkerError, match="no store") as caught:
        run(WorkerThreads(count, Unreachable(), [0] * 2))
    assert caught.value.pulled_version is caught.value.report is None


def test_gradients_that_do_not_fit_the_parameters_are_reported_and_not_applied():
    store = make_store(params=jnp.zeros(3))

    def step(params, state):
        return jnp.zeros(4), state, None

    with pytest.raises(WorkerError) as caught:
        run(WorkerThreads(step, store, [0] * 3))
    assert isinstance(caught.value.__cause__, TypeError | ValueError)
    assert store.pull().version == 0


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt, SystemExit])
def test_an_exception_of_the_tick_comes_through_and_leaves_no_thread_alive(kind):
    store, states = make_store(), [0] * 4

    def on_tick():
        raise kind("from the tick")

    with pytest.raises(kind, match="from the tick"):
        run(WorkerThreads(count, store, states), on_tick)
    version = store.pull().version
    assert float(store.pull().params) == version == sum(states)


def test_an_exception_of_the_tick_does_not_hide_that_a_worker_failed_before_it():
    ticked = threading.Event()

    def fail(params, state):
        assert ticked.wait(TIMEOUT)
        raise Boom

    def tick():
        ticked.set()
        for thread in threading.enumerate():
            if thread.name.startswith("a3c-worker-"):
                thread.join()
        raise ZeroDivisionError

    with pytest.raises(WorkerError) as caught:
        run(WorkerThreads(fail, make_store(), [0]), on_tick=tick)
    assert isinstance(caught.value.__cause__, Boom)


def test_a_run_that_fails_waits_for_the_segments_being_played():
    store, playing = make_store(), threading.Barrier(3)

    def step(params, state):
        playing.wait(TIMEOUT)
        assert threads._stop.wait(TIMEOUT)  # until the run has failed
        time.sleep(0.1)
        return count(params, state)

    def on_tick():
        playing.wait(TIMEOUT)
        raise Boom

    threads = WorkerThreads(step, store, [0] * 2)
    with pytest.raises(Boom):
        run(threads, on_tick)
    assert store.pull().version == 2


def wander(params, state):
    """A deterministic, chaotic step: any difference of a bit grows until it shows."""
    return jnp.sin(3.0 * params + state), jnp.cos(7.0 * state + params), None


@pytest.mark.parametrize("optimizer", ["adam", "shared_rmsprop", "rmsprop"])
def test_replaying_the_schedule_in_one_thread_gives_the_same_run_bit_for_bit(optimizer):
    num_workers, dimensions = 4, 8
    optimizer = make_optimizer(
        optimizer, learning_rate=0.1, anneal_over=150, num_workers=num_workers
    )
    start = jnp.linspace(-1.0, 1.0, dimensions)
    initial_states = list(jax.random.normal(jax.random.key(0), (num_workers, dimensions)))
    compiled = jax.jit(wander)
    optimizer = Updater(*map(jax.jit, make_updater(optimizer)))
    # Compiled before, because four threads at once would take long to do it.
    warm = SharedParameters(start, optimizer)
    for version in range(2):
        warm.apply(compiled(start, initial_states[0])[0], version, 0)
    store, states = SharedParameters(start, optimizer), list(initial_states)
    all_have_pulled = threading.Barrier(num_workers)
    this_thread = threading.local()

    def step(params, state):
        if not hasattr(this_thread, "has_played"):
            this_thread.has_played = True
            all_have_pulled.wait(TIMEOUT)  # so that some updates are stale, however threads run
        return jax.block_until_ready(compiled(params, state))

    run(WorkerThreads(step, store, states, max_updates=100))
    schedule = store.schedule
    assert schedule.staleness.sum() >= 6  # 0 + 1 + 2 + 3 of the first round, at the least

    def replay(workers, pulled_versions):
        replayed = SharedParameters(start, optimizer)
        versions, worker_states = [start], list(initial_states)
        for worker, pulled in zip(workers.tolist(), pulled_versions.tolist(), strict=True):
            gradients, worker_states[worker], _ = compiled(versions[pulled], worker_states[worker])
            replayed.apply(gradients, pulled, worker)
            versions.append(replayed.pull().params)
        return replayed, worker_states

    replayed, worker_states = replay(schedule.worker, schedule.pulled_version)
    chex.assert_trees_all_equal(replayed.pull(), store.pull())
    chex.assert_trees_all_equal(replayed.optimizer_state, store.optimizer_state)
    chex.assert_trees_all_equal(worker_states, states)

    # It is the schedule that does it: the same updates without their staleness lead elsewhere.
    fresh, _ = replay(schedule.worker, np.arange(100))
    assert not np.array_equal(fresh.pull().params, store.pull().params)


def test_threads_without_a_state_or_a_second_run_are_refused():
    with pytest.raises(ValueError, match="states must hold one state for each worker"):
        WorkerThreads(count, make_store(), [])
    threads = WorkerThreads(count, make_store(), [0], max_updates=1)
    threads.run()
    with pytest.raises(RuntimeError, match="have run already"):
        threads.run()


def test_an_error_that_comes_with_ctrl_c_is_its_consequence():
    def step(params, state):
        os.kill(os.getpid(), signal.SIGINT)
        raise BrokenPipeError("a process of the environment has got Ctrl-C as well")

    threads = WorkerThreads(step, make_store(), [0])
    with usual_ctrl_c(), pytest.raises(KeyboardInterrupt) as caught:
        threads.run()
    assert caught.value.args == (signal.SIGINT,)
    assert isinstance(caught.value.__cause__, WorkerError)
    assert isinstance(caught.value.__cause__.__cause__, BrokenPipeError)
    assert_no_worker_is_alive()


def test_ctrl_c_is_noticed_even_where_python_drops_exceptions():
    class Interrupting:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
            for _ in range(10):
                pass  # the handler runs here, where an exception would be ignored

    threads = WorkerThreads(count, make_store(), [0] * 2)
    with usual_ctrl_c():
        with pytest.raises(KeyboardInterrupt) as caught:
            threads.run(lambda: Interrupting() and None, interval=0.01)
        assert caught.value.args == (signal.SIGINT,)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_no_worker_is_alive()
