"""Timings of the library, each a script: `python -m experiments.benchmarks.NAME`."""
