"""Measurements: the programs behind the tables and pictures in docs/.

`throughput` and `scaling` measure speed, `staleness` and `reproduction` measure learning, `soak` looks for what
grows or drifts in a long run, and `synchronous` is the compiled loop that A3C is compared with.
"""
