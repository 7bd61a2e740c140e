"""What a relaxation is: two affine functions of a node's bounded operands that enclose its value.

    lower(v_1, ..., v_k)  <=  node(v_1, ..., v_k)  <=  upper(v_1, ..., v_k)

for all operands in their boxes. They are JAX functions, so the backward pass transposes them as it
does any affine operation, and the forward pass traces them: no second rule for either.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from bnncert.bounds.ops.lines import Lines


class Corner(NamedTuple):
    """Planes of a product P of two values that meet in one corner of their box.

        lower(v, w) = P(corner, w) + P(v - corner, below)
        upper(v, w) = P(corner, w) + P(v - corner, above)

    Attributes:
        corner: of the first operand.
        below: of the second.
        above: of the second.
    """

    corner: Array
    below: Array
    above: Array


class Planes(NamedTuple):
    """Two affine functions of the values of nodes.

    Attributes:
        operands: indices of the nodes they are functions of.
        lower: `(*values) -> value` of the relaxed node's shape.
        upper: likewise.
        lines: where they are elementwise functions of one value, their slopes and offsets: rows
            then pass by a multiplication.
        corner: where they are those of a product, from one corner: what they share is passed once.
        size: of what rounding depends on: no term of either, nor of what its coefficients are
            computed from, is larger than this, up to a factor that the rounding allows for.
    """

    operands: tuple[int, ...]
    lower: Callable[..., Array]
    upper: Callable[..., Array]
    lines: Lines | None = None
    corner: Corner | None = None
    size: Callable[[], Array] | None = None


def from_lines(operand: int, lines: Lines) -> Planes:
    """The planes of an elementwise function of one value."""
    return Planes(
        (operand,),
        lambda v: lines.lower_slope * v + lines.lower_offset,
        lambda v: lines.upper_slope * v + lines.upper_offset,
        lines,
    )
