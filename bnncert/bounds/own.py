"""An operation of your own: a function of one value, and what you promise of its shape.

    climb = bnncert.operation(lambda x: x + jnp.sin(x), increasing=True)
    network = lambda x: W2 @ climb.function(W1 @ x)
    bnncert.bound(network, "crown", operations=[climb])(box)

It is recognised where the network calls the function, by its equations and not by its name; nothing
is registered, and nothing else changes. From the promise alone follows what bounds need:

    increasing                  h([l, u]) = [h(l), h(u)]
    convex on [start, end],     two lines: tangents where it is convex, chords where it is concave
    concave on either side      (`ops.curves`); its interval lies between these and its ends

A promise that does not hold makes bounds that do not hold: `bnncert.testing.check_operation` tries
both on thousands of intervals, as the library's own operations are tried.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Node
from bnncert.bounds.ops import SUPPORTED, Operation, curves
from bnncert.bounds.ops.curves import Curve
from bnncert.bounds.ops.elementwise import elementwise, increasing
from bnncert.bounds.ops.operation import IntervalRule, Rounding
from bnncert.sets import Box

_BISECTIONS = 30


def operation(
    function: Callable[[Array], Array],
    *,
    increasing: bool = False,
    convex: tuple[float, float] | None = None,
    slope: Callable[[Array], Array] | None = None,
    rounding: tuple[float, float] | None = None,
    name: str = "",
) -> Operation:
    """An operation of your own, for `bnncert.bound(f, operations=[...])`.

    Args:
        function: elementwise, of one array of any shape and dtype. Numbers may be part of it,
            arrays may not.
        increasing: a promise: x <= y implies h(x) <= h(y). With this alone, h is enclosed by its
            interval.
        convex: a promise: the interval (start, end) on which h is convex; on either side it is
            concave. (-inf, inf): a convex function; (inf, -inf): a concave one; one end at least is
            infinite.
        slope: the derivative, with its digits kept where it is small; None: by `jax.jvp`. Where h
            has a kink, any slope between those on its sides.
        rounding: of an increasing function, R and A of |fl h(x) - h(x)| <= (R |h(x)| + A) u: by
            `rounding="outward"` its interval then encloses it. None: not known, and refused there.
        name: in errors; empty: the function's own.

    Returns:
        The operation. It costs what `bnncert.bound` costs for a function of its kind.

    Raises:
        ValueError: no promise; an interval with two finite ends; a name that the library has;
            errors of a function that is not increasing.
        TypeError: no function.

    Source: the lines are those of Zhang et al., "Efficient Neural Network Robustness Certification
    with General Activation Functions", NeurIPS 2018, section 3.2.

    Example:
        >>> import bnncert
        >>> climb = bnncert.operation(lambda x: x + jnp.sin(x), increasing=True)
        >>> box = Box(jnp.zeros(1), jnp.full(1, 6.0))
        >>> for operations in ([], [climb]):
        ...     found = bnncert.bound(climb.function, "ibp", operations=operations)(box)
        ...     print(f"{float(found.lower[0]):.2f} {float(found.upper[0]):.2f}")
        -1.00 7.00
        0.00 5.72
    """
    if not callable(function):
        raise TypeError(f"function = {function!r}: give a function of one array.")
    own = getattr(function, "__name__", "")
    name = name or (own if own.isidentifier() else "operation")
    _check(name, increasing, convex, rounding)
    curve = None if convex is None else partial(_curve, function, slope, convex)
    errors = None if rounding is None else Rounding(*rounding, planes="interval")
    return elementwise(
        name,
        errors,
        interval=_increasing if increasing else _between_lines(curve),
        increases=increasing,
        curve=curve,
        function=function,
    )


def _check(
    name: str,
    increasing: bool,
    convex: tuple[float, float] | None,
    rounding: tuple[float, float] | None,
) -> None:
    if name in SUPPORTED:
        raise ValueError(
            f"name = {name!r} is an operation of bnncert's own: give this one another name."
        )
    if not increasing and convex is None:
        raise ValueError(
            f"nothing is promised of '{name}', and nothing follows: give increasing=True, or "
            "convex=(start, end), where it is convex."
        )
    if convex is not None and not (math.isinf(convex[0]) or math.isinf(convex[1])):
        raise ValueError(
            f"convex = {convex}: beyond both ends '{name}' would be concave, and a chord over all "
            "of it no bound. One end at least has to be infinite."
        )
    if rounding is not None and not increasing:
        raise ValueError(
            f"rounding = {rounding} of '{name}': with increasing=True alone it is known what its "
            'interval is off by. Bound it with rounding="nearest".'
        )


_increasing = increasing


def _curve(
    function: Callable[[Array], Array],
    slope: Callable[[Array], Array] | None,
    convex: tuple[float, float],
) -> Curve:
    def derivative(x: Array) -> Array:
        return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    return Curve(function, slope or derivative, *convex)


def _between_lines(curve: Callable[[], Curve] | None) -> IntervalRule:
    """The interval of a curve, from the lines that touch it where it is least and greatest."""

    def rule(node: Node, box: Box) -> Box:
        assert curve is not None
        own = curve()
        lower = _least(own, box.lower, box.upper)
        upper = -_least(curves.negative(own, box.lower, box.upper), box.lower, box.upper)
        return Box(lower, upper)

    return rule


def _least(curve: Curve, l: Array, u: Array) -> Array:
    """At most the least value of a curve on [l, u].

    That of the flattest tangent below it, found by bisection on the slope, which grows from the
    first to the last of them; any would do. Where there is none, that of the chord.
    """
    first, last, _, _ = curves.tangents(curve, l, u, 0)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        falls, rises = ends
        middle = 0.5 * (falls + rises)
        falling = curve.slope(middle) < 0
        return jnp.where(falling, middle, falls), jnp.where(falling, rises, middle)

    at = jax.lax.fori_loop(0, _BISECTIONS, halve, (first, last))[0]
    wide = last > first
    share = jnp.where(wide, (at - first) / jnp.where(wide, last - first, 1), 0.5)
    slope, offset = curves.below(curve, l, u, jax.lax.stop_gradient(share), 0)
    lost = 16 * float(jnp.finfo(l.dtype).eps)
    ends = (slope * end + offset - lost * jnp.abs(slope * end) for end in (l, u))
    return jnp.minimum(*ends) - lost * jnp.abs(offset)
