"""Losses of log pi that attacks make large: cross-entropy, and the difference-of-logits ratios.

With z = log pi in the place of the logits, and pi_1 >= pi_2 >= ... its sorted entries,

    CE            log-odds against y,  logsumexp_{j != y} z_j - z_y
    DLR           -(z_y - max_{j != y} z_j) / (z_1 - z_3)
    targeted DLR  -(z_y - z_t) / (z_1 - (z_3 + z_4)/2)

The cross-entropy -log pi_y = softplus(log-odds): the same points are worst and the same directions
steepest, but the log-odds still grow where pi_y rounds to 1. DLR is the same for a z + b, a > 0:
networks whose logits are steep are attacked as well as others, which cross-entropy is not. log pi
differs from the logits of a single network by a constant, so there DLR is that of the paper; for
an average of networks log pi is what remains of it: shifts do not matter, scales are the average's.

Fewer classes than the ratio names: with three, targeted DLR divides by z_1 - z_3; with two, where
z_1 - z_2 would make every value +-1, both are the plain difference.

Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, equations 6 and 7.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

_LEAST = 1e-12  # a spread of the z, as in the authors' code: where all classes are equal


def log_odds(log_pi: Float[Array, " classes"], y: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """Computes the log-odds against the true class, which the cross-entropy increases with.

        log((1 - pi_y) / pi_y) = logsumexp_{j != y} z_j - z_y

    Args:
        log_pi: log probabilities (C,), nats, up to a constant.
        y: the true class.

    Returns:
        A scalar, nats.

    Example:
        >>> log_odds(jnp.array([1.0, 0.0]), 0).item()
        -1.0
    """
    return jax.nn.logsumexp(_rivals(log_pi, y)) - log_pi[y]


def dlr(log_pi: Float[Array, " classes"], y: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """Computes the difference-of-logits ratio, positive where y is not the most probable class.

        DLR = -(z_y - max_{j != y} z_j) / (z_1 - z_3)

    Args:
        log_pi: log probabilities (C,), nats, up to a constant.
        y: the true class.

    Returns:
        A scalar, in [-1, 1] for three or more classes; with two, the plain difference in nats.

    Source: Croce & Hein, ICML 2020, equation 6.

    Example:
        >>> dlr(jnp.array([3.0, 2.0, 1.0]), 0).item(), dlr(jnp.array([3.0, 2.0, 1.0]), 1).item()
        (-0.5, 0.5)
    """
    lead = log_pi[y] - jnp.max(_rivals(log_pi, y))
    if log_pi.size < 3:
        return -lead
    top = jax.lax.top_k(log_pi, 3)[0]
    return -lead / jnp.maximum(top[0] - top[2], _LEAST)


def targeted_dlr(
    log_pi: Float[Array, " classes"], y: Int[ArrayLike, ""], target: Int[ArrayLike, ""]
) -> Float[Array, ""]:
    """Computes the targeted ratio, positive where the target is more probable than y.

        targeted DLR = -(z_y - z_t) / (z_1 - (z_3 + z_4)/2)

    Args:
        log_pi: log probabilities (C,), nats, up to a constant.
        y: the true class.
        target: the class that the point shall be taken for.

    Returns:
        A scalar; with two classes, the plain difference in nats.

    Source: Croce & Hein, ICML 2020, equation 7.

    Example:
        >>> targeted_dlr(jnp.array([3.0, 2.0, 1.0, 1.0]), 0, 2).item()
        -1.0
    """
    lead = log_pi[y] - log_pi[target]
    if log_pi.size < 3:
        return -lead
    top = jax.lax.top_k(log_pi, min(4, log_pi.size))[0]
    low = top[2] if log_pi.size == 3 else (top[2] + top[3]) / 2
    return -lead / jnp.maximum(top[0] - low, _LEAST)


def _rivals(log_pi: Array, y: ArrayLike) -> Array:
    return jnp.where(jnp.arange(log_pi.size) == y, -jnp.inf, log_pi)
