"""Sound bounds on any JAX function over sets of inputs or weights."""

from bnncert.bounds.api import Affine, LinearBounds, bound, crown, ibp, linear_bounds
from bnncert.bounds.arithmetic import Float, Real
from bnncert.bounds.graph import UnsupportedPrimitiveError
from bnncert.bounds.mean import mean_bound
from bnncert.bounds.methods import CROWN, CROWNIBP, IBP, AlphaCROWN, Forward
from bnncert.bounds.ops import Operation
from bnncert.bounds.own import operation
from bnncert.bounds.widening import Width, Widths, widths

__all__ = [
    "CROWN",
    "CROWNIBP",
    "IBP",
    "Affine",
    "AlphaCROWN",
    "Float",
    "Forward",
    "LinearBounds",
    "Operation",
    "Real",
    "UnsupportedPrimitiveError",
    "Width",
    "Widths",
    "bound",
    "crown",
    "ibp",
    "linear_bounds",
    "mean_bound",
    "operation",
    "widths",
]
