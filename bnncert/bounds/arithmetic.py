"""The arithmetic that bounds hold in: an object of a few verbs, which both kinds answer.

    Real()                       of the function itself, whatever is lost in computing its bounds
    Float(unit_roundoff=None)    of what a network computes, by the model of `rounding.model`

| verb     | what it says                                                    |
|----------|-----------------------------------------------------------------|
| tracking | what a trace is to know of constants                            |
| interval | the box of a node from those of its operands                    |
| region   | a set, so wide that a last product over it cuts off nothing     |
| errors   | what rows are to allow for at affine nodes                      |
| planes   | planes of a relaxed node, that enclose what is computed of it   |
| allow    | anything else that only rounding asks for                       |

In real arithmetic each of them leaves things as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from jaxtyping import Array

from bnncert.bounds import rounding
from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops.planes import Planes
from bnncert.bounds.rounding import Errors, Precision
from bnncert.bounds.tracing import Tracking
from bnncert.sets import Box, Set

Value = TypeVar("Value")


@dataclass(frozen=True)
class Real:
    """Real arithmetic: `rounding="nearest"`.

    Bounds of the function itself, computed in the dtype of the sets: their own rounding may cut
    them, by some 1e-6 of the values in float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnncert import bound
        >>> box = bound(lambda x: 3 * x, "ibp", rounding=Real())(Box(jnp.ones(1), jnp.ones(1)))
        >>> box.lower.tolist(), box.upper.tolist()
        ([3.0], [3.0])
    """

    def tracking(self) -> Tracking | None:
        """Constants are exact."""
        return None

    def interval(self, graph: Graph, node: Node, operands: Sequence[Box]) -> Box:
        """The node's interval rule."""
        return node.operation.interval(node, *operands)

    def region(self, graph: Graph, region: Set) -> Set:
        """The set itself."""
        return region

    def errors(self, graph: Graph, boxes: Sequence[Box], known: Errors) -> Errors:
        """None."""
        return known

    def planes(
        self,
        graph: Graph,
        index: int,
        planes: Planes,
        boxes: Sequence[Box],
        carried: Mapping[int, Array],
        free: bool,
    ) -> Planes:
        """The planes themselves."""
        return planes

    def allow(self, value: Value, charge: Callable[[Value, Precision], Value]) -> Value:
        """The value itself."""
        return value


@dataclass(frozen=True)
class Float:
    """Floating-point arithmetic: `rounding="outward"`.

    Bounds of what the network computes, and of the function in real arithmetic, by the model of
    `bnncert.bounds.rounding.model`.

    Attributes:
        unit_roundoff: of the network's operations, where they are less exact than the dtype of the
            bounds (TF32 products: 2**-11; bfloat16: 2**-8); None: of the dtype of each value.

    Raises:
        ValueError: a unit roundoff that is not in (0, 1/2).

    Example:
        >>> import jax.numpy as jnp
        >>> from bnncert import bound
        >>> at_one = Box(jnp.ones(1), jnp.ones(1))
        >>> box = bound(lambda x: 3 * x, "ibp", rounding=Float(2**-11))(at_one)
        >>> bool(box.lower[0] < 3 * (1 - 2**-11)), bool(box.upper[0] > 3 * (1 + 2**-11))
        (True, True)
    """

    unit_roundoff: float | None = None

    def __post_init__(self) -> None:
        if self.unit_roundoff is not None and not 0 < self.unit_roundoff < 0.5:
            raise ValueError(
                f"unit_roundoff = {self.unit_roundoff}: give a number in (0, 0.5), e.g. 2**-24."
            )

    @property
    def precision(self) -> Precision:
        """How exactly the network computes."""
        return Precision(self.unit_roundoff)

    def tracking(self) -> Tracking | None:
        """What a network computes of its constants is bounded as well."""
        return rounding.tracking(self.precision)

    def interval(self, graph: Graph, node: Node, operands: Sequence[Box]) -> Box:
        """The interval of what the node computes.

        Raises:
            UnsupportedPrimitiveError: no rule for this operation, or nothing known of its rounding.
        """
        return rounding.outward_interval(graph, node, operands, self.precision)

    def region(self, graph: Graph, region: Set) -> Set:
        """A set of which the last product of a row cannot cut off anything."""
        return rounding.outward_set(graph, region)

    def errors(self, graph: Graph, boxes: Sequence[Box], known: Errors) -> Errors:
        """What affine nodes are off by, for all that have boxes."""
        return rounding.affine_errors(graph, boxes, self.precision, known)

    def planes(
        self,
        graph: Graph,
        index: int,
        planes: Planes,
        boxes: Sequence[Box],
        carried: Mapping[int, Array],
        free: bool,
    ) -> Planes:
        """Planes that enclose what the node computes, errors carried to it included."""
        return rounding.outward_planes(graph, index, planes, boxes, carried, self.precision, free)

    def allow(self, value: Value, charge: Callable[[Value, Precision], Value]) -> Value:
        """The value, with what rounding asks for."""
        return charge(value, self.precision)


Arithmetic: TypeAlias = Real | Float
Rounding: TypeAlias = str | Arithmetic
"""An arithmetic, or its short form: one of `ROUNDINGS`."""

ROUNDINGS: Mapping[str, type[Arithmetic]] = {"nearest": Real, "outward": Float}
"""The short forms: what bounds allow for rounding."""


def arithmetic_of(rounding: object) -> Arithmetic:
    """The arithmetic that a name is short for.

    Raises:
        ValueError: an unknown rounding.
        TypeError: neither a name nor an arithmetic.
    """
    if isinstance(rounding, (Real, Float)):
        return rounding
    if isinstance(rounding, str) and rounding in ROUNDINGS:
        return ROUNDINGS[rounding]()
    kind = ValueError if isinstance(rounding, str) else TypeError
    raise kind(
        f"rounding = {rounding!r}: choose 'nearest' (bnncert.Real()) or 'outward' "
        "(bnncert.Float(unit_roundoff=None))."
    )
