"""Faults to test with: limits of the system that a run meets, and Ctrl-C."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def limited(kind, value):
    """Lowers one of the process's limits during the block."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def no_file_larger_than(size):
    """A write stops where the limit is, in the middle of a row, and the next one is an OSError, as on a full disk."""
    return limited(resource.RLIMIT_FSIZE, size)


def no_more_file_handles():
    """Nothing can be opened."""
    return limited(resource.RLIMIT_NOFILE, 0)


@contextlib.contextmanager
def usual_ctrl_c():
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
