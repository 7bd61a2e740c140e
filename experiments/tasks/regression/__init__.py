"""Regression from end to end: `python -m experiments.regression {diabetes,sine}`.

`run` goes from data to results, `settings` has the options, `data` the two problems.
"""
