"""Scores of a posterior predictive: accuracy and proper scoring rules.

With pi_n(c) = mean_s p_s(c | x_n), the predictive over S weight samples:

    NLL   = -mean_n log pi_n(y_n)                                       (nats a datum)
    Brier = mean_n sum_c (pi_n(c) - [c = y_n])^2                        (0 to 2)

Source: Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather
Review 1950.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bnncert.sets import is_concrete


def accuracy(
    probs: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Computes the fraction of data whose most probable class is the label.

    Of equally probable classes the first counts.

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
    check_labels(probs, labels)
    return jnp.mean(jnp.argmax(probs, axis=-1) == labels, dtype=probs.dtype)


def nll(
    probs: Float[Array, "batch classes"], labels: Int[Array, " batch"], *, from_log: bool = False
) -> Float[Array, ""]:
    """Computes the negative log-likelihood of the labels, the mean over data, in nats.

        NLL = -mean_n log pi_n(y_n)

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
    check_labels(probs, labels)
    chosen = jnp.take_along_axis(probs, labels[:, None], axis=-1)[:, 0]
    if not from_log:
        chosen = jnp.log(jnp.maximum(chosen, jnp.finfo(probs.dtype).tiny))
    return -jnp.mean(chosen)


def brier(probs: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Computes the Brier score: the squared distance from the one-hot label, mean over data.

        Brier = mean_n sum_c (pi_n(c) - [c = y_n])^2

    Args:
        probs: the predictive.
        labels: class indices.

    Returns:
        A scalar in [0, 2].

    Raises:
        ValueError: if the shapes disagree or a (concrete) label names no class.

    Source: Brier, Monthly Weather Review 1950.

    Example:
        >>> print(brier(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])))
        1.0
    """
    check_labels(probs, labels)
    target = jax.nn.one_hot(labels, probs.shape[-1], dtype=probs.dtype)
    return jnp.mean(jnp.sum((probs - target) ** 2, axis=-1))


def check_labels(probs: Array, labels: Array) -> None:
    """Checks probabilities and labels: shapes always, values where they are known (not traced).

    Args:
        probs: (N, C), or any scores of the classes.
        labels: class indices, (N,).

    Raises:
        ValueError: if the shapes disagree or a known label names no class.

    Example:
        >>> check_labels(jnp.ones((2, 3)) / 3, jnp.array([0, 2]))
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1]:
        raise ValueError(
            f"probs must be (batch, classes) and labels (batch,), got {probs.shape} and "
            f"{labels.shape}; average per-sample probabilities over their first axis"
        )
    if not is_concrete(labels) or labels.size == 0:
        return
    values = np.asarray(labels)  # NumPy: under a trace JAX would stage the minimum
    low, high, classes = int(values.min()), int(values.max()), probs.shape[-1]
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels must be in 0..{classes - 1}, got a label {low if low < 0 else high}"
        )
