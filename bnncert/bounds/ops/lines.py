"""Two lines around a function of one value, and which of the valid ones.

    lower_slope x + lower_offset  <=  h(x)  <=  upper_slope x + upper_offset      on [l, u]

Elementwise: any shape. How the lines of a function are found is in `piecewise`, `curves`, `powers`,
`waves` and `hinges`; which of them is a `Choice`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOWER_SLOPES = ("adaptive", "zero", "one", "chord")
"""Of the line below a ReLU that crosses 0: 0 or 1, what leaves less area; 0; 1; the chord's."""


def check_lower_slope(lower_slope: str) -> None:
    """Raises ValueError unless it is one of `LOWER_SLOPES`."""
    if lower_slope not in LOWER_SLOPES:
        ways = ", ".join(map(repr, LOWER_SLOPES))
        raise ValueError(f"lower_slope = {lower_slope!r}: choose one of {ways}.")


class Lines(NamedTuple):
    """lower(x) <= h(x) <= upper(x) on [l, u]; every field has the shape of l."""

    lower_slope: Float[Array, "*shape"]
    lower_offset: Float[Array, "*shape"]
    upper_slope: Float[Array, "*shape"]
    upper_offset: Float[Array, "*shape"]


class Choice(NamedTuple):
    """Which of the valid lines.

    Attributes:
        lower: of the free line below, in [0, 1] and of the shape of l; None: the default.
        upper: of the free line above, likewise.
        variant: 0 or 1, an array where lines are mapped over both: of two defaults that are both
            good, neither always the tighter.
        lower_slope: the default of a kink that is crossed: "adaptive" (0 or 1, whichever leaves the
            smaller area), "zero", "one", or "chord" (parallel to the line above).
    """

    lower: Array | None = None
    upper: Array | None = None
    variant: int | Array = 0
    lower_slope: str = "adaptive"


DEFAULT = Choice()


def by_variant(variant: int | Array, first: Array, second: Array) -> Array:
    """The first of two values, or the second for variant 1."""
    if isinstance(variant, int):
        return second if variant else first
    return jnp.where(variant == 1, second, first)


def with_finite_gradients(l: Array, u: Array) -> tuple[Array, Array]:
    """The ends of an interval, as constants where they are so close that quotients overflow.

    The derivative of a quotient has the square of its divisor below: of an interval narrower than
    the root of the smallest normal number it is infinite, or NaN, and says nothing of the lines.
    """
    narrow = u - l < math.sqrt(jnp.finfo(l.dtype).tiny)
    fixed_l, fixed_u = jax.lax.stop_gradient((l, u))
    return jnp.where(narrow, fixed_l, l), jnp.where(narrow, fixed_u, u)


def constant(lower: Array, upper: Array) -> Lines:
    """The lines of slope 0: an interval of values, for a function with no better relaxation."""
    zero = jnp.zeros_like(lower)
    return Lines(zero, lower, zero, upper)


def negated(lines: Lines) -> Lines:
    """The lines of -h, from those of h."""
    lower_slope, lower_offset, upper_slope, upper_offset = lines
    return Lines(-upper_slope, -upper_offset, -lower_slope, -lower_offset)


def mirrored(lines: Lines) -> Lines:
    """The lines of h(-x) on [l, u], from those of h on [-u, -l]."""
    lower_slope, lower_offset, upper_slope, upper_offset = lines
    return Lines(-lower_slope, lower_offset, -upper_slope, upper_offset)


def swapped(choice: Choice) -> Choice:
    """The choice for -h."""
    return choice._replace(lower=choice.upper, upper=choice.lower)


def limited(lines: Lines, below: Array, above: Array) -> Lines:
    """The lines where they are known to enclose; elsewhere no bound."""
    return Lines(
        jnp.where(below, lines.lower_slope, 0),
        jnp.where(below, lines.lower_offset, -jnp.inf),
        jnp.where(above, lines.upper_slope, 0),
        jnp.where(above, lines.upper_offset, jnp.inf),
    )


def finite(lines: Lines) -> Lines:
    """No bound where a line is not finite."""
    below = jnp.isfinite(lines.lower_slope) & ~jnp.isnan(lines.lower_offset)
    above = jnp.isfinite(lines.upper_slope) & ~jnp.isnan(lines.upper_offset)
    return limited(lines, below, above)
