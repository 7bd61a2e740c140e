"""Nodes that normalise a value by the root of its mean square, found by what they compute.

    c s        s = (a S + e)^(-1/2)        S the sum of c_j^2 over a group of coordinates

with numbers a, e > 0 is one node (`ops.normalising`). No name is trusted, nor any library's way to
write it; what is asked is whether a product of two nodes is this in real arithmetic. One factor, c,
may be any value. The other is followed back through

    moves, and products with constants     these come out again, as a scale after the node
    1 / sqrt, or sqrt and 1 / x
    + e                                    a number
    max(., 0)                              nothing, of sums of squares
    products with, quotients by numbers    a
    and then one of these
      a sum of P^2 over axes               where the coordinates of P are those of c in each group
      mean x^2 - (mean x)^2                where c is x less that mean; means of the same x, divided
                                           by their number exactly: it is the mean of (x - mean x)^2

A coordinate of c, or of P, is one of a node, or the difference of two. Which ones, is found by
sending their numbers through the moves in place of values; so it does not matter how values are
reshaped, where they are repeated, or what is computed twice: two sums of one node over the same
axes are one value. What differs (another axis, a mean by n - 1 in the second form, e elsewhere) is
left to its parts, or is another a. Under a millisecond for a thousand coordinates.

Where the arithmetic is rounded, the node acts on q = a S + e as the function computes it. What that
loses (all digits, where the variance is small beside (mean x)^2, in the second form) is charged to
the nodes that compute it.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.ops.normalising import Groups, least_constant
from bnncert.bounds.tracing.coordinates import (
    MOVES,
    Leaf,
    axes_of,
    coordinates,
    identity,
    is_idle,
    is_move,
    leaf_of,
    moved,
    multiplier_of,
    number_of,
    numbers,
    walk_back,
)


class _Factor(NamedTuple):
    """The other factor of a product: `scale * (share S + e)^(-1/2)`.

    Attributes:
        sums: the node of the sums S, or of the difference of two means.
        places: of each coordinate of the product, in the value of `sums`.
        share: a.
        gain: what a loss on the way to a S is multiplied by, at most.
        e: the constant.
        scale: what was multiplied by on the way, of the shape of the product; None: nothing.
        q: the node of `share S + e`.
        onto: the nodes between it and the product.
        within: the nodes between the sums and it.
    """

    sums: int
    places: np.ndarray
    share: Fraction
    gain: float
    e: float
    scale: Any
    q: int
    onto: tuple[Any, ...]
    within: tuple[Any, ...]

    def is_computed(self, nodes: Sequence[Any]) -> bool:
        """Whether a number in it is off by what computing it lost."""
        return any(node.computed for node in (nodes[self.q], *self.within, *self.onto))


class _Members(NamedTuple):
    """What is normalised together, and what is summed: rows (sum, coordinates).

    Attributes:
        own: of c, a row for each of its coordinates.
        summed: of the sums, a row for each of their terms.
        layout: the axes of these.
        share: what each square counts for.
        same: whether it is c itself that is squared, and no other node of this value.
    """

    own: np.ndarray
    summed: np.ndarray
    layout: Groups
    share: Fraction = Fraction(1)
    same: bool = False


class _Found(NamedTuple):
    """A normalisation: of which node, in which groups, and by what."""

    c: Ref
    factor: _Factor
    groups: Groups
    share: float
    same: bool


def normalised(
    nodes: Sequence[Any], outputs: Sequence[Any], exact: bool
) -> tuple[list[Any], list[Any]]:
    """The nodes, with one that normalises in place of each product that does.

    Args:
        nodes: `graph.Node`s, in the order of execution.
        outputs: a `Ref` for each that is a node.
        exact: whether q may be computed otherwise than the function computes it.

    Returns:
        More nodes, where a scale follows, and the outputs among them. Those that only a
        normalisation was made of are no longer needed.
    """
    found: list[Any] = []
    places: list[int] = []

    def renamed(operands: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(Ref(places[o.index]) if isinstance(o, Ref) else o for o in operands)

    for node in nodes:
        own = node._replace(operands=renamed(node.operands))
        match = _match(found, own)
        if match is None or (not exact and match.factor.is_computed(found)):
            found.append(own)
        else:
            _compose(found, own, match, exact)
        places.append(len(found) - 1)
    return found, list(renamed(outputs))


def _match(nodes: Sequence[Any], node: Any) -> _Found | None:
    """What a product normalises, if it does."""
    if node.op != "mul" or len(node.refs) != 2:
        return None
    for c, other in (node.refs, node.refs[::-1]):
        factor = _factor(nodes, other) if nodes[c].shape == node.shape else None
        members = _members(nodes, c, factor) if factor else None
        groups = _groups(factor, members) if factor and members else None
        if factor and members and groups:
            share = float(factor.share * members.share)
            if factor.e < _least(node.dtype, max(share, factor.gain), groups):
                return None
            return _Found(Ref(c), factor, groups, share, members.same)
    return None


def _least(dtype: Any, gain: float, groups: Groups) -> float:
    """The least e: what is lost by underflow on the way is nothing beside it, gain times each."""
    count = math.prod(groups.shape[i] for i in groups.axes)
    return least_constant(dtype) * max(1.0, gain * count)


_SMALLEST = Fraction(1, 2**60)
"""Of factors, and of products of these: beyond it, and its inverse, all is left to its parts."""


def _compose(nodes: list[Any], node: Any, found: _Found, exact: bool) -> None:
    """Appends what a product is: squares and their sum, a node that normalises, and a scale.

    Where it is not exact, q is the function's own, however it computes it: then nothing is known of
    it besides its bounds, unless it is of the squares of c itself.
    """
    c, factor, groups, share, same = found

    def add(op: str, operands: Sequence[Any], evaluate: Callable[..., Any], **params: Any) -> Ref:
        values = [nodes[o.index] if isinstance(o, Ref) else o for o in operands]
        avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values]
        shape = jax.eval_shape(evaluate, *avals).shape
        own = node._replace(op=op, operands=tuple(operands), evaluate=evaluate)
        nodes.append(own._replace(params=params, shape=shape, summed=1, computed=()))
        return Ref(len(nodes) - 1)

    summed, scale = node.summed, factor.scale
    if exact:
        spread = partial(groups.spread, shape=node.shape)
        value = add("square", (c,), jnp.square)
        if groups.shape != node.shape:
            value = add("reshape", (value,), partial(jnp.reshape, shape=groups.shape))
        total = partial(jnp.sum, axis=groups.axes)
        value = add("reduce_sum", (value,), total, axes=groups.axes)
        value = add("mul", (value, np.asarray(share, node.dtype)), jnp.multiply)
        q = add("add", (value, np.asarray(factor.e, node.dtype)), jnp.add)
    else:
        q, spread = Ref(factor.q), partial(_spread, factor.onto)

    params = {"groups": groups if exact or same else None, "share": share, "e": factor.e}
    params |= {"spread": spread, "scale": scale}
    value = add("normalise", (c, q), lambda v, w: v * jax.lax.rsqrt(spread(w)), **params)
    if scale is not None:
        add("mul", (value, scale), jnp.multiply)
    nodes[-1] = nodes[-1]._replace(summed=summed)


def _spread(onto: Sequence[Any], value: Any) -> Any:
    """A value moved as nodes move theirs."""
    for node in onto:
        value = node.evaluate(value) if node.op in MOVES else value
    return value


def _factor(nodes: Sequence[Any], index: int) -> _Factor | None:
    """A node as the factor that normalises; None if it is none."""
    after, index = walk_back(nodes, index, lambda node: is_move(node) or _scales(node))
    if sum(map(_scales, after)) > 1:  # what is between two of them may underflow
        return None
    between: list[Any] = []
    if nodes[index].op == "reciprocal":
        between, index = walk_back(nodes, nodes[index].refs[0], is_move)
        if nodes[index].op != "sqrt":
            return None
    elif nodes[index].op != "rsqrt":
        return None
    before, index = walk_back(nodes, nodes[index].refs[0], is_move)
    q, node = index, nodes[index]
    e = number_of(node) if node.op == "add" else None
    if e is None or e < least_constant(node.dtype):
        return None
    within, index = walk_back(nodes, node.refs[0], _keeps_sums)
    # The products of the last of them, the longest first: what is lost before is multiplied by.
    after_each = list(accumulate((multiplier_of(s) or Fraction(1) for s in within[::-1]), mul))
    if any(not _SMALLEST <= product <= 1 / _SMALLEST for product in after_each):
        return None
    share = after_each[-1] if after_each else Fraction(1)
    onto = (*before, *between, *after)
    places = moved(numbers(nodes[index].shape), (*within, *onto))
    gain = float(max([Fraction(1), *after_each]))
    return _Factor(index, places, share, gain, float(e), _scale(after), q, onto, tuple(within))


def _scale(after: Sequence[Any]) -> Any:
    """What nodes multiply by, one after the other."""
    scale = None
    for node in after:
        if node.op in MOVES:
            scale = None if scale is None else node.evaluate(scale)
        elif _scales(node):
            own = next(o for o in node.operands if not isinstance(o, Ref))
            own = jnp.broadcast_to(jnp.asarray(own, node.dtype), node.shape)
            scale = own if scale is None else scale * own
    return scale


def _members(nodes: Sequence[Any], c: int, factor: _Factor) -> _Members | None:
    """What is normalised together; None where the sums are not those of the squares of c."""
    of_squares = nodes[factor.sums].op == "reduce_sum"
    found = (_of_squares if of_squares else _of_means)(nodes, c, factor)
    if found is None or found.own.shape != found.summed.shape:
        return None
    return found if np.array_equal(_sorted(found.own), _sorted(found.summed)) else None


def _groups(factor: _Factor, members: _Members) -> Groups | None:
    """Axes along which a normalisation goes: those of c itself, or of what is summed."""
    for groups in (_own_axes(factor.places), members.layout):
        if math.prod(groups.shape) != factor.places.size:
            continue
        rows = _apart(factor.places, groups)
        count = np.unique(factor.places).size
        if rows.shape[-1] * count == rows.size and (rows == rows[..., :1]).all():
            return groups
    return None


def _of_squares(nodes: Sequence[Any], c: int, factor: _Factor) -> _Members | None:
    """The members of each group, where the sums are of squares."""
    sums = nodes[factor.sums]
    moves, index = walk_back(nodes, sums.refs[0], is_move)
    if nodes[index].op != "square":
        return None
    own, squared = coordinates(nodes, c), coordinates(nodes, nodes[index].refs[0])
    if [identity(nodes, leaf) for leaf in own] != [identity(nodes, leaf) for leaf in squared]:
        return None
    layout = Groups(nodes[sums.refs[0]].shape, axes_of(sums))
    which = np.empty(layout.shape, int)
    which[...] = np.expand_dims(numbers(sums.shape), layout.axes)
    return _Members(
        _table(factor.places, *(leaf.places for leaf in own)),
        _table(which, *(moved(leaf.places, moves) for leaf in squared)),
        layout,
        same=walk_back(nodes, c, is_idle)[1] == walk_back(nodes, nodes[index].refs[0], is_idle)[1],
    )


def _of_means(nodes: Sequence[Any], c: int, factor: _Factor) -> _Members | None:
    """The members of each group, where the square of a mean is taken from a mean of squares."""
    minus, difference = nodes[factor.sums], coordinates(nodes, c)
    if minus.op != "sub" or len(minus.refs) != 2 or len(difference) != 2:
        return None
    of_squares, square = (leaf_of(nodes, i) for i in minus.refs)
    x, mean = difference
    if nodes[square.node].op != "square" or square.factor != 1 or x.factor != 1:
        return None
    squared = leaf_of(nodes, nodes[square.node].refs[0])
    squared = squared._replace(places=squared.places.reshape(-1)[square.places])
    mean = mean._replace(factor=-mean.factor)
    rows = [
        _summed(nodes, leaf, x.node, leaf is of_squares) for leaf in (of_squares, squared, mean)
    ]
    if any(own is None for own in rows):
        return None
    members, *others = (own for own in rows if own is not None)
    size = members.shape[-1]
    for own, leaf in ((members, of_squares), (others[0], squared), (others[1], mean)):
        if own.shape[-1] != size or leaf.factor * size != 1:
            return None
    # Sums over the same coordinates have the same number.
    names = np.unique(np.concatenate([members, *others]), axis=0, return_inverse=True)[1]
    first, second, third = np.split(names, np.cumsum([len(members), len(others[0])]))
    group = first[of_squares.places]
    if not np.array_equal(group, second[squared.places]):
        return None
    if not np.array_equal(group.reshape(-1)[factor.places], third[mean.places]):
        return None
    summed = members[of_squares.places.reshape(-1)]
    which = np.broadcast_to(np.arange(len(summed))[:, None], summed.shape)
    sums = nodes[of_squares.node]
    layout = Groups(nodes[sums.refs[0]].shape, axes_of(sums))
    own = _table(factor.places, x.places)
    return _Members(own, _table(which, summed), layout, Fraction(1, size))


def _summed(nodes: Sequence[Any], leaf: Leaf, x: int, squares: bool) -> np.ndarray | None:
    """The coordinates of x that each value of a sum is of, one row a value, sorted."""
    sums = nodes[leaf.node]
    if sums.op != "reduce_sum":
        return None
    moves, index = walk_back(nodes, sums.refs[0], is_move)
    if squares:
        if nodes[index].op != "square":
            return None
        index = nodes[index].refs[0]
    own = leaf_of(nodes, index)
    if own.node != x or own.factor != 1:
        return None
    places = moved(own.places, moves)
    rows = _apart(places, Groups(places.shape, axes_of(sums)))
    return np.sort(rows.reshape(-1, rows.shape[-1]), -1)


def _keeps_sums(node: Any) -> bool:
    """Whether a node moves sums of squares, or multiplies them by a number above 0."""
    if node.op == "max":
        return number_of(node) == 0
    multiplier = multiplier_of(node)
    return is_move(node) or (multiplier is not None and multiplier > 0)


def _scales(node: Any) -> bool:
    """Whether a node is a product with a constant."""
    return node.op == "mul" and len(node.operands) == 2


def _own_axes(places: np.ndarray) -> Groups:
    """The axes along which nothing changes."""
    axes = [i for i, n in enumerate(places.shape) if n > 1]
    same = (i for i in axes if (places == np.take(places, [0], i)).all())
    return Groups(places.shape, tuple(same))


def _apart(places: np.ndarray, groups: Groups) -> np.ndarray:
    """As `Groups.apart`."""
    places = places.reshape(groups.shape)
    others = [i for i in range(places.ndim) if i not in groups.axes]
    moved = places.transpose(*others, *groups.axes)
    return moved.reshape(*moved.shape[: len(others)], -1)


def _table(*columns: np.ndarray) -> np.ndarray:
    return np.stack([column.reshape(-1) for column in columns], -1)


def _sorted(table: np.ndarray) -> np.ndarray:
    return table[np.lexsort(table.T)]
