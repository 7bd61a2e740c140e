"""What a compiler makes of several operations in a row, in as far as no single one allows for it.

XLA rewrites a program by identities of real arithmetic. Nearly all of them leave each value within
what its nodes are charged; these do not (jaxlib 0.10 to 0.12, and the sources of later ones; none
has to happen, and which do depends on backend, version and sizes):

    an addend of a sum      W x + s, a scatter-add: s is one more of its terms, and may be the first
                            of n; so it passes through n roundings:                    gamma(n) |s|
    constants in a row      (x + c) + d becomes x + fl(c + d):    gamma(k) sum |c_i| for k of them
    factors in a row        (x c) d becomes x fl(c d), c / d or 1 / d likewise; also through a
                            factor that is no constant, (x c) y becomes x (c y). If c d is normal,
                            that is one rounding; where it may underflow, it is off by t, which
                            meets |x| and the factors that follow; if it overflows, by anything

also through operations that only move values or negate them, and through those that do nothing: a
factor of 1, an addend of 0, a sum of one term. Powers are products. Sums of sums are one sum, whose
terms `Node.summed` counts. Products of exponentials become the exponential of a sum:
their error (`ops.powers`).
That quotients of quotients and x 2^k + y 2^k neither overflow nor underflow in another order is
part of the model.

A value's `History` says what there is to be reordered. Constants count by their largest magnitudes,
whatever their shapes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from bnncert.bounds.graph import Graph, Node, Ref
from bnncert.bounds.ops.affine import MOVING, SUMMING
from bnncert.bounds.propagate import Domain, propagate
from bnncert.bounds.rounding.model import Precision, gamma, roundings, tiny
from bnncert.bounds.tracing.equations import is_neutral


class History(NamedTuple):
    """What a value was computed from, in as far as that may be reordered.

    Attributes:
        terms: of the sum that it is, or that was added to it; else 0.
        addends: how many constants were added in a row.
        total: the sum of their largest magnitudes.
        factors: how many constant factors came in a row.
        small: the product of those magnitudes of theirs that are below 1.
        large: that of those above 1.
    """

    terms: int = 0
    addends: int = 0
    total: ArrayLike = 0.0
    factors: int = 0
    small: ArrayLike = 1.0
    large: ArrayLike = 1.0


NONE = History()


def histories(graph: Graph, starts: Sequence[History | None]) -> tuple[History, ...]:
    """The history of each node of a graph.

    Args:
        graph: the traced function.
        starts: those of its sets; None: they were given.
    """

    def apply(index: int, found: list[History]) -> History:
        node = graph.nodes[index]
        return _history(graph, node, _operands(node, [found[i] for i in node.refs]))

    domain = Domain(lambda index: starts[index] or NONE, apply)
    return tuple(propagate(graph, domain)[0])


def reordering_error(
    graph: Graph, node: Node, sizes: Sequence[Array], precision: Precision
) -> Array | None:
    """What a node may be off by in another order of operations.

    Args:
        graph: the traced function, with its histories.
        node: the node.
        sizes: the largest magnitudes of its bounded operands.
        precision: of the network.

    Returns:
        Something that broadcasts to the shape of the value; None where no order is worse.
    """
    if not graph.histories:
        return None
    operands = _operands(node, [graph.histories[i] for i in node.refs])
    if node.op in _ADDING:
        return _of_sums(graph, node, operands, sizes, precision.unit(node))
    if node.op in _SCALING or _is_one_product(graph, node):
        return _of_products(graph, node, operands, sizes)
    if node.op in _POWERS:
        product, operands = _as_product(node, operands)
        return _of_products(graph, product, operands, [*sizes] * len(operands))
    return None


def _history(graph: Graph, node: Node, operands: Sequence[History | None]) -> History:
    bounded = [h for h, o in zip(operands, node.operands, strict=True) if isinstance(o, Ref)]
    known = [h for h in operands if h is not None]
    first = bounded[0] or NONE
    if len(bounded) == 1 and (node.op in _PASSING or _sums_nothing(graph, node)):
        return first
    if node.op == "abs":  # the square of one is that of what it is of
        return History(factors=first.factors, small=first.small, large=first.large)
    neutral = len(bounded) == 1 and _may_be_neutral(node)
    if node.op in _ADDING:
        terms = max((h.terms for h in known), default=0)
        constants = [o for o in node.operands if not isinstance(o, Ref)]
        factors = first if neutral else NONE
        return factors._replace(
            terms=terms + 1 if terms else 0,
            addends=sum(h.addends for h in known) + len(constants),
            total=sum((h.total for h in known), 0.0) + sum(_largest(c) for c in constants),
        )
    if node.op in _SCALING or _is_one_product(graph, node):
        own = _scaled(node, operands)
        if not neutral:
            return own
        return own._replace(terms=first.terms, addends=first.addends, total=first.total)
    if node.op in _POWERS:
        own = _scaled(*_as_product(node, operands))
        return _inverse(own) if node.params.get("y", 2) < 0 else own
    if node.op == "reciprocal":
        return _inverse(known[0])
    if node.op in SUMMING:
        return History(terms=roundings(graph, node).forward)
    return first if neutral else NONE


def _inverse(own: History) -> History:
    return History(factors=own.factors, small=1 / own.large, large=1 / own.small)


def _sums_nothing(graph: Graph, node: Node) -> bool:
    """Whether each of its sums has one term and no coefficient; or it is a first power."""
    if node.op == "integer_pow":
        return node.params["y"] == 1
    alone = node._replace(summed=1)
    return node.op in _PLAIN_SUMS and roundings(graph, alone).forward == 1


def _may_be_neutral(node: Node) -> bool:
    """Whether constants may be such that an operation returns its one bounded operand."""
    values: list[Any] = [None if isinstance(o, Ref) else o for o in node.operands]
    if node.op in ("dot_general", "conv_general_dilated"):  # of one term
        return any(_is_unknown(node, i) or _is_one(v) for i, v in enumerate(values))
    (place,) = (i for i, o in enumerate(node.operands) if isinstance(o, Ref))
    if node.op in (*_ADDING, *_SCALING) and any(_is_unknown(node, i) for i in (0, 1)):
        return True
    return is_neutral(node.op, place, values)


def _is_unknown(node: Node, place: int) -> bool:
    """Whether a constant is traced, or computed by the function: it may be any number."""
    computed = bool(node.computed) and node.computed[place] is not None
    return computed or isinstance(node.operands[place], Tracer)


def _is_one(value: Any) -> bool:
    return is_neutral("mul", 0, (None, value))


def _as_product(node: Node, operands: Sequence[Any]) -> tuple[Node, list[Any]]:
    """A power as the product that it may be computed as."""
    count = 2 if node.op == "square" else abs(int(node.params["y"]))
    return node._replace(op="mul", operands=node.operands[:1] * count), [operands[0]] * count


def _scaled(node: Node, operands: Sequence[History | None]) -> History:
    count, small, large = 0, 1.0, 1.0
    for place, (history, operand) in enumerate(zip(operands, node.operands, strict=True)):
        if history is not None:
            count, small, large = (
                count + history.factors,
                small * history.small,
                large * history.large,
            )
        if not isinstance(operand, Ref):
            least, most = _range(operand)
            if node.op == "div" and place == 1:
                least, most = 1 / most, 1 / least
            count, small, large = count + 1, small * _least(least), large * _most(most)
    return History(factors=count, small=small, large=large)


def _of_sums(
    graph: Graph,
    node: Node,
    operands: Sequence[History | None],
    sizes: Sequence[Array],
    unit: float,
) -> Array | None:
    magnitudes = node._replace(operands=tuple(map(_absolute, node.operands))).fill(sizes)
    parts: list[Array] = []
    for place, history in enumerate(operands):
        if history is not None and history.terms:
            rest = (m for other, m in enumerate(magnitudes) if other != place)
            parts += [gamma(history.terms + 4, unit) * jnp.asarray(m) for m in rest]
    own = _history(graph, node, operands)
    if own.addends > 1:
        total = jnp.asarray(own.total, node.dtype)
        finite = 2 * total < float(jnp.finfo(node.dtype).max)
        parts.append(jnp.where(finite, gamma(own.addends + 4, unit) * total, jnp.inf))
    return sum(parts[1:], parts[0]) if parts else None


def _of_products(
    graph: Graph, node: Node, operands: Sequence[History | None], sizes: Sequence[Array]
) -> Array | None:
    own = _scaled(node, operands)
    single = len(sizes) == 1
    if own.factors == 0 or (single and own.factors == 1 and node.op != "div"):
        return None
    smallest, largest = tiny(node), float(jnp.finfo(node.dtype).max)
    bounded = [
        h or NONE for h, o in zip(operands, node.operands, strict=True) if isinstance(o, Ref)
    ]
    # The value that the factors came to, at most, one after the other.
    bases = [
        size / jnp.asarray(h.small, node.dtype) for size, h in zip(sizes, bounded, strict=True)
    ]
    large = jnp.asarray(own.large, node.dtype)
    reach = math.prod((1 + base for base in bases[1:]), start=1 + bases[0]) * large
    if _is_one_product(graph, node):
        reach = jnp.max(reach)
    error = 16 * (own.factors + 2) * smallest * reach
    if single:  # of constants alone: where none of their products underflows, all is relative
        error = jnp.where(jnp.asarray(own.small, node.dtype) >= 4 * smallest, 0.0, error)
    fits = reach < largest if not single else large < largest
    return jnp.where(fits, error, jnp.inf)


def _operands(node: Node, bounded: Sequence[History]) -> list[History | None]:
    """Of each operand; None for a constant that was given."""
    computed = node.computed or (None,) * len(node.operands)
    histories = iter(bounded)
    return [
        next(histories) if isinstance(o, Ref) else c and c.history
        for o, c in zip(node.operands, computed, strict=True)
    ]


def _is_one_product(graph: Graph, node: Node) -> bool:
    """Whether a matrix product with constants has sums of one term."""
    if node.op not in ("dot_general", "conv_general_dilated") or len(node.refs) != 1:
        return False
    return roundings(graph, node).forward == 1


def _range(constant: Any) -> tuple[Array, Array]:
    """The least magnitude of a constant that is not 0, and the largest."""
    size = jnp.abs(jnp.asarray(constant))
    return jnp.min(jnp.where(size > 0, size, jnp.inf), initial=jnp.inf), jnp.max(size, initial=0.0)


def _largest(constant: Any) -> Array:
    return _range(constant)[1]


def _least(value: ArrayLike) -> Array:
    return jnp.minimum(value, 1.0)


def _most(value: ArrayLike) -> Array:
    return jnp.maximum(value, 1.0)


def _absolute(operand: Any) -> Any:
    return operand if isinstance(operand, Ref) else jnp.abs(jnp.asarray(operand))


_ADDING = ("add", "add_any", "sub")
_SCALING = ("mul", "div")
_POWERS = ("square", "integer_pow")
_PLAIN_SUMS = ("reduce_sum", "cumsum", "reduce_window_sum")
_PASSING = MOVING | {"convert_element_type"}
