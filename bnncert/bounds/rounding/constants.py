"""Constants that a network computes itself: how far off they may be, and what they make others.

An operation on constants is one on boxes of them, of width 0 to begin with, and rounds as any
other: `intervals.tracking` bounds it. What then depends on a constant c that is off by e is off,
with x of magnitude m, by

    c x, sums of such        |op|(m) with e in the place of c
    x / c                    m e / (|c| (|c| - e));  no bound where e >= |c|
    x + c, moves             e where c goes
    max(x, c), min, clip     e, of each constant
    where(x > 0, x, c x)     m e
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node, Ref, unsupported
from bnncert.bounds.graph.constants import is_float
from bnncert.bounds.ops import EVERY
from bnncert.bounds.rounding.model import Precision, gamma, own_unit, roundings


def constant_error(
    graph: Graph, node: Node, sizes: Sequence[Array], precision: Precision
) -> Array | None:
    """The largest change in a node's value for all that its constants may be.

    Args:
        graph: the traced function.
        node: the node.
        sizes: the largest magnitudes of its bounded operands.
        precision: of the network, which rounds products with what a constant is off by as well.

    Returns:
        The shape of the value, rounded up; None where all constants are exact.

    Raises:
        UnsupportedPrimitiveError: a function that is not known to depend on its constant so.
    """
    if not node.computed:
        return None
    errors = [None if c is None else c.error for c in node.computed]
    error = jnp.broadcast_to(_change(node, errors, sizes), node.shape)
    terms = max(math.prod(v.shape) for v in (*sizes, *errors) if v is not None)
    rounded = precision.relative(node, roundings(graph, node).forward) if node.affine else 0
    return error * (1 + rounded) * (1 + 4 * gamma(terms + 8, own_unit(node)))


def _change(node: Node, errors: Sequence[Any], sizes: Sequence[Array]) -> Array:
    if node.op == "div":
        divisor, error = (jnp.abs(jnp.asarray(v)) for v in (node.operands[1], errors[1]))
        least = divisor - error
        quotient = sizes[0] * error / (divisor * jnp.where(least > 0, least, 1))
        return jnp.where(least > 0, quotient, jnp.inf)
    operation = node.operation
    depends = operation.rounding.constants if operation.rounding else ""
    if depends == "moves":
        return jnp.asarray(sum(filter(_is_known, errors)))
    if depends == "scales" or (operation.affine and operation.affine.scales):
        (error,) = filter(_is_known, errors)
        (place,) = (i for i, e in enumerate(errors) if _is_known(e))
        if depends == "scales":
            return sizes[0] * error
        operands = [sizes[0], sizes[0]]
        operands[place] = error
        return node.evaluate(*operands)
    if not operation.affine:
        raise unsupported(
            node,
            _KNOWN,
            f"rounding=\"outward\" does not know what '{node.op}' makes of a constant that f "
            "computes itself: compute it before.",
        )
    bounded = iter(sizes)
    placed = [
        _placed(next(bounded) if isinstance(o, Ref) else o, e)
        for o, e in zip(node.operands, errors, strict=True)
    ]
    return jnp.abs(node.evaluate(*placed))


def _placed(value: Any, error: Any) -> Any:
    """What stands in the place of an operand: its error or 0; itself where it is an index."""
    if error is not None:
        return jnp.broadcast_to(error, jnp.shape(value))
    return jnp.zeros_like(value) if is_float(value) else value


def _is_known(error: Any) -> bool:
    return error is not None


_KNOWN = sorted(
    {o.name for o in EVERY if o.affine and o.affine.scales}
    | {o.name for o in EVERY if o.rounding and o.rounding.constants}
)
"""Operations that are known to depend on their constants so."""
