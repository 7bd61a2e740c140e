"""What an operation acts on: the value of a node, or a constant."""

from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import ArrayLike


@dataclass(frozen=True)
class Ref:
    """An operand that is the value of node `index`."""

    index: int


Operand: TypeAlias = Ref | ArrayLike
"""A bounded value, or a constant: an array or a number."""
