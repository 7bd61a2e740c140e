"""Probabilistic robustness: bounds on the mass of the weights that are safe over a set of inputs.

    P_safe(T, S) = Prob_{w ~ q}( f(w, x) in S for all x in T ),    S = { y : C y + d > 0 }

for a factorised Gaussian q and linear constraints, one a row. This is the *formal* tier: no draw of
weights stands for q. With disjoint boxes of weights (`bnncert.certify.formal.boxes`),

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

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy import ndarray

from bnncert import prior as priors
from bnncert.bounds.arithmetic import Rounding, arithmetic_of
from bnncert.bounds.methods import Method
from bnncert.certify.exact.decision import arithmetic_name
from bnncert.certify.formal import linear
from bnncert.certify.formal import mass as masses
from bnncert.certify.formal.boxes import Claim, Gaussian, Proof, search
from bnncert.certify.formal.claims import (
    Constraints,
    Data,
    Task,
    attacked,
    claim_at,
)
from bnncert.certify.formal.weights import leaves_of
from bnncert.certify.inputs import check_region
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
        >>> found = safety(key, apply, q, point, outputs_within(-1.0, 1.0), num_boxes=1)
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
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
    num_boxes: int = 16,
    rounds: int = 3,
    steps: int = 12,
    delta: float = 1e-4,
) -> Safety:
    """Certifies lower and upper bounds on P_safe under a factorised Gaussian posterior.

    By boxes of weights,

        P_safe >= sum of M(B) over boxes B with min over B x T of C f + d > 0 in every row
        P_safe <= 1 - sum of M(B) over boxes B with max over B of (C f(w, x*) + d)_k < 0

    and with `method="linear"` by bounds on the rows that are linear in the weights, of means E_j
    and Lipschitz constants L_j, which hold with probability 1 - delta together,

        P_safe >= 1 - delta - sum_j exp(-E_j^2 / (2 L_j^2))

    Boxes hold any function and answer for few weights; the others answer for many.

    Call it outside `jit`: masses are summed on the host. What it compiles is kept for the same
    `apply` and shapes, so define `apply` once.

    Args:
        key: a PRNG key: where boxes start and how the attack does; the bounds hold for any.
        apply: `(params, x) -> outputs` for one example; outputs are compared as one flat vector.
        posterior: a `MeanField`; leaves whose scale is None are fixed at `loc`.
        x_set: the set T, a `Box` or an `LpBall` of inputs for one example.
        constraints: the set S of safe outputs: `class_stays`, `outputs_within`, or `Constraints`;
            its numbers are rounded to the weights' dtype first.
        method: "linear": bounds linear in the weights, and no boxes; else of the bounds over
            boxes, as for `bnncert.bound`.
        rounding: as for `bnncert.bound`; "nearest" alone by "linear".
        num_boxes: parts of the space of weights that are examined, >= 1; with the same key, more
            never leave a wider gap between the bounds.
        rounds: of growing a box, with sides by the bound's derivatives after the first, >= 1.
        steps: of the bisection in each round, >= 1.
        delta: by "linear", the probability that some hidden unit leaves the interval that it is
            relaxed on, in (0, 1); what is proved is at most 1 - delta.

    Returns:
        A `Safety`. By "linear" it holds no boxes, and `inputs` and `rows` what the upper bound is
        of, where there is any below 1.

    Raises:
        TypeError: another posterior; x_set is not a set; leaves of different dtypes.
        ValueError: no random leaf, a scale that is not positive, bad counts; constraints that do
            not fit the outputs; as `bnncert.bound`. By "linear" also a delta out of range.
        UnsupportedPrimitiveError: as `bnncert.bound`; by "linear", a weight that is used twice.

    Cost: by "linear", an attack of 20 steps and a backward pass for each hidden unit, a few times;
    convolutions keep an array of the size of their weights for each. By boxes, num_boxes times an
    attack of 20 steps, rounds steps bounds and rounds of their gradients, twice at worst. Memory:
    one bound with its gradient, and 4 num_boxes P numbers.

    Source: Wicker et al., UAI 2020; Batten et al., AISTATS 2024, section 4.

    Example:
        >>> from bnncert.certify import outputs_within
        >>> q = MeanField({"w": jnp.zeros(1)}, {"w": jnp.ones(1)})
        >>> found = safety(
        ...     jax.random.key(0), lambda params, x: params["w"] * x, q,
        ...     Box(jnp.array([0.5]), jnp.array([1.0])), outputs_within(-1.0, 1.0), num_boxes=12,
        ... )                                             # P(-1 < w < 1) = 0.68269
        >>> round(found.lower, 4), round(found.upper, 4)
        (0.6827, 0.6827)
    """
    posterior = _mean_field(posterior)
    names = _check(posterior, x_set, num_boxes=num_boxes, rounds=rounds, steps=steps)
    gaussian = Gaussian(
        np.asarray(flatten(posterior.loc, names)),
        np.asarray(flatten(posterior.scale, names), np.float64),
    )
    dtype = gaussian.loc.dtype
    rows = Constraints(
        jnp.asarray(constraints.matrix, dtype), jnp.asarray(constraints.offset, dtype)
    )
    _check_constraints(apply, posterior.loc, x_set, rows)
    task = Task(apply, names, method, rounding)
    data = Data(posterior.loc, x_set, rows)
    if method == "linear":
        return _by_linear_bounds(key, task, data, gaussian, posterior, delta)
    draws = iter(range(2 * num_boxes + 2))

    def claims(anchor: ndarray) -> Claim:
        return claim_at(jax.random.fold_in(key, next(draws)), task, data, anchor)

    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    found = search(
        claims,
        gaussian,
        lambda: random.uniform(size=gaussian.loc.shape),
        num_boxes=num_boxes,
        rounds=rounds,
        steps=steps,
    )
    safe, unsafe = ([p for p in found if p.safe is kind] for kind in (True, False))
    safe_boxes, unsafe_boxes = (
        _weight_boxes(kind, posterior.loc, names, gaussian) for kind in (safe, unsafe)
    )
    shape = jnp.shape(x_set.center)
    inputs = [p.witness[0] for p in unsafe]
    return Safety(
        masses.total(safe_boxes.masses),
        masses.complement(unsafe_boxes.masses),
        safe_boxes,
        unsafe_boxes,
        np.stack(inputs) if inputs else np.zeros((0, *shape), dtype),
        np.array([p.witness[1] for p in unsafe], int),
        arithmetic_name(rounding, dtype, apply, posterior.loc, x_set.center),
    )


def _by_linear_bounds(
    key: Key, task: Task, data: Data, gaussian: Gaussian, posterior: MeanField, delta: float
) -> Safety:
    """Of all rows over the set, and of the row that an attack on the mean network breaks."""
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: give a probability in (0, 1), e.g. 1e-4.")
    how = linear.How("crown", arithmetic_of(task.rounding), delta)
    bounded = partial(linear.linear_margins, task.apply, how, data.params, leaves_of(posterior))
    # 1. The set is safe.
    everywhere = bounded(data.x_set, data.constraints)
    # 2. One row is violated at one point.
    x, row, least = attacked(key, task, data, gaussian.loc)
    upper = 1.0
    if float(least) < 0:
        matrix, offset = (-jnp.asarray(part)[row][None] for part in data.constraints)
        there = bounded(Box(x, x), Constraints(matrix, offset))
        upper = 1.0 - linear.mass(there, delta)
    found = upper < 1
    none = _weight_boxes([], posterior.loc, task.names, gaussian)
    dtype = gaussian.loc.dtype
    inputs = np.asarray(x)[None] if found else np.zeros((0, *np.shape(x)), dtype)
    rows = np.array([int(row)] if found else [], int)
    return Safety(
        linear.mass(everywhere, delta),
        upper,
        none,
        none,
        inputs,
        rows,
        arithmetic_name(task.rounding, dtype, task.apply, posterior.loc, x),
    )


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


def _check(posterior: MeanField, x_set: Any, **counts: int) -> tuple[str, ...]:
    """Checks what is given at the public edge, and names the random leaves."""
    check_region(x_set)
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: it must be at least 1.")
    check_structure(posterior.loc, posterior.scale, "scale")
    scales = {n: s for n, s in priors.named(posterior.scale).items() if s is not None}
    locs = priors.named(posterior.loc)
    if not scales:
        raise ValueError("no leaf of the posterior is random: bnncert.bound decides one network.")
    kinds = {jnp.result_type(locs[name]) for name in scales}
    if len(kinds) > 1:
        raise TypeError(f"random leaves have dtypes {sorted(map(str, kinds))}: give them one.")
    for name, scale in scales.items():
        if not (np.isfinite(locs[name]).all() and (np.asarray(scale) > 0).all()):
            raise ValueError(
                f"leaf {name!r}: loc must be finite and scale positive; None for a leaf that is "
                "deterministic."
            )
    return tuple(scales)


def _check_constraints(apply: Apply, params: Params, x_set: Set, rows: Constraints) -> None:
    size = jax.eval_shape(apply, params, x_set.center).size
    shapes = jnp.shape(rows.matrix), jnp.shape(rows.offset)
    if shapes != ((*(shapes[1] or (0,))[:1], size), shapes[0][:1]):
        raise ValueError(
            f"constraints of matrix {shapes[0]} and offset {shapes[1]} on {size} outputs: give "
            f"shapes (rows, {size}) and (rows,)."
        )
