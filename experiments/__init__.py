"""Experiments: examples to run, tools for their run folders, and measurements.

`python -m experiments.cartpole` and the other examples train an agent. `replay` and `curves` work on the folders
that they leave behind. `experiments.measurements` holds the programs behind the tables and pictures in docs/.
Each explains itself with `--help`.
"""

import time

STARTED = time.perf_counter()
"""When this package was imported, which is the first thing that an experiment does."""
