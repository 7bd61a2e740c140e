"""A JAX function as a flat list of nodes: the only rooms that look inside JAX.

walk          a function's operations, in the order of execution: `trace(f, args, kwargs)`
equations     one operation of JAX: calls, sums, how it is evaluated
parameters    what an operation may be asked for, and what is refused
recognition   functions that are several operations
fusion        operations that are one function
rewriting     operations that are written as others
windows       pooling
randomness    dropout that was left on
endings       how a function ends: logits, probabilities
"""

from bnncert.bounds.tracing.walk import Tracking, trace

__all__ = ["Tracking", "trace"]
