"""Intervals at the ends of a format's range: where an operation under- or overflows.

Subnormal numbers may be taken for 0, on the way into a function and out of it:

    an end of an operand that is subnormal    moved outward, to 0 or to the smallest normal number t
    a value that may have been flushed        moved outward by a few t, on the side that its sign
                                              leaves open: what is flushed to 0 keeps its sign
    other values below a few t / eps          moved outward by as much, whatever their sign

so that 1 / x on [1e38, 2e38] is [0, 4 t] in float32, and not [0, 0]. Where the function overflows
at a finite end there is no bound on that side, and none below: [-inf, inf] and not [inf, inf].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.ops.boxes import sides, stacked, unstacked
from bnncert.sets import Box


def least(dtype: jnp.dtype) -> float:
    """What an underflow is off by: float16's subnormal numbers are not taken for 0.

    They are normal ones of float32, in which float16 is computed.
    """
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal if dtype == jnp.float16 else info.tiny)


def magnitude(box: Box) -> Array:
    """The largest magnitude in a box, elementwise."""
    return jnp.maximum(jnp.abs(box.lower), jnp.abs(box.upper))


def off_subnormal(box: Box) -> Box:
    """Ends that are subnormal, and may be read as 0, moved outward to numbers that are not."""
    tiny = float(jnp.finfo(box.lower.dtype).tiny)
    if least(box.lower.dtype) < tiny:
        return box
    ends = stacked(box)
    moved = jnp.where(jnp.signbit(ends), sides(-tiny, -0.0, like=ends), sides(0.0, tiny, like=ends))
    return unstacked(jnp.where(_subnormal(ends), moved, ends))


def off_underflow(box: Box, humped: bool) -> Box:
    """A function's values, those moved outward that may have lost all of what they are."""
    ends = stacked(box)
    lost = _lost(humped, ends.dtype)
    # Of values below `near` a difference may be subnormal, and flushed as well.
    near = lost if ends.dtype == jnp.float16 else lost / float(jnp.finfo(ends.dtype).eps)
    size = jnp.abs(ends)
    outward = jnp.signbit(ends) ^ (sides(0.0, 1.0, like=ends) > 0)
    moved = (size < near) & (outward | (size >= lost))
    # A sum: a selection would cut off the gradient at 0.
    return unstacked(ends + jnp.where(moved, sides(-lost, lost, like=ends), 0))


def off_overflow(box: Box, *operands: Box) -> Box:
    """No bound at a NaN, and none above -inf or below inf that finite operands give."""
    finite = jnp.ones((), bool)
    for operand in operands:
        finite &= jnp.isfinite(operand.lower) & jnp.isfinite(operand.upper)
    ends, none = stacked(box), sides(-jnp.inf, jnp.inf, like=box.lower[None])
    lost = jnp.isnan(ends) | (finite & (ends == -none))
    return unstacked(jnp.where(lost, none, ends))


def _lost(humped: bool, dtype: jnp.dtype) -> float:
    """What a function may be off by where it, or what it divides by, leaves the range.

    Humped ones are x times a factor that vanishes from |x| = 100 on; in float16, from 12 on. Half
    of the width is to be normal where subnormal numbers are not.
    """
    narrow = dtype == jnp.float16
    factor = (4.0 if humped else 1.0) if narrow else (128.0 if humped else 4.0)
    return factor * float(jnp.finfo(dtype).tiny)


def _subnormal(v: Array) -> Array:
    """By their bits: a comparison may take them for 0."""
    info = jnp.finfo(v.dtype)
    integer = {16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[info.bits]
    bits = jax.lax.bitcast_convert_type(v, integer) << 1  # without the sign
    return (bits != 0) & (bits < integer(2 << info.nmant))
