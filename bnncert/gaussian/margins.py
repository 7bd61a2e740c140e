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

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float
from numpy import ndarray
from scipy.special import ndtri

from bnncert import prior as priors
from bnncert.bounds.api import DEFAULT_BATCH_SIZE
from bnncert.bounds.arithmetic import Arithmetic, Rounding, arithmetic_of
from bnncert.bounds.methods import AlphaCROWN, Method, method_of
from bnncert.bounds.plan import Options, make_plan
from bnncert.bounds.rows import map_rows
from bnncert.bounds.tracing import trace
from bnncert.gaussian import tails
from bnncert.gaussian.network import Margin, network_of
from bnncert.gaussian.slopes import least_spread, optimised
from bnncert.gaussian.weights import Leaf, leaves_of, weights_of
from bnncert.sets import Box, Set
from bnncert.types import Apply, Params, Posterior

METHODS = ("alpha-crown", "crown", "crown-ibp", "ibp")
"""How intervals of hidden units are found, and whether rows pass nonlinearities."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Margins:
    """Bounds from below on linear forms of outputs, as functions of Gaussian weights.

    With probability 1 - delta over the weights, every y_j over the whole set is at least F_j; and

        Prob( F_j <= mean_j - u ) <= Phi(-u / lipschitz_j)      for any u >= 0

    A pytree, as `jit`, `vmap` and `grad` make it; its methods compute on the host, in float64, and
    take leading axes of a batch.

    Attributes:
        mean: E F_j, shape (..., rows).
        lipschitz: L_j, the same shape.
        delta: a probability.

    Example:
        >>> found = Margins(jnp.array([2.0, 3.0]), jnp.array([0.5, 0.5]), 1e-4)
        >>> print(f"{found.probability():.4f} {found.quantile(0.01)[0]:.3f}")
        0.9999 0.835
    """

    mean: Float[Array, "..."]
    lipschitz: Float[Array, "..."]
    delta: float = field(metadata={"static": True})

    def probability(self) -> Float[ndarray, "..."]:
        """Bounds the probability that all rows are positive over the whole set.

            1 - delta - sum_j Phi(-E_j / L_j),     the summand of a row with E_j <= 0 being 1

        Returns:
            Numbers in [0, 1] without the axis of rows, rounded down.

        Example:
            >>> Margins(jnp.array([-1.0, 8.0]), jnp.ones(2), 1e-6).probability().item()
            0.0
        """
        return tails.probability(self.mean, self.lipschitz, self.delta)

    def quantile(self, level: float) -> Float[ndarray, "..."]:
        """Bounds the rows but for a share of the posterior, each row by itself.

            y_j >= E_j + L_j Phi^-1(level - delta)     with probability 1 - level

        Args:
            level: the share that may lie below, in (delta, 1).

        Returns:
            Numbers of the shape of `mean`.

        Raises:
            ValueError: a level out of range.

        Example:
            >>> Margins(jnp.array([2.0]), jnp.array([0.5]), 0.001).quantile(0.051).round(3).tolist()
            [1.178]

            A band that a regression's outputs f(w, x) lie in, for all x of a ball and 90% of the
            posterior: rows for f and -f, each with half of the rest.

            >>> from bnncert import MeanField, ball
            >>> q = MeanField({"w": jnp.array([[2.0]])}, {"w": jnp.full((1, 1), 0.1)})
            >>> found = margins(
            ...     lambda p, x: p["w"] @ x, q, ball(jnp.ones(1), 0.1),
            ...     jnp.array([[1.0], [-1.0]]), jnp.zeros(2),
            ... )
            >>> low, high = found.quantile(0.05)
            >>> print(f"{low:.2f} {-high:.2f}")
            1.62 2.38
        """
        return tails.quantile(self.mean, self.lipschitz, self.delta, level)

    def cvar(self, level: float) -> Float[ndarray, "..."]:
        """Bounds the mean of each F_j over the share of the posterior where it is least.

            E[ F_j | F_j <= its quantile ] >= E_j - L_j phi(Phi^-1(level)) / level

        It is of the bound F_j, which y_j is above but for a probability of delta.

        Args:
            level: the share, in (0, 1]; at 1 it is the mean.

        Returns:
            Numbers of the shape of `mean`.

        Raises:
            ValueError: a level out of range.

        Example:
            >>> Margins(jnp.array([2.0]), jnp.array([0.5]), 0.001).cvar(0.05).round(3).tolist()
            [0.969]
        """
        return tails.cvar(self.mean, self.lipschitz, level)

    def class_probability(self) -> Float[ndarray, "..."]:
        """Bounds the expected softmax of a class at its worst, where rows are its logit margins.

            E_w[ min_x softmax_y ]  >=  E[ 1 / (1 + sum_j exp(-F_j)) ] - delta

        Returns:
            Numbers in [0, 1] without the axis of rows, rounded down.

        Example:
            >>> found = Margins(jnp.array([2.0, 3.0]), jnp.array([0.5, 0.5]), 1e-4)
            >>> print(f"{found.class_probability():.2f}")      # .84 at the means
            0.78
        """
        return tails.class_probability(self.mean, self.lipschitz, self.delta)


def margins(
    apply: Apply,
    posterior: Posterior,
    x_set: Set,
    matrix: Float[ArrayLike, "rows outputs"],
    offset: Float[ArrayLike, " rows"],
    *,
    method: str | Method = "crown",
    rounding: Rounding = "outward",
    delta: float = 1e-3,
) -> Margins:
    """Bounds linear forms of a network's outputs over a set, under a Gaussian posterior.

        matrix f(w, x) + offset  >=  F(w)    for all x of the set, with probability 1 - delta

    Pure: `jit`, `vmap` (over sets) and `grad` (by the posterior) compose with it; under `jit` it is
    many times faster.

    Args:
        apply: `(params, x) -> outputs` for one example; outputs are taken as one flat vector.
        posterior: a `bnncert.posterior.MeanField`, `LowRank` or `Gaussian`.
        x_set: a `Box` or an `LpBall` of inputs for one example.
        matrix: of the forms, e.g. `bnncert.certify.class_stays(label, num_classes).matrix`.
        offset: of the forms.
        method: "ibp": forward alone; "crown-ibp": rows pull the outputs back to the set;
            "crown": and every hidden unit, each row by the better of two slopes; "alpha-crown":
            and the slopes of the outputs' rows are optimised for E / L. Or the method itself: its
            one option is `bnncert.AlphaCROWN(steps=)`.
        rounding: as for `bnncert.bound`; "outward" is sound for the float32 network as well.
        delta: the probability that some hidden unit leaves the interval that it is relaxed on.

    Returns:
        `Margins` of shape (rows,); means of -inf where the set is traced and empty, or weights are
        not finite.

    Raises:
        TypeError: another posterior.
        ValueError: an unknown method, a delta that is not in (0, 1); outputs that depend on
            nothing; as `bnncert.bound`.
        UnsupportedPrimitiveError: an operation on random values that has no rule; weights that are
            used twice.

    Cost: by "crown" a backward pass for each unit of each hidden layer after the first, twice, and
    one for each output; for convolutions each keeps an array of the size of its weights. By
    "alpha-crown" four more of those of the outputs for each step of the optimiser. By
    "crown-ibp" the last alone. By "ibp" three interval passes, and the outputs' last layer. Of
    correlated weights, R times that for R factors.

    Source: the module says how it is derived; Zhang et al., NeurIPS 2018 (CROWN).

    Example:
        >>> from bnncert import MeanField, ball
        >>> q = MeanField({"w": jnp.array([[2.0], [-2.0]])}, {"w": jnp.full((2, 1), 0.1)})
        >>> found = margins(
        ...     lambda params, x: params["w"] @ x, q, ball(jnp.ones(1), 0.5),
        ...     jnp.array([[1.0, -1.0]]), jnp.zeros(1),           # logit 0 stays above logit 1
        ... )
        >>> print(f"{found.mean[0]:.2f} {found.lipschitz[0]:.2f} {found.probability():.4f}")
        2.00 0.21 0.9990
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: give a probability in (0, 1), e.g. 1e-3.")
    leaves = leaves_of(posterior)
    how = How(*_chosen(method), arithmetic_of(rounding), delta)
    rows = jnp.asarray(matrix), jnp.asarray(offset)
    q: Any = posterior
    found = row_margins(apply, how, q.loc, leaves, x_set, rows)
    return Margins(found.mean, found.lipschitz, delta)


def _chosen(method: str | Method) -> tuple[str, int]:
    """Gives the name of a method, and the steps of its optimiser."""
    name = method if isinstance(method, str) else method.name
    if name in METHODS:
        default = method_of(name)
        chosen = default if isinstance(method, str) else method
        steps = chosen.steps if isinstance(chosen, AlphaCROWN) else 0
        if chosen == (dataclasses.replace(default, steps=steps) if steps else default):  # pyright: ignore[reportArgumentType]
            return name, steps
    raise ValueError(
        f"method = {method!r}: choose one of {', '.join(map(repr, METHODS))}, without options but "
        "the steps of AlphaCROWN."
    )


class How(NamedTuple):
    """Says how bounds linear in the weights are found (`margins`).

    Attributes:
        method: one of `METHODS`.
        steps: of the optimiser of slopes.
        arithmetic: that they are to hold in.
        delta: a probability.
    """

    method: str
    steps: int
    arithmetic: Arithmetic
    delta: float


def row_margins(
    apply: Apply,
    how: How,
    params: Params,
    leaves: Mapping[str, Leaf],
    x_set: Set,
    rows: tuple[Array, Array],
) -> Margin:
    """Bounds the rows, as `margins` says, of params some leaves of which are random."""
    matrix, offset = rows

    def outputs(params: Params, x: Array) -> Array:
        return matrix @ jnp.ravel(apply(params, x)) + offset

    # 1. The network, as a graph over boxes of weights and the set.
    named = priors.named(params)
    ordered = [leaves[name] for name in named if name in leaves]
    widest = _far(sum(leaf.loc.size for leaf in ordered), how.delta * _SHARE)
    parts = [_box(leaves[name], widest) if name in leaves else v for name, v in named.items()]
    boxed = jax.tree.unflatten(jax.tree.structure(params), parts)
    graph = trace(outputs, (boxed, x_set), {}, how.arithmetic.tracking())
    plan = make_plan(graph, Options(DEFAULT_BATCH_SIZE, how.arithmetic))
    if not plan.outputs:
        raise ValueError("the outputs depend neither on random weights nor on x: nothing to bound.")
    # 2. What holds of its hidden units, but for a probability.
    network = network_of(plan, weights_of(plan.graph, ordered), how.method)
    boxes, passage = network.bounds(_far(network.units(), how.delta * (1 - _SHARE)))
    # 3. The rows. What is not finite is no bound.
    (output,) = plan.outputs
    finite = [jnp.isfinite(v).all() for v in jax.tree.leaves((params, leaves)) if _is_float(v)]
    valid = jnp.stack([*finite, *([] if graph.valid is None else [graph.valid])]).all()

    def one(row: Array) -> Margin:
        if how.steps:
            return optimised(network, output, boxes, passage, row, _ratio, how.steps)
        return network.best(output, boxes, passage, row, _ratio)

    found = map_rows(one, graph.nodes[output], plan.batch_size)
    # What overflowed, to NaN as well, is no bound.
    known = valid & ~jnp.isnan(found.mean) & ~jnp.isnan(found.lipschitz)
    return found._replace(mean=jnp.where(known, found.mean, -jnp.inf))


def _is_float(value: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _far(numbers: int, probability: float) -> float:
    """Computes how far so many Gaussian numbers reach, but for a probability."""
    return float(-ndtri(probability / (2 * max(numbers, 1)))) * (1 + 1e-9)


def _box(leaf: Leaf, widest: float) -> Box:
    """Finds where weights lie, each of them rounded to their format."""
    unit = 4 * float(jnp.finfo(leaf.loc.dtype).eps)
    reach = widest * leaf.deviation
    reach = reach + unit * (jnp.abs(leaf.loc) + reach) + float(jnp.finfo(leaf.loc.dtype).tiny)
    return Box(leaf.loc - reach, leaf.loc + reach)


def _ratio(found: Margin) -> Array:
    """Computes how many Lipschitz constants a mean lies above 0; where it does not, the mean."""
    ratio = found.mean / jnp.maximum(found.lipschitz, least_spread(found.mean.dtype))
    return jnp.where(found.mean > 0, ratio, found.mean)


_SHARE = 1e-3
"""What of delta is spent on weights, and not on hidden units."""
