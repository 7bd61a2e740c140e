"""Certificates for posteriors: what is proved about them and their predictions over inputs."""

from bnncert.certify.cascade import Cascade, cascade
from bnncert.certify.claims import Constraints
from bnncert.certify.joint import joint_decision
from bnncert.certify.moments import Expectation, expectation
from bnncert.certify.predictive import Decision, decision, predictive
from bnncert.certify.radii import (
    AttackedRadius,
    CertifiedRadius,
    attacked_radius,
    radius,
    statistical_radius,
)
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
from bnncert.certify.uncertainty import Moments, Uncertainty, mean_and_variance, uncertainty

__all__ = [
    "AttackedRadius",
    "Cascade",
    "CertifiedRadius",
    "Constraints",
    "Decision",
    "Expectation",
    "Moments",
    "Safety",
    "SampledSafety",
    "Uncertainty",
    "WeightBoxes",
    "attacked_radius",
    "cascade",
    "class_stays",
    "decision",
    "expectation",
    "joint_decision",
    "mean_and_variance",
    "outputs_within",
    "predictive",
    "proves_class",
    "proves_outputs",
    "radius",
    "safety",
    "sampled_safety",
    "statistical",
    "statistical_radius",
    "uncertainty",
]
