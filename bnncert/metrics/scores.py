"""Scores of a posterior predictive: accuracy, proper scoring rules, calibration, uncertainty.

With pi_n(c) = mean_s p_s(c | x_n), the predictive over S weight samples:

    NLL   = -mean_n log pi_n(y_n)                                       (nats a datum)
    Brier = mean_n sum_c (pi_n(c) - [c = y_n])^2                        (0 to 2)
    ECE   = sum_b (count_b / N) |accuracy_b - confidence_b|             (0 to 1)
    MI    = H[mean_s p_s] - mean_s H[p_s] = mean_s KL(p_s || pi)        (nats, 0 to log C)

The bins b of the ECE part the confidence max_c pi_n(c) into intervals ((b-1)/B, b/B].

Functions of `probs` (N, C) take the predictive; those of `sample_probs` (S, N, C) one row of
probabilities for each weight sample. All are pure and run under `jit` and `vmap`.

Sources: Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather
Review 1950; Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning",
AAAI 2015 (ECE); Guo et al., "On calibration of modern neural networks", ICML 2017, equations 2
and 3 (reliability, ECE); Depeweg et al., "Decomposition of uncertainty in Bayesian deep
learning", ICML 2018 (entropies, mutual information).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bnncert.sets import is_concrete


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reliability:
    """What happened in each bin of confidence; 0 in a bin that holds no datum (count 0)."""

    confidence: Float[Array, " bins"]  # mean confidence
    accuracy: Float[Array, " bins"]  # fraction of the bin's data predicted rightly
    count: Int[Array, " bins"]


def accuracy(
    probs: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Fraction of data whose most probable class is the label; of equal ones the first counts.

    Args:
        probs: the predictive, or any scores that rank the classes as it does.
        labels: class indices.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if the shapes disagree or a (concrete) label names no class.

    Example:
        >>> print(accuracy(jnp.array([[0.9, 0.1], [0.6, 0.4]]), jnp.array([0, 1])))
        0.5
    """
    _check_labels(probs, labels)
    return jnp.mean(jnp.argmax(probs, axis=-1) == labels, dtype=probs.dtype)


def nll(
    probs: Float[Array, "batch classes"], labels: Int[Array, " batch"], *, from_log: bool = False
) -> Float[Array, ""]:
    """Negative log-likelihood of the labels, the mean over data, in nats.

    A probability that underflowed to 0 counts as the smallest normal number (87 nats in float32),
    so one such datum cannot hide all others. Log-probabilities know no such floor.

    Args:
        probs: the predictive; its logarithm if `from_log`.
        labels: class indices.
        from_log: whether `probs` are log-probabilities.

    Returns:
        A scalar >= 0, nats a datum.

    Raises:
        ValueError: if the shapes disagree or a (concrete) label names no class.

    Example:
        >>> print(f"{float(nll(jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([0, 1]))):.4f}")
        0.3466
    """
    _check_labels(probs, labels)
    chosen = jnp.take_along_axis(probs, labels[:, None], axis=-1)[:, 0]
    if not from_log:
        chosen = jnp.log(jnp.maximum(chosen, jnp.finfo(probs.dtype).tiny))
    return -jnp.mean(chosen)


def brier(probs: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Brier score: squared distance from the one-hot label, summed over classes, mean over data.

    Args:
        probs: the predictive.
        labels: class indices.

    Returns:
        A scalar in [0, 2].

    Raises:
        ValueError: if the shapes disagree or a (concrete) label names no class.

    Example:
        >>> print(brier(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])))
        1.0
    """
    _check_labels(probs, labels)
    target = jax.nn.one_hot(labels, probs.shape[-1], dtype=probs.dtype)
    return jnp.mean(jnp.sum((probs - target) ** 2, axis=-1))


def reliability(
    probs: Float[Array, "batch classes"], labels: Int[Array, " batch"], num_bins: int = 15
) -> Reliability:
    """Accuracy against confidence in bins of equal width: the reliability diagram's numbers.

    Args:
        probs: the predictive.
        labels: class indices.
        num_bins: number B of bins; bin b holds the confidences in ((b-1)/B, b/B].

    Returns:
        `Reliability`, each field of shape (num_bins,). Empty bins hold zeros, never NaN.

    Raises:
        ValueError: if the shapes disagree, a (concrete) label names no class, or num_bins < 1.

    Example:
        >>> bins = reliability(jnp.array([[0.9, 0.1], [0.8, 0.2]]), jnp.array([0, 1]), num_bins=2)
        >>> bins.count.tolist(), bins.accuracy.tolist()
        ([0, 2], [0.0, 0.5])
    """
    _check_labels(probs, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    confidence = jnp.max(probs, axis=-1)
    correct = (jnp.argmax(probs, axis=-1) == labels).astype(probs.dtype)
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
    probs: Float[Array, "batch classes"], labels: Int[Array, " batch"], num_bins: int = 15
) -> Float[Array, ""]:
    """Expected calibration error: |accuracy - confidence| over bins, weighted by their counts.

    Args:
        probs: the predictive.
        labels: class indices.
        num_bins: number of bins of equal width.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if the shapes disagree, a (concrete) label names no class, or num_bins < 1.

    Example:
        >>> print(ece(jnp.array([[0.75, 0.25], [0.75, 0.25]]), jnp.array([0, 0])))
        0.25
    """
    bins = reliability(probs, labels, num_bins)
    return jnp.sum(bins.count * jnp.abs(bins.accuracy - bins.confidence)) / probs.shape[0]


def predictive_entropy(
    sample_probs: Float[Array, "samples batch classes"],
) -> Float[Array, " batch"]:
    """Entropy of the predictive, H[mean_s p_s]: all of the uncertainty.

    Args:
        sample_probs: probabilities under each weight sample.

    Returns:
        Nats, between 0 and log C, one for each datum.

    Example:
        >>> print(f"{float(predictive_entropy(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))[0]):.4f}")
        0.6931
    """
    return jnp.sum(jax.scipy.special.entr(jnp.mean(sample_probs, axis=0)), axis=-1)


def expected_entropy(
    sample_probs: Float[Array, "samples batch classes"],
) -> Float[Array, " batch"]:
    """Mean entropy of the samples, mean_s H[p_s]: the part more data would not remove.

    Args:
        sample_probs: probabilities under each weight sample.

    Returns:
        Nats, between 0 and log C, one for each datum.

    Example:
        >>> print(f"{float(expected_entropy(jnp.array([[[0.5, 0.5]], [[0.0, 1.0]]]))[0]):.4f}")
        0.3466
    """
    return jnp.mean(jnp.sum(jax.scipy.special.entr(sample_probs), axis=-1), axis=0)


def mutual_information(
    sample_probs: Float[Array, "samples batch classes"],
) -> Float[Array, " batch"]:
    """Information between weights and label, mean_s KL(p_s || mean_s p_s): the disagreement.

    Equal to `predictive_entropy - expected_entropy`, but summed from terms that are not negative,
    so that a small disagreement is not lost in the difference of two entropies.

    Args:
        sample_probs: probabilities under each weight sample.

    Returns:
        Nats, >= 0, one for each datum.

    Example:
        >>> print(f"{float(mutual_information(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))[0]):.4f}")
        0.6931
    """
    # The floor: a mean of numbers near the smallest may flush to 0, where the KL is infinite.
    tiny = jnp.finfo(sample_probs.dtype).tiny
    predictive = jnp.maximum(jnp.mean(sample_probs, axis=0), tiny)
    terms = jax.scipy.special.kl_div(sample_probs, predictive)
    return jnp.maximum(jnp.mean(jnp.sum(terms, axis=-1), axis=0), 0)


def _check_labels(probs: Array, labels: Array) -> None:
    """Shapes always; values where they are known (not under a trace)."""
    if probs.ndim != 2 or labels.shape != probs.shape[:1]:
        raise ValueError(
            f"probs must be (batch, classes) and labels (batch,), got {probs.shape} and "
            f"{labels.shape}; average per-sample probabilities over their first axis"
        )
    if not is_concrete(labels) or labels.size == 0:
        return
    low, high, classes = int(labels.min()), int(labels.max()), probs.shape[-1]
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels must be in 0..{classes - 1}, got a label {low if low < 0 else high}"
        )
