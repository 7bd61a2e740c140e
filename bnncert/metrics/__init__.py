"""Scores of a posterior predictive: how right, how well calibrated, how unsure and of what kind.

Functions of `probs` (N, C) take the predictive; those of `sample_probs` (S, N, C) one row of
probabilities for each weight sample. All are pure and run under `jit` and `vmap`.
"""

from bnncert.metrics.calibration import Reliability, ece, fit_temperature, mce, reliability
from bnncert.metrics.detection import auroc, fpr_at_tpr, likelihood_ratio
from bnncert.metrics.scores import accuracy, brier, nll
from bnncert.metrics.uncertainty import expected_entropy, mutual_information, predictive_entropy

__all__ = [
    "Reliability",
    "accuracy",
    "auroc",
    "brier",
    "ece",
    "expected_entropy",
    "fit_temperature",
    "fpr_at_tpr",
    "likelihood_ratio",
    "mce",
    "mutual_information",
    "nll",
    "predictive_entropy",
    "reliability",
]
