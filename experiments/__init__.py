"""Experiments: `python -m experiments.<name> --help`."""

import time

STARTED = time.perf_counter()
"""When this package was imported: the first thing an experiment does."""
