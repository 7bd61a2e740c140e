"""Interval rules by family, one table each.

    affine      linear in its bounded operands: `AFFINE`, with what the backward pass must know
    monotone    elementwise and increasing: `MONOTONE`
    elementwise not increasing: `ELEMENTWISE`
    reductions  of an axis, not linear: `REDUCTIONS`
    bilinear    products of two bounded values: `BILINEAR`
    extremes    what all but the affine ones allow for under- and overflow

An operation is *relaxed* where it is in no way affine: it then needs an interval for its operands,
in IBP, CROWN-IBP and CROWN alike. That is derived here from the tables, and stated nowhere else.
"""

from collections.abc import Callable

from bnncert.bounds.graph import Node, UnsupportedPrimitiveError
from bnncert.bounds.graph.advice import instead_of
from bnncert.bounds.graph.nodes import unsupported
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.rules.affine import AFFINE, AffineRule
from bnncert.bounds.rules.bilinear import BILINEAR
from bnncert.bounds.rules.elementwise import ELEMENTWISE
from bnncert.bounds.rules.extremes import (
    EXACT_FUNCTIONS,
    off_overflow,
    off_subnormal,
    off_underflow,
)
from bnncert.bounds.rules.monotone import MONOTONE
from bnncert.bounds.rules.reductions import REDUCTIONS
from bnncert.sets import Box

_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
_SINGLE = {**ELEMENTWISE, **REDUCTIONS}

SUPPORTED = tuple(sorted({*AFFINE, *MONOTONE, *_SINGLE, *BILINEAR}))


def affine_rule(node: Node) -> AffineRule | None:
    """The rule of an operation that is affine in its bounded operands; None where it is not."""
    rule = AFFINE.get(node.op)
    return rule if rule is not None and rule.applies(node) else None


def interval(node: Node, *operands: Box) -> Box:
    """The interval of a node's value from those of its bounded operands.

    Raises:
        UnsupportedPrimitiveError: no rule for this operation on these operands.
    """
    affine = affine_rule(node)
    if affine is not None:
        return affine.interval(node, *operands)
    rule: Callable[..., Box] | None = MONOTONE.get(node.op)
    if len(operands) == 1 and isinstance(node.operands[0], Ref):  # 2 ** x is not a power of x
        rule = rule or _SINGLE.get(node.op)
    elif len(operands) == 2 and rule is None and node.op in BILINEAR:
        return off_overflow(BILINEAR[node.op](node, *operands))
    if rule is None:
        raise _unsupported(node)
    box = off_underflow(node.op, rule(node, *map(off_subnormal, operands)))
    if node.op in REDUCTIONS or node.op in EXACT_FUNCTIONS:
        return box
    return off_overflow(box, *operands)


def _unsupported(node: Node) -> UnsupportedPrimitiveError:
    hint = instead_of(node.op)
    if node.op in AFFINE:
        hint = "It is supported where it is linear: with the other operands constant."
    if node.op in _COMPARISONS:
        hint = (
            "What a comparison selects may jump. Write a rectifier as jax.nn.relu or "
            "jax.nn.leaky_relu (or jnp.where(x > 0, x, a * x)), the larger of two values as "
            "jnp.maximum, a range as jnp.clip; a mask must not depend on a set."
        )
    return unsupported(node, SUPPORTED, hint)
