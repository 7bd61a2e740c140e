"""Relaxations of nonlinearities: affine functions that enclose them on a box.

    lines        two lines around an elementwise function of one value; functions with kinks
    curves       the lines of a curve, from its values, its slopes and where it is convex
    smooth       curves by name
    hinges       elu and selu: a curve with a concave kink
    powers       exponentials, logarithms and powers: with overflow, or a singular end
    waves        sin and cos
    planes       what every relaxation becomes: two affine functions of a node's operands
    products     of two bounded values
    reductions   of an axis

The elementwise ones by operation: `LINES[op](l, u, *constants, choice=...) -> Lines`.
"""

from collections.abc import Callable, Mapping

from jaxtyping import Array, ArrayLike

from bnncert.bounds.graph import Node
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.relaxations import curves, hinges, powers, waves
from bnncert.bounds.relaxations.lines import (
    DEFAULT,
    LOWER_SLOPES,
    Choice,
    Lines,
    absolute,
    check_lower_slope,
    clip,
    constant,
    hard_tanh,
    leaky_relu,
    maximum,
    minimum,
    relu,
    with_finite_gradients,
)
from bnncert.bounds.relaxations.planes import Planes, from_lines
from bnncert.bounds.relaxations.powers import POWERS
from bnncert.bounds.relaxations.smooth import CURVES

__all__ = [
    "FREE",
    "KINKS",
    "LINES",
    "LOWER_SLOPES",
    "PARAMETERS",
    "TWO_VARIANTS",
    "Choice",
    "Lines",
    "Planes",
    "check_lower_slope",
    "constant",
    "from_lines",
    "has_lines",
    "initial_choice",
    "relu",
    "with_finite_gradients",
]

KINKS: Mapping[str, Callable[..., Lines]] = {
    "max": maximum,
    "min": minimum,
    "leaky_relu": leaky_relu,
    "abs": absolute,
    "clip": clip,
    "hard_tanh": hard_tanh,
}
"""The piecewise linear ones."""
_WAVES: Mapping[str, Callable[..., Lines]] = {"sin": waves.sin, "cos": waves.cos}


def _curved(build: Callable[..., curves.Curve]) -> Callable[..., Lines]:
    def rule(l: Array, u: Array, *constants: ArrayLike, choice: Choice = DEFAULT) -> Lines:
        return powers.finite(curves.lines(build(*constants), l, u, choice))

    return rule


def _finite(rule: Callable[..., Lines]) -> Callable[..., Lines]:
    def finite(l: Array, u: Array, *constants: ArrayLike, choice: Choice = DEFAULT) -> Lines:
        return powers.finite(rule(l, u, *constants, choice=choice))

    return finite


LINES: Mapping[str, Callable[..., Lines]] = {
    **KINKS,
    **{op: _curved(build) for op, build in CURVES.items()},
    **{op: _finite(rule) for op, rule in {**hinges.HINGES, **POWERS, **_WAVES}.items()},
}
"""The lines of an elementwise operation: `rule(l, u, *constants, choice=...)`."""

FREE = frozenset(LINES)
"""Operations whose lines depend on the fractions of a `Choice`."""

_HUMPED = ("gelu", "gelu_tanh", "silu", "mish", "hard_silu")

TWO_VARIANTS = frozenset((*_HUMPED, *_WAVES, "integer_pow", "clip"))
"""Operations of whose two default lines neither is nearly always the better."""

PARAMETERS: Mapping[str, tuple[str, ...]] = {"integer_pow": ("y",)}
"""Parameters of an operation that its rule takes after the constants."""


def has_lines(node: Node) -> bool:
    """Whether a node is a function of one value, with lines; 2 ** x is no power of x."""
    return node.op in LINES and len(node.refs) == 1 and isinstance(node.operands[0], Ref)


def initial_choice(op: str, l: Array, u: Array, *constants: ArrayLike) -> Choice:
    """Fractions that give the default lines, or nearly: where an optimisation may start."""
    if op in KINKS:
        return _initial_kink(op, l, u, *constants)
    if op in hinges.HINGES:
        return hinges.fractions(op, l, u, *constants)
    if op in CURVES:
        return curves.fractions(CURVES[op](*constants), l, u)
    if op in _WAVES:
        return waves.fractions(op, l, u)
    return powers.fractions(op, l, u, *constants)


def _initial_kink(op: str, l: Array, u: Array, *constants: ArrayLike) -> Choice:
    """Each default is 0 or 1: the steeper where the middle lies on the steep side of the kink."""
    middle = 0.5 * (l + u)
    if op in ("clip", "hard_tanh"):
        low, high = constants or (-1.0, 1.0)
        return Choice((middle > low).astype(l.dtype), (middle < high).astype(l.dtype))
    kink = constants[0] if op in ("max", "min") else 0.0
    steep = (middle < kink if op == "min" else middle > kink).astype(l.dtype)
    return Choice(steep, steep)
