"""Detection: whether a score tells inputs like the training data from others.

Scores of both kinds, larger for what is to be found (the *positives*; for out-of-distribution data
by confidence max_c pi(c), the in-distribution ones are positive; by an entropy, the others):

    AUROC  = P(s+ > s-) + P(s+ = s-) / 2                                (1/2: as good as chance)
    FPR95  = P(s- >= t),   t the largest threshold with P(s+ >= t) >= 95%
    LR     = mean max_c pi(c | x in) / mean max_c pi(c | x out)         (1: equally sure of both)

Sources: Hendrycks & Gimpel, "A baseline for detecting misclassified and out-of-distribution
examples in neural networks", ICLR 2017 (AUROC); Liang et al., "Enhancing the reliability of
out-of-distribution image detection in neural networks", ICLR 2018 (FPR95); Wicker et al.,
"Bayesian inference with certifiable adversarial robustness", AISTATS 2021 (the ratio of
likelihoods, in-distribution over out: here, that of the classes predicted).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def auroc(
    positive: Float[Array, " positives"], negative: Float[Array, " negatives"]
) -> Float[Array, ""]:
    """Computes the area under the receiver operating characteristic (ROC).

        AUROC = P(s+ > s-) + P(s+ = s-) / 2

    Args:
        positive: scores of the inputs that are to be found.
        negative: scores of the others.

    Returns:
        A scalar in [0, 1]; ties count half.

    Raises:
        ValueError: if either is empty or has more than one axis.

    Cost: a sort; memory of the scores.

    Source: Hendrycks & Gimpel, ICLR 2017.

    Example:
        >>> print(auroc(jnp.array([0.9, 0.8, 0.4]), jnp.array([0.5, 0.3])))
        0.8333334
    """
    _check_scores(positive, negative)
    ordered = jnp.sort(negative)
    below = jnp.searchsorted(ordered, positive, side="left")
    up_to = jnp.searchsorted(ordered, positive, side="right")
    return jnp.mean((below + up_to) / (2 * negative.size)).astype(positive.dtype)


def fpr_at_tpr(
    positive: Float[Array, " positives"], negative: Float[Array, " negatives"], tpr: float = 0.95
) -> Float[Array, ""]:
    """Computes the false positive rate where at least this fraction of positives is found: FPR95.

        FPR = P(s- >= t),   t the largest threshold with P(s+ >= t) >= tpr

    Args:
        positive: scores of the inputs that are to be found.
        negative: scores of the others.
        tpr: fraction of the positives that score at or above the threshold, in (0, 1].

    Returns:
        The fraction of negatives at or above that threshold, in [0, 1]; ties are errors.

    Raises:
        ValueError: if either is empty or has more than one axis, or for a tpr out of range.

    Cost: a sort; memory of the scores.

    Source: Liang et al., ICLR 2018.

    Example:
        >>> print(fpr_at_tpr(jnp.array([0.9, 0.8, 0.4]), jnp.array([0.5, 0.3]), tpr=0.6))
        0.0
    """
    _check_scores(positive, negative)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    # Rounded first: 0.95 * 20 is above 19 in floating point.
    found = math.ceil(round(tpr * positive.size, 9))
    threshold = jnp.sort(positive)[positive.size - max(found, 1)]
    return jnp.mean(negative >= threshold, dtype=negative.dtype)


def likelihood_ratio(
    inside: Float[Array, "inside classes"], outside: Float[Array, "outside classes"]
) -> Float[Array, ""]:
    """Computes how much likelier the predicted class is held in distribution than out of it.

    The ratio of the mean confidence on the two sets, mean max_c pi(c | x in) / mean max_c
    pi(c | x out); its log is the difference of the logs of the means.

    Args:
        inside: the predictive at in-distribution inputs.
        outside: the predictive at other inputs.

    Returns:
        A scalar in [1/C, C]; above 1: less sure out of distribution, as it should be.

    Raises:
        ValueError: if either is empty or no matrix, or they differ in classes.

    Source: after Wicker et al., AISTATS 2021; of the classes predicted.

    Example:
        >>> print(likelihood_ratio(jnp.array([[0.9, 0.1]]), jnp.array([[0.4, 0.6]])))
        1.4999999
    """
    for name, probs in {"inside": inside, "outside": outside}.items():
        if probs.ndim != 2 or not probs.size or probs.shape[1] != inside.shape[1]:
            raise ValueError(
                f"{name} has shape {probs.shape}: give probabilities (batch, classes), of as many "
                "classes in both sets"
            )
    return jnp.mean(jnp.max(inside, axis=-1)) / jnp.mean(jnp.max(outside, axis=-1))


def _check_scores(positive: Array, negative: Array) -> None:
    for name, scores in {"positive": positive, "negative": negative}.items():
        if scores.ndim != 1 or not scores.size:
            raise ValueError(
                f"{name} has shape {scores.shape}: give one score for each input, and at least one"
            )
