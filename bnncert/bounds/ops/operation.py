"""An operation, and all that bounds know of it: one record in one place.

| field      | what it says                                                                |
|------------|-----------------------------------------------------------------------------|
| interval   | the box of a value from the boxes of its bounded operands                   |
| affine     | where it is affine in what is bounded: how it spreads values                |
| lines      | of a function of one value: two lines that enclose it                       |
| relaxation | where it is not affine: two planes that enclose it                          |
| roundings  | of sums and products: how often a term is rounded                           |
| rounding   | of all others: by how much what is computed is off                          |
| function   | what it is recognised as where it is no primitive of its own                |

One name may have several records: a product is affine where one factor is bounded, and relaxed
where both are. The first that `applies` to a node is its operation (`ops.operation_of`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from bnncert.bounds.graph import Graph, Node, Ref
from bnncert.bounds.ops.lines import Choice, Lines
from bnncert.bounds.ops.planes import Planes
from bnncert.sets import Box

IntervalRule: TypeAlias = Callable[..., Box]
"""`(node, *boxes of its bounded operands) -> Box`."""

LinesRule: TypeAlias = Callable[..., Lines]
"""`(l, u, *constants, choice=...) -> Lines`."""

Family: TypeAlias = Literal["affine", "elementwise", "pair", "reduction", "product"]
"""What an operation acts on: the rows of the table in `docs/operations.md`."""


class Roundings(NamedTuple):
    """How many roundings a term of an affine operation passes through.

    Attributes:
        forward: on the way to one coordinate of the value; 0: the operation is exact.
        backward: on the way to one coefficient of an operand, in the transpose; 0: it is exact.
    """

    forward: int
    backward: int


class Affine(NamedTuple):
    """How an operation acts where it is affine in its bounded operands.

    Attributes:
        spreads: "places": each coordinate of an operand goes to at most one of the value, alone;
            "repeats": to several; "adds": as "places", operands meeting elementwise;
            "mixes": a coordinate of the value sums many of one operand.
        has_offset: whether constant operands may add a constant (else f(0) = 0).
        scales: whether it has coefficients of its own.
        negates: whether some coefficient may be negative.
    """

    spreads: Literal["places", "repeats", "adds", "mixes"]
    has_offset: bool = False
    scales: bool = False
    negates: bool = False


Curvature: TypeAlias = float | Callable[[Node, Box, bool], ArrayLike]
"""The largest |h''| where a tangent may touch; or `(node, box, free) -> ` that on a box."""


class Rounding(NamedTuple):
    """What an operation that is not affine is off by, in floating point of unit roundoff u.

        |fl h(x) - h(x)|    <=  (R |h(x)| + A + X |x|) u + 2 t
        |fl h'(x) - h'(x)|  <=  (R' |h'(x)| + A') u

    Measured and not proved: `experiments.studies.roundoff` sweeps float32 for these numbers. They
    are about twice what has been seen to be needed, or more.

    Attributes:
        relative: R.
        absolute: A.
        operand: X.
        slope: R' and A' of its slope, as its lines compute it; or `node -> ` these.
        curvature: what a slope changes by where its point does: rounded up.
        errors: `(node, boxes) -> (R, A + X |x|)` in their place, where these are no constants.
        exact: it chooses among values, or rounds them: nothing is lost.
        humped: it is x times a factor that vanishes far out, and so may be 0 for a large x.
        constants: how it depends on its constants: it changes by no more than they do ("moves"), or
            by that times its operand ("scales").
        planes: what its planes are made of: "lines"; "values" and a chord of these; "softplus";
            "products"; terms whose "size" they tell; or nothing that is known to enclose when
            rounded, so that its "interval" has to do.
    """

    relative: float = 16.0
    absolute: float = 0.0
    operand: float = 0.0
    slope: tuple[float, float] | Callable[[Node], tuple[float, float]] = (16.0, 4.0)
    curvature: Curvature = 0.0
    errors: Callable[[Node, Sequence[Box]], tuple[ArrayLike, ArrayLike]] | None = None
    exact: bool = False
    humped: bool = False
    constants: Literal["", "moves", "scales"] = ""
    planes: Literal["lines", "values", "softplus", "products", "sized", "interval"] = "lines"


EXACT = Rounding(0.0, 0.0, slope=(0.0, 0.0), exact=True)
"""Of functions that choose among values, or round them."""


class Relaxation(NamedTuple):
    """The planes that enclose an operation on the boxes of its operands.

    Attributes:
        planes: `(graph, index, boxes, choice) -> Planes`; the boxes are those of its operands, and,
            where it is known, that of its own value.
        start: `(graph, index, boxes) -> Choice`: where an optimisation of the fractions may start;
            None of a node that has but one choice.
        variants: how many defaults it has, none of which is always the better: 1 or 2; or
            `(graph, node) -> ` that.
    """

    planes: Callable[[Graph, int, Sequence[Box], Choice], Planes]
    start: Callable[[Graph, int, Sequence[Box]], Choice | None]
    variants: int | Callable[[Graph, Node], int]


def _interval_planes(graph: Graph, index: int, boxes: Sequence[Box], choice: Choice) -> Planes:
    node = graph.nodes[index]
    values = node.operation.interval(node, *(boxes[i] for i in node.refs))
    return Planes((), lambda: values.lower, lambda: values.upper)


BY_INTERVAL = Relaxation(_interval_planes, lambda *_: None, 1)
"""Two constants: the ends of the interval."""


class Parameter(NamedTuple):
    """The constant of a recognised function: an operand of the call, or a number in its body.

    Attributes:
        primitive: the first equation of the body that holds it.
        default: where there is none: a factor of 1, say, is left out.
        least: a smaller one has no rule.
    """

    primitive: str
    default: float
    least: float = -np.inf


class Operation(NamedTuple):
    """All that bounds know of one operation; `bnncert.bounds.ops.operation` says of what.

    Attributes:
        name: of the primitive, or of the function that is recognised.
        family: what it acts on.
        interval: the box of its value.
        applies: whether the record holds for a node, given which of its operands are bounded;
            None: it does whatever is bounded.
        affine: where it is affine in what is bounded; None: it is relaxed.
        lines: of a function of one value.
        initial: `(l, u, *constants) -> Choice` of fractions that give the default lines, or nearly.
        kinked: whether its lines have closed forms, which lose nothing but to the range.
        variants: how many default lines it has, none of which is always the better.
        parameters: those of the node that its lines take after its constants.
        relaxation: its own, or its interval.
        roundings: `(graph, node) -> Roundings` of a sum or a product, by itself.
        rounding: of what is neither; None: nothing is known.
        function: of one value (and the parameter's), recognised wherever it is traced.
        parameter: of `function`, if it has one.
        increasing: whether its value grows with each operand.
        curve: of a smooth function: `(*constants) -> curves.Curve`, what its lines are made from.
    """

    name: str
    family: Family
    interval: IntervalRule
    applies: Callable[[Node], bool] | None
    affine: Affine | None = None
    lines: LinesRule | None = None
    initial: Callable[..., Choice] | None = None
    kinked: bool = False
    variants: int = 1
    parameters: tuple[str, ...] = ()
    relaxation: Relaxation = BY_INTERVAL
    roundings: Callable[[Graph, Node], Roundings] | None = None
    rounding: Rounding | None = None
    function: Callable[..., Any] | None = None
    parameter: Parameter | None = None
    increasing: bool = False
    curve: Callable[..., Any] | None = None


def one_bounded(node: Node) -> bool:
    """Whether one operand is bounded, once."""
    return len(node.refs) == 1


def of_one_value(node: Node) -> bool:
    """Whether a node is a function of its first operand; 2 ** x is no power of x."""
    return one_bounded(node) and isinstance(node.operands[0], Ref)


def of_two_values(node: Node) -> bool:
    """Whether two operands are bounded, or one twice."""
    return len(node.refs) == 2


def parameter_of(node: Node) -> Array:
    """The constant of a function that has one."""
    constant: Any = node.operands[1]
    return jnp.asarray(constant, node.dtype)
