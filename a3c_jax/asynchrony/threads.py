"""Worker threads over an opaque step function: they start, stop, fail and keep to a budget.

Each thread repeats the loop of A3C: pull the shared parameters, play a segment with them, apply its
gradients. Nothing here knows of environments, networks or losses, so that the asynchrony can be read,
and tested, by itself.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from a3c_jax.asynchrony.parameters import SharedParameters, Update
from a3c_jax.asynchrony.signals import noted_signals
from a3c_jax.asynchrony.turns import Turns

Step = Callable[[Any, Any], tuple[Any, Any, Any]]
OnUpdate = Callable[[Update, Any], bool | None]

_POLL = 0.1
"""Seconds after which Ctrl-C is noticed at the latest."""


class WorkerError(RuntimeError):
    """A worker thread failed; `__cause__` is its exception.

    Attributes:
      worker: which worker.
      pulled_version: the version of the parameters that it had pulled; None if it had pulled none.
      report: what its step reported; None if the step itself failed.
      state: what its step left of its state, likewise.
      result: the result so far, if `a3c_jax.train` or `a3c_jax.replay` raised this.
    """

    def __init__(
        self,
        worker: int,
        error: BaseException,
        pulled_version: int | None = None,
        report: Any = None,
        state: Any = None,
    ) -> None:
        super().__init__(f"worker {worker} failed with {type(error).__name__}: {error}")
        self.__cause__ = error
        self.worker = worker
        self.pulled_version = pulled_version
        self.report = report
        self.state = state
        self.result: Any = None


class StepAbandoned(Exception):
    """Raised by a step that waits for something, when it sees that the run is stopping. It ends its thread."""


class WorkerThreads:
    """The threads of one run.

    Args:
      step: `step(params, state) -> (gradients, state, report)`, or one such function for each worker. Its results
        must be computed when it returns, so that nobody waits for them with the store's lock held.
      store: the parameters that the workers share.
      states: each worker's initial state, a list. One thread is made for each, and replaces its entry
        after every update, under the store's lock.
      read_report: what to make of a step's report before the lock is taken; None leaves it as it is.
      on_update: called as `on_update(update, report)` with the store's lock held, just before an update
        becomes visible. If it returns True, all threads stop; see `stop`.
      max_updates: how many updates to make, all threads together, exactly; None sets no limit.
      max_running: how many threads may be between their pull and their apply at the same time; None
        sets no limit. Others wait for their turn.
      turn_seconds: how long such a turn lasts at least.
      stopping: set when the threads are to stop; None makes a new one. A step that may wait for long has to look
        at it, and raise `StepAbandoned` once it is set.

    Raises:
      ValueError: if there are no states.
    """

    def __init__(
        self,
        step: Step | Sequence[Step],
        store: SharedParameters,
        states: list[Any],
        *,
        read_report: Callable[[Any], Any] | None = None,
        on_update: OnUpdate | None = None,
        max_updates: int | None = None,
        max_running: int | None = None,
        turn_seconds: float = 0.02,
        stopping: threading.Event | None = None,
    ) -> None:
        if not states:
            raise ValueError(
                "states must hold one state for each worker, got none; give at least one."
            )
        self._steps = [step] * len(states) if callable(step) else list(step)
        self._store = store
        self._states = states
        self._read_report = read_report or (lambda report: report)
        self._on_update = on_update or (lambda update, report: None)
        self._max_updates = max_updates
        self._turns = Turns(max_running or len(states), turn_seconds)
        self._begun = 0
        self._running = len(states)
        self._lock = threading.Lock()
        self._stop = stopping or threading.Event()
        self._finished = threading.Event()
        self._error: WorkerError | None = None

    def run(self, on_tick: Callable[[], None] | None = None, interval: float = 0.5) -> None:
        """Runs the threads, once, until the budget is spent, `stop` is called, or one of them fails.

        However it ends, no thread is alive afterwards. Only a second Ctrl-C does not wait for the
        segments being played; their threads end with them, or with the process.

        Args:
          on_tick: called from the calling thread every `interval` seconds.
          interval: seconds between two calls.

        Raises:
          WorkerError: if a worker failed; the first exception is its cause.
          KeyboardInterrupt: on Ctrl-C or SIGTERM, with the signal's number as its argument, and the error of a worker, if
            one failed as well, as its cause.
          Exception: what `on_tick` raised, if no worker failed.
          RuntimeError: if the threads have run before.
        """
        if self._finished.is_set():
            raise RuntimeError("these WorkerThreads have run already; make new ones.")
        threads = [
            threading.Thread(target=self._work, args=(w,), name=f"a3c-worker-{w}", daemon=True)
            for w in range(len(self._states))
        ]
        started = []
        failure: Exception | None = None
        with noted_signals() as noted:
            if noted:
                raise KeyboardInterrupt(noted[0])
            try:
                for thread in threads:
                    thread.start()
                    started.append(thread)
                next_tick = time.monotonic() + interval
                while not noted and not self._finished.wait(min(interval, _POLL)):
                    if on_tick is not None and time.monotonic() >= next_tick:
                        on_tick()
                        next_tick = time.monotonic() + interval
            except Exception as error:  # of on_tick, perhaps after a worker has failed
                failure = error
            finally:
                self.stop()
                for thread in started:
                    thread.join()
        if noted:
            # An error may be a consequence: Ctrl-C in a terminal reaches the processes of environments as well.
            raise KeyboardInterrupt(noted[0]) from self._error
        if self._error is not None:
            raise self._error
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """Asks every thread to end after the segment that it is playing. Any thread may call this."""
        self._stop.set()

    def _work(self, worker: int) -> None:
        """The loop of one worker."""
        step, version, report, state = self._steps[worker], None, None, None
        try:
            while self._may_begin():
                version, report, state = None, None, None
                params, version = self._store.pull(worker)
                gradients, state, report = step(params, self._states[worker])
                report = self._read_report(report)
                with self._store.applying(gradients, version, worker) as update:
                    if self._on_update(update, report):
                        self.stop()
                    self._states[worker] = state
        except StepAbandoned:
            self.stop()
        except BaseException as error:
            with self._lock:
                self._error = self._error or WorkerError(worker, error, version, report, state)
            self.stop()
            self._finished.set()
        finally:
            self._turns.leave()
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._finished.set()

    def _may_begin(self) -> bool:
        """Waits for the thread's turn and takes one update out of the budget; False if none is left."""
        self._turns.wait()
        with self._lock:
            if self._stop.is_set() or self._begun == self._max_updates:
                return False
            self._begun += 1
            return True
