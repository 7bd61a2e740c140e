"""Which values a node only moves, and multiplies by numbers: each coordinate by its number.

Numbers are sent through reshapes, transposes and repetitions in place of values, so that two nodes
are compared coordinate by coordinate, however each of them was arranged.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from bnncert.bounds.graph.operands import Ref

MOVES = frozenset("reshape broadcast_in_dim squeeze expand_dims transpose copy".split())
"""Operations that move values, or repeat them."""


class Leaf(NamedTuple):
    """Values of one node, moved and multiplied by a number.

    Attributes:
        node: its index.
        places: of each coordinate, in the node's value.
        factor: the number.
    """

    node: int
    places: np.ndarray
    factor: Fraction = Fraction(1)


def coordinates(nodes: Sequence[Any], index: int) -> tuple[Leaf, ...]:
    """Finds what each coordinate of a node is: of one value, or the difference of two."""
    moves, index = walk_back(nodes, index, is_move)
    node = nodes[index]
    if node.op != "sub" or len(node.refs) != 2:
        return (Leaf(index, moved(numbers(node.shape), moves)),)
    x, y = (leaf_of(nodes, i) for i in node.refs)
    y = y._replace(factor=-y.factor)
    return tuple(leaf._replace(places=moved(leaf.places, moves)) for leaf in (x, y))


def leaf_of(nodes: Sequence[Any], index: int) -> Leaf:
    """A node as the values of another, moved and multiplied by a number."""
    steps, index = walk_back(
        nodes, index, lambda node: is_move(node) or multiplier_of(node) is not None
    )
    factor = math.prod((multiplier_of(node) or Fraction(1) for node in steps), start=Fraction(1))
    return Leaf(index, moved(numbers(nodes[index].shape), steps), factor)


def identity(nodes: Sequence[Any], leaf: Leaf) -> tuple[Any, ...]:
    """Names what tells values apart: sums of one value over the same axes are one value."""
    node = nodes[leaf.node]
    key = (node.refs, axes_of(node)) if node.op == "reduce_sum" else leaf.node
    return key, leaf.factor


def walk_back(
    nodes: Sequence[Any], index: int, passes: Callable[[Any], bool]
) -> tuple[list[Any], int]:
    """Back from a node as long as nodes are passed: these in order, and the one that is not."""
    passed: list[Any] = []
    while len(nodes[index].refs) == 1 and passes(nodes[index]):
        passed.append(nodes[index])
        index = nodes[index].refs[0]
    return passed[::-1], index


def is_move(node: Any) -> bool:
    """Says whether a node moves its operand, or does nothing."""
    return node.op in MOVES or is_idle(node)


def is_idle(node: Any) -> bool:
    """Says whether a node does nothing, whatever its constants are off by."""
    if any(node.computed):
        return False
    if node.op == "select_n":
        condition, *cases = node.operands
        chosen = _known(condition)
        return chosen is not None and isinstance(cases[int(chosen)], Ref)
    return node.op in ("add", "sub") and isinstance(node.operands[0], Ref) and number_of(node) == 0


def multiplier_of(node: Any) -> Fraction | None:
    """The number that a node multiplies by."""
    if node.op not in ("mul", "div") or not (node.op == "mul" or isinstance(node.operands[0], Ref)):
        return None
    number = number_of(node)
    if number is None or not np.isfinite(number) or number == 0:
        return None
    return Fraction(number) if node.op == "mul" else 1 / Fraction(number)


def number_of(node: Any) -> float | None:
    """The other operand of a node of two, if that is one known number, and exact."""
    if any(node.computed):
        return None
    others = [o for o in node.operands if not isinstance(o, Ref)]
    return _known(others[0]) if len(others) == 1 and len(node.operands) == 2 else None


def _known(constant: Any) -> float | None:
    """The one number that a constant is; None where it is traced, or several."""
    if isinstance(constant, (Ref, Tracer)):
        return None
    values = np.asarray(constant).reshape(-1)
    return float(values[0]) if values.size and (values == values[0]).all() else None


def moved(places: np.ndarray, steps: Sequence[Any]) -> np.ndarray:
    """What nodes make of their operand that only move it, or multiply it by numbers."""
    for node in steps:
        if node.op == "transpose":
            places = places.transpose(node.params["permutation"])
        elif node.op == "broadcast_in_dim":
            to = node.params.get("broadcast_dimensions")
            if to is not None:
                kept = [1] * len(node.shape)
                for own, axis in enumerate(to):
                    kept[axis] = places.shape[own]
                places = places.reshape(kept)
            places = np.broadcast_to(places, node.shape)
        else:
            places = places.reshape(node.shape)
    return places


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    """The number of each coordinate."""
    return np.arange(math.prod(shape)).reshape(shape)


def axes_of(node: Any) -> tuple[int, ...]:
    """Those that a node sums over."""
    return tuple(map(int, node.params["axes"]))
