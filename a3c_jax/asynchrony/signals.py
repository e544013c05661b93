"""How Ctrl-C and SIGTERM end a run: noted by a handler, and raised where it is safe."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_noted: list[int] | None = None


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Notes the first Ctrl-C or SIGTERM in a list, instead of raising it wherever the main thread is.

    Python drops a KeyboardInterrupt that is raised inside a destructor or a callback of the garbage
    collector, and one that is raised inside a library may leave its locks held. A second signal is
    raised at once, as a KeyboardInterrupt. Outside the main thread, or if somebody else handles a
    signal, nothing changes. A block inside a block has the list of the outer one.

    Yields:
      The list: empty, or with the number of the signal that came.
    """
    global _noted
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    if _noted is not None:
        yield _noted
        return
    noted: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt(number)
        noted.append(number)

    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    ours = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    _noted = noted
    try:
        for number in ours:
            signal.signal(number, handle)
        yield noted
    finally:
        _noted = None
        for number in ours:
            signal.signal(number, usual[number])


def raise_noted() -> None:
    """Raises the signal that a `noted_signals` around this call has noted, if it has noted one.

    Raises:
      KeyboardInterrupt: with the signal's number as its argument.
    """
    if _noted and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt(_noted[0])


def number_of(interruption: KeyboardInterrupt) -> int:
    """The number of the signal behind an interruption: its first argument, or SIGINT if somebody else raised it."""
    number = next(iter(interruption.args), None)
    return int(number) if isinstance(number, int) else int(signal.SIGINT)
