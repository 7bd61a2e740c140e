"""The mass that a factorised Gaussian gives to a box of weights, rounded down.

    M(l, u) = prod_i P( l_i <= w_i <= u_i ),    w_i ~ N(m_i, s_i^2)

With Q(z) = P(N(0, 1) > z), and z the distance of an end from the mean in standard deviations,

    1 - Q(z_below) - Q(z_above)     where the mean lies between the ends
    Q(z_near) - Q(z_far)            where both ends lie on one side of it

and log M = sum_i log1p(-(Q + Q)): many factors close to 1 are multiplied without losing what they
lack of it, which differences of distribution functions do (and in float32 err upwards).

Rounding. All is float64 on the host, u = 2^-53; ends and parameters are taken as the exact numbers
that they are. A computed z passed through two roundings. As -Q'(z) / Q(z) = p(z) / Q(z), and
z p(z) / Q(z) <= z^2 + 1 (Mills), that changes Q by less than 2.1 (z^2 + 1) u of itself. SciPy's
`ndtr` is off by less than (2 z^2 + 60) u of itself: measured (`tests/certify/test_mass.py`), not
proved. Together less than

    (8 z^2 + 128) u        `_error`, up to z = 40; beyond z = 37 add 1e-300, more than Q itself

so each Q is enlarged by this where it is subtracted and lessened where it is not. A logarithm is
off by 4 u of itself at most, their sum is rounded once (`math.fsum`), and all have one sign: the
sum is lowered by 2^-49 of itself and its exponential by as much, which is more than all that.

The box is closed and its ends are floating-point numbers, so that a weight drawn from the Gaussian
and *then rounded* to their format lies in it whenever the weight does: rounding is monotone.
"""

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import ArrayLike, Float
from numpy import ndarray
from scipy.special import ndtr

_UNIT = 2.0**-53
_MARGIN = 2.0**-49
_TINY = 1e-300


def log_mass(
    lower: Float[ArrayLike, "..."],
    upper: Float[ArrayLike, "..."],
    loc: Float[ArrayLike, "..."],
    scale: Float[ArrayLike, "..."],
) -> float:
    """Computes the logarithm of the mass of a box, rounded down.

        log M(l, u) = sum_i log P( l_i <= w_i <= u_i ),    w_i ~ N(m_i, s_i^2)

    Args:
        lower: ends of the box, may be -inf.
        upper: ends of the box, may be inf; `lower <= upper`.
        loc: means of the weights.
        scale: their standard deviations, > 0.

    Returns:
        A number that is no larger than the logarithm; -inf where nothing can be said.

    Example:
        >>> ends = np.array([1.0, 2.0])
        >>> round(math.exp(log_mass(-ends, ends, 0.0, 1.0)), 6)
        0.651627
    """
    total = math.fsum(factors(lower, upper, loc, scale).ravel())
    return total + _MARGIN * total if total > -math.inf else -math.inf


def mass(
    lower: Float[ArrayLike, "..."],
    upper: Float[ArrayLike, "..."],
    loc: Float[ArrayLike, "..."],
    scale: Float[ArrayLike, "..."],
) -> float:
    """Computes the mass of a box, rounded down.

        M(l, u) = prod_i P( l_i <= w_i <= u_i ),    w_i ~ N(m_i, s_i^2)

    Args:
        lower: as for `log_mass`.
        upper: as for `log_mass`.
        loc: as for `log_mass`.
        scale: as for `log_mass`.

    Returns:
        A number in [0, 1] that is no larger than the mass.

    Example:
        >>> mass(-1.0, 1.0, 0.0, 1.0) <= math.erf(1 / math.sqrt(2)) < mass(-1.0, 1.000001, 0.0, 1.0)
        True
    """
    return math.exp(log_mass(lower, upper, loc, scale)) * (1 - _MARGIN)


def total(masses: Iterable[float]) -> float:
    """Adds the masses of disjoint boxes, rounded down.

    Args:
        masses: of the boxes, each in [0, 1].

    Returns:
        No more than their sum.

    Example:
        >>> total([0.25, 0.5]) < 0.75
        True
    """
    return max(0.0, math.nextafter(math.fsum(masses), -math.inf))


def complement(masses: Iterable[float]) -> float:
    """Takes the masses of disjoint boxes off 1, rounded up.

    Args:
        masses: of the boxes, each in [0, 1].

    Returns:
        No less than 1 - their sum, and at most 1.

    Example:
        >>> complement([0.25, 0.5]) > 0.25
        True
    """
    return min(1.0, math.nextafter(1.0 - total(masses), math.inf))


def factors(
    lower: Float[ArrayLike, "..."],
    upper: Float[ArrayLike, "..."],
    loc: Float[ArrayLike, "..."],
    scale: Float[ArrayLike, "..."],
) -> Float[ndarray, "..."]:
    """Computes each weight's own log factor, off by no more than 4 u of it upwards.

    Args:
        lower: as for `log_mass`.
        upper: as for `log_mass`.
        loc: as for `log_mass`.
        scale: as for `log_mass`.

    Returns:
        log P( l_i <= w_i <= u_i ), elementwise, float64.
    """
    below, above = (
        (np.asarray(end, np.float64) - np.asarray(loc, np.float64)) / np.asarray(scale, np.float64)
        for end in (lower, upper)
    )
    within = (below <= 0) & (above >= 0)
    lacking = _tail(np.where(within, -below, 0), 1) + _tail(np.where(within, above, 0), 1)
    near = np.where(below > 0, below, -above)
    far = np.where(below > 0, above, -below)
    aside = _tail(np.where(within, 0, near), -1) - _tail(np.where(within, 0, far), 1)
    aside *= 1 - _MARGIN  # the difference was rounded
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant
        inside = np.log1p(-np.minimum(lacking, 1.0))
        return np.asarray(np.where(within, inside, np.log(np.maximum(aside, 0.0))))


def _tail(z: Float[ndarray, "..."], side: int) -> Float[ndarray, "..."]:
    """Computes Q(z) for z >= 0, enlarged (side 1) or lessened (side -1) by its error."""
    return np.asarray(ndtr(-z) * (1 + side * _error(z)) + side * _TINY)


def _error(z: Float[ndarray, "..."]) -> Float[ndarray, "..."]:
    return np.asarray((8 * np.minimum(z, 40.0) ** 2 + 128) * _UNIT)
