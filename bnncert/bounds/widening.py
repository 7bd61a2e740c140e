"""Where bounds get wide: the width of every value on the way from the sets to the outputs.

    width of v    upper - lower of its box, elementwise
    growth of v   (largest width of v) / (largest width of what it is computed from)

Bounds that say nothing are seldom wide everywhere: one operation made them so, and all that follow
pass it on. A growth is no fault by itself, as a layer of large weights widens its values too. What
is suspicious is a growth far above that of its neighbours; a product of two bounded values; and a
width that gets small again by CROWN where it does not by IBP, as there intervals forgot that two
values came from one.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from bnncert.bounds.api import DEFAULT_BATCH_SIZE, check_batch_size, traced
from bnncert.bounds.arithmetic import Rounding, arithmetic_of
from bnncert.bounds.graph import Node
from bnncert.bounds.methods import Method, method_of
from bnncert.bounds.ops import Operation
from bnncert.bounds.plan import Options, make_plan
from bnncert.sets import Box, Set, is_concrete

_HEAD = ("", "op", "shape", "of", "largest", "median", "growth", "called at")


class Width(NamedTuple):
    """How wide the box of one value is.

    Attributes:
        op: the operation: a primitive's name, a function's that is recognised, or "input".
        shape: of the value.
        operands: the rows of what it is computed from; empty of a set.
        source: where your code calls it; of a set, its place among the leaves of the arguments.
        largest: the largest width of any coordinate, in units of the value; infinite where one end
            of it is not known.
        median: that of all coordinates.
        growth: `largest` over the largest of any operand; 1 where both are 0 or infinite, and None
            of a set.

    Example:
        >>> Width("relu", (2,), (0,), "model.py:3 (apply)", 0.5, 0.2, 1.0).growth
        1.0
    """

    op: str
    shape: tuple[int, ...]
    operands: tuple[int, ...]
    source: str
    largest: float
    median: float
    growth: float | None


class Widths(NamedTuple):
    """The widths of all values of a function, in the order of execution; `print` shows a table.

    Attributes:
        rows: one for each set, then one for each operation that a set reaches.

    Example:
        >>> print(Widths((Width("input", (2,), (), "argument leaf 0", 0.2, 0.2, None),)))
           op     shape  of  largest  median  growth  called at
        0  input  (2,)           0.2     0.2          argument leaf 0
    """

    rows: tuple[Width, ...]

    def __str__(self) -> str:
        cells = [_HEAD, *(_cells(index, row) for index, row in enumerate(self.rows))]
        columns = list(zip(*cells, strict=True))
        sizes = [max(map(len, column)) for column in columns]
        numbers = (0, 4, 5, 6)
        lines = (
            "  ".join(
                cell.rjust(size) if i in numbers else cell.ljust(size)
                for i, (cell, size) in enumerate(zip(line, sizes, strict=True))
            ).rstrip()
            for line in cells
        )
        return "\n".join(lines)


def widths(
    f: Callable[..., PyTree],
    method: str | Method = "crown-ibp",
    *,
    rounding: Rounding = "nearest",
    operations: Sequence[Operation] = (),
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Callable[..., Widths]:
    """Tells how wide each value of a function gets over sets, operation by operation.

    Args:
        f: as for `bnncert.bound`.
        method: as for `bnncert.bound`. By "ibp" and "crown-ibp" the widths on the way are those of
            intervals, by the others of what their relaxations stand on.
        rounding: as for `bnncert.bound`.
        operations: as for `bnncert.bound`.
        batch_size: as for `bnncert.bound`.

    Returns:
        A function called as `f`, with sets in place of some arrays, for one example and outside of
        `jit` and `vmap`; it returns `Widths`. A run of affine operations that is bounded as one
        may end narrower than it is on the way.

    Raises:
        ValueError: as `bnncert.bound`; when called: under `jit` or `vmap`, where widths are no
            numbers.
        TypeError, UnsupportedPrimitiveError: as `bnncert.bound`.

    Cost: that of `bnncert.bound`, compiled anew in each call.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> f = lambda x: jax.nn.relu(x @ jnp.array([[1.0, 3.0], [-2.0, 3.0]])).sum()
        >>> found = widths(f, "ibp")(Box(jnp.zeros(2), jnp.ones(2)))
        >>> [(row.op, row.largest, row.growth) for row in found.rows]
        [('input', 1.0, None), ('dot_general', 6.0, 6.0), ('max', 6.0, 1.0), ('reduce_sum', 7.0, ...
    """
    check_batch_size(batch_size)
    options = Options(batch_size, arithmetic_of(rounding), operations=tuple(operations))
    chosen = method_of(method)

    @wraps(f)
    def measured(*args: object, **kwargs: object) -> Widths:
        graph = traced(f, args, kwargs, options)

        def boxes_over(inputs: tuple[Set, ...]) -> list[Box]:
            return chosen.boxes(make_plan(graph._replace(inputs=inputs), options))

        boxes = jax.jit(boxes_over)(graph.inputs)
        if not all(is_concrete(end) for box in boxes for end in (box.lower, box.upper)):
            raise ValueError(
                "widths are numbers to read, and under jit or vmap there are none: call "
                "bnncert.widths outside of them, for one example."
            )
        rows: list[Width] = []
        for node, box in zip(graph.nodes, boxes, strict=True):
            rows.append(_row(node, box, rows))
        return Widths(tuple(rows))

    return measured


def _row(node: Node, box: Box, before: Sequence[Width]) -> Width:
    lower, upper = (np.asarray(end, np.float64) for end in (box.lower, box.upper))
    with np.errstate(invalid="ignore"):
        found = np.nan_to_num(upper - lower, nan=np.inf, posinf=np.inf).reshape(-1)
    largest, median = (float(found.max()), float(np.median(found))) if found.size else (0.0, 0.0)
    growth = None
    if node.refs:
        growth = _ratio(largest, max(before[i].largest for i in node.refs))
    return Width(node.op, node.shape, node.refs, node.source, largest, median, growth)


def _ratio(after: float, before: float) -> float:
    if after == before:
        return 1.0
    return after / before if before else float("inf")


def _cells(index: int, row: Width) -> tuple[str, ...]:
    return (
        str(index),
        row.op,
        str(row.shape),
        " ".join(map(str, row.operands)),
        f"{row.largest:.3g}",
        f"{row.median:.3g}",
        "" if row.growth is None else f"{row.growth:.3g}",
        row.source.rsplit("/", 1)[-1],
    )
