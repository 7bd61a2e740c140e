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
   layers of theirs, which hold weights of their own, and by Gaussian concentration

       Prob( F <= E F - u )  <=  exp(-u^2 / (2 L^2))

4. Intervals. Each of N hidden units that something acts on has such an F below and above. With
   q = sqrt(2 log(2 N / delta)) all 2 N of them stay above E F - q L with probability 1 - delta;
   call that event A. On A every hidden unit lies in its interval for all x of the set, layer by
   layer: the F of one layer are bounds where the units of the layers before it lie in theirs. So is
   the F of an output, and for margins y_j with E F_j > 0

       Prob( y_j > 0 for all x of the set and all j )  >=  1 - delta - sum_j exp(-E_j^2 / (2 L_j^2))

   The F are fixed functions of the weights, whether A holds or not; only that they bound needs it.

Of each row several bounds are made, by other lines of the nonlinearities, and one is kept: which is
decided by means and constants alone, so that it is no more random than they are.

Sources: Zhang et al., NeurIPS 2018 (CROWN); Boucheron, Lugosi and Massart, "Concentration
Inequalities", 2013, theorem 5.6 (Lipschitz functions of Gaussian vectors); Wicker et al., UAI 2020
(the probability).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert import prior as priors
from bnncert.bounds.api import DEFAULT_BATCH_SIZE
from bnncert.bounds.arithmetic import Real
from bnncert.bounds.ops.boxes import drop_nan, intersect
from bnncert.bounds.plan import Options, Plan, make_plan
from bnncert.bounds.propagate import Domain, propagate
from bnncert.bounds.rows import map_rows
from bnncert.bounds.tracing import trace
from bnncert.certify.formal.claims import Constraints
from bnncert.certify.formal.layers import Margin, network_of, weights_of
from bnncert.sets import Box, Set
from bnncert.types import Apply, Params


@partial(jax.jit, static_argnums=(0, 1))
def linear_margins(
    apply: Apply,
    delta: float,
    params: Params,
    scales: Mapping[str, Array],
    x_set: Set,
    constraints: Constraints,
) -> Margin:
    """Bounds the rows of constraints from below, linearly in the weights.

    Args:
        apply: `(params, x) -> outputs`.
        delta: as for `safety`.
        params: the means of the weights.
        scales: of the random leaves, by name, their standard deviations.
        x_set: the set of inputs; `jax.vmap` for a batch.
        constraints: the rows.

    Returns:
        A `Margin` of shape (rows,); where the set is traced and empty, means of -inf.
    """
    matrix, offset = (jnp.asarray(part) for part in constraints)

    def rows(params: Params, x: Array) -> Array:
        return matrix @ jnp.ravel(apply(params, x)) + offset

    named = priors.named(params)
    points = [Box(v, v) if name in scales else v for name, v in named.items()]
    boxed = jax.tree.unflatten(jax.tree.structure(params), points)
    graph = trace(rows, (boxed, x_set), {}, Real().tracking())
    plan = make_plan(graph, Options(DEFAULT_BATCH_SIZE, Real()))
    ordered = [scales[name] for name in named if name in scales]
    found = margins(plan, ordered, delta)
    if graph.valid is None:
        return found
    return found._replace(mean=jnp.where(graph.valid, found.mean, -jnp.inf))


def margins(plan: Plan, scales: Sequence[Array], delta: float) -> Margin:
    """Bounds each coordinate of a function's one output from below.

    Args:
        plan: of the network over `Box`es of one point, the means of its random leaves, and then
            the set of inputs; in real arithmetic.
        scales: the leaves' standard deviations, in their order.
        delta: the probability that some hidden unit leaves its interval, in (0, 1).

    Returns:
        A `Margin` of the shape of the output.

    Raises:
        UnsupportedPrimitiveError: an operation on random values that has no rule; weights that are
            used twice.

    Cost: a backward pass for each hidden unit, twice, and one for each output; for convolutions
    each keeps an array of the size of its weights.
    """
    network = network_of(plan, weights_of(plan.graph, scales))
    units = sum(math.prod(plan.graph.nodes[i].shape) for i in network.hidden)
    reach = math.sqrt(2 * math.log(2 * max(units, 1) / delta))

    def settle(index: int, boxes: list[Box], steps: Any) -> tuple[Box, Any]:
        if index in network.hidden:
            steps = network.further(boxes, steps)
            box = drop_nan(network.interval(index, boxes, steps, reach))
            boxes = [*boxes[:index], intersect(boxes[index], box)]
        return boxes[index], steps

    boxes, steps = propagate(plan.graph, Domain(network.start, network.apply, settle, {}))
    steps = network.further(boxes, steps)
    (output,) = plan.outputs
    node = plan.graph.nodes[output]

    def one(row: Array) -> Margin:
        return network.best(output, boxes, steps, row, _ratio)

    found = map_rows(one, node, plan.batch_size)
    return jax.tree.map(lambda v: v.reshape(node.shape), found)


def _ratio(found: Margin) -> Array:
    """How many Lipschitz constants a mean lies above 0."""
    tiny = float(jnp.finfo(found.mean.dtype).tiny)
    return found.mean / jnp.maximum(found.lipschitz, tiny)


def mass(margin: Margin, delta: float) -> float:
    """Bounds the probability that all margins are positive from below, in float64.

        1 - delta - sum_j exp(-E_j^2 / (2 L_j^2)),     the summand of a row with E_j <= 0 being 1

    Args:
        margin: of the rows.
        delta: of their hidden units.

    Returns:
        A number in [0, 1], rounded down.

    Example:
        >>> f"{mass(Margin(jnp.array([5.0, 8.0]), jnp.ones(2)), 1e-6):.6f}"
        '0.999995'
    """
    mean, spread = (np.asarray(v, np.float64).reshape(-1) for v in margin)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        tails = np.where(mean > 0, np.exp(-0.5 * np.square(mean / spread)), 1.0)
    lost = float(np.where(np.isnan(tails), 1.0, tails).sum())
    return max(0.0, 1.0 - (delta + lost) * (1 + _ROUNDED) - _ROUNDED)


_ROUNDED = 1e-12
"""More than sums and exponentials in float64 are off by."""
