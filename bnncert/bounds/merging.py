"""Which runs of affine operations are bounded as the one map they are.

Op by op, intervals forget that two coordinates came from one. Where a run has lost that
(`exactness`), rows pulled back through it (`rows.py`) give the interval of the whole map:

    the prefix  from the sets to the first nonlinearities; over an L1 or L2 ball this is the dual
                norm, sharper than the ball's hull by the square root of the dimension
    the tail    from the last nonlinearities to an output: margins f_j - f_y after the last layer

A row is a backward pass, and there is one for each coordinate that the run ends on. So a run is
merged while all of it takes no more multiply-adds than `BUDGET` forward passes, or than `FEW`,

    rows (sum of those of the run's operations + the size of its sources)  <=  BUDGET * forward

a matrix product counted `_GEMM` times for rows: all of them are one product of two matrices, which
reads the weights once. Where that is too much, the run is merged from its end as far back as the
budget reaches, its operands there in their intervals; where nothing is won by that, op by op.

Whatever it costs, merged are an LpBall's first sums, of which the ball's hull would be far too wide
(`norms.py` bounds most of them without rows); and where the outputs are margins, at least the last
two sums: their matrix and the last layer.

Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably
Robust Models", 2018 (the tail: section 3, "elision of the last layer").
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from bnncert.bounds.graph import Graph, Node, Ref
from bnncert.bounds.graph.operands import Operand
from bnncert.bounds.norms import first_sums
from bnncert.bounds.ops.affine import SUMMING, spreads
from bnncert.sets import LpBall

BUDGET = 4.0
"""Forward passes that all rows of a function's merged runs may cost together."""

FEW = 2**12
"""Multiply-adds that they may cost besides where a forward pass is less: microseconds."""

_GEMM = 1 / 8
INDEPENDENT, EXACT, LOOSE = range(3)


class Run(NamedTuple):
    """How a node is merged.

    Attributes:
        passed: the nodes that its rows pass, itself included.
        whole: whether these are all that lie between the node and its sources.
    """

    passed: frozenset[int]
    whole: bool


class Merged(NamedTuple):
    """What is bounded as one affine map.

    Attributes:
        runs: by node, its run. A node that is exact op by op has none.
        prefix: the nodes that are affine in the sets alone.
        exact: of these, those that intervals bound exactly.
        sums: the first sums of balls, which have boxes of their own (`norms.first_sum`).
        forward: multiply-adds of an evaluation.
    """

    runs: dict[int, Run]
    prefix: frozenset[int]
    exact: frozenset[int]
    sums: frozenset[int]
    forward: int


def merged(graph: Graph, margins: bool = False) -> Merged:
    """What of a function is merged.

    Args:
        graph: the traced function.
        margins: whether its outputs are differences of a last layer's.
    """
    runs, prefix = merged_runs(graph, margins), affine_prefix(graph)
    found, sums = exactness(graph), frozenset(first_sums(graph))
    whole = {i for i, run in runs.items() if run.whole}
    exact = frozenset(i for i in prefix if found[i][0] != LOOSE or i in whole)
    return Merged(runs, frozenset(prefix), exact, sums, _forward(graph))


def merged_runs(graph: Graph, margins: bool = False) -> dict[int, Run]:
    """The nodes to bound as one affine map of what their run begins with.

    Args:
        graph: the traced function.
        margins: whether its outputs are differences of a last layer's.

    Returns:
        By node, its run. A node that is exact op by op has none.
    """
    found = exactness(graph)
    depths = _depths(graph)
    outputs = set(graph.output_nodes)
    places = (affine_prefix(graph) & graph.acted_on) | outputs
    loose = [i for i in sorted(places) if found[i][0] == LOOSE]
    runs: dict[int, Run] = {}
    left = max(BUDGET * _forward(graph), FEW)
    for index in sorted(loose, key=lambda i: i not in outputs):
        worth = [run for run, won in _suffixes(graph, index, depths) if won]
        for run in worth:
            spent = cost(graph, index, run)
            if spent <= left:
                runs[index], left = run, left - spent
                break
        if margins and index in outputs:
            runs.setdefault(index, worth[-1])
    for index in loose:
        if index not in runs or not runs[index].whole:
            first = _first_sums(graph, index) - first_sums(graph)
            runs |= {i: _suffix(graph, i, depths, 0) for i in first}
    return runs


def affine_prefix(graph: Graph) -> set[int]:
    """Nodes that are affine in the sets alone."""
    num_sets = len(graph.inputs)
    return {i for i, (_, sources) in enumerate(exactness(graph)) if max(sources) < num_sets}


def exactness(
    graph: Graph, begins: Callable[[int], bool] = lambda index: False, until: int | None = None
) -> list[tuple[int, frozenset[int]]]:
    """For each node: is its op-by-op interval that of the merged affine map, and of which sources.

    Sources are the sets and the values of nonlinearities that an affine run starts from. A value is
    INDEPENDENT while each coordinate of a source reaches one of its coordinates at most, EXACT when
    its intervals are still those of the merged map, LOOSE when they may be wider.

    Args:
        graph: the traced function.
        begins: more nodes to take for sources.
        until: of how many nodes; None: of all.
    """
    normed = first_sums(graph)
    found: list[tuple[int, frozenset[int]]] = []
    for index, node in enumerate(graph.nodes[:until]):
        itself = frozenset({index})
        if node.op == "input":
            state = EXACT if isinstance(graph.inputs[index], LpBall) else INDEPENDENT
            found.append((state, itself))
            continue
        if node.affine is None or begins(index):
            found.append((INDEPENDENT, itself))
            continue
        states, sources = zip(*(found[i] for i in node.refs), strict=True)
        union = frozenset().union(*sources)
        state = max(states)
        spread = spreads(graph, node)
        if spread == "mixes":
            state = EXACT if state == INDEPENDENT else LOOSE
        elif spread == "repeats":
            state = max(state, EXACT)
        if index in normed:
            state = EXACT  # by itself
        if len(union) < sum(map(len, sources)):  # a source meets itself
            state = LOOSE if spread == "adds" else max(state, EXACT)
        found.append((state, union))
    return found


def _depths(graph: Graph) -> list[int]:
    """How many sums lie one after the other between a node and its sources."""
    found: list[int] = []
    for node in graph.nodes:
        if node.op == "input" or node.affine is None:
            found.append(0)
        else:
            found.append(max(found[i] for i in node.refs) + _sums(node))
    return found


def _suffixes(graph: Graph, index: int, depths: list[int]) -> Iterator[tuple[Run, bool]]:
    """The ends of a node's run, longest first, and whether intervals lose to each."""
    for cut in range(max(depths[index], 1)):
        run = _suffix(graph, index, depths, cut)
        if run.whole:
            yield run, True
        else:
            states = exactness(graph, lambda i, passed=run.passed: i not in passed, index + 1)
            yield run, states[index][0] == LOOSE


def _suffix(graph: Graph, index: int, depths: list[int], cut: int) -> Run:
    """What of a node's run lies after its first `cut` sums."""
    passed, whole, waiting = set(), True, [index]
    while waiting:
        i = waiting.pop()
        node = graph.nodes[i]
        if i in passed or not node.refs or node.affine is None:
            continue
        if depths[i] < cut or (depths[i] == cut and cut > 0):
            whole = False
            continue
        passed.add(i)
        waiting.extend(node.refs)
    return Run(frozenset(passed), whole)


def _first_sums(graph: Graph, index: int) -> set[int]:
    """The sums in a node's run of an LpBall's own coordinates, which no other sum has gathered."""
    own: list[bool] = []
    for i, node in enumerate(graph.nodes[: index + 1]):
        if node.op == "input":
            own.append(isinstance(graph.inputs[i], LpBall))
        else:
            affine = node.affine is not None
            own.append(affine and not _sums(node) and any(own[j] for j in node.refs))
    return {
        i
        for i in _suffix(graph, index, _depths(graph), 0).passed
        if _sums(graph.nodes[i]) and any(own[j] for j in graph.nodes[i].refs)
    }


def ends_of(graph: Graph, run: Run) -> set[int]:
    """The nodes that a run's rows end on."""
    return {i for j in run.passed for i in graph.nodes[j].refs} - run.passed


def cost(graph: Graph, index: int, run: Run) -> float:
    """Multiply-adds of all rows through a run, matrix products counted as `_GEMM`."""
    ends = ends_of(graph, run)
    passing = sum(
        products(graph, graph.nodes[i]) * (_GEMM if graph.nodes[i].op == "dot_general" else 1)
        for i in run.passed
    )
    # The bound over the sources is two more products of all rows: with centres and with radii.
    reading = 2 * _GEMM * sum(math.prod(graph.nodes[i].shape) for i in ends)
    return math.prod(graph.nodes[index].shape) * (passing + reading)


def _forward(graph: Graph) -> int:
    return sum(products(graph, node) for node in graph.nodes)


def products(graph: Graph, node: Node) -> int:
    """Multiply-adds of one operation; where it is no product, the values that it reads or makes."""
    if node.op in ("input", "reshape", "squeeze", "expand_dims"):
        return 0
    size = math.prod(node.shape)
    shapes = [_shape(graph, o) for o in node.operands]
    if node.op == "dot_general":
        (contract, _), _ = node.params["dimension_numbers"]
        return size * math.prod(shapes[0][i] for i in contract)
    if node.op == "conv_general_dilated":
        features = shapes[1][node.params["dimension_numbers"].rhs_spec[0]]
        return size * math.prod(shapes[1]) // max(features, 1)
    return max(size, *map(math.prod, shapes))


def _shape(graph: Graph, operand: Operand) -> tuple[int, ...]:
    return graph.nodes[operand.index].shape if isinstance(operand, Ref) else jnp.shape(operand)


def _sums(node: Node) -> bool:
    return node.op in SUMMING
