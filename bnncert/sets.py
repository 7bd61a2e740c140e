"""Sets of inputs or of weights: boxes, and balls of the L1 and L2 norms.

    Box     { x : lower <= x <= upper }                elementwise
    LpBall  { x : |x - center|_p <= eps },  p in {1, 2}

A linear function a.x is bounded over them by its dual norm: with 1/p + 1/q = 1,

    max over a box   a.c + |a|.r          c = (lower + upper)/2,  r = (upper - lower)/2
    max over a ball  a.c + eps |a|_q

They are pytrees: `jit`, `vmap` and `grad` take and return them. Values are checked where they are
used (`bnncert.bound`), not here: a transformation may put other things in their fields.

A set that is empty (lower > upper, a negative radius, NaN) is an error where its numbers are known,
and certifies nothing where they are traced (`bnncert._emptiness`).
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Num


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Box:
    """The box `lower <= x <= upper`, elementwise.

    Attributes:
        lower: any shape.
        upper: the shape of `lower`.

    Example:
        >>> box = Box(jnp.array([0.0, 1.0]), jnp.array([2.0, 1.0]))
        >>> box.center.tolist(), box.radius.tolist()
        ([1.0, 1.0], [1.0, 0.0])
    """

    lower: Any
    upper: Any

    @property
    def center(self) -> Array:
        """The middle of the box, exact where `lower == upper`, finite where they are."""
        lower, upper = jnp.asarray(self.lower), jnp.asarray(self.upper)
        total = lower + upper
        # Halves of small numbers may be lost, sums of large ones overflow.
        return jnp.where(jnp.abs(total) < jnp.inf, 0.5 * total, 0.5 * lower + 0.5 * upper)

    @property
    def radius(self) -> Array:
        """Half the width of the box, to the farther end; `center` -+ `radius` hold both."""
        center, upper = self.center, jnp.asarray(self.upper)
        reach = jnp.maximum(upper - center, center - self.lower)
        # Backends take what is below the smallest normal number for 0; the box is no point.
        lost = (reach == 0) & (upper > self.lower)
        return jnp.where(lost, jnp.finfo(reach.dtype).tiny, reach)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LpBall:
    """The ball `|x - center|_p <= eps`, the norm taken over all of x.

    Attributes:
        center: any shape.
        eps: radius, a scalar; under `vmap` one for each example.
        p: 1 or 2.

    Example:
        >>> ball = LpBall(jnp.zeros(2), 0.5, 2)
        >>> jax.tree.leaves(ball)[1], ball.p
        (0.5, 2)
    """

    center: Any
    eps: Any
    p: int = field(metadata={"static": True})


Set = Box | LpBall


def is_set(value: object) -> bool:
    """Says whether `value` is a `Box` or an `LpBall`.

    Args:
        value: anything.

    Returns:
        A bool.

    Example:
        >>> is_set(Box(0.0, 1.0)), is_set((0.0, 1.0))
        (True, False)
    """
    return isinstance(value, Set)


def ball(
    x: Num[ArrayLike, "..."],
    eps: Float[ArrayLike, ""],
    *,
    p: int | float = jnp.inf,
    clip: tuple[float, float] | None = None,
) -> Set:
    """Makes the ball of radius `eps` around `x`.

        { x' : |x' - x|_p <= eps },   for p = inf cut to low <= x' <= high

    Args:
        x: center, any shape.
        eps: radius in the units of `x` (for images: pixels in [0, 1]).
        p: inf for a `Box`; 1 or 2 for an `LpBall`.
        clip: `(low, high)`: intersect with this range of values; only for p = inf. x lies in it.

    Returns:
        A `Box` (p = inf) or an `LpBall`. Where x is traced and leaves the range, or where `eps` is
        traced and no radius, an empty one: it certifies nothing.

    Raises:
        ValueError: for another p, for `clip` with an `LpBall`, for a negative or NaN `eps`, for an
            x that is not finite or not in `clip`.
        TypeError: for an `x` of integers.

    Example:
        >>> import jax.numpy as jnp
        >>> box = ball(jnp.array([0.0, 0.5]), 0.1, clip=(0.0, 1.0))
        >>> [round(float(v), 2) for v in (*box.lower, *box.upper)]
        [0.0, 0.4, 0.1, 0.6]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x has dtype {x.dtype}: a ball needs floating-point values. For images, "
            "scale them first: x.astype(jnp.float32) / 255."
        )
    check_radius(eps)
    check_center(x, clip)
    if p not in (1, 2, jnp.inf):
        raise ValueError(f"p = {p}: choose 1, 2 or jnp.inf.")
    if p != jnp.inf and clip is not None:
        raise ValueError(
            f"clip = {clip} with p = {p}: an L{p} ball is not clipped; use p = jnp.inf, or "
            "clip=None."
        )
    reach = _reach(eps, x.dtype)
    usable = None if is_concrete(eps) else (0 <= jnp.asarray(eps)) & (jnp.asarray(eps) < jnp.inf)
    if p != jnp.inf:
        return LpBall(x, reach if usable is None else jnp.where(usable, reach, -1.0), int(p))
    lower, upper = x - reach, x + reach
    low, high = -1.0, 1.0
    if clip is not None:
        low, high = (jnp.asarray(end, x.dtype) for end in clip)
        lower, upper = jnp.maximum(lower, low), jnp.minimum(upper, high)
        if not is_concrete(x):
            inside = (low <= x) & (x <= high)
            usable = inside if usable is None else inside & usable
    if usable is not None:  # empty by finite ends: nothing infinite enters a computation
        lower, upper = jnp.where(usable, lower, high), jnp.where(usable, upper, low)
    return Box(lower, upper)


def check_radius(eps: Any, name: str = "eps") -> None:
    """Checks that a radius, if known, is finite and not negative; tracers pass.

    Args:
        eps: a radius, or an array of them.
        name: of it, in the error.

    Raises:
        ValueError: it is known and negative, infinite or NaN.

    Example:
        >>> check_radius(-0.1)
        Traceback (most recent call last):
        ValueError: eps = -0.1: a radius must be finite and not negative.
    """
    if is_concrete(eps):
        values = np.asarray(eps)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name} = {eps}: a radius must be finite and not negative.")


def check_clip(clip: tuple[float, float]) -> tuple[float, float]:
    """Checks that a range of values, if known, increases.

    Args:
        clip: `(low, high)`.

    Returns:
        `clip`.

    Raises:
        ValueError: it is known, and low >= high.

    Example:
        >>> check_clip((0.0, 1.0))
        (0.0, 1.0)
    """
    low, high = clip
    if is_concrete(low) and is_concrete(high) and not low < high:
        raise ValueError(f"clip = {clip}: give (low, high) with low < high, e.g. (0.0, 1.0).")
    return low, high


def check_center(x: Any, clip: tuple[float, float] | None, name: str = "x") -> None:
    """Checks that a center, if known, is finite and inside `clip`; tracers pass.

    Args:
        x: a center.
        clip: `(low, high)`, or None.
        name: of the center, in the error.

    Raises:
        ValueError: it is known and not finite or outside of `clip`; `check_clip`'s.

    Example:
        >>> check_center(np.array([255.0]), (0.0, 1.0))
        Traceback (most recent call last):
        ValueError: x holds 255.0, outside clip = (0.0, 1.0): ...
    """
    ends = None if clip is None else check_clip(clip)
    if not is_concrete(x):
        return
    values = np.asarray(x)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values: no ball has such a center.")
    if ends is None or not all(map(is_concrete, ends)):
        return
    low, high = (np.asarray(end).astype(values.dtype) for end in ends)
    outside = (values < low) | (values > high)
    if outside.any():
        raise ValueError(
            f"{name} holds {values[outside][0]}, outside clip = {clip}: give both in the same "
            "units (an image in 0..255: divide it by 255), or a clip that holds the input."
        )


def is_concrete(value: Any) -> bool:
    """Says whether the numbers of `value` are known now: it is no tracer.

    Args:
        value: an array or a number.

    Returns:
        A bool.

    Example:
        >>> is_concrete(1.0), jax.eval_shape(lambda x: x * is_concrete(x), 1.0).shape
        (True, ())
    """
    return not isinstance(value, Tracer)


def check_set(region: Set, where: str = "a set") -> None:
    """Checks a set at a public edge: structure and dtype always, values where they are known.

    Args:
        region: the set.
        where: how the error calls it.

    Raises:
        TypeError: fields that are not floating-point.
        ValueError: shapes or dtypes that differ, lower > upper, NaN or infinite values, a bad
            radius or p. What is traced passes: see `bnncert._emptiness`.

    Example:
        >>> check_set(Box(jnp.ones(2), jnp.zeros(2)))
        Traceback (most recent call last):
        ValueError: a set: Box with lower > upper at (0,): 1.0 > 0.0; ...
    """
    for name, value in vars(region).items():
        if name != "p" and not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(
                f"{where}: {type(region).__name__}.{name} has dtype {jnp.result_type(value)}; "
                "a set needs floating-point values (an image of integers: scale it, x / 255)."
            )
    if isinstance(region, LpBall):
        if region.p not in (1, 2):
            raise ValueError(
                f"{where}: LpBall with p = {region.p}; choose 1 or 2, or a Box for inf."
            )
        if jnp.shape(region.eps) != ():
            raise ValueError(
                f"{where}: LpBall.eps has shape {jnp.shape(region.eps)}; it is one radius for one "
                "example: use jax.vmap for a batch."
            )
        check_radius(region.eps, f"{where}: LpBall.eps")
        if is_concrete(region.center) and not np.isfinite(np.asarray(region.center)).all():
            raise ValueError(f"{where}: LpBall.center holds NaN or infinite values.")
        return
    if jnp.shape(region.lower) != jnp.shape(region.upper):
        raise ValueError(
            f"{where}: Box.lower has shape {jnp.shape(region.lower)} but Box.upper "
            f"{jnp.shape(region.upper)}; give both the shape of the input."
        )
    kinds = [jnp.result_type(v) for v in vars(region).values() if not isinstance(v, float)]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"{where}: Box.lower has dtype {kinds[0]} but Box.upper {kinds[1]}; give both one "
            "dtype, that of the network's inputs."
        )
    ends = [np.asarray(end) for end in (region.lower, region.upper) if is_concrete(end)]
    if not all(np.isfinite(end).all() for end in ends):
        raise ValueError(f"{where}: a Box with NaN or infinite sides; give finite ones.")
    if len(ends) == 2:
        lower, upper = ends
        if (lower > upper).any():
            i = tuple(int(k) for k in np.argwhere(lower > upper)[0])
            raise ValueError(
                f"{where}: Box with lower > upper at {i}: {lower[i]} > {upper[i]}; swap them, or "
                "use bnncert.ball(x, eps)."
            )


def dual_norm(a: Array, p: int) -> Array:
    """Computes the dual of the Lp norm: the largest magnitude for p = 1, the L2 norm for p = 2.

    Args:
        a: any shape; the norm is over all of it.
        p: 1 or 2, of the ball.

    Returns:
        A scalar, with neither overflow nor underflow on the way.

    Example:
        >>> a = jnp.array([3.0, -4.0])
        >>> dual_norm(a, 1).item(), dual_norm(a, 2).item()
        (4.0, 5.0)
    """
    if p == 1:
        return jnp.max(jnp.abs(a), initial=0.0)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(a), initial=0.0))
    usual = (largest > 0) & (largest < jnp.inf)
    scale = jnp.where(usual, largest, 1)  # squares of it neither underflow nor overflow
    square = jnp.sum((a / scale) ** 2)
    return jnp.where(usual, scale * jnp.sqrt(jnp.where(usual, square, 1.0)), largest)


def is_subnormal(value: Array) -> Array:
    """Says which numbers are subnormal, by their bits: compared as numbers, they are equal to 0.

    Args:
        value: floating-point numbers, any shape.

    Returns:
        Booleans of that shape.

    Example:
        >>> is_subnormal(jnp.array([1e-40, 1e-30, 0.0])).tolist()
        [True, False, False]
    """
    info = jnp.finfo(value.dtype)
    magnitude = bits_of(value) & (2 ** (info.bits - 1) - 1)
    return (magnitude > 0) & (magnitude < 2**info.nmant)


def bits_of(value: Array) -> Array:
    """Reads the bits of floating-point numbers as unsigned integers.

    Args:
        value: any shape.

    Returns:
        Integers of that shape and as many bits.

    Example:
        >>> hex(bits_of(jnp.float32(1.0)).item())
        '0x3f800000'
    """
    kind = jnp.dtype(f"uint{jnp.finfo(value.dtype).bits}")
    return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(value), kind)


def _reach(eps: Any, dtype: Any) -> Array:
    """Casts a radius to the dtype of its center: not to 0 unless it is 0."""
    tiny = jnp.finfo(dtype).tiny
    if is_concrete(eps):
        known = np.asarray(eps)
        return jnp.asarray(np.where((known > 0) & (known < float(tiny)), tiny, known), dtype)
    eps = jnp.asarray(eps, jnp.result_type(eps, dtype))
    lost = ((eps > 0) & (eps < tiny)) | is_subnormal(eps)
    return jnp.where(lost, tiny, eps).astype(dtype)
