"""Decision robustness: bounds on the posterior predictive over a set of inputs.

The *exact* tier: the deployed predictor is the average over a finite set of weights w_1, ..., w_S,

    pi_c(x') = 1/S sum_s softmax_c f(w_s, x')

and its bounds over a set T are proofs about that very predictor (see Arithmetic):

    min_{x' in T} pi_c - pi_j  >=  1/S sum_s  min_{x' in T} ( softmax_c - softmax_j ) f(w_s, x')

For one network the minimum is that over a box of its margins f_k - f_c
(`bnncert.certify.exact.softmax`).

Arithmetic. With `rounding="outward"` the margins bound those of the *computed* logits. What the
predictor makes of them is rounded too: with d_k = max f - f_k, exp(-d_k) is off by (16 + 1.1 d_k) u
of itself, and d exp(-d) <= 1/e, so a computed softmax of C classes is off by (40 + 2 C) u at most;
a mean of S of them by (S + 2) u more. The bounds above, by log-sum-exp and exp of the margins, are
off by at most (130 + 2 C) u, and their mean likewise. A difference of two probabilities so gives
way by (400 + 8 C + 4 S) u in all, a probability by half of it: `rounding_slack`. What is certified
is then that the float32 predictor, evaluated in any order, chooses the class
(`bnncert.bounds.rounding.model`). By "nearest" all this holds in real arithmetic, up to the
rounding of the bounds themselves, which may cut some 1e-6 of the logits' terms.

Outputs that are probabilities already (`bnncert.outputs`) are bounded as they are, p_c - p_j as one
function of the input; of them the predictor computes the mean alone, and gives way by no more.

Source: Wicker et al., AISTATS 2021, section 6 (the predictive); differences of probabilities in
place of a confidence above 1/2, which certifies far less on hard data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert.bounds import bound
from bnncert.bounds.arithmetic import Rounding, arithmetic_of
from bnncert.bounds.graph.precision import asked_of
from bnncert.bounds.margins import all_margin_bounds, margin_bounds
from bnncert.bounds.methods import Method
from bnncert.bounds.rounding import Precision
from bnncert.certify.exact.softmax import least_differences, probability_box
from bnncert.certify.inputs import check_region, nominal_input, num_samples
from bnncert.outputs import classifier, look_at_ending, normalised, probabilities
from bnncert.sets import Box, Set
from bnncert.types import Apply, Params, Stacked


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
            outputs), by `rounding="outward"`; in "tensorfloat32" or "bfloat16" where the factors of
            its matrix products are rounded to that (`bnncert.bounds.graph.precision`); in
            "unit roundoff u", where that was given; in "real" arithmetic, up to the rounding of the
            bounds themselves, by "nearest".

    Example:
        >>> around = Box(jnp.array(0.6), jnp.array(0.9))
        >>> proved = Decision(jnp.array(0), jnp.array(True), jnp.array([0.0, 0.2]), around, 1.0)
        >>> bool(proved.robust), proved.arithmetic
        (True, 'real')
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
    samples: Stacked,
    x_set: Set,
    *,
    x: Float[Array, "..."] | None = None,
    outputs: str = "logits",
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
    batch_size: int | None = None,
) -> Decision:
    """Certifies the decision of the posterior predictive over a set of inputs.

        pi_c(x') = 1/S sum_s softmax_c f(w_s, x')
        min_{x' in T} pi_c - pi_j  >=  1/S sum_s  min_{x' in T} ( softmax_c - softmax_j ) f(w_s, x')

    for the class c that pi chooses at the nominal input, and each j.

    Args:
        apply: `(params, x) -> logits (C,)` for one example; one logit for two classes.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        x: the nominal input, where the predicted class is read off; it must lie in the set. The
            set's center by default (that of a *clipped* ball is not the image it was made of).
        outputs: what apply returns: "logits", of which the predictor averages the softmax, one
            logit z for two classes being (0, z); or "probabilities", in [0, 1] and of sum 1 on the
            whole set, which it averages as they are, one q being (1 - q, q).
        method: of the bounds, as for `bnncert.bound`.
        rounding: "outward" covers the rounding of network, predictor and bounds; "nearest" speaks
            of real arithmetic, up to the rounding of bounds: no proof where that matters. It knows
            every operation (as for `bnncert.bound`).
        batch_size: samples at once; one by default, which suits convolutions on a CPU.

    Returns:
        A `Decision`. Where a set is traced and empty, or does not hold a traced x, nothing is
        proved: `robust` is False.

    Raises:
        TypeError: x_set is not a set; samples are a posterior, not weights.
        ValueError: no samples, or leaves that disagree on their number; an x outside the set, where
            both are known; outputs that are not as said (of such that are traced nothing is
            certified); with "outward", outputs of a dtype so coarse that nothing can be certified;
            as `bnncert.bound`.

    Cost: S evaluations and S bounds of the C margins. Memory: `batch_size` times one bound (under
    `vmap` times its batch), and S C numbers.
    Outside `jit` each call is traced and compiled anew, in a second or more: for many, jit it once,
    with `apply` fixed.

    Source: Wicker et al., AISTATS 2021, section 6, for differences of probabilities.

    Example:
        >>> import jax.numpy as jnp
        >>> apply = lambda w, x: w * x                                  # logits (x, -x)
        >>> samples = jnp.array([[1.0, -1.0], [2.0, -2.0]])
        >>> found = decision(apply, samples, Box(jnp.array([0.5]), jnp.array([1.0])))
        >>> int(found.predicted), bool(found.robust)
        (0, True)
    """
    _check(samples, x_set, batch_size)
    nominal, x_set = nominal_input(x, x_set)
    look_at_ending(apply, outputs, samples, nominal)
    network = classifier(apply, outputs)
    each = _sweep(lambda w: network(w, nominal), samples, batch_size)
    valid = normalised(each, outputs)
    average = probabilities(each, outputs).mean(0)
    predicted = jnp.argmax(average)
    classes = average.shape[0]

    bounded = class_bounds(network, outputs, method, rounding)
    differences, around = _sweep(lambda w: bounded(w, x_set, predicted), samples, batch_size)
    slack = rounding_slack(rounding, average, num_samples(samples))
    least = jnp.where(valid, differences.mean(0) - slack, -1.0)
    lower = jnp.where(jnp.arange(classes) == predicted, 0.0, least)
    robust = jnp.all((lower > 0) | (jnp.arange(classes) == predicted))
    probability = _mean(around, slack, valid)
    first = jax.tree.map(lambda leaf: leaf[0], samples)
    name = arithmetic_name(rounding, average.dtype, network, first, nominal)
    return Decision(predicted, robust, lower, probability, jnp.ones(()), name)


def predictive(
    apply: Apply,
    samples: Stacked,
    x_set: Set,
    *,
    outputs: str = "logits",
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
    batch_size: int | None = None,
) -> Box:
    """Bounds every class's posterior predictive probability over a set of inputs.

        1/S sum_s min_{x'} softmax_c f(w_s, x')  <=  pi_c(x')       and the same from above

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        outputs: "logits" or "probabilities", as for `decision`.
        method: of the bounds, as for `bnncert.bound`.
        rounding: as for `bnncert.bound`.
        batch_size: samples at once; one by default.

    Returns:
        A `Box` of shape (C,) that holds pi(x') for all x' in the set; [0, 1] where the set is
        traced and empty.

    Raises:
        TypeError, ValueError: as `decision`.

    Cost: S bounds of C (C - 1) / 2 margins; `decision` bounds C. Of probabilities: S bounds of C.
    Outside `jit` each call is traced and compiled anew, in a second or more: for many, jit it once,
    with `apply` fixed.

    Source: Wicker et al., AISTATS 2021, section 6.

    Example:
        >>> import jax.numpy as jnp
        >>> apply = lambda w, x: w * x
        >>> box = predictive(apply, jnp.array([[0.0, 0.0]]), Box(jnp.zeros(1), jnp.ones(1)))
        >>> [round(float(v), 3) for v in box.lower]
        [0.5, 0.5]
    """
    _check(samples, x_set, batch_size)

    look_at_ending(apply, outputs, samples, x_set.center)
    network, valid = classifier(apply, outputs), jnp.asarray(True)
    if outputs == "probabilities":
        each = _sweep(lambda w: network(w, x_set.center), samples, batch_size)
        valid, bounded = normalised(each, outputs), bound(network, method, rounding=rounding)
    else:
        margins = all_margin_bounds(network, method, rounding=rounding)

        def bounded(params: Params, region: Set) -> Box:
            return jax.vmap(probability_box)(margins(params, region))

    boxes = _sweep(lambda w: bounded(w, x_set), samples, batch_size)
    return _mean(boxes, rounding_slack(rounding, boxes.lower[0], num_samples(samples)), valid)


def class_bounds(
    network: Apply, outputs: str, method: str | Method, rounding: Rounding
) -> Callable[[Params, Set, Array], tuple[Float[Array, " classes"], Box]]:
    """Makes bounds on what one network says of a class over a set.

    Args:
        network: as `bnncert.outputs.classifier` returns it.
        outputs: of `decision`.
        method: as for `bnncert.bound`.
        rounding: as for `bnncert.bound`.

    Returns:
        `(params, x_set, c) -> (least p_c - p_j for each j, a Box around p_c)`, inside [-1, 1] and
        [0, 1].

    Cost: a call bounds C margins, or C + 1 rows of probabilities.

    Example:
        >>> bounded = class_bounds(lambda w, x: w * x, "logits", "ibp", "nearest")
        >>> least, _ = bounded(jnp.array([1.0, -1.0]), Box(jnp.ones(1), jnp.ones(1)), jnp.array(0))
        >>> [f"{float(v):.3f}" for v in least]
        ['0.000', '0.762']
    """
    if outputs == "logits":
        margins = margin_bounds(network, method, rounding=rounding)

        def found(params: Params, region: Set, c: Array) -> tuple[Array, Box]:
            box = margins(params, region, c)
            return least_differences(box), probability_box(box)
    else:

        def rows(params: Params, x: Array, c: Array) -> Array:
            p = network(params, x)
            unit = jnp.eye(p.size, dtype=jnp.int8)  # of integers, the difference is exact
            return jnp.concatenate([unit[c] - unit, unit[c][None]]).astype(p.dtype) @ p

        rows_bounded = bound(rows, method, rounding=rounding)

        def found(params: Params, region: Set, c: Array) -> tuple[Array, Box]:
            box = rows_bounded(params, region, c)
            # Where a bound overflowed, what probabilities are in any case.
            lower = jnp.where(jnp.isnan(box.lower), -1.0, box.lower)
            upper = jnp.where(jnp.isnan(box.upper), 1.0, box.upper)
            return lower[:-1], Box(lower[-1], upper[-1])

    def bounded(params: Params, region: Set, c: Array) -> tuple[Array, Box]:
        least, around = found(params, region, c)
        # Computed ends may leave these intervals by a rounding error; the true ones do not.
        return jnp.clip(least, -1.0, 1.0), jax.tree.map(lambda end: jnp.clip(end, 0.0, 1.0), around)

    return bounded


def rounding_slack(rounding: Rounding, probabilities: Array, count: int) -> float:
    """Computes what a difference of two averaged probabilities gives way by in rounding.

        (400 + 8 C + 4 S) u     as the module derives

    Args:
        rounding: as for `bnncert.bound`; 0 by "nearest".
        probabilities: an array of their dtype whose first axis counts the classes.
        count: networks averaged.

    Returns:
        The slack, a number below 1.

    Raises:
        ValueError: it would be 1 or more, which no difference of two probabilities exceeds.

    Example:
        >>> p = jnp.zeros(10)  # of C = 10 classes
        >>> f"{rounding_slack('outward', p, 16):.1e}", rounding_slack("nearest", p, 16)
        ('3.2e-05', 0.0)
    """
    own, classes = 0.5 * float(jnp.finfo(probabilities.dtype).eps), probabilities.shape[0]

    def rounded(slack: float, precision: Precision) -> float:
        unit = max(own, precision.unit_roundoff or 0.0)
        slack = (400 + 8 * classes + 4 * count) * unit
        if slack >= 1:
            raise ValueError(
                f"outputs of dtype {probabilities.dtype}, unit roundoff {unit:g}: with {classes} "
                f"classes and {count} networks "
                f"rounding may move a probability by more than {slack:.2f}, so that nothing can "
                "certify a decision. Return float32 outputs (the last layer in float32, or "
                'apply(params, x).astype(jnp.float32)), or ask for rounding="nearest", which '
                "speaks of real arithmetic."
            )
        return slack

    return arithmetic_of(rounding).allow(0.0, rounded)


def arithmetic_name(
    rounding: Rounding, dtype: jnp.dtype, network: Apply, params: Any, x: Array
) -> str:
    """Names the arithmetic in which something is proved of a network: `Decision.arithmetic`.

    Args:
        rounding: as for `bnncert.bound`.
        dtype: of what the network returns.
        network: `(params, x) -> outputs`.
        params: of one network, or their shapes and dtypes.
        x: one input.

    Returns:
        "real"; the dtype; "tensorfloat32" or "bfloat16" where factors of matrix products are
        rounded to that; or the unit roundoff that was given.

    Cost: one trace of the network; nothing is computed.

    Example:
        >>> one = jnp.ones(1)
        >>> arithmetic_name("nearest", one.dtype, lambda w, x: w * x, one, one)
        'real'
    """

    def rounded(name: str, precision: Precision) -> str:
        if precision.unit_roundoff is not None:
            return f"unit roundoff {precision.unit_roundoff:g}"
        asked = asked_of(network, params, x)
        return str(dtype) if asked == "float32" else str(asked)

    return arithmetic_of(rounding).allow("real", rounded)


def _check(samples: Stacked, x_set: Set, batch_size: int | None) -> None:
    num_samples(samples)
    check_region(x_set)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: at least one sample must be swept at once.")


def _sweep(one: Callable[[Params], Any], samples: Stacked, batch_size: int | None) -> Any:
    return jax.lax.map(one, samples, batch_size=batch_size)


def _mean(boxes: Box, slack: float, valid: Any) -> Box:
    """Averages bounds on probabilities; none is negative, and nothing is known where not valid."""
    lower, upper = boxes.lower.mean(0) - 0.5 * slack, boxes.upper.mean(0) + 0.5 * slack
    return Box(
        jnp.where(valid, jnp.maximum(lower, 0.0), -jnp.inf), jnp.where(valid, upper, jnp.inf)
    )
