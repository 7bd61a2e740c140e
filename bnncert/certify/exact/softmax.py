"""The softmax of one network whose margins lie in a box.

Let [l_k, u_k] bound the margins m_k = f_k - f_c over a set of inputs (m_c = 0). Then

    softmax_c              =  1 / sum_k exp m_k
    softmax_c - softmax_j  =  (1 - exp m_j) / sum_k exp m_k

The first falls with every margin. The second falls with m_j, and with the other m_k where m_j <= 0,
while it rises with them where m_j > 0: its minimum over the box is at u_j with u_k, or l_k where
u_j > 0. Both are computed by log-sum-exp, which no margin overflows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert.sets import Box


def least_differences(margins: Box) -> Float[Array, " classes"]:
    """The least softmax_c - softmax_j of one network, for each j.

    Args:
        margins: bounds on f_k - f_c, shape (C,), of which that of c itself is 0.
    """
    # [j, k]: the margin m_k at which softmax_c - softmax_j is smallest
    others = jnp.where(margins.upper[:, None] > 0, margins.lower[None, :], margins.upper[None, :])
    itself = jnp.eye(margins.upper.shape[0], dtype=bool)
    worst = jnp.where(itself, margins.upper[:, None], others)
    total = jax.nn.logsumexp(worst, axis=1)
    difference = jnp.exp(-total) - jnp.exp(margins.upper - total)
    # Where a bound overflowed: the least that two probabilities can differ by.
    return jnp.where(jnp.isnan(difference), -1.0, difference)


def probability_box(margins: Box) -> Box:
    """Bounds on softmax_c, from bounds on the margins f_k - f_c (of which that of c is 0)."""
    lower, upper = -jax.nn.logsumexp(margins.upper), -jax.nn.logsumexp(margins.lower)
    return Box(jnp.exp(lower), jnp.exp(upper))
