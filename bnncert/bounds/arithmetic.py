"""Floating-point arithmetic: a model of it, and intervals that hold in it.

`rounding="outward"` bounds what a network *computes*, not only what it is in real arithmetic.

The model. The network runs node by node as it was traced, by operations of unit roundoff u
(float32: 2^-24) and smallest normal number t (2^-126); nothing overflows. With |d| <= u:

    + - * / and conversions   fl(a o b) = (a o b)(1 + d), and off by t where that underflows
    sums of n products        in any order, with or without fused multiply-add, but by no fast
                              algorithm (Winograd, Strassen, FFT)
    factors of such products  as they are; or rounded to TF32 or bfloat16, where the network asks
                              for no more or its backend does so by itself (`precision.py`)
    division by a constant    may be a product with its reciprocal
    functions h               |fl h(x) - h(x)| <= (R |h(x)| + A + X |x|) u + 2 t
    moves, comparisons, max   exact; one that is compiled twice comes out alike
    subnormal values          may be taken for 0; weights are not subnormal

What is computed of weights alone is computed so too, and no exact number. Compilers may reorder:

    sums of sums              one sum of all terms
    an addend of a sum        one more of its terms, and be it the first
    constants in a row        added up, or multiplied, before they meet what is not constant
    products of up to five    the exponential of a sum
      exponentials
    quotients of quotients    a / (b c), a c / b or a d / (b c), of which nothing overflows, and no
                              divisor underflows; x 2^k + y 2^k as (x + y) 2^k likewise
    conversions               left out, there and back

`tests/bounds/test_compilers.py` tests this on what XLA does. Not covered: matrix products of matrix
products in another order than traced, which no backend is known to do by default.

Real arithmetic is the case d = 0: the bounds hold there too. So they do for any order of summation,
any batch and any fusion. They are computed in floating point themselves, under the same model.

Sums. Each product of y = sum_i w_i x_i passes through at most n roundings, in any order, so

    fl(y) = sum_i w_i x_i (1 + theta_i),     |theta_i| <= gamma(n) = n u / (1 - n u)

(Higham 2002, section 3.1). The network computes the *exact* sum at x_i (1 + theta_i): at a point of
the box widened by gamma(n) max(|l_i|, |u_i|) on either side. The bound is the interval rule on that
box, and the rule rounds as well: by centre c and radius r it is off by at most

    |fl(W c) - W c| + |fl(|W| r) - |W| r|  <=  gamma(n) |W| (|c| + r)

and |c| + r = max(|l|, |u|): the same widening once more, with n + 8 for the few roundings of c, r
and of the widening. Two products as before, no third for magnitudes. An operand taken for 0 is off
by t: the box is widened by 2 t as well. A product that underflows costs t, in the network and in
the rule: 8 t for each are added at the end, with a few u of the value for the last roundings.

A function that increases is evaluated at both ends, with the error that its value may have there,
and the network's value has the same error once more. Others likewise, at the points where their
rule evaluates them. R, A and X (`function_errors.py`) are measured and not proved; they are as good
as the backend's functions, and `experiments.studies.roundoff` checks them there.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM 2002, chapters 2, 3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node, UnsupportedPrimitiveError
from bnncert.bounds.graph.nodes import unsupported
from bnncert.bounds.graph.operands import Operand, Ref
from bnncert.bounds.graph.precision import FACTOR_UNITS, PRODUCTS, factors
from bnncert.bounds.rules import SUPPORTED
from bnncert.sets import Box


@dataclass(frozen=True)
class Real:
    """Real arithmetic: `rounding="nearest"`.

    Bounds of the function itself, computed in the dtype of the sets: their own rounding may cut
    them, by some 1e-6 of the values in float32.

    Example:
        >>> from bnncert import bound
        >>> box = bound(lambda x: 3 * x, "ibp", rounding=Real())(Box(jnp.ones(1), jnp.ones(1)))
        >>> box.lower.tolist(), box.upper.tolist()
        ([3.0], [3.0])
    """


@dataclass(frozen=True)
class Float:
    """Floating-point arithmetic: `rounding="outward"`.

    Bounds of what the network computes, and of the function in real arithmetic, by the model of
    `bnncert.bounds.arithmetic`.

    Attributes:
        unit_roundoff: of the network's operations, where they are less exact than the dtype of the
            bounds (TF32 products: 2**-11; bfloat16: 2**-8); None: of the dtype of each value.

    Raises:
        ValueError: a unit roundoff that is not in (0, 1/2).

    Example:
        >>> from bnncert import bound
        >>> at_one = Box(jnp.ones(1), jnp.ones(1))
        >>> box = bound(lambda x: 3 * x, "ibp", rounding=Float(2**-11))(at_one)
        >>> bool(box.lower[0] < 3 * (1 - 2**-11)), bool(box.upper[0] > 3 * (1 + 2**-11))
        (True, True)
    """

    unit_roundoff: float | None = None

    def __post_init__(self) -> None:
        if self.unit_roundoff is not None and not 0 < self.unit_roundoff < 0.5:
            raise ValueError(
                f"unit_roundoff = {self.unit_roundoff}: give a number in (0, 0.5), e.g. 2**-24."
            )

    def unit(self, node: Node) -> float:
        """The network's unit roundoff at a node: no less than that of the dtype."""
        return max(self.unit_roundoff or 0.0, own_unit(node))

    def relative(self, node: Node, terms: int) -> float:
        """The largest relative error of each product in a sum, of `terms` roundings or a few more.

        Where a backend rounds the factors to a coarser format than the sum, of both factors too.

        Raises:
            UnsupportedPrimitiveError: a format of which nothing is known.
        """
        sums = gamma(terms + 4, self.unit(node))
        if node.op not in PRODUCTS or jnp.finfo(node.dtype).bits > 32:
            return sums
        name = factors(node.params["precision"], jax.default_backend())
        if name is None and self.unit_roundoff is None:
            hint = (
                f"With precision {node.params['precision']} nothing is known of its rounding: ask "
                'for more (jax.default_matmul_precision("float32")), or give unit_roundoff=.'
            )
            raise unsupported(node, (), hint)
        factor = FACTOR_UNITS[name] if name else 0.0
        return (1 + sums) * (1 + factor) ** 2 - 1 if factor > self.unit(node) else sums


Arithmetic: TypeAlias = Real | Float
Rounding: TypeAlias = str | Arithmetic
"""An arithmetic, or its short form: one of `ROUNDINGS`."""

ROUNDINGS: Mapping[str, type[Arithmetic]] = {"nearest": Real, "outward": Float}
"""The short forms: what bounds allow for rounding."""


def arithmetic_of(rounding: object) -> Float | None:
    """The floating-point arithmetic that bounds are to hold in; None: real arithmetic.

    Raises:
        ValueError: an unknown rounding.
        TypeError: neither a name nor an arithmetic.
    """
    if isinstance(rounding, str) and rounding in ROUNDINGS:
        rounding = ROUNDINGS[rounding]()
    if isinstance(rounding, Float):
        return rounding
    if isinstance(rounding, Real):
        return None
    kind = ValueError if isinstance(rounding, str) else TypeError
    raise kind(
        f"rounding = {rounding!r}: choose 'nearest' (bnncert.Real()) or 'outward' "
        "(bnncert.Float(unit_roundoff=None))."
    )


class Roundings(NamedTuple):
    """How many roundings a term passes through.

    Attributes:
        forward: on the way to one coordinate of the value; 0: the operation is exact.
        backward: on the way to one coefficient of an operand, in the transpose; 0: it is exact.
    """

    forward: int
    backward: int


def own_unit(node: Node) -> float:
    """The unit roundoff of a node's dtype, in which bounds are computed."""
    return 0.5 * float(jnp.finfo(node.dtype).eps)


def tiny(node: Node) -> float:
    """The smallest normal number of a node's dtype."""
    return float(jnp.finfo(node.dtype).tiny)


def gamma(n: int, unit: float) -> float:
    """The largest relative error that n roundings leave: n u / (1 - n u).

    Raises:
        ValueError: n u is 1/2 or more, where nothing can be said.
    """
    if not 2 * n * unit < 1:
        raise ValueError(
            f"a sum of {n} terms has no error bound at unit roundoff {unit:g}: n u must be below "
            '1/2. Bound in a wider format (float32 or float64), or with rounding="nearest".'
        )
    return n * unit / (1 - n * unit)


def magnitude(box: Box) -> Array:
    """The largest magnitude in a box, elementwise."""
    return jnp.maximum(jnp.abs(box.lower), jnp.abs(box.upper))


def unknown_rounding(node: Node) -> UnsupportedPrimitiveError:
    """What is raised where nothing is known of an operation's rounding."""
    hint = f'rounding="outward" does not know how \'{node.op}\' rounds; "nearest" bounds it.'
    return unsupported(node, sorted({*SUPPORTED} - {"pow"}), hint)


def roundings(graph: Graph, node: Node) -> Roundings:
    """Of an operation that is affine in its bounded operands, or a product of two of them.

    A sum whose values are summed on is one with all of their terms.

    Raises:
        UnsupportedPrimitiveError: an operation whose rounding is not known.
    """
    found = _roundings(graph, node)
    if node.op in SUMMING and node.summed > 1:
        found = found._replace(forward=(found.forward + 1) * node.summed)
    return found


def _roundings(graph: Graph, node: Node) -> Roundings:
    """As `roundings`, of the operation by itself."""
    shapes = [graph.nodes[i].shape for i in node.refs]
    size, largest = math.prod(node.shape), max((math.prod(s) for s in shapes), default=1)
    op = node.op
    if op in EXACT:
        return Roundings(0, 0)
    if op == "windows":
        return Roundings(0, node.shape[0] - 1)
    if op in REPEATING:
        return Roundings(0, size if op == "gather" else max(0, -(-size // max(largest, 1)) - 1))
    if op in ("add", "add_any", "sub"):
        return Roundings(1, 0)
    if op == "convert_element_type":
        return Roundings(1, 1)
    if op in ("mul", "div"):
        return Roundings(3, 3)
    if op == "reduce_sum":
        return Roundings(max(1, largest // max(size, 1)), 0)
    if op == "cumsum":
        length = node.shape[node.params["axis"]]
        return Roundings(length, length)
    if op == "reduce_window_sum":
        window = math.prod(node.params["window_dimensions"])
        return Roundings(window, window)
    if op == "scatter-add":
        updates = node.operands[2]
        return Roundings(math.prod(_shape(graph, updates)) + 1, 0)
    if op == "dot_general":
        return _dot_roundings(graph, node)
    if op == "conv_general_dilated":
        return _convolution_roundings(graph, node)
    raise unknown_rounding(node)


def _dot_roundings(graph: Graph, node: Node) -> Roundings:
    (contract, _), (batch, _) = node.params["dimension_numbers"]
    first, second = (_shape(graph, o) for o in node.operands)
    summed = math.prod(first[i] for i in contract)
    kept = summed * math.prod(first[i] for i in batch)
    frees = {0: math.prod(second) // max(kept, 1), 1: math.prod(first) // max(kept, 1)}
    places = [place for place, o in enumerate(node.operands) if isinstance(o, Ref)]
    return Roundings(max(summed, 1), max(1, *(frees[place] for place in places)))


def _convolution_roundings(graph: Graph, node: Node) -> Roundings:
    """Of patches times kernel; backward, at most each tap of each feature for an image's pixel."""
    _, rhs, out = node.params["dimension_numbers"]
    kernel = _shape(graph, node.operands[1])
    features = kernel[rhs[0]]
    taps = math.prod(kernel) // max(features, 1)
    space = math.prod(kernel[i] for i in rhs[2:])
    groups = node.params["feature_group_count"]
    backward = space * features // groups
    if isinstance(node.operands[1], Ref):  # for a tap of the kernel: every position it was at
        positions = math.prod(node.shape[i] for i in (out[0], *out[2:]))
        backward = max(backward, positions)
    return Roundings(max(taps, 1), max(backward, 1))


def _shape(graph: Graph, operand: Operand) -> tuple[int, ...]:
    return graph.nodes[operand.index].shape if isinstance(operand, Ref) else jnp.shape(operand)


EXACT = frozenset(
    "reshape transpose squeeze expand_dims rev slice split dynamic_slice unstack stack concatenate "
    "dynamic_update_slice scatter pad select_n neg".split()
)
"""Operations that move values, each to one place."""

REPEATING = frozenset("tile windows broadcast_in_dim gather".split())
"""Operations that move values, each to several places."""

SINGLE = frozenset("add add_any sub mul div convert_element_type".split())
"""Operations each value of which is one product, quotient, sum of two or conversion, rounded."""

SUMMING = frozenset(
    "reduce_sum cumsum reduce_window_sum scatter-add dot_general conv_general_dilated".split()
)
"""Operations that add up many terms."""
