"""Bounds on a network over Gaussian weights and a set of inputs, linear in the weights.

Let the weights be w = m + s xi, with xi a vector of independent standard normal numbers. A row is
pulled back through the network as CROWN does (`bnncert.bounds.rows`), at the *means* of the
weights, and carries along what they deviate by.

1. A layer. z = W h with W = M + D. A row lam on z is, with g = D' lam,

       lam . z  =  (M' lam) . h  +  g . h,        g_n ~ N(0, t_n^2),  t_n^2 = sum_k lam_k^2 S_kn^2
       g . h    >=  g . c - |g| . r               for all h in the box c -+ r

   No lam is random, as long as the relaxations between layers stand on intervals that are not. So
   the row goes on with M' lam, and leaves behind a function of D alone. Its mean is
   -sqrt(2/pi) sum_n t_n r_n, and as a function of xi it has the Lipschitz constant

       L^2  <=  sum_kn lam_k^2 S_kn^2 (|c_n| + r_n)^2,        |dg_n / dxi_kn| = |lam_k| S_kn

   Where a weight is used at several places (a convolution), their derivatives add up before they
   are squared: L^2 <= |S (|dW(c, lam)| + dW(r, |lam|))|^2, with dW(h, lam) the transpose of
   W -> W h. A weight that is added, as a bias is, is a Gaussian number lam . b: nothing is lost.

2. The set. What arrives at the input x has mean coefficients a, and a layer's g beside them:
   (a + g) . x >= (a + g) . c - |a + g| . r, where |a_n + g_n| is a folded normal number of mean
   t sqrt(2/pi) exp(-a^2 / 2 t^2) + a erf(a / (t sqrt 2)).

3. So the bound of a row is a function F of the weights whose mean is known. L^2 is the sum over the
   layers of theirs, which hold weights of their own. F is *concave*: a sum of linear functions of
   the weights and of -|linear function| r. By Gaussian isoperimetry its deviations from its median
   are those of one Gaussian number of deviation L, or less; and the median of a concave function
   is no less than its mean (Kwapien). Hence

       Prob( F <= E F - u )  <=  Phi(-u / L)

4. Intervals. Each of N hidden units that something acts on has such an F below and above. With
   Phi(-q) = delta / 2N all 2 N of them stay above E F - q L with probability 1 - delta; call that
   event A. On A every hidden unit lies in its interval for all x of the set, layer by layer: the F
   of one layer are bounds where the units of the layers before it lie in theirs. So is the F of an
   output, and for margins y_j with E F_j > 0

       Prob( y_j > 0 for all x of the set and all j )  >=  1 - delta - sum_j Phi(-E_j / L_j)

   The F are fixed functions of the weights, whether A holds or not; only that they bound needs it.

Of each row several bounds are made, by other lines of the nonlinearities, and one is kept: which is
decided by means and constants alone, so that it is no more random than they are.

Forwards. A unit's own row meets each of its weights once, so that its mean and L^2 are products of
centres and radii with E|W| and S^2: no row has to be pulled back. That is all there is to know of a
first layer over a box, and a bound for any other.

Factors. Where weights share standard normal numbers c_r, w = m + s xi + sum_r u_r c_r, their
derivatives by c_r add up over all layers, with their signs where these are known, and L^2 gains the
sum of their squares.

Rounding. By `rounding="outward"` a row allows, at each node that it passes, for what the network
and the row are off by there (`bnncert.bounds.rounding`), from the magnitudes of the values. That of
a weight is at most |m| + k s, with Phi(-k) = d / 2P for P weights: it costs d, a thousandth of
delta. Means are rounded down, constants up; tails are computed in float64.

Sources: Zhang et al., NeurIPS 2018 (CROWN); Boucheron, Lugosi and Massart, "Concentration
Inequalities", 2013, section 10.4 (isoperimetry); Kwapien, "A remark on the median and the
expectation of convex functions of Gaussian vectors", 1994; Wicker et al., UAI 2020 (the
probability).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import ndtr, ndtri

from bnncert import prior as priors
from bnncert.bounds.api import DEFAULT_BATCH_SIZE
from bnncert.bounds.arithmetic import Arithmetic
from bnncert.bounds.plan import Options, Plan, make_plan
from bnncert.bounds.rows import map_rows
from bnncert.bounds.tracing import trace
from bnncert.certify.formal.claims import Constraints
from bnncert.certify.formal.network import Margin, network_of
from bnncert.certify.formal.weights import Leaf, weights_of
from bnncert.sets import Box, Set
from bnncert.types import Apply, Params


class How(NamedTuple):
    """How bounds linear in the weights are found.

    Attributes:
        method: "crown", "crown-ibp" or "ibp".
        arithmetic: that they are to hold in.
        delta: the probability that some hidden unit leaves its interval, in (0, 1).
    """

    method: str
    arithmetic: Arithmetic
    delta: float


@partial(jax.jit, static_argnums=(0, 1))
def linear_margins(
    apply: Apply,
    how: How,
    params: Params,
    leaves: Mapping[str, Leaf],
    x_set: Set,
    constraints: Constraints,
) -> Margin:
    """Bounds the rows of constraints from below, linearly in the weights.

    Args:
        apply: `(params, x) -> outputs`.
        how: the bounds are found.
        params: gives the deterministic leaves, and all shapes.
        leaves: the random ones, by name.
        x_set: the set of inputs; `jax.vmap` for a batch.
        constraints: the rows.

    Returns:
        A `Margin` of shape (rows,); where the set is traced and empty, means of -inf.
    """
    matrix, offset = (jnp.asarray(part) for part in constraints)

    def rows(params: Params, x: Array) -> Array:
        return matrix @ jnp.ravel(apply(params, x)) + offset

    named = priors.named(params)
    widest = _far(sum(leaf.loc.size for leaf in leaves.values()), how.delta * _SHARE)
    boxes = [_box(leaves[name], widest) if name in leaves else v for name, v in named.items()]
    boxed = jax.tree.unflatten(jax.tree.structure(params), boxes)
    graph = trace(rows, (boxed, x_set), {}, how.arithmetic.tracking())
    plan = make_plan(graph, Options(DEFAULT_BATCH_SIZE, how.arithmetic))
    ordered = [leaves[name] for name in named if name in leaves]
    found = margins(plan, ordered, how)
    if graph.valid is None:
        return found
    return found._replace(mean=jnp.where(graph.valid, found.mean, -jnp.inf))


def margins(plan: Plan, leaves: Sequence[Leaf], how: How) -> Margin:
    """Bounds each coordinate of a function's one output from below.

    Args:
        plan: of the network over a `Box` for each of its random leaves, and then the set of inputs.
        leaves: these, in their order.
        how: the bounds are found.

    Returns:
        A `Margin` of the shape of the output.

    Raises:
        UnsupportedPrimitiveError: an operation on random values that has no rule; weights that are
            used twice.

    Cost: by "crown" a backward pass for each unit of each hidden layer after the first, twice, and
    one for each output; for convolutions each keeps an array of the size of its weights. By
    "crown-ibp" the last alone. By "ibp" three interval passes, and the outputs' last layer.
    """
    network = network_of(plan, weights_of(plan.graph, leaves), how.method)
    reach = _far(network.units(), how.delta * (1 - _SHARE))
    boxes, passage = network.bounds(reach)
    (output,) = plan.outputs
    node = plan.graph.nodes[output]

    def one(row: Array) -> Margin:
        return network.best(output, boxes, passage, row, _ratio)

    found = map_rows(one, node, plan.batch_size)
    return jax.tree.map(lambda v: v.reshape(node.shape), found)


def mass(margin: Margin, delta: float) -> float:
    """Bounds the probability that all margins are positive from below, in float64.

        1 - delta - sum_j Phi(-E_j / L_j),     the summand of a row with E_j <= 0 being 1

    Args:
        margin: of the rows.
        delta: of their hidden units.

    Returns:
        A number in [0, 1], rounded down.

    Example:
        >>> f"{mass(Margin(jnp.array([5.0, 8.0]), jnp.ones(2)), 1e-6):.7f}"
        '0.9999987'
    """
    mean, spread = (np.asarray(v, np.float64).reshape(-1) for v in margin)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        known = (mean > 0) & (spread < np.inf)
        lost = float(np.where(known, ndtr(-mean / spread), 1.0).sum())
    return max(0.0, 1.0 - (delta + lost) * (1 + _ROUNDED) - _ROUNDED)


def _far(numbers: int, probability: float) -> float:
    """How far so many Gaussian numbers reach to either side, but for a probability."""
    return float(-ndtri(probability / (2 * max(numbers, 1)))) * (1 + _ROUNDED)


def _box(leaf: Leaf, widest: float) -> Box:
    """Where weights lie, each of them rounded to their format."""
    unit = 4 * float(jnp.finfo(leaf.loc.dtype).eps)
    reach = widest * jnp.sqrt(leaf.variance)
    reach = reach + unit * (jnp.abs(leaf.loc) + reach) + float(jnp.finfo(leaf.loc.dtype).tiny)
    return Box(leaf.loc - reach, leaf.loc + reach)


def _ratio(found: Margin) -> Array:
    """How many Lipschitz constants a mean lies above 0."""
    tiny = float(jnp.finfo(found.mean.dtype).tiny)
    return found.mean / jnp.maximum(found.lipschitz, tiny)


_SHARE = 1e-3
"""What of delta is spent on weights, and not on hidden units."""

_ROUNDED = 1e-9
"""More than sums and tails in float64 are off by, relatively."""
