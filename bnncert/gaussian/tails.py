"""What follows from the mean and the Lipschitz constant of a concave function of Gaussian numbers.

    Prob( F <= E F - u )  <=  Phi(-u / L),     u >= 0                                            (1)

`bnncert.gaussian.margins` says where F comes from. Computed on the host, in float64, each result
rounded to its safe side: values of Phi are off by less than 1e-9 of themselves here.

Source: Boucheron, Lugosi and Massart, "Concentration Inequalities", 2013, section 10.4.
"""

import numpy as np
from jaxtyping import ArrayLike, Float
from numpy import ndarray
from scipy.special import ndtr, ndtri

_ROUNDED = 1e-9
"""More than sums and tails in float64 are off by, relatively."""

_STEPS = np.linspace(0.0, 12.0, 2401)
"""Numbers of Lipschitz constants that an expectation is summed over."""


def probability(
    mean: Float[ArrayLike, "..."], lipschitz: Float[ArrayLike, "..."], delta: float
) -> Float[ndarray, "..."]:
    """Bounds the probability that all F_j along the last axis are positive from below.

        1 - delta - sum_j Phi(-E_j / L_j),     the summand of a row with E_j <= 0 being 1

    Args:
        mean: E_j.
        lipschitz: L_j, the same shape.
        delta: the probability that the F_j are no bounds.

    Returns:
        Numbers in [0, 1]; NaN and infinite constants prove nothing.

    Example:
        >>> mean, lipschitz = np.array([5.0, 8.0]), np.ones(2)
        >>> print(f"{probability(mean, lipschitz, 1e-6):.7f}")
        0.9999987
    """
    mean, spread = _in_float64(mean, lipschitz)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        known = (mean > 0) & (mean < np.inf) & (spread < np.inf)
        lost = np.where(known, ndtr(-mean / spread), 1.0).sum(-1)
    return np.asarray(np.maximum(0.0, 1.0 - (delta + lost) * (1 + _ROUNDED) - _ROUNDED))


def quantile(
    mean: Float[ArrayLike, "..."], lipschitz: Float[ArrayLike, "..."], delta: float, level: float
) -> Float[ndarray, "..."]:
    """Bounds what F_j, and what it bounds, is above but for a probability.

        E_j + L_j Phi^-1(level - delta);    E_j, which the median is above, for more than half

    Args:
        mean: E_j.
        lipschitz: L_j, the same shape.
        delta: the probability that the F_j are no bounds.
        level: that probability, in (delta, 1).

    Returns:
        Numbers of that shape.

    Raises:
        ValueError: a level out of range.

    Example:
        >>> quantile(np.array([2.0]), np.array([0.5]), 0.001, 0.051).round(3).tolist()
        [1.178]
    """
    if not delta < level < 1:
        raise ValueError(
            f"level = {level}: give a share between delta = {delta} and 1; with a smaller delta "
            "smaller shares are to be had."
        )
    mean, spread = _in_float64(mean, lipschitz)
    depth = max(0.0, float(-ndtri((level - delta) * (1 - _ROUNDED)))) * (1 + _ROUNDED)
    return _less(mean, depth * spread)


def cvar(
    mean: Float[ArrayLike, "..."], lipschitz: Float[ArrayLike, "..."], level: float
) -> Float[ndarray, "..."]:
    """Bounds the mean of F_j over the share of the weights where it is least.

        E_j - L_j phi(Phi^-1(level)) / level

    As a function of t, the Phi(t)-quantile of F has the Lipschitz constant L (isoperimetry). So it
    less E + L t falls with t, and has mean 0 under a Gaussian t: from below, it sums to no less.

    Args:
        mean: E_j.
        lipschitz: L_j, the same shape.
        level: the share, in (0, 1].

    Returns:
        Numbers of that shape.

    Raises:
        ValueError: a level out of range.

    Example:
        >>> cvar(np.array([2.0]), np.array([0.5]), 0.05).round(3).tolist()
        [0.969]
    """
    if not 0 < level <= 1:
        raise ValueError(f"level = {level}: give a share in (0, 1], e.g. 0.05.")
    mean, spread = _in_float64(mean, lipschitz)
    density = float(np.exp(-0.5 * ndtri(level) ** 2) / np.sqrt(2 * np.pi))
    return _less(mean, density / level * (1 + _ROUNDED) * spread)


def class_probability(
    mean: Float[ArrayLike, "..."], lipschitz: Float[ArrayLike, "..."], delta: float
) -> Float[ndarray, "..."]:
    """Bounds E[ 1 / (1 + sum_j exp(-F_j)) ] - delta from below.

    But for a probability of min(1, rows Phi(-u)) all F_j are above E_j - u L_j, where the softmax
    is at least G(u); G falls with u, so that sums over steps of u take it at their far ends.

    Args:
        mean: E_j, logit margins of a class; the last axis is over the other classes.
        lipschitz: L_j, the same shape.
        delta: the probability that the F_j are no bounds.

    Returns:
        Numbers in [0, 1].

    Example:
        >>> mean, lipschitz = np.array([2.0, 3.0]), np.full(2, 1e-9)
        >>> print(f"{class_probability(mean, lipschitz, 0.0):.3f}")
        0.844
    """
    mean, spread = _in_float64(mean, lipschitz)
    beyond = np.minimum(1.0, mean.shape[-1] * ndtr(-_STEPS) * (1 + _ROUNDED))
    shares = -np.diff(np.concatenate([[1.0], beyond]))
    with np.errstate(invalid="ignore", over="ignore"):
        least = _less(mean[..., None], _STEPS * spread[..., None])
        softmax = 1 / (1 + np.exp(-least).sum(-2))
    found = (softmax * shares).sum(-1) * (1 - _ROUNDED) - delta - _ROUNDED
    return np.asarray(np.clip(found, 0.0, 1.0))


def _in_float64(*values: ArrayLike) -> tuple[ndarray, ...]:
    return tuple(np.asarray(value, np.float64) for value in values)


def _less(mean: ndarray, by: ndarray) -> ndarray:
    """Subtracts, rounded down; -inf where there is no difference."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.nextafter(mean - by, -np.inf)
    return np.where(np.isnan(found), -np.inf, found)
