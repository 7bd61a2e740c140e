"""bnncert: Bayesian neural networks that are robust by construction, and proofs of how robust.

Public names, re-exported; see the modules for their mathematics.
"""

from bnncert._compiler import avoid_wrong_sums as _avoid_wrong_sums

_avoid_wrong_sums()  # before anything that could compute is imported

from bnncert import (  # noqa: E402
    attack,
    bounds,
    certify,
    gaussian,
    infer,
    interop,
    likelihood,
    metrics,
    outputs,
    posterior,
    prior,
    sets,
    testing,
    types,
)
from bnncert.bounds import (  # noqa: E402
    CROWN,
    CROWNIBP,
    IBP,
    Affine,
    AlphaCROWN,
    Float,
    Forward,
    LinearBounds,
    Operation,
    Real,
    UnsupportedPrimitiveError,
    bound,
    crown,
    ibp,
    linear_bounds,
    operation,
    widths,
)
from bnncert.posterior import MeanField, Samples  # noqa: E402
from bnncert.sets import Box, LpBall, ball  # noqa: E402
from bnncert.types import Algorithm, Batch, Threat  # noqa: E402

__version__ = "0.2.0"

__all__ = [  # noqa: RUF022
    "Affine",
    "Algorithm",
    "AlphaCROWN",
    "Batch",
    "Box",
    "CROWN",
    "CROWNIBP",
    "Float",
    "Forward",
    "IBP",
    "LinearBounds",
    "LpBall",
    "MeanField",
    "Operation",
    "Real",
    "Samples",
    "Threat",
    "UnsupportedPrimitiveError",
    "attack",
    "ball",
    "bound",
    "bounds",
    "certify",
    "crown",
    "gaussian",
    "ibp",
    "infer",
    "interop",
    "likelihood",
    "linear_bounds",
    "metrics",
    "operation",
    "outputs",
    "posterior",
    "prior",
    "sets",
    "testing",
    "types",
    "widths",
]
