"""What may be proved of a box of weights: that it is safe, or that it is unsafe.

    safe      min over the box and the set of inputs of every row of C f(w, x) + d  > 0
    unsafe    max over the box of one row at one input                              < 0

The input and the row of an unsafe box come from an attack on one weight. Both are functions of the
ends of the box, compiled once for a network, a method and shapes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float
from numpy import ndarray

from bnncert import prior as priors
from bnncert.attack import pgd
from bnncert.bounds import bound
from bnncert.bounds.arithmetic import Rounding
from bnncert.bounds.methods import CROWN, AlphaCROWN, Method, method_of
from bnncert.certify.formal.boxes import Claim
from bnncert.posterior.leaves import unflatten
from bnncert.sets import Box, LpBall, Set
from bnncert.types import Apply, Key, Params


class Constraints(NamedTuple):
    """The outputs y that are safe: `matrix @ y + offset > 0` in every row.

    Attributes:
        matrix: shape (rows, outputs).
        offset: shape (rows,).

    Example:
        >>> positive = Constraints(matrix=np.eye(2), offset=np.zeros(2))  # both outputs are
        >>> bool((positive.matrix @ np.array([0.5, -0.1]) + positive.offset > 0).all())
        False
    """

    matrix: Float[ArrayLike, "rows outputs"]
    offset: Float[ArrayLike, " rows"]


def class_stays(label: int, num_classes: int) -> Constraints:
    """Calls safe that the logit of a class is the strict largest, y_label - y_j > 0 for all j.

    Args:
        label: the class, in 0..num_classes - 1.
        num_classes: C >= 2.

    Returns:
        `Constraints` of C - 1 rows, y_label - y_j.

    Raises:
        ValueError: no such class.

    Source: Wicker et al., UAI 2020 (a set of safe outputs by linear constraints).

    Example:
        >>> class_stays(1, 3).matrix.tolist()
        [[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]
    """
    if not 0 <= label < num_classes or num_classes < 2:
        raise ValueError(
            f"label = {label} of num_classes = {num_classes}: give one of 0..C - 1, with C >= 2."
        )
    unit = np.eye(num_classes, dtype=np.float32)
    return Constraints(
        np.delete(unit[label] - unit, label, axis=0), np.zeros(num_classes - 1, np.float32)
    )


def outputs_within(lower: Float[ArrayLike, "..."], upper: Float[ArrayLike, "..."]) -> Constraints:
    """Calls safe that every output lies strictly between two values.

    Args:
        lower: one for each output (a scalar for one output), finite.
        upper: likewise, above `lower`.

    Returns:
        `Constraints` of two rows for each output.

    Raises:
        ValueError: nothing lies between.

    Source: Wicker et al., UAI 2020 (a set of safe outputs by linear constraints).

    Example:
        >>> outputs_within(-1.0, 2.0).offset.tolist()
        [1.0, 2.0]
    """
    low, high = (np.atleast_1d(np.asarray(end, np.float32)) for end in (lower, upper))
    if not (np.isfinite([low, high]).all() and (low < high).all()):
        raise ValueError(
            f"lower = {lower} and upper = {upper}: give finite lower < upper, elementwise."
        )
    unit = np.eye(low.size, dtype=np.float32)
    return Constraints(np.concatenate([unit, -unit]), np.concatenate([-low, high]))


class Task(NamedTuple):
    """What a compiled bound on boxes of weights depends on, and is compiled anew for.

    Attributes:
        apply: `(params, x) -> outputs`.
        names: of the random leaves.
        method: of the bounds.
        rounding: of the bounds.
    """

    apply: Apply
    names: tuple[str, ...]
    method: str | Method
    rounding: Rounding


class Data(NamedTuple):
    """What a compiled bound on boxes of weights takes.

    Attributes:
        params: gives the deterministic leaves, and all shapes.
        x_set: the set of inputs.
        constraints: what is safe.
    """

    params: Params
    x_set: Any
    constraints: Constraints


def claim_at(key: Key, task: Task, data: Data, anchor: ndarray) -> Claim:
    """Chooses what to prove around an anchor: unsafe if an attack on it succeeds, else safe.

    Args:
        key: of the attack.
        task: what the compiled functions depend on.
        data: what they take.
        anchor: weights, flat.

    Returns:
        The claim, with the input and the row of an unsafe one as its witness.

    Cost: one attack of 20 steps and two restarts; the claim's value is one bound, its gradient
    another with its backward pass. Each is compiled once for a `Task` and shapes.
    """
    x, row, least = attacked(key, task, data, anchor)
    kind, rest, witness = _safe, (), ()
    if not float(least) > 0:
        kind, rest, witness = _unsafe, (x, row), (np.asarray(x), int(row))

    def value(lower: ndarray, upper: ndarray) -> float:
        return float(_value(kind, task, data, lower, upper, *rest))

    def gradient(lower: ndarray, upper: ndarray) -> tuple[ndarray, ndarray]:
        below, above = _gradient(kind, task, data, lower, upper, *rest)
        return np.asarray(below), np.asarray(above)

    return Claim(value, gradient, kind is _safe, witness)


def _rows(task: Task, data: Data, params: Params, x: Array) -> Array:
    """Computes C f(w, x) + d."""
    matrix, offset = (jnp.asarray(part) for part in data.constraints)
    return matrix @ jnp.ravel(task.apply(params, x)) + offset


def _params(task: Task, data: Data, weights: Array) -> Params:
    return priors.replace(data.params, unflatten(weights, data.params, task.names))


def _boxed(task: Task, data: Data, lower: Array, upper: Array) -> Params:
    """Makes params with a `Box` for each random leaf."""
    below, above = (unflatten(ends, data.params, task.names) for ends in (lower, upper))
    leaves = priors.named(data.params)
    boxes = [Box(below[n], above[n]) if n in below else leaf for n, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(data.params), boxes)


def _safe(task: Task, data: Data, lower: Array, upper: Array) -> Array:
    """Bounds the least row over all weights of the box and all inputs of the set from below."""
    bounded = bound(partial(_rows, task, data), task.method, rounding=task.rounding)
    return jnp.min(bounded(_boxed(task, data, lower, upper), data.x_set).lower)


def _unsafe(task: Task, data: Data, lower: Array, upper: Array, x: Array, row: Array) -> Array:
    """Bounds from below by how much a row is negative at one input, for all weights of the box."""

    def one(params: Params) -> Array:
        return _rows(task, data, params, x)[row]

    bounded = bound(one, task.method, rounding=task.rounding)
    return -bounded(_boxed(task, data, lower, upper)).upper


@partial(jax.jit, static_argnums=(0, 1))
def _value(claim: Any, task: Task, data: Data, lower: Array, upper: Array, *rest: Any) -> Array:
    return claim(task, data, lower, upper, *rest)


@partial(jax.jit, static_argnums=(0, 1))
def _gradient(
    claim: Any, task: Task, data: Data, lower: Array, upper: Array, *rest: Any
) -> tuple[Array, Array]:
    method = method_of(task.method)
    if isinstance(method, AlphaCROWN):  # a guide need not be optimised
        task = task._replace(method=CROWN(method.lower_slope))
    return jax.grad(claim, argnums=(2, 3))(task, data, lower, upper, *rest)


@partial(jax.jit, static_argnums=1)
def attacked(key: Key, task: Task, data: Data, weights: Array) -> tuple[Array, Array, Array]:
    """Searches a point of the set where the least row is small; gives it, the row and its value."""
    params, region = _params(task, data, weights), data.x_set
    dtype = region.center.dtype
    if isinstance(region, LpBall):
        # inside the ball also once it is rounded; the L2 ball inside that of L1
        size = region.center.size if region.p == 1 else 1
        stretch, p = region.eps * (1 - 1e-4) / jnp.sqrt(jnp.asarray(size, dtype)), 2
    else:
        stretch, p = region.radius, jnp.inf

    def point(z: Array) -> Array:
        x = region.center + stretch * z
        return x if isinstance(region, LpBall) else jnp.clip(x, region.lower, region.upper)

    def odds(params: Params, z: Array) -> Array:  # logits of a class "safe" and its rival
        least = jnp.min(_rows(task, data, params, point(z)))
        return jnp.stack([least, jnp.zeros_like(least)])

    one = jax.tree.map(lambda leaf: leaf[None], params)
    found = pgd(key, odds, one, jnp.zeros_like(region.center), 0, 1.0, restarts=2, p=p)
    x = point(found.x)
    values = _rows(task, data, params, x)
    row = jnp.argmin(values)
    return x, row, values[row]


def check_constraints(apply: Apply, params: Params, x_set: Set, rows: Constraints) -> None:
    """Raises a ValueError unless constraints have the shapes of the outputs."""
    size = jax.eval_shape(apply, params, x_set.center).size
    shapes = jnp.shape(rows.matrix), jnp.shape(rows.offset)
    if shapes != ((*(shapes[1] or (0,))[:1], size), shapes[0][:1]):
        raise ValueError(
            f"constraints of matrix {shapes[0]} and offset {shapes[1]} on {size} outputs: give "
            f"shapes (rows, {size}) and (rows,)."
        )
