"""Probabilistic robustness: bounds on the mass of the weights that are safe over a set of inputs.

    P_safe(T, S) = Prob_{w ~ q}( f(w, x) in S for all x in T ),    S = { y : C y + d > 0 }

for a Gaussian q and linear constraints, one a row. This is the *formal* tier: no draw of weights
stands for q. Bounds linear in the weights (`bnncert.gaussian.margins`) have a mean E_j and a
Lipschitz constant L_j for each row,

    lower   1 - delta - sum of Phi(-E_j / L_j)
    upper   1 - the same for the opposite of one row at one point x* of T, found by an attack

With disjoint boxes of weights (`bnncert.certify.formal.boxes`), of a factorised q,

    lower   sum of M(B)       over boxes B with  min over B x T of C f + d  > 0       in every row
    upper   1 - sum of M(B)   over boxes B with  max over B of (C f(w, x*) + d)_k < 0

An unsafe box has *one* point x* of T, found by an attack on one weight, and one row k, which all of
its weights violate there (`bnncert.certify.formal.claims`). Masses (`bnncert.certify.formal.mass`)
are rounded down, of the very boxes that were bounded, and sums of them in the safe direction.

Arithmetic. With `rounding="outward"` a weight in a safe box keeps C f + d positive for the float32
network, and for the network in real arithmetic; w ~ q is a vector of real numbers, or those rounded
to float32. By "nearest" it is the network in real arithmetic, up to the rounding of the bounds.
Generators of normal numbers draw from q only nearly.

Gaussian boxes scale badly: with sides of 2 a standard deviations in each of P weights their mass is
(1 - 2 Q(a))^P; at P = 100,000 only a > 5 leaves any.

Source: Wicker et al., "Probabilistic safety for Bayesian neural networks", UAI 2020; Batten et al.,
AISTATS 2024.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy import ndarray

from bnncert import prior as priors
from bnncert.bounds.arithmetic import Rounding
from bnncert.bounds.methods import Method, method_of
from bnncert.certify.exact.decision import arithmetic_name
from bnncert.certify.formal import mass as masses
from bnncert.certify.formal.boxes import Claim, Gaussian, Proof, search
from bnncert.certify.formal.claims import (
    Constraints,
    Data,
    Task,
    attacked,
    check_constraints,
    claim_at,
)
from bnncert.certify.inputs import check_region
from bnncert.gaussian import Margins, margins
from bnncert.gaussian.weights import leaves_of
from bnncert.posterior import MeanField
from bnncert.posterior.leaves import check_structure, flatten, unflatten
from bnncert.sets import Box, Set
from bnncert.types import Apply, Key, Params, Posterior


class WeightBoxes(NamedTuple):
    """Disjoint boxes of weights and their masses.

    Attributes:
        boxes: a `Box` for each random leaf (the array for a deterministic one), params' structure;
            ends are stacked along a leading axis K.
        masses: under q, each rounded down; shape (K,), float64.

    Example:
        >>> boxes = {"w": Box(jnp.array([[-1.0]]), jnp.array([[1.0]]))}  # K = 1
        >>> found = WeightBoxes(boxes, np.array([masses.mass(-1.0, 1.0, 0.0, 1.0)]))
        >>> found.masses.round(4).tolist()
        [0.6827]
    """

    boxes: Params
    masses: Float[ndarray, " boxes"]


class Safety(NamedTuple):
    """What is proved about P_safe: `lower <= P_safe <= upper`.

    Attributes:
        lower: a float.
        upper: a float.
        safe: boxes of weights that are safe over the whole set.
        unsafe: boxes of weights that violate one row at one input.
        inputs: that input for each unsafe box, stacked.
        rows: that row for each unsafe box.
        arithmetic: of the network: "float32" (or the weights' dtype) by `rounding="outward"`;
            "real", up to rounding, by "nearest".

    Example:
        >>> from bnncert.certify import outputs_within
        >>> q = MeanField({"w": jnp.zeros(1)}, {"w": jnp.ones(1)})
        >>> key, point = jax.random.key(0), Box(jnp.ones(1), jnp.ones(1))
        >>> apply = lambda params, x: params["w"] * x
        >>> within = outputs_within(-1.0, 1.0)
        >>> found = safety(key, apply, q, point, within, method="ibp", num_boxes=1)
        >>> 0.6 < found.lower < 0.6827 < found.upper, found.arithmetic
        (True, 'float32')
    """

    lower: float
    upper: float
    safe: WeightBoxes
    unsafe: WeightBoxes
    inputs: Float[ndarray, "boxes ..."]
    rows: ndarray
    arithmetic: str


def safety(
    key: Key,
    apply: Apply,
    posterior: Posterior,
    x_set: Set,
    constraints: Constraints,
    *,
    method: str | Method | Sequence[str | Method] = "linear",
    rounding: Rounding = "outward",
    delta: float = 1e-3,
    rows: str | Method = "crown",
    num_boxes: int = 16,
    rounds: int = 3,
    steps: int = 12,
) -> Safety:
    """Certifies lower and upper bounds on P_safe under a Gaussian posterior.

    By bounds on the rows that are linear in the weights (`bnncert.gaussian.margins`), of means E_j
    and Lipschitz constants L_j, which hold with probability 1 - delta together,

        P_safe >= 1 - delta - sum_j Phi(-E_j / L_j)

    and by boxes of weights

        P_safe >= sum of M(B) over boxes B with min over B x T of C f + d > 0 in every row
        P_safe <= 1 - sum of M(B) over boxes B with max over B of (C f(w, x*) + d)_k < 0

    The first answer for any number of weights, boxes for few, and for any function of them.

    Call it outside `jit`: masses are summed on the host. What it compiles is kept for the same
    `apply` and shapes, so define `apply` once, and change nothing that it refers to. For many sets,
    `bnncert.gaussian.margins` is jitted and mapped.

    Args:
        key: a PRNG key: where boxes start and how the attack does; the bounds hold for any.
        apply: `(params, x) -> outputs` for one example; outputs are compared as one flat vector.
        posterior: a `MeanField`, or, by "linear", a `LowRank` or `Gaussian`; leaves that are not
            random are fixed at `loc`.
        x_set: the set T, a `Box` or an `LpBall` of inputs for one example.
        constraints: the set S of safe outputs: `class_stays`, `outputs_within`, or `Constraints`;
            its numbers are rounded to the weights' dtype first.
        method: "linear", bounds linear in the weights; else of the bounds over boxes, as for
            `bnncert.bound`; or several, whose best bounds are given.
        rounding: as for `bnncert.bound`.
        delta: by "linear", the probability that some hidden unit leaves the interval that it is
            relaxed on, in (0, 1); what is proved is at most 1 - delta.
        rows: by "linear", how the rows are bounded, as the method of `bnncert.gaussian.margins`.
        num_boxes: parts of the space of weights that are examined, >= 1; with the same key, more
            never leave a wider gap between the bounds.
        rounds: of growing a box, with sides by the bound's derivatives after the first, >= 1.
        steps: of the bisection in each round, >= 1.

    Returns:
        A `Safety`. By "linear" it holds no boxes, and `inputs` and `rows` are what the upper bound
        is of, where there is any below 1.

    Raises:
        TypeError: another posterior; x_set is not a set; leaves of different dtypes.
        ValueError: no random leaf, a scale that is not positive, bad counts, a delta out of range,
            no method; constraints that do not fit the outputs; as `bnncert.bound`.
        UnsupportedPrimitiveError: as `bnncert.bound`; by "linear", a weight that is used twice.

    Cost: by "linear", an attack of 20 steps and twice `bnncert.gaussian.margins`. By boxes,
    num_boxes times an attack of 20 steps, rounds steps bounds and rounds of their gradients, twice
    at worst. Memory: one bound with its gradient, and 4 num_boxes P numbers.

    Source: Wicker et al., UAI 2020; Batten et al., AISTATS 2024, section 4.

    Example:
        >>> from bnncert.certify import outputs_within
        >>> q = MeanField({"w": jnp.zeros(1)}, {"w": jnp.ones(1)})
        >>> within = Box(jnp.array([0.5]), jnp.array([1.0])), outputs_within(-1.0, 1.0)
        >>> for method in ("linear", "ibp"):                     # P(-1 < w < 1) = 0.68269
        ...     found = safety(
        ...         jax.random.key(0), lambda params, x: params["w"] * x, q, *within,
        ...         method=method, num_boxes=12,
        ...     )
        ...     print(f"{found.lower:.4f} {found.upper:.4f}")
        0.5756 1.0000
        0.6827 0.6827
    """
    methods = _methods(method)
    boxes = [m for m in methods if m != "linear"]
    names = _check(posterior, x_set, num_boxes=num_boxes, rounds=rounds, steps=steps)
    q: Any = _mean_field(posterior) if boxes else posterior
    loc = np.asarray(flatten(q.loc, names))
    wanted = Constraints(
        jnp.asarray(constraints.matrix, loc.dtype), jnp.asarray(constraints.offset, loc.dtype)
    )
    check_constraints(apply, q.loc, x_set, wanted)
    data = Data(q.loc, x_set, wanted)
    search_for = Search(num_boxes, rounds, steps)
    found = [
        _by_linear_bounds(key, Task(apply, names, m, rounding), data, q, (rows, delta))
        if m == "linear"
        else _by_boxes(key, Task(apply, names, m, rounding), data, q, search_for)
        for m in methods
    ]
    *_, best = sorted(found, key=lambda result: (len(result.safe.masses), -result.upper))
    return best._replace(
        lower=max(result.lower for result in found), upper=min(result.upper for result in found)
    )


class Search(NamedTuple):
    """Says how many boxes are looked for, and how long each (`safety`)."""

    num_boxes: int
    rounds: int
    steps: int


def _by_boxes(key: Key, task: Task, data: Data, q: MeanField, options: Search) -> Safety:
    """Bounds P_safe by disjoint boxes of weights."""
    gaussian = Gaussian(
        np.asarray(flatten(q.loc, task.names)), np.asarray(flatten(q.scale, task.names), np.float64)
    )
    draws = iter(range(2 * options.num_boxes + 2))

    def claims(anchor: ndarray) -> Claim:
        return claim_at(jax.random.fold_in(key, next(draws)), task, data, anchor)

    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    found = search(
        claims,
        gaussian,
        lambda: random.uniform(size=gaussian.loc.shape),
        **options._asdict(),
    )
    safe, unsafe = ([p for p in found if p.safe is kind] for kind in (True, False))
    safe_boxes, unsafe_boxes = (
        _weight_boxes(kind, q.loc, task.names, gaussian) for kind in (safe, unsafe)
    )
    shape, dtype = jnp.shape(data.x_set.center), gaussian.loc.dtype
    inputs = [p.witness[0] for p in unsafe]
    return Safety(
        masses.total(safe_boxes.masses),
        masses.complement(unsafe_boxes.masses),
        safe_boxes,
        unsafe_boxes,
        np.stack(inputs) if inputs else np.zeros((0, *shape), dtype),
        np.array([p.witness[1] for p in unsafe], int),
        arithmetic_name(task.rounding, dtype, task.apply, q.loc, data.x_set.center),
    )


def _by_linear_bounds(
    key: Key, task: Task, data: Data, posterior: Any, options: tuple[str | Method, float]
) -> Safety:
    """Bounds P_safe by all rows over the set, and by the row that an attack breaks."""
    bounded = partial(_margins, task.apply, (task.rounding, *options), posterior)
    # 1. The set is safe.
    lower = float(bounded(data.x_set, *data.constraints).probability())
    # 2. One row is violated at one point.
    loc = np.asarray(flatten(posterior.loc, task.names))
    x, row, least = attacked(key, task, data, loc)
    upper = 1.0
    if float(least) < 0:
        matrix, offset = (-jnp.asarray(part)[row][None] for part in data.constraints)
        upper = 1.0 - float(bounded(Box(x, x), matrix, offset).probability())
    found = upper < 1
    none = _weight_boxes([], posterior.loc, task.names, Gaussian(loc, np.ones(loc.shape)))
    return Safety(
        lower,
        upper,
        none,
        none,
        np.asarray(x)[None] if found else np.zeros((0, *np.shape(x)), loc.dtype),
        np.array([int(row)] if found else [], int),
        arithmetic_name(task.rounding, loc.dtype, task.apply, posterior.loc, x),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _margins(
    apply: Apply,
    options: tuple[Rounding, str | Method, float],
    posterior: Any,
    x_set: Set,
    *rows: Array,
) -> Margins:
    rounding, method, delta = options
    return margins(apply, posterior, x_set, *rows, method=method, rounding=rounding, delta=delta)


def _methods(method: Any) -> list[Any]:
    several = not isinstance(method, str) and isinstance(method, Sequence)
    methods = list(method) if several else [method]
    if not methods:
        raise ValueError("method is empty: name one, e.g. 'linear'.")
    return [m if m == "linear" else method_of(m) for m in methods]


def _weight_boxes(
    proofs: list[Proof], params: Params, names: tuple[str, ...], gaussian: Gaussian
) -> WeightBoxes:
    shape = (len(proofs), gaussian.loc.size)
    lower, upper = (
        np.array([getattr(p, end) for p in proofs], gaussian.loc.dtype).reshape(shape)
        for end in ("lower", "upper")
    )
    below, above = (
        jax.vmap(lambda ends: unflatten(ends, params, names))(jnp.asarray(side))
        for side in (lower, upper)
    )
    boxes = {name: Box(below[name], above[name]) for name in names}
    leaves = [boxes.get(name, leaf) for name, leaf in priors.named(params).items()]
    found = [masses.mass(p.lower, p.upper, *gaussian) for p in proofs]
    return WeightBoxes(jax.tree.unflatten(jax.tree.structure(params), leaves), np.array(found))


def _mean_field(posterior: Posterior) -> MeanField:
    if not isinstance(posterior, MeanField):
        raise TypeError(
            f"posterior is a {type(posterior).__name__}: weight boxes have a mass in closed form "
            "only under a factorised Gaussian, bnncert.posterior.MeanField. Any other can be drawn "
            "from: bnncert.certify.sampled_safety."
        )
    return posterior


def _check(posterior: Any, x_set: Any, **counts: int) -> tuple[str, ...]:
    """Checks what is given at the public edge, and names the random leaves."""
    check_region(x_set)
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: it must be at least 1.")
    if isinstance(posterior, MeanField):
        check_structure(posterior.loc, posterior.scale, "scale")
    leaves = leaves_of(posterior)
    if not leaves:
        raise ValueError("no leaf of the posterior is random: bnncert.bound decides one network.")
    kinds = {leaf.loc.dtype for leaf in leaves.values()}
    if len(kinds) > 1:
        raise TypeError(f"random leaves have dtypes {sorted(map(str, kinds))}: give them one.")
    for name, (loc, scale, factors) in leaves.items():
        own = factors is None
        if not (np.isfinite(loc).all() and ((scale > 0) if own else (scale >= 0)).all()):
            raise ValueError(
                f"leaf {name!r}: loc must be finite and scale positive; None for a leaf that is "
                "deterministic."
            )
        if not own and not np.isfinite(factors).all():
            raise ValueError(f"leaf {name!r}: its factors must be finite.")
    return tuple(leaves)
