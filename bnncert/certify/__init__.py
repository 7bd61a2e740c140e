"""Certificates for posteriors: what is proved about their predictions over a set of inputs."""

from bnncert.certify.predictive import Decision, decision, predictive
from bnncert.certify.sampled_safety import (
    SampledSafety,
    proves_class,
    proves_outputs,
    sampled_safety,
)
from bnncert.certify.sampling import statistical

__all__ = [
    "Decision",
    "SampledSafety",
    "decision",
    "predictive",
    "proves_class",
    "proves_outputs",
    "sampled_safety",
    "statistical",
]
