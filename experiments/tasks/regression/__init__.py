"""Regression from end to end: `python -m experiments.regression {diabetes,sine}`.

`run` has the command, `settings` its options, `data` the two problems.
"""
