"""A traced function as data: nodes, what they act on, and the errors that name one of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from bnncert.bounds.graph.constants import Rounded
from bnncert.bounds.graph.operands import Operand, Ref
from bnncert.sets import Set


class UnsupportedPrimitiveError(NotImplementedError):
    """An operation on bounded values that has no sound rule."""


class Node(NamedTuple):
    """One operation on bounded values, or (op "input") one set.

    Attributes:
        op: the primitive's name, or that of a recognised function ("softplus").
        operands: a `Ref` for each bounded operand, the array itself for each constant.
        evaluate: `(*operand values) -> value`.
        params: the primitive's parameters.
        shape: of the value.
        dtype: of the value.
        source: where the user's code calls it ("model.py:12 (apply)").
        computed: for each operand that is a constant which the function computes itself, how; else
            None. Empty where there are none, and in real arithmetic.
        summed: how many of its values are added up to one by the sums that it flows into directly.
        operation: what is known of it (`ops.operation.Operation`); None of a set.
    """

    op: str
    operands: tuple[Operand, ...]
    evaluate: Callable[..., Array]
    params: dict[str, Any]
    shape: tuple[int, ...]
    dtype: np.dtype
    source: str
    computed: tuple[Rounded | None, ...] = ()
    summed: int = 1
    operation: Any = None

    @property
    def affine(self) -> Any:
        """How it is affine in its bounded operands (`ops.operation.Affine`); None: it is not."""
        return None if self.operation is None else self.operation.affine

    @property
    def has_constant(self) -> bool:
        """Whether it is affine and may have a value other than 0 at 0."""
        affine = self.affine
        return affine is not None and affine.has_offset and len(self.refs) < len(self.operands)

    @property
    def is_relaxed(self) -> bool:
        """Whether a node is neither a set nor affine in what is bounded."""
        return self.op != "input" and self.affine is None

    @property
    def refs(self) -> tuple[int, ...]:
        """Indices of the bounded operands."""
        return tuple(o.index for o in self.operands if isinstance(o, Ref))

    def fill(self, values: Sequence[Any]) -> list[Any]:
        """The operands, with `values` in place of the bounded ones."""
        iterator = iter(values)
        return [next(iterator) if isinstance(o, Ref) else o for o in self.operands]


class Graph(NamedTuple):
    """A traced function.

    Attributes:
        nodes: in the order of execution; the first `len(inputs)` are the sets.
        inputs: the sets among the arguments, in the order of their leaves; as `sets.settled`.
        valid: whether they certify anything, as `sets.settled`.
        outputs: a `Ref` for each output leaf; or an array that no set reaches, `Rounded` where the
            function computes it in rounded arithmetic.
        in_tree: structure of the arguments `(args, kwargs)`, sets as leaves.
        set_leaves: positions of the sets among the leaves of the arguments.
        out_tree: structure of the outputs.
        users: for each node, the nodes that act on it, once for each of their operands it is.
        output_nodes: the nodes that are outputs.
        acted_on: the nodes that a nonlinearity acts on.
        histories: for each node, what a compiler may make of it and what it is computed from; empty
            in real arithmetic.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Set, ...]
    valid: Array | None
    outputs: tuple[Any, ...]
    in_tree: Any
    set_leaves: tuple[int, ...]
    out_tree: Any
    users: tuple[tuple[int, ...], ...]
    output_nodes: tuple[int, ...]
    acted_on: frozenset[int]
    histories: tuple[Any, ...] = ()


def unsupported(node: Node, supported: Sequence[str], hint: str = "") -> UnsupportedPrimitiveError:
    """The error for a node without a rule: what, where, and what there is instead."""
    bounded = [i for i, o in enumerate(node.operands) if isinstance(o, Ref)]
    source = node.source or "a line inside JAX"
    return UnsupportedPrimitiveError(
        f"no bound rule for primitive '{node.op}' with bounded operand(s) {bounded} of "
        f"{len(node.operands)}, called at {source}.{' ' + hint if hint else ''} "
        f"Supported: {', '.join(sorted(supported))}."
    )


def unknown_constant(constant: Rounded, where: str) -> UnsupportedPrimitiveError:
    """The error for a constant of which nobody knows how far off it may be."""
    return UnsupportedPrimitiveError(
        f"'{constant.op}' on constants alone, called at {constant.source or 'a line inside JAX'}, "
        f'reaches {where}, and rounding="outward" does not know how it rounds. Compute it before, '
        "so that f is given its result (then that is the network's constant), or use "
        'rounding="nearest".'
    )


def graph_of(
    nodes: tuple[Node, ...],
    inputs: tuple[Set, ...],
    valid: Array | None,
    outputs: tuple[Any, ...],
    in_tree: Any = None,
    set_leaves: tuple[int, ...] = (),
    out_tree: Any = None,
) -> Graph:
    """The graph of these nodes, its own facts found; arguments as the attributes of `Graph`."""
    return Graph(
        nodes,
        inputs,
        valid,
        outputs,
        in_tree,
        set_leaves,
        out_tree,
        _users(nodes),
        tuple(sorted({o.index for o in outputs if isinstance(o, Ref)})),
        frozenset(i for node in nodes if node.is_relaxed for i in node.refs),
    )


def _users(nodes: Sequence[Node]) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        for i in node.refs:
            found[i].append(index)
    return tuple(map(tuple, found))


def prune(
    nodes: Sequence[Node], outputs: Sequence[Any], num_sets: int
) -> tuple[tuple[Node, ...], tuple[Any, ...]]:
    """Drops the nodes that no output needs: they are neither bounded nor in need of a rule."""
    needed = {o.index for o in outputs if isinstance(o, Ref)} | set(range(num_sets))
    for index in range(len(nodes) - 1, -1, -1):
        if index in needed:
            needed |= set(nodes[index].refs)
    place = {old: new for new, old in enumerate(sorted(needed))}

    def moved(operands: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(Ref(place[o.index]) if isinstance(o, Ref) else o for o in operands)

    live = (nodes[index] for index in sorted(needed))
    return tuple(node._replace(operands=moved(node.operands)) for node in live), moved(outputs)
