"""A traced function as data, and what is true of it whatever its operations mean.

nodes         what a graph is made of, and the errors that name a place in it
operands      a reference to a node, or a constant
facts         what a value depends on
primitives    JAX's own operations, as objects
constants     what is computed of constants, in rounded arithmetic
precision     how exactly matrix products are computed
advice        what to write instead
"""

from bnncert.bounds.graph.nodes import Graph, Node, UnsupportedPrimitiveError, unsupported
from bnncert.bounds.graph.operands import Ref

__all__ = ["Graph", "Node", "Ref", "UnsupportedPrimitiveError", "unsupported"]
