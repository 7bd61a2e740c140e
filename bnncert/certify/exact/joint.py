"""Decision robustness with one adversarial input for all samples, not one for each.

    d_s(x)  =  ( softmax_c - softmax_j ) f(w_s, x)
    min_x mean_s d_s(x)  >=  mean_s min_x d_s(x)

The right side is `bnncert.certify.decision`. For the left side each sample's difference gets linear
bounds over the set, whose average is minimised once (`bnncert.bounds.mean_bound`). That pays only
if a sample's own bound is as good as the exact minimum over the box [l, u] of its margins
m_k = f_k - f_c, which the usual relaxations of a softmax are not. This one is, at the worst corner:

Let r_k = max(0, floor u_k), M their largest, e = exp(-M), z = exp(m_j - M) in [zl, zu], and S = sum
exp(m_k - M) in [Sl, Su]; what is relaxed are exp(m_k - r_k), below 3, with weights exp(r_k - M).
Where h = e - zu > 0, McCormick for the product (e - z) / S, and a tangent of the convex 1/S at any
t > 0, give

    p_c - p_j = (e - z) / S  >=  h (2/t - S/t^2) + (zu - z) / Su

which is the minimum over the box at its corner m = u if t = Su. Elsewhere let W = S - z >= Wl: then
(e - z) / (z + W) is above its tangent in z at zu and W = Wl, flattened until at zl it is below
(e - zl) / (e + Wu) as well: the minimum again. Both t = Su and t half-way to Sl are tried.

With slope 0 under a ReLU that crosses, the linear bounds of one hidden layer lie inside its
intervals, and a joint bound by CROWN is never under the separate one with the same slopes. With
other slopes and depths either may be better, and both are taken.

Arithmetic. With `rounding="outward"` it is this that is proved, f_k the logits that network s
computes at x, in any order, m_k their *exact* differences, F_s the form above with the numbers that
were computed for h / t^2, 1 / Su and so on, in exact arithmetic:

    exact mean_s F_s(x) >= lower  for all x of the set              `mean_bound`
    F_s(x) <= softmax_c - softmax_j + charge,  softmax that of the f_k, exact

The model (`bounds.rounding.model`) lets each operation be off by anything up to its error, and
by 0: the margins in their box, and F_s, are bounded for computed logits with exact operations after
these. (The predictor subtracts no margins: what *it* makes of the logits, softmax and average, is
off by no more than `rounding_slack`, which is taken off as well.) And for real
arithmetic: logits that are exact.

The charge. Nothing is asked of r_k, whole numbers, nor of t >= Su / 2. With D the largest |l_k - M|
and |u_k - M|, an exponential is off by r = (18 + D) u of itself, its argument's rounding included,
and by less than u e / 2 where it underflows; a sum of C of them by r + C u. A compiler may compute
a number once for one term and once more for another, and round it otherwise: each is taken to be
off by itself.

    Product   e and zu are off by r, h by (2 r + 2 u) e, and e <= Sl <= t:  2 h / t by 12 r + (4 C
              + 56) u if h and t are not those of h / t^2, of which any fit: h/S + S h/t^2 >= 2 h/t.
              h / S by 2 r + 2 u; (zu - z) / Su by 2 r + (C + 4) u. The weights exp(r_k - M) are off
              by r: S h / t^2 <= 2 by 2 r, z / Su by r.
    Tangent   the value at zu, (e - zu) / (zu + Wl), is off by 3 r + (C + 8) u, as is (e - zl) /
              (e + Wu); the slope, (e + Wl) / (zu + Wl)^2 or less, times zu by 3 r + (4 C + 8) u; zu
              by r. The flattened slope is a ratio of small differences. It stands before z - zu
              alone: it lifts the line at zl, by what these values and zu are off by, and nothing
              else: 10 r + (3 C + 48) u, and r for the weight.

The larger is 19 r + (5 C + 64) u, and the charge (512 + 20 D + 8 C) u, which has room for errors of
second order while it is below 1/2. Else, and where e^2 may underflow, the form is the constant
`least_differences`, whose own error is below the charge too. Where it is h or e - zl that has the
wrong sign, by their errors, both forms hold up to these.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert.bounds import mean_bound
from bnncert.bounds.arithmetic import Rounding, arithmetic_of
from bnncert.bounds.margins import differences, margin_bounds
from bnncert.bounds.methods import LinearMethod, linear_method_of
from bnncert.certify.exact.decision import Decision, decision, rounding_slack
from bnncert.certify.exact.softmax import least_differences
from bnncert.certify.inputs import check_region, nominal_input, num_samples
from bnncert.outputs import classifier
from bnncert.sets import Box, Set
from bnncert.types import Apply, Stacked

ANCHORS = (0.5, 1.0)
"""Where 1/S is touched, from Sl (0) to Su (1)."""


class CornerTerms(NamedTuple):
    """The terms of a lower bound on softmax_c - softmax_j, linear in p_k = exp(m_k - shift_k).

        a_j sum_k weight_k p_k + b_j (p_j - at_j) + value_j

    Attributes:
        a: shape (C,), as all of them.
        b: of the class itself.
        at: where b has no weight: the largest p_j.
        value: the constant.
        shift: r_k.
        weight: exp(r_k - M).
    """

    a: Array
    b: Array
    at: Array
    value: Array
    shift: Array
    weight: Array


def joint_decision(
    apply: Apply,
    samples: Stacked,
    x_set: Set,
    *,
    x: Float[Array, "..."] | None = None,
    outputs: str = "logits",
    method: str | LinearMethod = "crown",
    rounding: Rounding = "outward",
) -> Decision:
    """Certifies the decision of the posterior predictive, jointly and separately.

        d_s(x)  =  ( softmax_c - softmax_j ) f(w_s, x)
        min_x mean_s d_s(x)  >=  max( min_x mean_s linear bound of d_s,  mean_s min_x d_s(x) )

    One input is the worst for all samples, not one for each.

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        x: as for `bnncert.certify.decision`.
        outputs: "logits" alone: what is relaxed here is a softmax of them.
        method: "crown" or "crown-ibp"; by the latter margins are only as good as their IBP box. By
            a name, joint bounds have lines of slope 0 under a ReLU that crosses, which suits
            averages; an object (`bnncert.CROWN(lower_slope=)`) is taken as it is.
        rounding: as for `bnncert.certify.decision`.

    Returns:
        A `Decision`, its margins never below those of `decision` by the same method and rounding.

    Raises:
        TypeError, ValueError: as `bnncert.certify.decision` and `bnncert.bounds.mean_bound`; for
            probabilities.

    Cost: `decision`, and three times as much again. Memory: one sample's linear bounds, and S C
    numbers.
    Outside `jit` each call is traced and compiled anew, in a second or more: for many, jit it once,
    with `apply` fixed.

    Source: Zhang et al., NeurIPS 2018 (CROWN), of an average of samples; the relaxation of the
    softmax at a corner is this library's.

    Example:
        >>> apply = lambda w, x: w * jnp.concatenate([x, -x])
        >>> samples = jnp.array([[1.0], [2.0]])
        >>> found = joint_decision(apply, samples, Box(jnp.array([0.5]), jnp.array([1.0])))
        >>> int(found.predicted), bool(found.robust), f"{float(found.margins[1]):.2f}"
        (0, True, '0.61')
    """
    if outputs == "probabilities":
        raise ValueError(
            'outputs="probabilities": joint bounds are of a softmax of logits. Return what comes '
            "before it, or use bnncert.certify.decision."
        )
    check_region(x_set)
    if x is not None:
        x, x_set = nominal_input(x, x_set)
    alone = decision(apply, samples, x_set, x=x, method=method, rounding=rounding)
    apply, c, margins = classifier(apply, outputs), alone.predicted, alone.margins
    box_of = margin_bounds(apply, method, rounding=rounding)
    boxes = jax.lax.map(lambda params: box_of(params, x_set, c), samples)
    below = partial(difference_below, apply)
    jointly = linear_method_of(method)
    if isinstance(method, str):
        jointly = replace(jointly, lower_slope="zero")
    mean = mean_bound(below, jointly, rounding=rounding)
    slack = rounding_slack(rounding, margins, num_samples(samples))
    for anchor in ANCHORS:
        terms = jax.vmap(partial(corner_terms, anchor=anchor, rounding=rounding))(boxes)
        lower = mean((samples, terms), x_set, c).lower - slack
        margins = jnp.where(lower > margins, lower, margins)  # a NaN is no bound
    others = jnp.arange(margins.shape[0]) != c
    margins = jnp.where(others, margins, 0.0)
    return Decision(
        c,
        jnp.all((margins > 0) | ~others),
        margins,
        alone.probability,
        alone.confidence,
        alone.arithmetic,
    )


def corner_terms(box: Box, anchor: float, rounding: Rounding = "nearest") -> CornerTerms:
    """Computes what bounds the differences p_c - p_j from below, for margins m in a box.

        p_c - p_j = (e - z) / S  >=  h (2/t - S/t^2) + (zu - z) / Su     where h = e - zu > 0

    Args:
        box: of the margins f_k - f_c, shape (C,); entry c is 0.
        anchor: where 1/S is touched: t = Sl + anchor (Su - Sl).
        rounding: "outward" subtracts the module's charge.

    Returns:
        `CornerTerms`, which `corner_bound` reads.

    Example:
        >>> box = Box(jnp.array([0.0, -2.0]), jnp.array([0.0, -1.0]))   # class 0 leads by 1 to 2
        >>> bound = corner_bound(corner_terms(box, 1.0), jnp.array([0.0, -1.0]))
        >>> bool(jnp.allclose(bound, least_differences(box)))           # exact at the worst corner
        True
    """
    # 1. The exponentials of both ends, over that of M: none overflows.
    info = jnp.finfo(box.upper.dtype)
    unit, tiny, classes = 0.5 * float(info.eps), float(info.tiny), box.upper.shape[0]
    shift = jnp.where(jnp.isfinite(box.upper), jnp.maximum(jnp.floor(box.upper), 0.0), 0.0)
    top = jnp.max(shift)
    e, low, high = (jnp.exp(m - top) for m in (0.0, box.lower, box.upper))
    weight, at = jnp.exp(shift - top), jnp.exp(box.upper - shift)
    # 2. What rounding is charged.
    deep = jnp.maximum(jnp.max(jnp.abs(box.lower - top)), jnp.max(jnp.abs(box.upper - top)))
    deep = jnp.where(deep < -math.log(tiny), deep, -math.log(tiny))  # beyond, it underflows to 0
    charge = (512 + 20 * deep + 8 * classes) * unit
    # 3. Below e at every corner: McCormick and the tangent of 1/S.
    least, most = low.sum(), high.sum()
    t, h = least + anchor * (most - least), e - high
    product = (-h / t**2, jnp.broadcast_to(-1 / most, h.shape), 2 * h / t)
    # 4. Else the tangent in z at zu, flattened to stay below the curve of Wu at zl < e as well.
    others = ~jnp.eye(classes, dtype=bool)
    few, many = (jnp.where(others, ends, 0.0).sum(1) for ends in (low, high))
    value, start = h / (high + few), (e - low) / (e + many)
    steepest = (e + few) / (high + few) ** 2
    room = jnp.where(high > low, high - low, 1)
    slope = jnp.where(low < e, jnp.minimum(steepest, (start - value) / room), steepest)
    tangent = (jnp.zeros_like(h), -slope, value)
    a, b, value = (jnp.where(h > 0, p, q) for p, q in zip(product, tangent, strict=True))
    # 5. The constant where that overflowed, squares did not keep their digits, or more is charged
    # than the derivation allows.
    fits = jnp.all(jnp.isfinite(box.upper)) & (e * e >= 4 * tiny / unit)
    arithmetic = arithmetic_of(rounding)
    fits = arithmetic.allow(fits, lambda fits, _: fits & (charge < 0.5))
    value = jnp.where(fits, value, least_differences(box))
    value = arithmetic.allow(value, lambda value, _: value - charge)
    # 6. The predicted class against itself: 0.
    itself = (box.lower == 0) & (box.upper == 0)
    a, b, at = (jnp.where(fits & ~itself, term, 0.0) for term in (a, b * weight, at))
    return CornerTerms(a, b, at, jnp.where(itself, 0.0, value), shift, weight)


def corner_bound(terms: CornerTerms, margins: Array) -> Array:
    """Computes what `corner_terms` say of p_c - p_j at margins m, for each j.

        a_j sum_k weight_k p_k + b_j (p_j - at_j) + value_j

    Args:
        terms: of a box.
        margins: m in that box, shape (C,).

    Returns:
        No more than p_c - p_j, shape (C,).
    """
    powers = jnp.exp(margins - terms.shift)
    total = (terms.weight * powers).sum()
    return terms.a * total + terms.b * (powers - terms.at) + terms.value


def margins_of(apply: Apply) -> Callable[[Any, Array, Array], Array]:
    """Makes `(params, x, c) -> f_k - f_c`, one affine map with the last layer.

    Args:
        apply: `(params, x) -> logits (C,)`.

    Returns:
        The margins, shape (C,), as a function.
    """
    return lambda params, x, c: differences(apply(params, x), c)


def difference_below(apply: Apply, member: Any, x: Array, c: Array) -> Array:
    """Computes at most softmax_c - softmax_j of one sample, for each j: it is relaxed and averaged.

    Args:
        apply: as for `joint_decision`.
        member: params, and their `corner_terms`.
        x: one input.
        c: the class.

    Returns:
        Shape (C,), as `corner_bound`.
    """
    params, terms = member
    return corner_bound(terms, margins_of(apply)(params, x, c))
