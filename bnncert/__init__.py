"""bnncert: Bayesian neural networks that are robust by construction, and proofs of how robust.

Public names, re-exported; see the modules for their mathematics.
"""

from bnncert import (
    attack,
    bounds,
    certify,
    infer,
    likelihood,
    metrics,
    posterior,
    prior,
    sets,
    types,
)
from bnncert.bounds import (
    Affine,
    LinearBounds,
    UnsupportedPrimitiveError,
    bound,
    crown,
    ibp,
    linear_bounds,
)
from bnncert.posterior import MeanField, Samples
from bnncert.sets import Box, LpBall, ball
from bnncert.types import Algorithm, Batch, Threat

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Algorithm",
    "Batch",
    "Box",
    "LinearBounds",
    "LpBall",
    "MeanField",
    "Samples",
    "Threat",
    "UnsupportedPrimitiveError",
    "attack",
    "ball",
    "bound",
    "bounds",
    "certify",
    "crown",
    "ibp",
    "infer",
    "likelihood",
    "linear_bounds",
    "metrics",
    "posterior",
    "prior",
    "sets",
    "types",
]
