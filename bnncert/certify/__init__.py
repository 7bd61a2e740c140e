"""Certificates for posteriors: what is proved about them and their predictions over inputs."""

from bnncert.certify.claims import Constraints
from bnncert.certify.predictive import Decision, decision, predictive
from bnncert.certify.safety import (
    Safety,
    WeightBoxes,
    class_stays,
    outputs_within,
    safety,
)
from bnncert.certify.sampled_safety import (
    SampledSafety,
    proves_class,
    proves_outputs,
    sampled_safety,
)
from bnncert.certify.sampling import statistical

__all__ = [
    "Constraints",
    "Decision",
    "Safety",
    "SampledSafety",
    "WeightBoxes",
    "class_stays",
    "decision",
    "outputs_within",
    "predictive",
    "proves_class",
    "proves_outputs",
    "safety",
    "sampled_safety",
    "statistical",
]
