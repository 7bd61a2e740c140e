"""Decision robustness with one adversarial input for all samples, not one for each.

    d_s(x)  =  ( softmax_c - softmax_j ) f(w_s, x)
    min_x mean_s d_s(x)  >=  mean_s min_x d_s(x)

The right side is `bnncert.certify.decision`. For the left side each sample's difference gets linear
bounds over the set, whose average is minimised once (`bnncert.bounds.mean_bound`). That pays only
if a sample's own bound is as good as the exact minimum over the box [l, u] of its margins
m_k = f_k - f_c, which the usual relaxations of a softmax are not. This one is, at the worst corner:

Let z = exp m_j, S = sum_k exp m_k in [Sl, Su]. Where u_j < 0, h = 1 - z >= hl > 0. McCormick for
the product h / S, and a tangent of the convex 1/S at any t > 0, give

    p_c - p_j = h / S  >=  hl (2/t - S/t^2) + h/Su - hl/Su

which is the minimum over the box at its corner m = u if t = Su. Elsewhere R = S - 1 - z >= Rl, and
(1 - z) / (1 + z + R) is above its tangent in z at zu and R = Rl, flattened until it stays below
R = Ru too: the minimum again. Both t = Su and t half-way to Sl are tried. The sums of exp m_k that
remain are relaxed as any function.

With slope 0 under a ReLU that crosses, the linear bounds of one hidden layer lie inside its
intervals, and a joint bound by CROWN is never under the separate one with the same slopes. With
other slopes and depths either may be better, and both are taken.

Arithmetic: real, as `mean_bound`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert.bounds import mean_bound
from bnncert.bounds.margins import margin_bounds
from bnncert.certify.predictive import Decision, check_region, decision, nominal_input
from bnncert.outputs import classifier
from bnncert.sets import Box, Set
from bnncert.types import Apply, Samples

ANCHORS = (0.5, 1.0)
"""Where 1/S is touched, from Sl (0) to Su (1)."""


def joint_decision(
    apply: Apply,
    samples: Samples,
    x_set: Set,
    *,
    x: Float[Array, "..."] | None = None,
    outputs: str = "logits",
    method: str = "crown",
    lower_slope: str = "zero",
) -> Decision:
    """Certifies the decision of the posterior predictive, jointly and separately.

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        x: as for `bnncert.certify.decision`.
        outputs: "logits" alone: what is relaxed here is a softmax of them.
        method: "crown" or "crown-ibp"; by the latter margins are only as good as their IBP box.
        lower_slope: under a ReLU that crosses, of the joint bounds.

    Returns:
        A `Decision` in real arithmetic, its margins never below those of `decision` by the same
        method with `rounding="nearest"`.

    Raises:
        TypeError, ValueError: as `bnncert.certify.decision` and `bnncert.bounds.mean_bound`; for
            probabilities.

    Cost: `decision`, and three times as much again. Memory: one sample's linear bounds, and S C
    numbers.

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
    alone = decision(apply, samples, x_set, x=x, method=method, rounding="nearest")
    apply, c = classifier(apply, outputs), alone.predicted
    box_of = margin_bounds(apply, method)
    boxes = jax.lax.map(lambda params: box_of(params, x_set, c), samples)
    mean = mean_bound(partial(difference_below, apply), method, lower_slope=lower_slope)
    margins = alone.margins
    for anchor in ANCHORS:
        terms = jax.vmap(partial(corner_terms, anchor=anchor))(boxes)
        lower = mean((samples, terms), x_set, c).lower
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


def corner_terms(box: Box, anchor: float) -> tuple[Array, Array, Array]:
    """(a, b, g) with p_c - p_j >= a_j sum_k exp m_k + b_j exp m_j + g_j for margins m in the box.

    Args:
        box: of the margins f_k - f_c, shape (C,); entry c is 0.
        anchor: where 1/S is touched: t = Sl + anchor (Su - Sl).
    """
    low, high = jnp.exp(box.lower), jnp.exp(box.upper)
    least, most = low.sum(), high.sum()
    # Below 0 at every corner: McCormick and the tangent of 1/S.
    t, h = least + anchor * (most - least), 1 - high
    product = (-h / t**2, jnp.broadcast_to(-1 / most, h.shape), 2 * h / t + (1 - h) / most)
    # Else the tangent in z at zu, flattened to stay below the curve of Ru at zl < 1 as well.
    few, many = least - 1 - low, most - 1 - high
    value = h / (1 + high + few)
    steepest = (2 + few) / (1 + high + few) ** 2
    room = jnp.where(high > low, high - low, 1)
    slope = jnp.minimum(steepest, ((1 - low) / (2 + many) - value) / room)
    slope = jnp.where(low < 1, slope, steepest)
    tangent = (jnp.zeros_like(h), -slope, value + slope * high)
    chosen = [jnp.where(h > 0, p, q) for p, q in zip(product, tangent, strict=True)]
    # The predicted class against itself: 0.
    itself = (box.lower == 0) & (box.upper == 0)
    a, b, g = (jnp.where(itself, 0.0, term) for term in chosen)
    return a, b, g


def margins_of(apply: Apply) -> Callable[[Any, Array, Array], Array]:
    """`(params, x, c) -> f_k - f_c`, one affine map with the last layer."""

    def margins(params: Any, x: Array, c: Array) -> Array:
        logits = apply(params, x)
        unit = jnp.eye(logits.size, dtype=logits.dtype)
        return (unit - unit[c]) @ logits

    return margins


def difference_below(apply: Apply, member: Any, x: Array, c: Array) -> Array:
    """At most softmax_c - softmax_j of one sample, for each j; what is relaxed and averaged.

    Args:
        apply: as for `joint_decision`.
        member: params, and their `corner_terms`.
        x: one input.
        c: the class.
    """
    params, (a, b, g) = member
    powers = jnp.exp(margins_of(apply)(params, x, c))
    return a * powers.sum() + b * powers + g
