"""The sets that attacks search, balls cut to a range of values, and the arguments they are given.

A norm decides three things: how a point is brought back into the set, the unit step along which a
loss of given gradient grows fastest, and how a point of the unit ball is drawn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike
from optax import projections

from bnncert._emptiness import is_valid
from bnncert._varying import axes_of, is_sharded, varying
from bnncert.posterior.leaves import check_stacked
from bnncert.sets import ball, check_center, check_clip, check_radius, is_concrete
from bnncert.types import Apply, Key, Stacked


class Geometry(NamedTuple):
    """What an attack's steps take from the norm of the ball.

    Attributes:
        project: `(x, eps, clip, point) -> point`, the nearest of the set around x.
        steepest: `direction -> step` of norm 1, along which a loss of this gradient grows fastest.
        draw: `(key, x) -> point` of the unit ball, of x's shape, uniformly.
    """

    project: Callable[[Array, Array, tuple[float, float] | None, Array], Array]
    steepest: Callable[[Array], Array]
    draw: Callable[[Key, Array], Array]


def _project_box(x: Array, eps: Array, clip: tuple[float, float] | None, point: Array) -> Array:
    box: Any = ball(x, eps, clip=clip)  # float for float the box that certificates speak of
    return projections.projection_box(point, box.lower, box.upper)


def _project_l2(x: Array, eps: Array, clip: tuple[float, float] | None, point: Array) -> Array:
    unit = projections.projection_l2_ball((point - x) / jnp.where(eps > 0, eps, 1.0), 1.0)
    point = x + eps * unit
    if clip is None:
        return point
    # x is in this range, so moving towards the range moves towards x: the ball is not left
    return projections.projection_box(point, *check_clip(clip))


def _normalize(direction: Array) -> Array:
    largest = jnp.max(jnp.abs(direction))
    direction = direction / jnp.where(largest > 0, largest, 1.0)  # squares of 1e-30 would be 0
    return direction / jnp.maximum(jnp.linalg.norm(direction), 1.0)


def _draw_box(key: Key, x: Array) -> Array:
    return jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)


def _draw_l2(key: Key, x: Array) -> Array:
    return jax.random.ball(key, x.size, 2, (), x.dtype).reshape(x.shape)


GEOMETRIES = {
    jnp.inf: Geometry(_project_box, jnp.sign, _draw_box),
    2: Geometry(_project_l2, _normalize, _draw_l2),
}


def starting_points(
    key: Key, geometry: Geometry, x: Array, eps: Array, clip: tuple[float, float] | None, num: int
) -> Array:
    """Stacks where searches start: the input itself, then uniform draws brought into the set."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num))
    project = partial(geometry.project, x, eps, clip)
    return jax.vmap(lambda k: project(x + eps * geometry.draw(k, x)))(keys).at[0].set(x)


def usable(
    x: Array, eps: ArrayLike, clip: tuple[float, float] | None, p: float | int
) -> Array | None:
    """Says where the set that an attack searches has points; None where that was checked."""
    if is_concrete(x) and is_concrete(eps):
        return None
    valid = is_valid(ball(x, eps, p=p, clip=clip if p == jnp.inf else None))
    if clip is None or p == jnp.inf:
        return valid
    low, high = clip
    return valid & jnp.all((jnp.asarray(low, x.dtype) <= x) & (x <= jnp.asarray(high, x.dtype)))


def spread_out(apply: Apply, samples: Stacked, x: Array, *others: Any) -> Array:
    """Returns the input, varying over each mesh axis that the attack on it varies over.

    Each device attacks its own networks: derivatives by an input that others shared would be summed
    over all of them.

    Args:
        apply: of the attack.
        samples: of the attack.
        x: the input.
        others: all else that the attack depends on.
    """
    if not is_sharded():
        return x
    first = jax.eval_shape(lambda s: jax.tree.map(lambda leaf: leaf[0], s), samples)
    return varying(x, axes_of(jax.eval_shape(apply, first, x), x, others))


def check_arguments(
    samples: Stacked,
    x: Array,
    y: ArrayLike,
    eps: ArrayLike,
    p: float | int,
    clip: tuple[float, float] | None = None,
    **counts: int | None,
) -> None:
    """Checks the arguments at the public edge, values where they are known."""
    check_stacked(samples)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x has dtype {x.dtype}: an attack moves floating-point values. For images, scale "
            "them first: x.astype(jnp.float32) / 255."
        )
    if not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise TypeError(f"y has dtype {jnp.result_type(y)}: a label is an integer.")
    for name, value in {"y": y, "eps": eps}.items():
        if shape := jnp.shape(value):
            raise ValueError(f"{name} has shape {shape}: give one example, jax.vmap a batch.")
    check_radius(eps)
    check_center(x, clip)
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: it must be at least 1.")
    if p not in GEOMETRIES:
        raise ValueError(f"p = {p}: choose 2 or jnp.inf.")
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(samples)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "samples must be stacked params, every leaf with the same leading axis of S >= 1 "
            f"networks; leading axes found: {sorted(lengths)}. One network: add an axis to each "
            "leaf, jax.tree.map(lambda w: w[None], params)."
        )
