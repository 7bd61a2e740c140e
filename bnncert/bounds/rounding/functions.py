"""What functions that are not affine are off by in floating point, and their slopes.

    values      |fl h(x) - h(x)| <= (R |h(x)| + A + X |x|) u + 2 t       `function_error`
    slopes      |fl h'(x) - h'(x)| <= (R' |h'(x)| + A') u                `slope_error`
    curvatures  the largest |h''|: what a slope changes by where its point does

The numbers stand with each operation (`ops.operation.Rounding`).
"""

from collections.abc import Mapping, Sequence

from jaxtyping import ArrayLike

from bnncert.bounds.graph import Node
from bnncert.bounds.ops import ELEMENTWISE
from bnncert.bounds.ops.extremes import magnitude
from bnncert.bounds.ops.operation import Rounding
from bnncert.bounds.rounding.model import unknown_rounding
from bnncert.sets import Box


def rounding_of(node: Node) -> Rounding:
    """What is known of how a node that is not affine rounds.

    Raises:
        UnsupportedPrimitiveError: nothing.
    """
    rounding = node.operation.rounding
    if rounding is None:
        raise unknown_rounding(node)
    return rounding


def function_error(node: Node, boxes: Sequence[Box]) -> tuple[ArrayLike, ArrayLike]:
    """R, and A + X |x|, for a function that is not linear.

    Raises:
        UnsupportedPrimitiveError: nothing known.
    """
    rounding = rounding_of(node)
    if rounding.errors is not None:
        return rounding.errors(node, boxes)
    if rounding.operand:
        return rounding.relative, rounding.absolute + rounding.operand * magnitude(boxes[0])
    return rounding.relative, rounding.absolute


def slope_error(node: Node) -> tuple[float, float]:
    """R' and A' of the slope of an elementwise function, as its lines compute it."""
    slope = rounding_of(node).slope
    return slope(node) if callable(slope) else slope


def curvature(node: Node, box: Box, free: bool) -> ArrayLike:
    """The largest |h''| where a tangent may touch an elementwise function.

    Args:
        node: the function.
        box: of its operand.
        free: whether a tangent may touch it anywhere; else, no nearer to a pole than the middle.
    """
    found = rounding_of(node).curvature
    return found(node, box, free) if callable(found) else found


_MEASURED = {
    o.name: o.rounding
    for o in ELEMENTWISE
    if o.rounding is not None and not o.rounding.exact and not o.parameters
}

FUNCTION_ERRORS: Mapping[str, tuple[float, float]] = {
    name: (rounding.relative, rounding.absolute) for name, rounding in _MEASURED.items()
}
"""R and A by function: what the sweep compares with (`experiments.studies.roundoff`)."""

OPERAND_ERRORS: Mapping[str, float] = {n: r.operand for n, r in _MEASURED.items() if r.operand}
"""X by function."""

SLOPE_ERRORS: Mapping[str, tuple[float, float]] = {
    name: rounding.slope for name, rounding in _MEASURED.items() if not callable(rounding.slope)
}
"""R' and A' by function."""

CURVATURES: Mapping[str, float] = {
    o.name: r.curvature
    for o in ELEMENTWISE
    if (r := _MEASURED.get(o.name)) is not None
    and o.lines is not None
    and r.planes == "lines"
    and isinstance(r.curvature, float)
}
"""The largest |h''| by function, where that is a number."""
