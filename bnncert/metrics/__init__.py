"""Scores of a posterior predictive: how right, how well calibrated, how unsure and of what kind.

Functions of `probs` (N, C) take the predictive; those of `sample_probs` (S, N, C) one row of
probabilities for each weight sample. All are pure and run under `jit` and `vmap`.
"""

from bnncert.metrics.scores import (
    Reliability,
    accuracy,
    brier,
    ece,
    expected_entropy,
    mutual_information,
    nll,
    predictive_entropy,
    reliability,
)

__all__ = [
    "Reliability",
    "accuracy",
    "brier",
    "ece",
    "expected_entropy",
    "mutual_information",
    "nll",
    "predictive_entropy",
    "reliability",
]
