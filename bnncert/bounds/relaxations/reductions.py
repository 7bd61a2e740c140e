"""Relaxations of operations that reduce an axis: maximum, log-sum-exp and softmax.

All act on the last axis of x in [l, u], shape (..., n).

max_j x_j
    below  any x_k
    above  with k the coordinate of the largest u, and c the second largest u:
           max_j x_j <= max(x_k, c), and the chord of that in x_k

log sum_j exp x_j, convex
    below  its tangent plane at the middle, whose gradient is the softmax there
    above  the lower in the middle of two:
           with the chords k_j x_j + o_j >= exp x_j, s(x) their sum and s0 = s(middle):
               log s(x) <= log s0 + (s(x) - s0) / s0
           with x_k the largest in the middle, r(x) the log-sum-exp of the others, of which the
           plane above is the first kind, and the chord of softplus on the range of r - x_k:
               x_k + softplus(r(x) - x_k); for two coordinates no plane is lower in the middle

softmax_i x = s(x_i - r_i(x)), s the logistic function and r_i the log-sum-exp of the others
    below  the line below s on the range of x_i - r_i, which rises, and the plane above r_i;
           or, with s_i(x) the sum of the chords of exp(x_j - x_i):  1/s_i >= 2/s0 - s_i/s0^2
    above  the line above s, and the tangent plane of r_i

Sources: Boopathy et al., "CNN-Cert", AAAI 2019 (maximum); Wei et al., "Convex bounds on the softmax
function with applications to robustness verification", AISTATS 2023.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.relaxations import curves
from bnncert.bounds.relaxations.lines import DEFAULT, Choice, relu, with_finite_gradients
from bnncert.bounds.relaxations.smooth import CURVES
from bnncert.sets import Box

Pair = tuple[Callable[[Array], Array], Callable[[Array], Array]]
"""A lower and an upper affine function."""


def maximum(x: Box, choice: Choice, repeats: Array | None = None) -> Pair:
    """The largest of the last axis; variant 1: its plainest planes (constant above).

    Args:
        x: the box of its coordinates.
        choice: which planes.
        repeats: which coordinates repeat another one; not all.
    """
    size = x.lower.shape[-1]
    if size == 1:
        return (lambda v: v[..., 0]), (lambda v: v[..., 0])

    def each(end: Array) -> Array:
        return end if repeats is None else jnp.where(repeats, -jnp.inf, end)

    largest = _one_hot(each(x.lower if choice.variant else x.center), size)
    top_u = _one_hot(each(x.upper), size)
    others = jnp.max(jnp.where(top_u > 0, -jnp.inf, each(x.upper)), -1)
    l, u = (jnp.sum(jnp.where(top_u > 0, end, 0), -1) for end in (x.lower, x.upper))
    if repeats is not None:
        others = jnp.where(jnp.sum(~repeats, -1) == 1, l, others)
    lines = relu(*with_finite_gradients(l - others, u - others))
    above, offset = lines.upper_slope, lines.upper_offset + (1 - lines.upper_slope) * others
    if choice.variant:
        certain = l >= others
        above, offset = certain.astype(u.dtype), jnp.where(certain, 0, u)

    def lower(v: Array) -> Array:
        return jnp.sum(largest * v, -1)

    def upper(v: Array) -> Array:
        return above * jnp.sum(top_u * v, -1) + offset

    return lower, upper


def logsumexp(x: Box, choice: Choice) -> Pair:
    """The log-sum-exp of the last axis; variant 1: above it the first of the two planes."""
    every = jnp.ones(x.lower.shape[-1:], bool)
    above = _chords(x, every) if choice.variant else _above(x, every, every.size)
    return _function(_tangent(x, every), x), _function(above, x)


def log_softmax(x: Box, choice: Choice) -> Pair:
    """X - log-sum-exp, along the last axis."""
    lower, upper = logsumexp(x, choice)
    return (lambda v: v - upper(v)[..., None]), (lambda v: v - lower(v)[..., None])


def softmax(x: Box, choice: Choice) -> Pair:
    """The softmax of the last axis; `choice` is of the logistic function's lines.

    Variant 1 is the second of the planes below.
    """
    size = x.lower.shape[-1]
    if size == 1:
        return jnp.ones_like, jnp.ones_like
    rows, others = _each(x)
    odds = log_odds(x)
    logistic = CURVES["logistic"]()
    lines = curves.lines(logistic, odds.lower, odds.upper, choice._replace(variant=0))

    def through(slope: Array, offset: Array, rest: Plane) -> Callable[[Array], Array]:
        turned = slope[..., None] * (jnp.eye(size, dtype=slope.dtype) - rest.slope)
        return _function(Plane(turned, slope * (x.center - rest.value) + offset), x)

    upper = through(lines.upper_slope, lines.upper_offset, _tangent(rows, others))
    if choice.variant:
        return _by_reciprocal(x), upper
    rest = _above(rows, others, size - 1)
    return through(lines.lower_slope, lines.lower_offset, rest), upper


def log_odds(x: Box) -> Box:
    """The range of each x_i minus the log-sum-exp of the others, along the last axis."""
    rows, others = _each(x)
    return Box(x.lower - _logsumexp(rows.upper, others), x.upper - _logsumexp(rows.lower, others))


class Plane(NamedTuple):
    """An affine function of the last axis, by its slopes and its value in the middle of a box."""

    slope: Array
    value: Array


def _function(plane: Plane, x: Box) -> Callable[[Array], Array]:
    """One plane, or (slopes of one axis more) several of the same point."""
    if plane.slope.ndim == x.lower.ndim:
        return lambda v: jnp.sum(plane.slope * (v - x.center), -1) + plane.value
    return lambda v: (
        jnp.einsum("...ij,...j->...i", plane.slope, v - x.center, precision=_HIGHEST) + plane.value
    )


def _each(x: Box) -> tuple[Box, Array]:
    """The box once for each coordinate, and which the others are."""
    size = x.lower.shape[-1]
    shape = (*x.lower.shape, size)
    lower, upper = (jnp.broadcast_to(end[..., None, :], shape) for end in (x.lower, x.upper))
    return Box(lower, upper), ~jnp.eye(size, dtype=bool)


def _logsumexp(v: Array, among: Array) -> Array:
    return jax.nn.logsumexp(jnp.where(among, v, -jnp.inf), -1)


def _tangent(x: Box, among: Array) -> Plane:
    """Below the log-sum-exp of some coordinates: the tangent plane at the middle."""
    middle = jnp.where(among, x.center, -jnp.inf)
    return Plane(jax.nn.softmax(middle), jax.nn.logsumexp(middle, -1))


def _above(x: Box, among: Array, count: int) -> Plane:
    """Above the log-sum-exp of `count` coordinates."""
    largest = _one_hot(jnp.where(among, x.center, -jnp.inf), x.lower.shape[-1])
    low, middle, high = (jnp.sum(largest * v, -1) for v in (x.lower, x.center, x.upper))
    if count == 1:
        return Plane(largest, middle)
    rest = among & (largest == 0)
    plane = _chords(x, rest) if count > 2 else _above(x, rest, 1)
    ends = _logsumexp(x.lower, rest) - high, _logsumexp(x.upper, rest) - low
    chord = curves.lines(CURVES["softplus"](), *ends, DEFAULT)
    slope = chord.upper_slope
    value = middle + slope * (plane.value - middle) + chord.upper_offset
    slope = slope[..., None] * plane.slope + (1 - slope[..., None]) * largest
    if count == 2:
        return Plane(slope, value)
    other = _chords(x, among)
    lower = value < other.value
    return Plane(
        jnp.where(lower[..., None], slope, other.slope), jnp.where(lower, value, other.value)
    )


def _chords(x: Box, among: Array) -> Plane:
    """Above the log-sum-exp: the tangent of log at the sum of the chords of exp."""
    shift = jnp.max(jnp.where(among, x.upper, -jnp.inf), -1, keepdims=True)
    shift = jax.lax.stop_gradient(shift)
    slope, offset = _exp_chord(*(jnp.where(among, v - shift, 0) for v in (x.lower, x.upper)))
    slope = jnp.where(among, slope, 0)
    total = jnp.sum(jnp.where(among, slope * (x.center - shift) + offset, 0), -1)
    return Plane(slope / total[..., None], jnp.log(total) + shift[..., 0])


def _by_reciprocal(x: Box) -> Callable[[Array], Array]:
    """Below the softmax: the second of the module's planes."""
    identity = jnp.eye(x.lower.shape[-1], dtype=bool)
    # Entry [..., i, j] is x_j - x_i.
    low = jnp.where(identity, 0, x.lower[..., None, :] - x.upper[..., :, None])
    high = jnp.where(identity, 0, x.upper[..., None, :] - x.lower[..., :, None])
    center = 0.5 * (low + high)
    least = jnp.exp(-jax.nn.logsumexp(high, -1))
    slope, offset = _exp_chord(*(jnp.minimum(d, _LARGEST_EXPONENT) for d in (low, high)))
    total = jnp.sum(slope * center + offset, -1)
    # Beyond, exp overflows: nothing better than the interval is known below.
    usable = jnp.max(high, -1) < _LARGEST_EXPONENT
    flatness = jnp.where(usable, 1 / total**2, 0)
    below = jnp.where(usable, 1 / total, least)

    def lower(v: Array) -> Array:
        difference = v[..., None, :] - v[..., :, None]
        return below - flatness * jnp.sum(slope * (difference - center), -1)

    return lower


_HIGHEST = jax.lax.Precision.HIGHEST
_LARGEST_EXPONENT = 40.0


def _exp_chord(l: Array, u: Array) -> tuple[Array, Array]:
    """Slope and offset of the chord of exp; at the end of which the line is the higher."""
    wide = u - l > jnp.sqrt(jnp.finfo(l.dtype).eps) * (1 + jnp.abs(l) + jnp.abs(u))
    middle_slope = jnp.exp(0.5 * (l + u))
    slope = jnp.where(wide, (jnp.exp(u) - jnp.exp(l)) / jnp.where(wide, u - l, 1), middle_slope)
    return slope, jnp.maximum(jnp.exp(l) - slope * l, jnp.exp(u) - slope * u)


def _one_hot(values: Array, size: int) -> Array:
    return jax.nn.one_hot(jnp.argmax(values, -1), size, dtype=values.dtype)
