"""How a function is bounded: each method is an object that carries its options.

    ibp           intervals
    forward       linear bounds from the sets forward
    crown         linear bounds backward, over relaxations on intervals (CROWN-IBP) or on what was
                  found so far (CROWN)
    alpha_crown   CROWN, its free lines optimised
    steps         how rows pass the nodes of a function (`bnncert.bounds.rows`)

A name is short for a method with its default options: "crown" for `CROWN()`.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from bnncert.bounds.methods.alpha_crown import AlphaCROWN
from bnncert.bounds.methods.crown import CROWN, CROWNIBP
from bnncert.bounds.methods.forward import Forward
from bnncert.bounds.methods.ibp import IBP

Method: TypeAlias = IBP | Forward | CROWNIBP | CROWN | AlphaCROWN
LinearMethod: TypeAlias = CROWNIBP | CROWN
"""Those whose outputs are bounded by linear functions of the sets."""

METHODS: Mapping[str, type[Method]] = {
    kind.name: kind for kind in (IBP, Forward, CROWNIBP, CROWN, AlphaCROWN)
}
"""From fast to tight, but for `forward`, which is for few inputs."""


def method_of(method: object) -> Method:
    """The method that a name is short for.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a method.
    """
    return _found(method, METHODS)


def linear_method_of(method: object) -> LinearMethod:
    """As `method_of`, for those that have linear bounds: CROWN-IBP and CROWN."""
    return _found(method, {kind.name: kind for kind in (CROWNIBP, CROWN)})


def _found(method: object, kinds: Mapping[str, type]) -> Any:
    if isinstance(method, tuple(kinds.values())):
        return method
    ways = ", ".join(f"{name!r} ({kind.__name__}())" for name, kind in kinds.items())
    if isinstance(method, str):
        if method in kinds:
            return kinds[method]()
        raise ValueError(f"method = {method!r}: choose one of {ways}.")
    hint = f"; did you mean {method.__name__}()?" if isinstance(method, type) else "."
    raise TypeError(f"method = {method!r}: give a name or an object, one of {ways}{hint}")
