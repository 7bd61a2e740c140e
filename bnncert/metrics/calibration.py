"""Calibration: whether a confidence of 70% is right 70% of the time, and how to make it so.

With bins b that part N data by their confidence max_c pi_n(c), and count_b data, accuracy_b the
fraction of them predicted rightly, confidence_b their mean confidence:

    ECE = sum_b (count_b / N) |accuracy_b - confidence_b|               (0 to 1)
    MCE = max over bins that are not empty of |accuracy_b - confidence_b|

Bins of equal width are the intervals ((b-1)/B, b/B]; of equal mass (adaptive), each holds N/B data
in the order of their confidence, so that none is empty and none holds nearly all.

Temperature scaling is the baseline every method for calibration is held against: the logits z (or
log-probabilities) become z / T, with the one T > 0 that makes the NLL of held-out data least.

Sources: Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015
(ECE, MCE); Guo et al., "On calibration of modern neural networks", ICML 2017, equations 2, 3, 5
and 9 (reliability, ECE, MCE, temperature); Nixon et al., "Measuring calibration in deep learning",
CVPR workshops 2019 (adaptive bins).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bnncert.metrics.scores import check_labels, nll


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reliability:
    """What happened in each bin of confidence; 0 in a bin that holds no datum (count 0).

    Attributes:
        confidence: mean confidence of the bin's data, in [0, 1].
        accuracy: fraction of the bin's data predicted rightly, in [0, 1].
        count: number of data in the bin.

    Example:
        >>> bins = Reliability(jnp.array([0.0, 0.8]), jnp.array([0.0, 0.5]), jnp.array([0, 2]))
        >>> [round(float(gap), 2) for gap in bins.confidence - bins.accuracy]
        [0.0, 0.3]
    """

    confidence: Float[Array, " bins"]
    accuracy: Float[Array, " bins"]
    count: Int[Array, " bins"]


def reliability(
    probs: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    num_bins: int = 15,
    *,
    equal_mass: bool = False,
) -> Reliability:
    """Computes accuracy against confidence in bins: the reliability diagram's numbers.

    Args:
        probs: the predictive.
        labels: class indices.
        num_bins: number B of bins; bin b holds the confidences in ((b-1)/B, b/B].
        equal_mass: bins of N/B data each, by the order of their confidence, in place of bins of
            equal width; of equal confidences the earlier datum comes first.

    Returns:
        `Reliability`, each field of shape (num_bins,). Empty bins hold zeros, never NaN.

    Raises:
        ValueError: if the shapes disagree, a (concrete) label names no class, or num_bins < 1.

    Cost: O(N + B) time and memory; a sort more for `equal_mass`.

    Source: Guo et al., ICML 2017, equations 2 and 3; Nixon et al. 2019 (`equal_mass`).

    Example:
        >>> bins = reliability(jnp.array([[0.9, 0.1], [0.8, 0.2]]), jnp.array([0, 1]), num_bins=2)
        >>> bins.count.tolist(), bins.accuracy.tolist()
        ([0, 2], [0.0, 0.5])
    """
    check_labels(probs, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    confidence = jnp.max(probs, axis=-1)
    correct = (jnp.argmax(probs, axis=-1) == labels).astype(probs.dtype)
    if equal_mass:
        rank = jnp.argsort(jnp.argsort(confidence))
        index = rank * num_bins // confidence.size
    else:
        index = jnp.clip(jnp.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    count = jnp.zeros(num_bins, int).at[index].add(1)
    total = jnp.maximum(count, 1)  # an empty bin divides 0 by 1
    empty = jnp.zeros(num_bins, probs.dtype)
    return Reliability(
        confidence=empty.at[index].add(confidence) / total,
        accuracy=empty.at[index].add(correct) / total,
        count=count,
    )


def ece(
    probs: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    num_bins: int = 15,
    *,
    equal_mass: bool = False,
) -> Float[Array, ""]:
    """Computes the expected calibration error: gaps of the bins, weighted by their counts.

        ECE = sum_b (count_b / N) |accuracy_b - confidence_b|

    Args:
        probs: the predictive.
        labels: class indices.
        num_bins: number of bins.
        equal_mass: bins of as many data each (adaptive) in place of bins of equal width.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if the shapes disagree, a (concrete) label names no class, or num_bins < 1.

    Cost: that of `reliability`.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017, equation 3.

    Example:
        >>> print(ece(jnp.array([[0.75, 0.25], [0.75, 0.25]]), jnp.array([0, 0])))
        0.25
    """
    bins = reliability(probs, labels, num_bins, equal_mass=equal_mass)
    return jnp.sum(bins.count * jnp.abs(bins.accuracy - bins.confidence)) / probs.shape[0]


def mce(
    probs: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    num_bins: int = 15,
    *,
    equal_mass: bool = False,
) -> Float[Array, ""]:
    """Computes the maximum calibration error: the gap of the worst bin, however few it holds.

        MCE = max over bins that are not empty of |accuracy_b - confidence_b|

    Args:
        probs: the predictive.
        labels: class indices.
        num_bins: number of bins.
        equal_mass: bins of as many data each (adaptive) in place of bins of equal width.

    Returns:
        A scalar in [0, 1], at least the ECE.

    Raises:
        ValueError: if the shapes disagree, a (concrete) label names no class, or num_bins < 1.

    Cost: that of `reliability`.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017, equation 5.

    Example:
        >>> print(mce(jnp.array([[0.75, 0.25], [0.5, 0.5]]), jnp.array([0, 0])))
        0.5
    """
    bins = reliability(probs, labels, num_bins, equal_mass=equal_mass)
    return jnp.max(jnp.abs(bins.accuracy - bins.confidence))  # 0 where a bin is empty


def fit_temperature(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], *, steps: int = 30
) -> Float[Array, ""]:
    """Finds the temperature T that makes `softmax(logits / T)` likeliest on held-out data.

        T = argmin_{T > 0}  -mean_n log softmax_{y_n}(z_n / T)

    The NLL is convex in 1/T, so there is one minimum; L-BFGS looks for it in log T. The ranking of
    the classes, and so the accuracy, stays as it was.

    Args:
        logits: of held-out data, not of the data that are scored; the log of a predictive will do.
        labels: class indices.
        steps: of L-BFGS; 10 are usually enough.

    Returns:
        T > 0, kept in [0.01, 100]: for data that are all predicted rightly the best T is 0.

    Raises:
        ValueError: if the shapes disagree, a (concrete) label names no class, or steps < 1.

    Cost: `steps` line searches, each a few evaluations of the NLL and its derivative in T.

    Source: Guo et al., ICML 2017, equation 9.

    Example:
        >>> logits = jnp.array([[4.0, 0.0]] * 4)       # 98% sure, and right in 3 of 4 cases
        >>> found = fit_temperature(logits, jnp.array([0, 0, 0, 1]))
        >>> print(f"{float(found):.3f}, {float(jax.nn.softmax(logits / found)[0, 0]):.2f}")
        3.641, 0.75
    """
    check_labels(logits, labels)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")

    def temperature(log_t: Array) -> Array:
        return jnp.exp(jnp.clip(log_t, -4.6051702, 4.6051702))

    def loss(log_t: Array) -> Array:
        return nll(jax.nn.log_softmax(logits / temperature(log_t)), labels, from_log=True)

    solver = optax.lbfgs()
    evaluate = optax.value_and_grad_from_state(loss)

    def step(carry: tuple[Array, optax.OptState], _: None) -> tuple[Any, None]:
        log_t, state = carry
        value, slope = evaluate(log_t, state=state)
        updates, state = solver.update(slope, state, log_t, value=value, grad=slope, value_fn=loss)
        return (optax.apply_updates(log_t, updates), state), None

    start = jnp.zeros((), logits.dtype)
    (log_t, _), _ = jax.lax.scan(step, (start, solver.init(start)), length=steps)
    return temperature(log_t)
