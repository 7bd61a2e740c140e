"""Relaxations of operations that reduce an axis: maximum, log-sum-exp and softmax.

All act on the last axis of x in [l, u], shape (..., n).

max_j x_j
    below  any x_k
    above  with k the coordinate of the largest u, and c the second largest u:
           max_j x_j <= max(x_k, c), and the chord of that in x_k

log sum_j exp x_j, convex
    below  its tangent plane at the middle, whose gradient is the softmax there
    above  with the chords k_j x_j + o_j >= exp x_j, s(x) their sum and s0 = s(middle):
           log s(x) <= log s0 + (s(x) - s0) / s0

softmax_i x = 1 / sum_j exp(x_j - x_i), of differences that are bounded coordinate by coordinate
    below  with s_i(x) the sum of the chords of exp(x_j - x_i):  1/s >= 2/s0 - s/s0^2
    above  two ways: through log softmax_i x = x_i - log sum_j exp x_j, which is concave: its
           tangent at the middle, then the chord of exp on its range; or through the sum of the
           tangents of exp and the chord of 1/s on [1/pu, 1/pl]: pu + pl - pl pu s(x)

Sources: Boopathy et al., "CNN-Cert", AAAI 2019 (maximum); Wei et al., "Convex bounds on the softmax
function with applications to robustness verification", AISTATS 2023.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.relaxations.lines import Choice, relu
from bnncert.sets import Box

Pair = tuple[Callable[[Array], Array], Callable[[Array], Array]]
"""A lower and an upper affine function."""


def maximum(x: Box, choice: Choice) -> Pair:
    """The largest of the last axis; variant 1: its plainest planes (constant above)."""
    size = x.lower.shape[-1]
    if size == 1:
        return (lambda v: v[..., 0]), (lambda v: v[..., 0])
    largest = _one_hot(x.lower if choice.variant else x.center, size)
    top_u = _one_hot(x.upper, size)
    others = jnp.max(jnp.where(top_u > 0, -jnp.inf, x.upper), -1)
    l, u = (jnp.sum(jnp.where(top_u > 0, end, 0), -1) for end in (x.lower, x.upper))
    lines = relu(l - others, u - others)
    above, offset = lines.upper_slope, lines.upper_offset + (1 - lines.upper_slope) * others
    if choice.variant:
        certain = l >= others
        above, offset = certain.astype(u.dtype), jnp.where(certain, 0, u)

    def lower(v: Array) -> Array:
        return jnp.sum(largest * v, -1)

    def upper(v: Array) -> Array:
        return above * jnp.sum(top_u * v, -1) + offset

    return lower, upper


def logsumexp(x: Box) -> Pair:
    """The log-sum-exp of the last axis."""
    middle = x.center
    share, at_middle = jax.nn.softmax(middle), jax.nn.logsumexp(middle, -1)
    shift = jax.lax.stop_gradient(jnp.max(x.upper, -1, keepdims=True))
    slope, offset = _exp_chord(x.lower - shift, x.upper - shift)
    total = jnp.sum(slope * (middle - shift) + offset, -1)
    log_total = jnp.log(total) + shift[..., 0]

    def lower(v: Array) -> Array:
        return jnp.sum(share * (v - middle), -1) + at_middle

    def upper(v: Array) -> Array:
        return jnp.sum(slope * (v - middle), -1) / total + log_total

    return lower, upper


def log_softmax(x: Box) -> Pair:
    """X - log-sum-exp, along the last axis."""
    lower, upper = logsumexp(x)
    return (lambda v: v - upper(v)[..., None]), (lambda v: v - lower(v)[..., None])


def softmax(x: Box, choice: Choice) -> Pair:
    """The softmax of the last axis; `choice.variant` is which of the two upper planes."""
    middle = x.center
    identity = jnp.eye(x.lower.shape[-1], dtype=bool)
    # Entry [..., i, j] is x_j - x_i.
    low = jnp.where(identity, 0, x.lower[..., None, :] - x.upper[..., :, None])
    high = jnp.where(identity, 0, x.upper[..., None, :] - x.lower[..., :, None])
    center = 0.5 * (low + high)
    log_low, log_high = -jax.nn.logsumexp(high, -1), -jax.nn.logsumexp(low, -1)
    least, most = jnp.exp(log_low), jnp.exp(log_high)
    slope, offset = _exp_chord(low, jnp.minimum(high, _LARGEST_EXPONENT))
    total = jnp.sum(slope * center + offset, -1)
    # Beyond, exp overflows: nothing better than the interval is known below.
    usable = jnp.max(high, -1) < _LARGEST_EXPONENT
    flatness = jnp.where(usable, 1 / total**2, 0)
    below = jnp.where(usable, 1 / total, least)

    def lower(v: Array) -> Array:
        difference = v[..., None, :] - v[..., :, None]
        return below - flatness * jnp.sum(slope * (difference - center), -1)

    if choice.variant:
        tangent = jnp.exp(jnp.minimum(center, _LARGEST_EXPONENT))
        fall = jnp.where(usable, least * most, 0)
        top = jnp.where(usable, least + most, most)

        def upper(v: Array) -> Array:
            difference = v[..., None, :] - v[..., :, None]
            return top - fall * jnp.sum(tangent * (1 + difference - center), -1)

        return lower, upper
    share, at_middle = jax.nn.softmax(middle), jax.nn.log_softmax(middle)
    rise, base = _exp_chord(log_low, log_high)

    def through_log(v: Array) -> Array:
        step = v - middle
        log_upper = at_middle + step - jnp.sum(share * step, -1, keepdims=True)
        return rise * log_upper + base

    return lower, through_log


_LARGEST_EXPONENT = 40.0


def _exp_chord(l: Array, u: Array) -> tuple[Array, Array]:
    """Slope and offset of the chord of exp; at the end of which the line is the higher."""
    wide = u - l > jnp.sqrt(jnp.finfo(l.dtype).eps) * (1 + jnp.abs(l) + jnp.abs(u))
    middle_slope = jnp.exp(0.5 * (l + u))
    slope = jnp.where(wide, (jnp.exp(u) - jnp.exp(l)) / jnp.where(wide, u - l, 1), middle_slope)
    return slope, jnp.maximum(jnp.exp(l) - slope * l, jnp.exp(u) - slope * u)


def _one_hot(values: Array, size: int) -> Array:
    return jax.nn.one_hot(jnp.argmax(values, -1), size, dtype=values.dtype)
