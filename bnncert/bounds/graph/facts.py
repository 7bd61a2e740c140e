"""What a value depends on, whatever the operations mean."""

from bnncert.bounds.graph.nodes import Graph


def input_sets(graph: Graph) -> list[frozenset[int]]:
    """For each node, the sets that its value depends on."""
    found: list[frozenset[int]] = []
    for index, node in enumerate(graph.nodes):
        own = (index,) if node.op == "input" else ()
        found.append(frozenset(own).union(*(found[i] for i in node.refs)))
    return found


def ancestors(graph: Graph, index: int) -> list[int]:
    """Nodes that a node's value depends on, itself included, in order."""
    found = {index}
    for i in range(index, -1, -1):
        if i in found:
            found |= set(graph.nodes[i].refs)
    return sorted(found)
