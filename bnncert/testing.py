"""Whether what is known of an operation is true, tried on thousands of intervals.

The library's own operations are tried by the same function. It can find a fault, and prove nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert.bounds.graph import Node, Ref
from bnncert.bounds.ops import Choice, Operation
from bnncert.bounds.ops.elementwise import enclosing_lines
from bnncert.sets import Box

_POINTS = 33


def check_operation(
    operation: Operation,
    lowest: float = -1e4,
    highest: float = 1e4,
    *,
    function: Callable[..., Array] | None = None,
    constants: Sequence[Any] = (),
    params: dict[str, Any] | None = None,
    dtype: Any = jnp.float32,
    count: int = 5_000,
    seed: int = 0,
) -> None:
    """Tries an operation of one value: its interval and its lines enclose it on every box.

    Ordinary intervals and narrow ones, huge and tiny ones, points, and such as begin or end at 0;
    all default lines, and those of the fractions 0, 0.3 and 1. Also: at a point the interval is the
    value, and gradients are finite.

    Args:
        operation: yours (`bnncert.operation`), or one of the library's.
        lowest: where the function is defined and representable: from here,
        highest: to here.
        function: `(x, *constants) -> values`; None: the operation's own.
        constants: of the function.
        params: what its rules must know besides.
        dtype: float32; or float64, where JAX is told to compute in it.
        count: intervals.
        seed: of the random numbers.

    Raises:
        AssertionError: it names an interval, a point in it, and what does not hold there.
        ValueError: an operation of several values; an empty range.

    Cost: seconds, most of them compiling.

    Example:
        >>> import bnncert
        >>> check_operation(bnncert.operation(lambda x: x + jnp.sin(x), increasing=True), -9.0, 9.0)
        >>> wrong = bnncert.operation(lambda x: jnp.sin(x) + 1, increasing=True, name="wave")
        >>> check_operation(wrong, -9.0, 9.0)
        Traceback (most recent call last):
        AssertionError: wave on [...]: its value at ... is ..., outside of its interval [...]...
    """
    f = operation.function if function is None else function
    if operation.family != "elementwise" or f is None:
        raise ValueError(f"operation = {operation.name!r}: only functions of one value are tried.")
    if not lowest < highest:
        raise ValueError(f"the range [{lowest}, {highest}] is empty.")
    l, u = _intervals(lowest, highest, dtype, count, seed)
    operands = (Ref(0), *(c if isinstance(c, int) else jnp.asarray(c, dtype) for c in constants))
    node = Node(operation.name, operands, f, params or {}, l.shape, l.dtype, "", (), 1, operation)
    x = jnp.clip(l + jnp.linspace(0, 1, _POINTS, dtype=dtype)[:, None] * (u - l), l, u)
    values = _exact(f, x, operands[1:])
    box = jax.jit(lambda l, u: operation.interval(node, Box(l, u)))(l, u)
    eps = float(jnp.finfo(dtype).eps)
    slack = 64 * eps * (1 + np.abs(values))

    def fail(outside: np.ndarray, what: str, *ends: np.ndarray) -> None:
        if outside.any():
            point, place = np.argwhere(outside)[0]
            low, high = (np.broadcast_to(end, values.shape)[point, place] for end in ends)
            raise AssertionError(
                f"{operation.name} on [{l[place]}, {u[place]}]: its value at {x[point, place]} is "
                f"{values[point, place]}, {what} [{low}, {high}]"
            )

    lower, upper = (np.asarray(end, np.float64) for end in (box.lower, box.upper))
    fail(
        (values < lower - slack) | (values > upper + slack), "outside of its interval", lower, upper
    )
    point = np.asarray(l == u)
    wide = (values - lower > slack) | (upper - values > slack)
    fail(wide & point, "a point, and its interval is not", lower, upper)
    for choice in _choices(operation, l):
        lines = jax.jit(lambda l, u, c=choice: enclosing_lines(operation, node, Box(l, u), c))(l, u)
        a, b, c, d = (np.asarray(field, np.float64) for field in lines)
        at = np.asarray(x, np.float64)
        size = np.maximum(np.abs(l), np.abs(u)) * np.maximum(np.abs(a), np.abs(c))
        room = slack + 64 * eps * (size + np.where(np.isfinite(b), np.abs(b), 0))
        below, above = a * at + b, c * at + d
        fail(
            (values < below - room) | (values > above + room), "outside of its lines", below, above
        )
    _check_gradients(operation, node, l, u)


def _choices(operation: Operation, l: Array) -> list[Choice]:
    if operation.lines is None:
        return []
    spread = (jnp.full_like(l, t) for t in (0.0, 0.3, 1.0))
    return [
        *(Choice(variant=v) for v in range(operation.variants)),
        *(Choice(t, t) for t in spread),
    ]


def _check_gradients(operation: Operation, node: Node, l: Array, u: Array) -> None:
    def total(ends: tuple[Array, Array]) -> Array:
        box = operation.interval(node, Box(*ends))
        parts = [box.lower, box.upper]
        if operation.lines is not None:
            parts += enclosing_lines(operation, node, Box(*ends), Choice())
        return sum((jnp.where(jnp.isfinite(p), p, 0).sum() for p in parts), jnp.zeros(()))

    constants = node.operands[1:]
    slope = jax.jit(jax.grad(lambda x: jnp.sum(node.evaluate(x, *constants))))
    # At a singular end there is none.
    usual = np.isfinite(slope(l)) & np.isfinite(slope(u))
    gradients = jax.jit(jax.grad(total))((l, u))
    for gradient in gradients:
        bad = ~np.isfinite(np.asarray(gradient)) & usual
        if bad.any():
            place = int(np.argmax(bad))
            raise AssertionError(
                f"{operation.name} on [{l[place]}, {u[place]}]: the derivative of its bounds by an "
                f"end of the interval is {gradient[place]}"
            )


def _exact(f: Callable[..., Array], x: Array, constants: Sequence[Any]) -> np.ndarray:
    """Evaluates a function, in float64 where JAX may."""
    wider = jnp.asarray(x, float)
    return np.asarray(jax.jit(lambda x: f(x, *constants))(wider), np.float64)


def _intervals(
    lowest: float, highest: float, dtype: Any, count: int, seed: int
) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    scale = rng.choice([1e-6, 1e-3, 0.3, 3.0, 30.0, max(-lowest, highest)], count)
    l = rng.uniform(-1, 1, count) * scale
    u = rng.uniform(-1, 1, count) * rng.permutation(scale)
    fifth = count // 5
    u[:fifth] = l[:fifth]
    u[fifth : 2 * fifth] = l[fifth : 2 * fifth] + rng.choice([1e-9, 1e-7, 1e-5], fifth)
    l[2 * fifth : 2 * fifth + 100] = 0
    u[2 * fifth + 50 : 2 * fifth + 150] = 0
    if lowest >= 0 or highest <= 0:
        sign = np.sign(highest + lowest)
        l, u = np.abs(l) * sign, np.abs(u) * sign
    l, u = np.clip(l, lowest, highest), np.clip(u, lowest, highest)
    return jnp.asarray(np.minimum(l, u), dtype), jnp.asarray(np.maximum(l, u), dtype)
