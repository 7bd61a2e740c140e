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
    """Bounds softmax_c - softmax_j of one network from below, for each j.

        min over the box of (1 - exp m_j) / sum_k exp m_k

    Args:
        margins: bounds on f_k - f_c, shape (C,), of which that of c itself is 0.

    Returns:
        Shape (C,); 0 for c itself, -1 where a bound overflowed.

    Example:
        >>> least_differences(Box(jnp.zeros(2), jnp.zeros(2))).tolist()  # logits that are equal
        [0.0, 0.0]
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
    """Bounds softmax_c of one network.

        1 / sum_k exp u_k  <=  softmax_c  <=  1 / sum_k exp l_k

    Args:
        margins: bounds on f_k - f_c, shape (C,), of which that of c itself is 0.

    Returns:
        A `Box` of scalars.

    Example:
        >>> print(probability_box(Box(jnp.zeros(2), jnp.zeros(2))).lower)
        0.5
    """
    lower, upper = -jax.nn.logsumexp(margins.upper), -jax.nn.logsumexp(margins.lower)
    return Box(jnp.exp(lower), jnp.exp(upper))
