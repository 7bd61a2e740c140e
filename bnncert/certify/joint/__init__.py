"""The names of `bnncert.certify.exact.joint`, for those that import them from here."""

from bnncert.certify.exact.joint import (
    ANCHORS,
    CornerTerms,
    corner_bound,
    corner_terms,
    difference_below,
    joint_decision,
    margins_of,
)

__all__ = [
    "ANCHORS",
    "CornerTerms",
    "corner_bound",
    "corner_terms",
    "difference_below",
    "joint_decision",
    "margins_of",
]
