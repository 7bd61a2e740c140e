"""What n independent draws say about a mean or a frequency, with confidence 1 - delta.

For independent D_1, ..., D_n in an interval of length b, with mean m and sample variance V (of the
divisor n - 1), each of these holds with probability 1 - delta:

    Hoeffding            E D  >=  m - b sqrt( log(1/delta) / (2 n) )
    empirical Bernstein  E D  >=  m - sqrt( 2 V log(2/delta) / n ) - 7 b log(2/delta) / (3 (n - 1))

and of k successes in n independent trials of probability p

    Clopper-Pearson      p  >=  the p' at which  Prob( Binomial(n, p') >= k ) = delta.

All are one-sided. Differences of probabilities lie in [-1, 1], so that b = 2 and their slack is
twice that of probabilities. Statements that are to hold together share one delta (union bound), and
so do the two inequalities where the better one is used: the choice looks at the draws.

Numbers here are float64 on the host, or rounded so that what is claimed is never more than holds.

Sources: Hoeffding, JASA 1963, theorem 2; Maurer and Pontil, "Empirical Bernstein bounds and sample
variance penalization", COLT 2009, theorem 4; Clopper and Pearson, Biometrika 1934.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float
from scipy import stats

INEQUALITIES = ("best", "hoeffding", "bernstein")

_UP = 1 + 1e-9  # far more than the relative error of float64 formulas and SciPy's quantiles


def hoeffding(count: int, delta: float, width: float = 1.0) -> float:
    """Bounds how far a mean of `count` independent draws may lie above its expectation.

        b sqrt( log(1/delta) / (2 n) )

    Args:
        count: draws, n >= 1.
        delta: probability that it lies further, in (0, 1).
        width: length b of the interval that holds each draw.

    Returns:
        The slack, to be subtracted; rounded up.

    Raises:
        ValueError: a count or a delta out of range.

    Source: Hoeffding, JASA 1963, theorem 2.

    Example:
        >>> f"{hoeffding(32, 0.05 / 10_000, width=2.0):.3f}"
        '0.873'
    """
    check(count, delta, least=1)
    return _UP * width * math.sqrt(math.log(1 / delta) / (2 * count))


def bernstein(
    variance: Float[Array, "*shape"], count: int, delta: float, width: float = 1.0
) -> Float[Array, "*shape"]:
    """Bounds how far a mean may lie above its expectation by the draws' own variance.

    That is far less than `hoeffding` where they hardly vary.

        sqrt( 2 V log(2/delta) / n ) + 7 b log(2/delta) / (3 (n - 1))

    Args:
        variance: of the draws, divisor n - 1, as `sample_variance` rounds it.
        count: draws, n >= 2.
        delta: probability that the mean lies further, in (0, 1).
        width: length b of the interval that holds each draw.

    Returns:
        The slack, to be subtracted.

    Raises:
        ValueError: a count or a delta out of range.

    Source: Maurer and Pontil, COLT 2009, theorem 4.

    Example:
        >>> f"{float(bernstein(jnp.zeros(()), 1000, 0.05)):.4f}", f"{hoeffding(1000, 0.05):.4f}"
        ('0.0086', '0.0387')
    """
    check(count, delta, least=2)
    log = math.log(2 / delta)
    few = 16 * float(jnp.finfo(variance.dtype).eps)  # of this function's own few operations
    spread = jnp.sqrt(variance * (2 * log / count))
    return (1 + few) * (spread + 7 * width * log / (3 * (count - 1)))


def sample_variance(draws: Float[Array, "draws *shape"]) -> Float[Array, "*shape"]:
    """Computes the variance over the first axis, of the divisor n - 1, rounded up.

    Squares around any number but their mean only add up to more, so that only the summation can
    round down: by a relative (n + 8) eps at most.

    Args:
        draws: n >= 2 along the first axis.

    Returns:
        No less than their variance, elementwise.

    Example:
        >>> print(f"{sample_variance(jnp.array([1.0, 3.0])):.4f}")
        2.0000
    """
    count = draws.shape[0]
    total = jnp.sum((draws - draws.mean(0)) ** 2, axis=0)
    return total * ((1 + (count + 8) * float(jnp.finfo(draws.dtype).eps)) / (count - 1))


def slack(
    draws: Float[Array, "draws *shape"], delta: float, width: float, inequality: str = "best"
) -> Float[Array, "*shape"]:
    """Bounds what a mean of independent draws gives way by, with confidence 1 - delta an entry.

    Args:
        draws: independent along the first axis, each in one interval of length `width`.
        delta: probability of an error, for each entry.
        width: length b of the interval.
        inequality: "hoeffding", "bernstein", or "best": the smaller, each at delta / 2.

    Returns:
        The slack of each entry's mean, to be subtracted (or added, for an upper bound).

    Raises:
        ValueError: an unknown inequality, a count or a delta out of range.

    Source: Hoeffding, JASA 1963; Maurer and Pontil, COLT 2009.

    Example:
        >>> print(f"{slack(jnp.ones(1000), 0.05, 1.0):.4f}")            # draws that do not vary
        0.0102
    """
    check_inequality(inequality)
    count, each = draws.shape[0], delta / 2 if inequality == "best" else delta
    found = []
    if inequality != "bernstein":
        up = 1 + float(jnp.finfo(draws.dtype).eps)  # the conversion to this dtype
        found.append(jnp.full(draws.shape[1:], up * hoeffding(count, each, width), draws.dtype))
    if inequality != "hoeffding":
        found.append(bernstein(sample_variance(draws), count, each, width))
    return found[0] if len(found) == 1 else jnp.minimum(*found)


def clopper_pearson(successes: int, count: int, delta: float) -> float:
    """Bounds the probability of a success from below; 1 - that of a failure is from above.

        the p at which  Prob( Binomial(n, p) >= k ) = delta

    Args:
        successes: k, of `count` independent trials.
        count: trials, n >= 1.
        delta: probability that the bound is above the truth, in (0, 1).

    Returns:
        The bound, rounded down.

    Raises:
        ValueError: a count or a delta out of range.

    Source: Clopper and Pearson, Biometrika 1934.

    Example:
        >>> f"{clopper_pearson(1000, 1000, 0.05):.5f}", clopper_pearson(0, 1000, 0.05)
        ('0.99701', 0.0)
    """
    check(count, delta, least=1)
    if not 0 <= successes <= count:
        raise ValueError(f"successes = {successes} of {count} trials: give 0 to {count}.")
    if successes == 0:
        return 0.0
    return float(stats.beta.ppf(delta, successes, count - successes + 1)) / _UP


def check(count: int, delta: float, *, least: int) -> None:
    """Checks that there are enough draws, and that delta is a probability.

    Args:
        count: number of draws.
        delta: probability of an error.
        least: draws that are needed.

    Raises:
        ValueError: fewer, or a delta outside of (0, 1).
    """
    if count < least:
        raise ValueError(f"{count} draws: at least {least} are needed, and 1,000 say more.")
    if not 0 < delta < 1:
        raise ValueError(
            f"delta = {delta}: the probability of an error, between 0 and 1, e.g. 0.05."
        )


def check_inequality(inequality: str) -> None:
    """Checks that an inequality is one of `INEQUALITIES`.

    Args:
        inequality: its name.

    Raises:
        ValueError: it is none of them.
    """
    if inequality not in INEQUALITIES:
        raise ValueError(f"inequality = {inequality!r}: choose one of {', '.join(INEQUALITIES)}.")
