"""The expected softmax over a set of inputs, from bounds that are linear in Gaussian weights.

Let F_j bound y_c - y_j from below over the whole set with probability 1 - delta, and lie below
E_j - u L_j with probability Phi(-u) at most (`bnncert.gaussian.margins`). All K - 1 of a class c
lie above that but for (K - 1) Phi(-u), and there the softmax is at least G(u), which falls with u:

    E softmax_c  >=  int G dP - delta,      G(u) = 1 / (1 + sum_j exp(u L_j - E_j)),
                                            P(u) = 1 - min(1, (K - 1) Phi(-u))
    E softmax_c  <=  1 - sum_{j != c} of these
    E softmax_c  <=  1 - E softmax_j of the two classes c and j alone, for each j

The integral is a sum over steps of u, G taken at the far end of each. The steps' probabilities are
constants, found in float64; sums of positive numbers in the network's dtype are rounded down.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import ndtr

from bnncert.certify.formal.moments import unit_error
from bnncert.gaussian import margins
from bnncert.sets import Box, Set
from bnncert.types import Apply, Posterior

_STEPS = np.linspace(0.0, 12.0, 481)
"""Numbers of Lipschitz constants that are summed over."""


def expected_softmax(apply: Apply, posterior: Posterior, x_set: Set, *, delta: float = 1e-3) -> Box:
    """Bounds E_w softmax f(w, x) for all x of a set.

        E softmax_c >= int G dP - delta,    E softmax_c <= 1 - sum of the others'

    Args:
        apply: `(params, x) -> logits (K,)` for one example.
        posterior: a `MeanField`, `LowRank` or `Gaussian`.
        x_set: a `Box` or an `LpBall` of inputs.
        delta: the probability that the bounds linear in the weights are none.

    Returns:
        A `Box` of K numbers in [0, 1]: [0, 1] where the set is traced and empty.

    Cost: `bnncert.gaussian.margins` with K (K - 1) rows.
    """
    q: Any = posterior
    center = jnp.zeros(x_set.center.shape, x_set.center.dtype)
    shape = jax.eval_shape(apply, q.loc, center).shape
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            f"apply must return a vector of logits, one of each class; its value has shape {shape}"
        )
    count = shape[0]
    pairs = np.array(list(itertools.permutations(range(count), 2)))
    matrix = np.eye(count)[pairs[:, 0]] - np.eye(count)[pairs[:, 1]]
    found = margins(apply, posterior, x_set, matrix, np.zeros(len(matrix)), delta=delta)
    means, spreads = (v.reshape(count, count - 1) for v in (found.mean, found.lipschitz))
    # 1. From below: all other classes at once.
    lower = _least_softmax(means, spreads, delta)
    # 2. From above: what the others have, or what one of them has of the two.
    of_two = _least_softmax(means.reshape(-1, 1), spreads.reshape(-1, 1), delta)
    against = jnp.zeros((count, count), of_two.dtype).at[pairs[:, 1], pairs[:, 0]].set(of_two)
    unit = unit_error(lower, count)
    rest = 1 - (lower.sum() - lower) * (1 - unit) + unit
    upper = jnp.minimum(rest, 1 - against.max(1) + unit)
    return Box(lower, jnp.clip(upper, lower, 1.0))


def _least_softmax(means: Array, spreads: Array, delta: float) -> Array:
    """Bounds int G dP - delta from below, for each row of means and Lipschitz constants.

    In float32 at least: so many steps are more than half formats add up.
    """
    means, spreads = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (means, spreads))
    steps, shares = _masses(means.shape[-1])
    unit = unit_error(means, len(steps) + means.shape[-1])
    depths = jnp.asarray(steps, means.dtype) * (1 + unit)
    reach = depths[:, None] * spreads[:, None, :]
    size = jnp.abs(means)[:, None, :] + reach
    least = means[:, None, :] - reach - 4 * float(jnp.finfo(means.dtype).eps) * size
    least = jnp.where(jnp.isnan(least), -jnp.inf, least)
    softmax = 1 / (1 + jnp.exp(-least).sum(-1))
    total = (softmax * jnp.asarray(shares, means.dtype)).sum(-1)
    return jnp.clip(total * (1 - unit) - delta - unit, 0.0, 1.0)


def _masses(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds steps of u, those that have mass, and lower bounds on their masses."""
    beyond = np.minimum(1.0, rows * ndtr(-_STEPS) * (1 + 1e-9))
    shares = -np.diff(np.concatenate([[1.0], beyond]))
    kept = shares > 0
    return _STEPS[kept], shares[kept] * (1 - 1e-9)
