"""Decision robustness: bounds on the posterior predictive over a set of inputs.

The *exact* tier: the deployed predictor is the average over a finite set of weights w_1, ..., w_S,

    pi_c(x') = 1/S sum_s softmax_c f(w_s, x')

and its bounds over a set T are proofs about that very predictor (see Arithmetic):

    min_{x' in T} pi_c - pi_j  >=  1/S sum_s  min_{x' in T} ( softmax_c - softmax_j ) f(w_s, x')

For one network, let [l_k, u_k] bound the margins m_k = f_k - f_c over T (m_c = 0). Then

    softmax_c - softmax_j = (1 - exp m_j) / sum_k exp m_k

falls with m_j, and with the other m_k where m_j <= 0, while it rises with them where m_j > 0. So
its minimum over the box of margins is at u_j with u_k, or l_k where u_j > 0.

Arithmetic. With `rounding="outward"` the margins bound those of the *computed* logits. What the
predictor makes of them is rounded too: with d_k = max f - f_k, exp(-d_k) is off by (16 + 1.1 d_k) u
of itself, and d exp(-d) <= 1/e, so a computed softmax of C classes is off by (40 + 2 C) u at most;
a mean of S of them by (S + 2) u more. The bounds above, by log-sum-exp and exp of the margins, are
off by at most (130 + 2 C) u, and their mean likewise. A difference of two probabilities so gives
way by (400 + 8 C + 4 S) u in all, a probability by half of it: `rounding_slack`. What is certified
is then that the float32 predictor, evaluated in any order, chooses the class
(`bnncert.bounds.arithmetic`). By "nearest" all this holds in real arithmetic, up to the rounding
of the bounds themselves, which may cut some 1e-6 of the logits' terms.

Source: Wicker et al., AISTATS 2021, section 6 (the predictive); differences of probabilities in
place of a confidence above 1/2, which certifies far less on hard data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert.bounds.margins import all_margin_bounds, margin_bounds
from bnncert.sets import Box, LpBall, Set, is_concrete, is_set
from bnncert.types import Apply, Params, Samples


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decision:
    """What is proved about the decision of a posterior predictive over a set of inputs.

    Attributes:
        predicted: the class chosen at the nominal input, an integer.
        robust: whether it is proved to stay the strict winner over the whole set.
        margins: for each class j a lower bound on pi_predicted - pi_j over the set (0 for itself),
            shape (C,).
        probability: a `Box` around pi_predicted over the set, scalars.
        confidence: 1.0: a proof about the deployed samples; 1 - delta where it is a statement about
            a continuous posterior, from draws of it (`bnncert.certify.statistical`).
        arithmetic: what is proved is proved of the predictor in "float32" (or the dtype of its
            outputs), by `rounding="outward"`; of "real" arithmetic only, and up to the rounding of
            the bounds themselves, by "nearest".
    """

    # Any, as in `Box`: a batch axis under `vmap`, and transformations put other things here.
    predicted: Any
    robust: Any
    margins: Any
    probability: Any
    confidence: Any
    arithmetic: str = field(default="real", metadata={"static": True})


def decision(
    apply: Apply,
    samples: Samples,
    x_set: Set,
    *,
    x: Float[Array, "..."] | None = None,
    method: str = "crown-ibp",
    rounding: str = "outward",
    batch_size: int | None = None,
) -> Decision:
    """Certifies the decision of the posterior predictive over a set of inputs.

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        x: the nominal input, where the predicted class is read off; it must lie in the set. The
            set's center by default (that of a *clipped* ball is not the image it was made of).
        method: of the bounds, as for `bnncert.bound`.
        rounding: "outward" covers the rounding of network, predictor and bounds; "nearest" speaks
            of real arithmetic, up to the rounding of bounds: no proof where that matters. It knows
            every operation (as for `bnncert.bound`).
        batch_size: samples at once; one by default, which suits convolutions on a CPU.

    Returns:
        A `Decision`.

    Raises:
        TypeError: x_set is not a set.
        ValueError: no samples, or leaves that disagree on their number; x outside the set; outputs
            that are not logits (C,) of at least two classes; as `bnncert.bound`.

    Cost: S evaluations and S bounds of the C margins. Memory: `batch_size` times one bound (under
    `vmap` times its batch), and S C numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> apply = lambda w, x: w * x                                  # logits (x, -x)
        >>> samples = jnp.array([[1.0, -1.0], [2.0, -2.0]])
        >>> found = decision(apply, samples, Box(jnp.array([0.5]), jnp.array([1.0])))
        >>> int(found.predicted), bool(found.robust)
        (0, True)
    """
    _check(samples, x_set, batch_size)
    nominal = nominal_input(x, x_set)
    average = _sweep(
        lambda w: jax.nn.softmax(checked_logits(apply, w, nominal)), samples, batch_size
    ).mean(0)
    predicted = jnp.argmax(average)
    classes = average.shape[0]

    bounded = margin_bounds(apply, method, rounding=rounding)

    def certify(params: Params) -> tuple[Array, Box]:
        box = bounded(params, x_set, predicted)
        return least_differences(box), probability_box(box)

    differences, probabilities = _sweep(certify, samples, batch_size)
    slack = rounding_slack(rounding, average, num_samples(samples))
    lower = jnp.where(jnp.arange(classes) == predicted, 0.0, differences.mean(0) - slack)
    robust = jnp.all((lower > 0) | (jnp.arange(classes) == predicted))
    probability = _mean(probabilities, slack)
    arithmetic = "real" if rounding == "nearest" else str(average.dtype)
    return Decision(predicted, robust, lower, probability, jnp.ones(()), arithmetic)


def predictive(
    apply: Apply,
    samples: Samples,
    x_set: Set,
    *,
    method: str = "crown-ibp",
    rounding: str = "outward",
    batch_size: int | None = None,
) -> Box:
    """Bounds on every class's posterior predictive probability over a set of inputs.

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        method: of the bounds, as for `bnncert.bound`.
        rounding: as for `bnncert.bound`.
        batch_size: samples at once; one by default.

    Returns:
        A `Box` of shape (C,) that holds pi(x') for all x' in the set.

    Raises:
        TypeError, ValueError: as `decision`.

    Cost: S bounds of C (C - 1) / 2 margins; `decision` bounds C.

    Example:
        >>> import jax.numpy as jnp
        >>> apply = lambda w, x: w * x
        >>> box = predictive(apply, jnp.array([[0.0, 0.0]]), Box(jnp.zeros(1), jnp.ones(1)))
        >>> [round(float(v), 3) for v in box.lower]
        [0.5, 0.5]
    """
    _check(samples, x_set, batch_size)

    bounded = all_margin_bounds(partial(checked_logits, apply), method, rounding=rounding)

    def certify(params: Params) -> Box:
        return jax.vmap(probability_box)(bounded(params, x_set))

    boxes = _sweep(certify, samples, batch_size)
    return _mean(boxes, rounding_slack(rounding, boxes.lower[0], num_samples(samples)))


def num_samples(samples: Samples) -> int:
    """The number S of stacked weights.

    Raises:
        ValueError: there are none, or the leaves disagree.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(samples)}
    if len(sizes) != 1 or sizes in ({()}, {(0,)}):
        raise ValueError(
            f"samples: leading axes {sorted(sizes)}; every leaf must have the same one, of S >= 1 "
            "stacked weights (for one network: jax.tree.map(lambda leaf: leaf[None], params))."
        )
    return sizes.pop()[0]


def least_differences(margins: Box) -> Float[Array, " classes"]:
    """The least softmax_c - softmax_j of one network, for each j.

    Args:
        margins: bounds on f_k - f_c, shape (C,), of which that of c itself is 0.
    """
    # [j, k]: the margin m_k at which softmax_c - softmax_j is smallest
    others = jnp.where(margins.upper[:, None] > 0, margins.lower[None, :], margins.upper[None, :])
    itself = jnp.eye(margins.upper.shape[0], dtype=bool)
    worst = jnp.where(itself, margins.upper[:, None], others)
    total = jax.nn.logsumexp(worst, axis=1)
    difference = jnp.exp(-total) - jnp.exp(margins.upper - total)
    # Where a bound overflowed: the least that two probabilities can differ by.
    return jnp.where(jnp.isnan(difference), -1.0, difference)


def probability_box(margins: Box) -> Box:
    """Bounds on softmax_c, from bounds on the margins f_k - f_c (of which that of c is 0)."""
    lower, upper = -jax.nn.logsumexp(margins.upper), -jax.nn.logsumexp(margins.lower)
    return Box(jnp.exp(lower), jnp.exp(upper))


def rounding_slack(rounding: str, probabilities: Array, count: int) -> float:
    """What a difference of two averaged probabilities gives way by, as the module derives.

    Args:
        rounding: "outward" or "nearest" (0).
        probabilities: an array of their dtype whose first axis counts the classes.
        count: networks averaged.
    """
    unit = 0.5 * float(jnp.finfo(probabilities.dtype).eps)
    classes = probabilities.shape[0]
    return 0.0 if rounding == "nearest" else (400 + 8 * classes + 4 * count) * unit


def nominal_input(x: Array | None, x_set: Set) -> Array:
    """Where the predicted class is read off: the set's center, or x if it is inside.

    Raises:
        ValueError: x has another shape, or lies outside.
    """
    return x_set.center if x is None else _inside(jnp.asarray(x), x_set)


def check_region(x_set: Set) -> None:
    """Raises TypeError unless it is a set."""
    if not is_set(x_set):
        raise TypeError(
            f"x_set is a {type(x_set).__name__}: give a bnncert.Box or a bnncert.LpBall (for an "
            "input x and a radius eps: bnncert.ball(x, eps))."
        )


def checked_logits(apply: Apply, params: Params, x: Array) -> Float[Array, " classes"]:
    """`apply(params, x)`; raises ValueError unless it has shape (C,), C >= 2."""
    logits = apply(params, x)
    if logits.ndim != 1 or logits.shape[0] < 2:
        raise ValueError(
            f"apply returned shape {logits.shape} for one example; it must return logits (C,) of "
            "C >= 2 classes. x is one example, without a batch axis."
        )
    return logits


def _check(samples: Samples, x_set: Set, batch_size: int | None) -> None:
    num_samples(samples)
    check_region(x_set)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: at least one sample must be swept at once.")


def _sweep(one: Callable[[Params], Any], samples: Samples, batch_size: int | None) -> Any:
    return jax.lax.map(one, samples, batch_size=batch_size)


def _mean(boxes: Box, slack: float) -> Box:
    """Of probabilities over samples; none is negative."""
    lower, upper = boxes.lower.mean(0) - 0.5 * slack, boxes.upper.mean(0) + 0.5 * slack
    return Box(jnp.maximum(lower, 0.0), upper)


def _inside(x: Array, x_set: Set) -> Array:
    shape = jnp.shape(x_set.center)
    if x.shape != shape:
        raise ValueError(f"x has shape {x.shape}, but the set {shape}.")
    if isinstance(x_set, LpBall):
        distance = jnp.linalg.norm((x - x_set.center).ravel(), x_set.p)
        inside = distance <= x_set.eps * (1 + 1e-5)
    else:
        inside = jnp.all((x >= x_set.lower) & (x <= x_set.upper))
    if is_concrete(inside) and not bool(inside):
        raise ValueError("x lies outside the set: the decision there says nothing about the set.")
    return x
