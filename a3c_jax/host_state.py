"""Where the environments of one worker stand: open, as objects, and as arrays from which they can be made again."""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from a3c_jax.autoreset import Stepped, VectorPlayer

T = TypeVar("T")

MOST_REMEMBERED = 200_000
"""Steps of running episodes that are remembered. A longer one cannot be put back, and begins anew after a resume."""

_CLOSE_SECONDS = 10.0
"""How long to wait for environments to close."""


class Live:
    """The open environments of one worker, and the thread in which they are made and stepped.

    A thread of their own makes it possible to go on without them if they hang.

    Attributes:
      player: the environments; None before they are made.
      log: the actions of the running episodes.
      clock: how many segments they have played. A state with another clock is of another moment.
    """

    def __init__(self) -> None:
        self.player: VectorPlayer | None = None
        self.log: ActionLog | None = None
        self.clock = 0
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._block: _Block | None = None  # the one that is going on
        self._stuck_in: str | None = None  # what they did not return from

    @contextlib.contextmanager
    def watched(self, steps: int = 1, name: str = "a step") -> Iterator[None]:
        """Marks the block as one that may take as long as so many steps of the environments."""
        self._block = _Block(time.monotonic(), steps, name)
        try:
            yield
        finally:
            self._block = None

    def open(self, make: Callable[[], VectorPlayer], num_envs: int) -> None:
        """Makes the environments. Each of them may take as long as a step. Call it in their thread, by `call`."""
        with self.watched(num_envs, f"making {num_envs} copies"):
            player = make()
        if self._stuck_in is not None:  # nobody waits for them any more
            player.close()
            raise TimeoutError("the environments were given up before they were made.")
        self.player = player

    def call(self, function: Callable[[], T], name: str, step_seconds: float | None) -> T:
        """Calls a function in the thread of the environments.

        Args:
          function: what to call.
          name: the environment's, for the error message.
          step_seconds: how long a step in a watched block may take; None sets no limit.

        Raises:
          TimeoutError: if a watched block takes longer than its steps may. The thread is given up, and with it all calls to come. If
            the block ever ends, the environments are closed.
        """
        if self._thread is None and self._stuck_in is None:
            whose = threading.current_thread().name
            self._thread = threading.Thread(
                target=_work, args=(self._tasks,), name=f"{whose}-environments", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._tasks.put, None)  # in case that nobody closes them
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tasks.put((function, done))
        while True:
            patience = self._patience(step_seconds)
            if self._stuck_in is not None:
                raise TimeoutError(
                    f"environment {name!r} has not returned from {self._stuck_in}; if it may take so long, make it with "
                    "a larger step_seconds."
                )
            try:
                result, error = done.get(timeout=patience)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return result

    def close(self, wait: bool = True) -> None:
        """Closes the environments and ends the thread. An error in closing them changes nothing any more."""
        player, self.player = self.player, None
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if player is not None:
            self._tasks.put((player.close, queue.SimpleQueue()))
        self._tasks.put(None)
        if wait and thread is not threading.current_thread():
            thread.join(timeout=_CLOSE_SECONDS)

    def _patience(self, step_seconds: float | None) -> float | None:
        """How long the block that is going on may still take."""
        block = self._block
        if step_seconds is None or block is None:
            return step_seconds
        limit = block.steps * step_seconds
        left = block.since + limit - time.monotonic()
        if left <= 0 and self._block is block:
            self._stuck_in = f"{block.name} for {limit:g} s"
            if self.player is not None:
                self.player.end_processes()
            self.close(wait=False)
        return max(left, 0.001)


class _Block(NamedTuple):
    """Something that environments do and whose time is limited: since when, how many steps it counts as, what it is called."""

    since: float
    steps: int
    name: str


class WatchedPlayer:
    """Open environments outside a worker's step. Their steps and resets have a time limit, as a worker's have.

    Args:
      live: the environments.
      name: theirs, for the error message.
      step_seconds: how long a step or reset may take; None sets no limit.
    """

    def __init__(self, live: Live, name: str, step_seconds: float | None) -> None:
        assert live.player is not None
        self._player, self._live = live.player, live
        self._name, self._step_seconds = name, step_seconds

    def begin(self, episode: np.ndarray) -> Any:
        """See `VectorPlayer`."""
        return self._watched(self._player.begin, episode)

    def step(self, action: Any) -> Stepped:
        """See `VectorPlayer`."""
        return self._watched(self._player.step, action)

    def render(self) -> np.ndarray:
        """See `VectorPlayer`."""
        return self._watched(self._player.render)

    def _watched(self, function: Callable[..., T], *arguments: Any) -> T:
        def call() -> T:
            with self._live.watched():
                return function(*arguments)

        return self._live.call(call, self._name, self._step_seconds)


def _work(tasks: "queue.SimpleQueue[Any]") -> None:
    """What the thread of the environments does."""
    while (task := tasks.get()) is not None:
        function, done = task
        try:
            done.put((function(), None))
        except BaseException as error:  # raised where the function was called from
            done.put((None, error))
        del task, function, done


@jax.tree_util.register_pytree_with_keys_class
class HostState:
    """Where the environments of one worker stand: enough to play their running episodes again.

    Attributes:
      entropy: what all seeds are derived from, `[2]` uint32.
      episode: the number of each environment's running episode, `[N]` int32; -1 before the first.
      actions: the last actions, `[L, N, ...]`, with L at least the length of the longest running episode,
        unless that is longer than `MOST_REMEMBERED`.
      live: the open environments. It is no array, and not saved.
      clock: what `live.clock` was then.
    """

    def __init__(
        self, entropy: Any, episode: Any, actions: Any, live: Live | None = None, clock: int = -1
    ) -> None:
        self.entropy, self.episode = entropy, episode
        self._actions = actions
        self.live = Live() if live is None else live
        self.clock = clock

    @property
    def actions(self) -> Any:
        """See the class."""
        return self._actions() if callable(self._actions) else self._actions

    def tree_flatten_with_keys(self) -> Any:
        """For JAX."""
        names = ("entropy", "episode", "actions")
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> "HostState":
        """For JAX."""
        return cls(*leaves)


class ActionLog:
    """The actions of running episodes. What it gives as `snapshot` stays as it is when more are appended.

    Args:
      actions: the first actions, `[L, N, ...]`.
    """

    def __init__(self, actions: np.ndarray) -> None:
        self._parts = [actions]
        self._length = len(actions)

    def append(self, actions: np.ndarray, longest: int) -> None:
        """Appends `[T, N, ...]` actions, and forgets those before the last `longest` steps, now and then."""
        self._parts.append(actions)
        self._length += len(actions)
        keep = min(longest, MOST_REMEMBERED)
        if self._length > 2 * keep + 1_000:
            # A new list, because snapshots hold the old one.
            self._parts = [np.concatenate(self._parts)[self._length - keep :]]
            self._length = keep

    def snapshot(self, longest: int) -> Callable[[], np.ndarray]:
        """A function that gives the actions of the last `longest` steps, or all if there are fewer."""
        parts, count, first = self._parts, len(self._parts), max(0, self._length - longest)
        return lambda: np.concatenate(parts[:count])[first:]
