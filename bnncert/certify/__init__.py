"""Certificates for posteriors: what is proved about them and their predictions over inputs.

The three tiers are three rooms, and no function returns sometimes a proof and sometimes an
estimate:

    exact     proofs about the average of the finitely many networks that are deployed
    sampled   the statistical tier: a continuous posterior, by independent draws, at a confidence
    formal    proofs about a factorised Gaussian posterior itself

`radii` searches for the largest ball that a certificate covers, and the smallest that an attack
breaks; `inputs` is what all of them check.
"""

from bnncert.certify.exact.cascade import Cascade, cascade
from bnncert.certify.exact.decision import Decision, decision, predictive
from bnncert.certify.exact.joint import joint_decision
from bnncert.certify.exact.uncertainty import Moments, Uncertainty, mean_and_variance, uncertainty
from bnncert.certify.formal.claims import Constraints, class_stays, outputs_within
from bnncert.certify.formal.expectation import Expectation, expectation
from bnncert.certify.formal.safety import (
    Safety,
    WeightBoxes,
    safety,
)
from bnncert.certify.radii import (
    AttackedRadius,
    CertifiedRadius,
    attacked_radius,
    posterior_radius,
    radius,
    statistical_radius,
)
from bnncert.certify.sampled.decision import statistical
from bnncert.certify.sampled.safety import (
    SampledSafety,
    proves_class,
    proves_outputs,
    sampled_safety,
)

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
    "posterior_radius",
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
