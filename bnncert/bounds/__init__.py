"""Sound bounds on any JAX function over sets of inputs or weights."""

from bnncert.bounds.api import Affine, LinearBounds, bound, crown, ibp, linear_bounds
from bnncert.bounds.graph import UnsupportedPrimitiveError
from bnncert.bounds.joint import mean_bound

__all__ = [
    "Affine",
    "LinearBounds",
    "UnsupportedPrimitiveError",
    "bound",
    "crown",
    "ibp",
    "linear_bounds",
    "mean_bound",
]
