"""A JAX function as a flat list of nodes: the only rooms that look inside JAX.

trace         a function's operations, in the order of execution: `trace(f, args, kwargs)`
nodes         what a graph is made of, and the errors that name a place in it
operands      a reference to a node, or a constant
equations     one operation of JAX: calls, sums, how it is evaluated
primitives    JAX's own operations, as objects
parameters    what an operation may be asked for, and what is refused
constants     what is computed of constants, in rounded arithmetic
precision     how exactly matrix products are computed
recognition   functions that are several operations
fusion        operations that are one function
rewriting     operations that are written as others
windows       pooling
randomness    dropout that was left on
endings       how a function ends: logits, probabilities
advice        what to write instead
"""

from bnncert.bounds.graph.nodes import Graph, Node, UnsupportedPrimitiveError
from bnncert.bounds.graph.tracing import trace

__all__ = ["Graph", "Node", "UnsupportedPrimitiveError", "trace"]
