"""A model of floating-point arithmetic.

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
rule evaluates them. R, A and X (`ops.operation.Rounding`) are measured and not proved; they are as
good as the backend's functions, and `experiments.studies.roundoff` checks them there.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM 2002, chapters 2, 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bnncert.bounds.graph import Graph, Node, UnsupportedPrimitiveError, unsupported
from bnncert.bounds.graph.precision import FACTOR_UNITS, PRODUCTS, factors
from bnncert.bounds.ops import SUPPORTED
from bnncert.bounds.ops.affine import SUMMING
from bnncert.bounds.ops.operation import Roundings


class Precision(NamedTuple):
    """How exactly a network computes.

    Attributes:
        unit_roundoff: of its operations, where they are less exact than the dtype of the bounds.
    """

    unit_roundoff: float | None = None

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
    rule = node.operation.roundings
    if rule is None:
        raise unknown_rounding(node)
    found = rule(graph, node)
    if node.op in SUMMING and node.summed > 1:
        found = found._replace(forward=(found.forward + 1) * node.summed)
    return found
