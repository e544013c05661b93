"""Turns: never more threads than places, in the order in which they came, and none forgotten."""

import threading
import time
import types

import pytest

from a3c_jax.asynchrony.turns import Turns

pytestmark = pytest.mark.usefixtures("switching_often")

TIMEOUT = 20.0


def until(condition):
    """Waits until the condition holds."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


class Thread(threading.Thread):
    """A thread that does what it is told, one thing after the other, and says when it is done."""

    def __init__(self, turns):
        super().__init__(daemon=True)
        self.turns, self.number_done = turns, 0
        self._to_do, self._next = [], threading.Semaphore(0)
        self.start()

    def run(self):
        while True:
            self._next.acquire()
            action = self._to_do.pop(0)
            if action is None:
                return
            action()
            self.number_done += 1

    def wait(self):
        """Has it wait for its turn; returns when it has got it or stands in the queue."""
        done, queued = self.number_done, len(self.turns._waiting)
        self._tell(self.turns.wait)
        until(lambda: self.number_done > done or len(self.turns._waiting) > queued)

    def wait_and_pass_on(self, successor):
        """Has it wait where its turn is over, so that the successor is let in."""
        done = successor.number_done
        self._tell(self.turns.wait)
        until(lambda: successor.number_done > done)

    def leave(self):
        done = self.number_done
        self._tell(self.turns.leave)
        until(lambda: self.number_done > done)

    def end(self):
        self._tell(None)
        self.join(TIMEOUT)

    def _tell(self, action):
        self._to_do.append(action)
        self._next.release()


@pytest.fixture
def make():
    """Makes turns and threads that want them; ends the threads after the test."""
    threads = []

    def make(num_threads, places, seconds):
        turns = Turns(places, seconds)
        threads.extend(Thread(turns) for _ in range(num_threads))
        return turns, *threads

    yield make
    for _ in range(2):  # whoever waits is let in by those who leave
        for thread in threads:
            thread._tell(thread.turns.leave)
    for thread in threads:
        thread.end()
    assert not any(thread.is_alive() for thread in threads)


def test_as_many_threads_run_as_there_are_places_and_the_next_waits(make):
    turns, a, b, c = make(3, places=2, seconds=0.0)
    a.wait()
    b.wait()
    assert (a.number_done, b.number_done, len(turns._waiting)) == (1, 1, 0)
    c.wait()
    assert (c.number_done, len(turns._waiting)) == (0, 1)
    a.leave()
    until(lambda: c.number_done == 1)


def test_a_thread_keeps_its_place_while_its_turn_lasts_and_goes_to_the_end_afterwards(
    make, monkeypatch
):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("a3c_jax.asynchrony.turns.time", clock)
    turns, a, b = make(2, places=1, seconds=1.0)
    a.wait()
    b.wait()
    for _ in range(3):
        a.wait()
    assert (a.number_done, b.number_done) == (4, 0)
    now[0] += 1.0
    a.wait_and_pass_on(b)
    assert a.number_done == 4 and len(turns._waiting) == 1
    now[0] += 1.0
    b.wait_and_pass_on(a)


def test_a_turn_goes_on_for_as_long_as_nobody_waits(make):
    _, a, b = make(2, places=1, seconds=0.0)
    for n in range(5):
        a.wait()
        assert a.number_done == n + 1
    b.wait()
    assert b.number_done == 0


def test_first_come_is_first_served(make):
    _, a, *others = make(6, places=1, seconds=0.0)
    a.wait()
    for thread in others:
        thread.wait()
    a.wait_and_pass_on(others[0])
    for thread, successor in zip(others, [*others[1:], a], strict=True):
        assert successor.number_done == (1 if successor is a else 0)
        thread.wait_and_pass_on(successor)


def test_a_place_that_is_left_is_free_again_once_only(make):
    turns, a, b, c = make(3, places=1, seconds=0.0)
    a.leave()  # has no place, and frees none
    a.wait()
    a.leave()
    a.leave()
    b.wait()
    assert b.number_done == 1
    c.wait()
    assert c.number_done == 0 and len(turns._waiting) == 1
    b.leave()
    until(lambda: c.number_done == 1)


@pytest.mark.parametrize("places", [1, 3])
@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_in_a_crowd_no_more_than_may_run_and_all_come_to_their_end(places, seconds):
    turns, lock, inside, most = Turns(places, seconds), threading.Lock(), set(), []

    def work(number):
        for _ in range(300):
            turns.wait()
            with lock:
                inside.add(number)
                most.append(len(inside))
            with lock:
                inside.remove(number)
        turns.leave()

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)
    assert max(most) <= places
    assert len(most) == 8 * 300
    assert turns._free == places and not turns._waiting
