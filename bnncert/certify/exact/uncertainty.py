"""Bounds on what a posterior predictive says of its own uncertainty, over a set of inputs.

Classification. Let the predictive lie in the box l_c <= pi_c <= u_c over the set T
(`bnncert.certify.predictive`), and on the simplex. Then u_c may be lowered to 1 - sum of the other
l, l_c raised likewise, and over T

    confidence   max_c l_c  <=  max_c pi_c  <=  max_c u_c
    entropy      H(pi) = -sum pi log pi, between its minimum and maximum over the box and simplex

With h(p) = -p log p, concave, and v_c = clip(t, l_c, u_c), for *any* t in (0, 1] and any mu

    H(pi)  <=  sum_c h(v_c) + h'(t) (1 - sum_c v_c)
    H(pi)  >=  mu + sum_c min( h(l_c) - mu l_c, h(u_c) - mu u_c )

The first because h lies under its tangents, and h'(v_c) (pi_c - v_c) <= h'(t) (pi_c - v_c) where
the clip acts; it is exact at the t at which the v_c add up to 1. The second by duality, as a
concave function is least at an end; the best of some values of mu is taken. An upper bound on the
confidence around an input of another distribution certifies that it is *detected*, whatever is
added to it.

Regression. With S networks whose outputs lie in [l_s, u_s] over T, their mean lies in the mean of
the intervals, and their variance (divisor S), for any number t,

    1/(2 S^2) sum_{s, r} max(l_s - u_r, l_r - u_s, 0)^2  <=  Var

    Var  <=  1/S sum_s max(|l_s - t|, |u_s - t|)^2

Arithmetic. With `rounding="outward"` all this holds of the average of the softmax, or of mean and
variance, in real arithmetic, of what the networks compute. What is computed here gives way by its
own error: sums of C numbers of at most m by m (64 + C (C + 8)) u, with u the unit roundoff; means
of S by (S + 8) u of the mean magnitude; variances by (2 S + 32) u of themselves.

Source: Hein et al., "Why ReLU networks yield high-confidence predictions far away from the training
data", CVPR 2019; Bitterwolf et al., "Certifiably adversarially robust detection of
out-of-distribution data", NeurIPS 2020 (upper bounds on the confidence over balls).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnncert._varying import axes_of, varying
from bnncert.bounds import bound
from bnncert.bounds.arithmetic import Rounding
from bnncert.bounds.methods import Method
from bnncert.certify.exact.decision import predictive
from bnncert.certify.inputs import check_region, num_samples
from bnncert.outputs import tolerance
from bnncert.sets import Box, Set
from bnncert.types import Apply, Params, Stacked

_SLOPES = np.linspace(-4.0, 12.0, 65)
"""Values of mu that are tried: h' is -1 at 1, and 12 at 2e-6."""


class Uncertainty(NamedTuple):
    """Bounds on a classifier's predictive over a set of inputs.

    Attributes:
        probability: a `Box` of shape (C,) around the predictive.
        confidence: a `Box` around its largest entry, scalars.
        entropy: a `Box` around its entropy in nats, scalars.

    Example:
        >>> at_zero = Box(jnp.zeros(1), jnp.zeros(1))
        >>> found = uncertainty(lambda w, x: w * x, jnp.array([[1.0, -1.0]]), at_zero)
        >>> [f"{float(end):.3f}" for end in (found.confidence.lower, found.entropy.upper)]
        ['0.500', '0.693']
    """

    probability: Box
    confidence: Box
    entropy: Box


class Moments(NamedTuple):
    """Bounds on the outputs of a regression's networks over a set of inputs.

    Attributes:
        mean: a `Box` around the mean over samples, of the outputs' shape.
        variance: a `Box` around their variance (divisor S); the noise's own is not in it.

    Example:
        >>> at_one = Box(jnp.ones(1), jnp.ones(1))
        >>> found = mean_and_variance(lambda w, x: w * x, jnp.ones((3, 1)), at_one)
        >>> print(f"{float(found.variance.upper[0]):.3f}")               # three equal networks
        0.000
    """

    mean: Box
    variance: Box


def uncertainty(
    apply: Apply,
    samples: Stacked,
    x_set: Set,
    *,
    outputs: str = "logits",
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
    batch_size: int | None = None,
) -> Uncertainty:
    """Bounds the predictive's confidence and entropy over a set of inputs.

        max_c l_c  <=  max_c pi_c  <=  max_c u_c
        H(pi)  <=  sum_c h(v_c) + h'(t) (1 - sum_c v_c),    v_c = clip(t, l_c, u_c)

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        outputs: "logits" or "probabilities", as for `bnncert.certify.decision`.
        method: of the bounds, as for `bnncert.bound`.
        rounding: as for `bnncert.certify.decision`.
        batch_size: as for `bnncert.certify.decision`.

    Returns:
        An `Uncertainty`. `metrics.auroc` of clean confidences against `confidence.upper` around
        inputs of another distribution is a certified AUROC.

    Raises:
        TypeError, ValueError: as `bnncert.certify.predictive`.

    Cost: `bnncert.certify.predictive`, and 65 C operations.

    Source: Bitterwolf et al., NeurIPS 2020 (upper bounds on the confidence over balls).

    Example:
        >>> apply = lambda w, x: w * x                                  # logits (x, -x)
        >>> near_zero = Box(jnp.array([-0.1]), jnp.array([0.1]))
        >>> found = uncertainty(apply, jnp.array([[1.0, -1.0]]), near_zero)
        >>> f"{float(found.confidence.upper):.3f}", f"{float(found.entropy.lower):.3f}"
        ('0.550', '0.683')
    """
    box = predictive(
        apply, samples, x_set, outputs=outputs, method=method, rounding=rounding,
        batch_size=batch_size,
    )  # fmt: skip
    classes, dtype = box.lower.size, box.lower.dtype
    # By how much what apply returns may fail to add up to 1.
    given = tolerance(classes, dtype) if outputs == "probabilities" else 0.0
    box = _on_the_simplex(box, given)
    # The maximum over the classes: of some class it is at least 1 / C.
    least = jnp.maximum(box.lower.max(), (1 - given - _unit(box) * 8) / classes)
    return Uncertainty(box, Box(least, box.upper.max()), _entropy(box, given))


def mean_and_variance(
    apply: Apply,
    samples: Stacked,
    x_set: Set,
    *,
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
    batch_size: int | None = None,
) -> Moments:
    """Bounds mean and variance over samples of a regression's outputs over a set of inputs.

        1/(2 S^2) sum_{s, r} max(l_s - u_r, l_r - u_s, 0)^2  <=  Var
        Var  <=  1/S sum_s max(|l_s - t|, |u_s - t|)^2,    for any t

    Args:
        apply: `(params, x) -> outputs` for one example.
        samples: as for `uncertainty`.
        x_set: as for `uncertainty`.
        method: of the bounds, as for `bnncert.bound`.
        rounding: as for `bnncert.bound`.
        batch_size: samples at once; one by default.

    Returns:
        A `Moments`.

    Raises:
        TypeError: x_set is not a set.
        ValueError: samples that are not stacked; as `bnncert.bound`.

    Cost: S bounds of the outputs, and S^2 numbers an output.

    Source: intervals; the bounds on the variance are this library's.

    Example:
        >>> apply = lambda w, x: w * x
        >>> samples, at_one = jnp.array([[1.0], [3.0]]), Box(jnp.ones(1), jnp.ones(1))
        >>> found = mean_and_variance(apply, samples, at_one)
        >>> found.mean.lower.round(3).tolist(), found.variance.upper.round(3).tolist()
        ([2.0], [1.0])
    """
    count = num_samples(samples)
    check_region(x_set)
    bounded = bound(apply, method, rounding=rounding)

    def one(params: Params) -> Box:
        return bounded(params, x_set)

    boxes = jax.lax.map(one, samples, batch_size=batch_size)
    lower, upper = boxes.lower, boxes.upper
    unit = _unit(boxes)
    error = (count + 8) * unit * jnp.maximum(jnp.abs(lower), jnp.abs(upper)).mean(0)
    mean = Box(lower.mean(0) - error, upper.mean(0) + error)
    gaps = jnp.maximum(lower[:, None] - upper[None], lower[None] - upper[:, None])
    least = 0.5 * jnp.square(jnp.maximum(gaps, 0.0)).mean(0).mean(0)
    middle = (0.5 * (lower + upper)).mean(0)
    middle = jnp.where(jnp.isfinite(middle), middle, 0.0)  # any number will do
    most = jnp.square(jnp.maximum(jnp.abs(lower - middle), jnp.abs(upper - middle))).mean(0)
    share = (2 * count + 32) * unit
    kind = jnp.finfo(lower.dtype)
    tiny = 2 * float(kind.tiny)  # squares that underflow
    least = jnp.minimum(least, float(kind.max)) * (1 - share) - tiny  # nor do sums overflow
    return Moments(mean, Box(jnp.maximum(least, 0.0), most * (1 + share) + tiny))


def _on_the_simplex(box: Box, given: float = 0.0) -> Box:
    """Takes off a box what cannot add up to 1, but for an error that is given."""
    error = _error(box) + given
    below, above = box.lower.sum() - box.lower, box.upper.sum() - box.upper
    lower = jnp.maximum(box.lower, jnp.minimum(1 - above - error, box.upper))
    upper = jnp.minimum(box.upper, jnp.maximum(1 - below + error, box.lower))
    return Box(jnp.clip(lower, 0.0, 1.0), jnp.clip(upper, 0.0, 1.0))


def _entropy(box: Box, given: float = 0.0) -> Box:
    """Bounds the entropy over the box and the simplex, in nats, for sums to 1 up to an error."""
    error, dtype = _error(box) + given, box.lower.dtype

    def dual(mu: Array) -> Array:
        ends = (_h(v) - mu * v for v in (box.lower, box.upper))
        return mu + jnp.minimum(*ends).sum() - (jnp.abs(mu) + 1) * error

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        t = 0.5 * (low + high)
        full = jnp.clip(t, box.lower, box.upper).sum() > 1
        return jnp.where(full, low, t), jnp.where(full, t, high)

    # 1. From below by duality, the best of some mu.
    least = jax.vmap(dual)(jnp.asarray(_SLOPES, dtype)).max()
    # 2. From above: bisect t until the v_c add up to 1; any t gives a bound.
    start = varying((jnp.zeros((), dtype), jnp.ones((), dtype)), axes_of(box))
    t = jnp.maximum(jax.lax.fori_loop(0, 30, halve, start)[1], 1e-6)
    v = jnp.clip(t, box.lower, box.upper)
    slope = -jnp.log(t) - 1
    most = _h(v).sum() + slope * (1 - v.sum()) + (jnp.abs(slope) + 1) * error
    # 3. No entropy exceeds log C.
    top = jnp.log(jnp.asarray(box.lower.size, dtype)) + error
    return Box(jnp.maximum(least, 0.0), jnp.minimum(most, top))


def _h(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes -p log p, with 0 where p underflows: its logarithm is that of 0 on some backends."""
    normal = p >= jnp.finfo(p.dtype).tiny
    return jnp.where(normal, -p * jnp.log(jnp.where(normal, p, 1.0)), 0.0)


def _unit(box: Box) -> float:
    return 0.5 * float(jnp.finfo(box.lower.dtype).eps)


def _error(box: Box) -> float:
    """Bounds the error of a sum of C computed numbers of at most 1."""
    classes = box.lower.size
    return (64 + classes * (classes + 8)) * _unit(box)
