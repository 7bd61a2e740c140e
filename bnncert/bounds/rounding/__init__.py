"""Linear bounds that hold in floating-point arithmetic: what a row must allow for.

Under the model of `model.py` a node computes its operation on what its operands computed, and
then is off by some e_i:

    v_i = op_i(v_j, ...) + error,     |error| <= e_i   on the boxes of the operands

A row passes node i with coefficients a_i. Each error is an unknown of its own, which the row meets
with weight a_i, so the bound gives way by <|a_i|, e_i>: errors travel as the *linear bounds* do,
with their cancellations, along the operations as they are executed and never through a merged map.

Affine nodes, |op| the operation with the magnitudes of its coefficients, m those of the operands:

    the network   gamma(n) (|op|(m) + |b|)    n roundings to a value, b the constant part
    the row       gamma(k) |op|(m)            its transpose is computed too: what it returns is off
                                              by gamma(k) |op|^T |a|, and that meets m
    its offset    gamma(N) |b|                <a, b> is a sum of N terms

Relaxed nodes by lines of slopes s and offsets o, S and O the larger magnitudes of the two, H that
of the node's own value, w the width of the operand's box:

    the network   (R H + A) u
    the row       gamma(k) S m;  for its offset gamma(N) O
    the lines     A slope is what was computed; the offset must make up for it. Of kinks, by the few
                  roundings of their formulas: 32 u ((1 + S)(m + H) + O). Of curves also: the slope
                  of a tangent at p is off from h'(p) by (R' S + A') u, over a distance of w at
                  most; values of h that lines were laid through, or compared with by bisection, are
                  off by (R H + A) u: four of these. And a compiler may compute p and the slope once
                  for the slope and once more for the offset, and round them otherwise: twice the
                  slope's error, and 8 u |h''| m for the difference in p, both over a distance of m.

Products by McCormick or a chord: each term of their planes is at most 8 |x| * |y|.

What no line is known to enclose in rounded arithmetic (softmax, log-sum-exp) is bounded by its
interval, which does.

Where they are charged. <|a_i|, e_i> reads a row once more. So the e_i of an affine node is
*carried* on through what only places or adds, to the lines of the nonlinearity it flows into: they
move apart by e_i |s|, at no cost to a row. A row that begins at such a node begins with its e_i.
Errors are charged at the node itself where it goes several ways, or into a mixing operation.

What remains is the last product, over the sets or over boxes: these are widened by gamma of its
size. A coefficient that underflows is off by t for each of its terms, and meets the node's value:
each node that a row comes through adds t (terms) sum (1 + m).

    model     the model of floating-point arithmetic
    functions what functions and their slopes are off by
    terms     how many terms the sums have that a row is made of
    constants what they may be off by where the network computes them itself
    reordering what a compiler may make of several operations
    intervals of what a network computes
    affine    errors of affine nodes
    relaxed   planes that allow for the errors of relaxed nodes
"""

from bnncert.bounds.rounding.affine import (
    EXACT,
    Errors,
    affine_errors,
    network_error,
    product_error,
    side_error,
)
from bnncert.bounds.rounding.intervals import outward_interval, tracking, widened
from bnncert.bounds.rounding.model import Precision
from bnncert.bounds.rounding.relaxed import outward_planes
from bnncert.bounds.rounding.terms import outward_set

__all__ = [
    "EXACT",
    "Errors",
    "Precision",
    "affine_errors",
    "network_error",
    "outward_interval",
    "outward_planes",
    "outward_set",
    "product_error",
    "side_error",
    "tracking",
    "widened",
]
