"""What is to be proved, for other verifiers: an instance as VNN-LIB, the format of VNN-COMP.

    inputs   X_i in [l_i, u_i]
    output   a counterexample: some row of `matrix @ Y + offset` is not positive

so that "unsat" is the proof. Every number is written out exactly, and is read back as itself.

Source: Demarchi et al., "Supporting standardization of neural networks verification with VNN-LIB
and CoCoNet", FoMLAS 2023.
"""

from decimal import Decimal

import numpy as np
from jaxtyping import Array

from bnncert.certify import Constraints
from bnncert.sets import Box, Set


def vnnlib(region: Set, constraints: Constraints, *, about: str = "") -> str:
    """Writes an input box and safe outputs as the text of a `.vnnlib` file.

        X in the box,    not all of  matrix @ Y + offset > 0

    Args:
        region: of inputs, of any shape; X_0, X_1, ... are its coordinates in C order.
        constraints: `bnncert.certify.class_stays`, `outputs_within`, or rows each of one output, or
            of the difference of two.
        about: a comment at the head.

    Returns:
        The text, to be written to a file.

    Raises:
        TypeError: the region is no box.
        ValueError: an empty or an unbounded one; a row that VNN-COMP's verifiers do not read.

    Cost: a line for each end.

    Source: Demarchi et al., FoMLAS 2023.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnncert.certify import class_stays
        >>> text = vnnlib(Box(jnp.zeros(1), jnp.ones(1)), class_stays(0, 2))
        >>> print(text.splitlines()[-1])
        (assert (or (and (>= Y_1 Y_0))))
    """
    if not isinstance(region, Box):
        raise TypeError(
            f"region is a {type(region).__name__}: VNN-LIB has boxes of inputs; give a bnncert.Box"
        )
    lower, upper = (np.asarray(end, np.float64).reshape(-1) for end in (region.lower, region.upper))
    if not (np.isfinite(lower).all() and np.isfinite(upper).all() and (lower <= upper).all()):
        raise ValueError("region is empty, or not bounded: give finite ends, lower <= upper")
    matrix, offset = (np.asarray(part, np.float64) for part in constraints)
    lines = [f"; {line}" for line in about.splitlines()]
    lines += [f"(declare-const X_{i} Real)" for i in range(lower.size)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(matrix.shape[1])]
    for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (>= X_{i} {_exact(low)}))", f"(assert (<= X_{i} {_exact(high)}))"]
    rows = enumerate(zip(matrix, offset, strict=True))
    broken = (_broken(place, row, number) for place, (row, number) in rows)
    lines.append(f"(assert (or {' '.join(f'(and {claim})' for claim in broken)}))")
    return "\n".join(lines) + "\n"


def _broken(place: int, row: np.ndarray, offset: float) -> str:
    """A row that is not positive: of one output against a number, or of two outputs."""
    (outputs,) = np.nonzero(row)
    values = row[outputs]
    if len(outputs) == 2 and offset == 0 and values[0] == -values[1]:
        more, less = outputs if values[0] > 0 else outputs[::-1]
        return f"(>= Y_{less} Y_{more})"
    if len(outputs) == 1 and abs(values[0]) == 1:
        relation, end = ("<=", -offset) if values[0] > 0 else (">=", offset)
        return f"({relation} Y_{outputs[0]} {_exact(end)})"
    raise ValueError(
        f"row {place} of the constraints is {row.tolist()} with the offset {offset:g}: VNN-COMP's "
        "verifiers read one output against a number (coefficient 1 or -1), or the difference of "
        "two (offset 0). Put other forms into the network's last layer"
    )


def _exact(value: float | Array) -> str:
    """All digits of a number: a double has finitely many."""
    text = format(Decimal(float(value)), "f")
    return text if "." in text else f"{text}.0"
