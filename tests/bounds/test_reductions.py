"""Planes of reductions enclose them on every box, and are exact where they should be."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds.ops import Choice
from bnncert.bounds.ops.reductions import PLANES as REDUCTION_PLANES
from bnncert.sets import Box

FUNCTIONS = {
    "reduce_max": lambda x: jnp.max(x, -1),
    "reduce_min": lambda x: jnp.min(x, -1),
    "logsumexp": lambda x: jax.nn.logsumexp(x, -1),
    "log_softmax": jax.nn.log_softmax,
    "softmax": jax.nn.softmax,
}
SIZES = (1, 2, 4)
every_function = pytest.mark.parametrize("op", FUNCTIONS)


def test_every_reduction_with_planes_is_tested():
    assert set(FUNCTIONS) == set(REDUCTION_PLANES)


@cache
def boxes(size, count=4_000):
    """Ordinary, narrow and huge boxes, far from 0 too; some are points, in part or entirely."""
    rng = np.random.default_rng(size)
    center = rng.normal(size=(count, size)) * rng.choice([0.3, 3.0, 300.0], (count, 1))
    reach = rng.uniform(size=(count, size)) * rng.choice([1e-9, 1e-3, 0.3, 3, 30, 1e4], (count, 1))
    reach[rng.uniform(size=reach.shape) < 0.2] = 0
    return Box(jnp.asarray(center - reach), jnp.asarray(center + reach))


@cache
def points(size):
    """Of each box the corners and some points inside: (points, boxes, size)."""
    box, rng = boxes(size), np.random.default_rng(1)
    places = [*product((0.0, 0.5, 1.0), repeat=size)][:: 1 if size < 4 else 2]
    at = np.concatenate([places, rng.uniform(size=(20, size))])[:, None]
    return jnp.clip(box.lower + at * (box.upper - box.lower), box.lower, box.upper)


@partial(jax.jit, static_argnames="op")
def sides(op, box, v):
    """The planes of every choice at points v: pairs."""
    choices = [Choice(variant=0), Choice(variant=1)]
    if op == "softmax":
        spread = (jnp.full_like(box.lower, t) for t in (0.0, 0.3, 1.0))
        choices += [Choice(t, t) for t in spread]
    pairs = (REDUCTION_PLANES[op](box, choice) for choice in choices)
    return [(lower(v), upper(v)) for lower, upper in pairs]


@every_function
@pytest.mark.parametrize("size", SIZES)
def test_planes_enclose(op, size, float64):
    v = points(size)
    value = np.asarray(FUNCTIONS[op](v))
    for lower, upper in sides(op, boxes(size), v):
        assert np.isfinite(lower).all() and np.isfinite(upper).all()
        scale = 1 + np.abs(value).max(0) + np.abs(lower).max(0) + np.abs(upper).max(0)
        assert ((value - lower) / scale).min() >= -1e-12
        assert ((upper - value) / scale).min() >= -1e-12


@every_function
@pytest.mark.parametrize("size", SIZES)
def test_at_a_point_both_planes_give_the_value(op, size, float64):
    at = boxes(size).center
    v = jnp.broadcast_to(at, points(size).shape)
    value = np.asarray(FUNCTIONS[op](v))
    for found in jax.tree.leaves(sides(op, Box(at, at), v)):
        np.testing.assert_allclose(found, value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("op", ["logsumexp", "softmax"])
def test_gradients_are_finite(op):
    """In float32, of the planes' values, with respect to the box."""
    box = Box(*(jnp.asarray(end, jnp.float32) for end in (boxes(4).lower, boxes(4).upper)))

    def total(box):
        v = 0.3 * box.lower + 0.7 * box.upper
        return sum(jnp.sum(side(v)) for side in REDUCTION_PLANES[op](box, Choice()))

    gradient = jax.jit(jax.grad(total))(box)
    assert bool(jnp.isfinite(gradient.lower).all() & jnp.isfinite(gradient.upper).all())


def test_of_two_coordinates_no_plane_above_their_logsumexp_is_lower_in_the_middle(float64):
    """Any plane above is at least the mean of two opposite corners there; this one is that."""
    box = boxes(2)
    corners = jnp.stack(
        [
            jnp.stack([box.lower[:, 0], box.upper[:, 1]], -1),
            jnp.stack([box.upper[:, 0], box.lower[:, 1]], -1),
        ]
    )
    mean = jax.nn.logsumexp(corners, -1).mean(0)
    (_, upper), _ = sides("logsumexp", box, box.center)
    np.testing.assert_allclose(upper, mean, rtol=1e-12, atol=1e-12)


def test_the_planes_of_a_softmax_are_close(float64):
    """Their distance in the middle is of the second order in the width."""
    center = jnp.asarray(np.random.default_rng(0).normal(size=boxes(4).lower.shape))
    v = jnp.broadcast_to(center, points(4).shape)
    gaps = []
    for reach in (0.1, 0.05):
        (lower, upper), *_ = sides("softmax", Box(center - reach, center + reach), v)
        gaps.append(float((upper - lower).mean()))
    assert 0.2 * gaps[0] <= gaps[1] <= 0.3 * gaps[0] and gaps[1] <= 2 * 0.05**2
