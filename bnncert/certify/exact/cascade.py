"""Many points by several methods, each on the points that the cheaper ones leave open.

A decision that one method proves needs no other; most points of a robust posterior are proved by
intervals, and the time goes to the rest. What a cascade proves of a point is what the last method
that saw it proves, together with what the earlier ones do: it equals the best of its stages there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from tqdm.auto import tqdm

from bnncert._emptiness import holds, is_valid
from bnncert.bounds.arithmetic import Rounding
from bnncert.bounds.methods import METHODS, Method, method_of
from bnncert.certify.exact.decision import Decision, decision
from bnncert.certify.exact.joint import joint_decision
from bnncert.certify.inputs import num_samples
from bnncert.outputs import classifier, normalised
from bnncert.sets import Box, Set, check_set, is_concrete, is_set
from bnncert.types import Apply, Stacked

STAGES = (*METHODS, "joint")
"""Methods of a cascade: those of `bnncert.bound`, and `joint_decision` by CROWN."""


class Cascade(NamedTuple):
    """What a cascade proves of N points.

    Attributes:
        decision: a `Decision` whose leaves have a leading axis N.
        stage: for each point the place of the last method that saw it.

    Example:
        >>> sets = Box(jnp.array([[0.5], [0.6]]), jnp.array([[0.6], [0.7]]))
        >>> found = cascade(lambda w, x: w * x, jnp.array([[1.0, -1.0]]), sets, methods=("ibp",))
        >>> found.decision.margins.shape, found.stage.tolist()
        ((2, 2), [0, 0])
    """

    decision: Decision
    stage: Int[np.ndarray, " points"]


def cascade(
    apply: Apply,
    samples: Stacked,
    x_sets: Set,
    *,
    x: Array | None = None,
    outputs: str = "logits",
    methods: Sequence[str | Method] = ("ibp", "crown-ibp", "crown"),
    wanted: Bool[np.ndarray, " points"] | None = None,
    rounding: Rounding = "outward",
    batch_size: int = 64,
    progress: bool = False,
) -> Cascade:
    """Certifies the decisions of the posterior predictive over many sets of inputs.

        pi_c(x') - pi_j(x') >= max over the methods that saw the point of their lower bounds

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x_sets: a `Box` or an `LpBall` whose leaves have a leading axis N, e.g.
            `jax.vmap(lambda x: ball(x, eps))(xs)`.
        x: the nominal inputs, shape (N, ...); the sets' centers by default.
        outputs: "logits" or "probabilities", as for `decision`; "joint" takes logits.
        methods: of the bounds, cheap ones first: those of `bnncert.bound`, by name or as objects
            with options, and "joint".
        wanted: points to certify at all, e.g. those that are classified correctly, which only the
            first method then sees; all by default.
        rounding: as for `decision`.
        batch_size: points at once; the last batch is filled up.
        progress: shows a bar for each method.

    Returns:
        A `Cascade`.

    Raises:
        ValueError: an unknown method, or one named twice; no point, sets that are not a batch of
            those that apply takes, x or wanted for another number of points; an empty set, or an x
            outside its set; as `decision`.
        TypeError: x_sets is not a set; traced values (under `jit`); as `decision`.

    Source: Wicker et al., AISTATS 2021, section 6, by each method in turn.

    Cost: one compile a method, and each point by each method until one proves it. Memory: that of
    `batch_size` decisions. Not to be jitted: what is computed depends on what was proved.

    Example:
        >>> apply = lambda w, x: w * jnp.concatenate([x, -x])
        >>> from bnncert.sets import ball
        >>> sets = jax.vmap(lambda x: ball(x, 0.2))(jnp.array([[0.5], [0.1], [-0.3]]))
        >>> found = cascade(apply, jnp.array([[1.0], [2.0]]), sets, methods=("ibp", "crown"))
        >>> found.decision.robust.tolist(), found.stage.tolist()
        ([True, False, True], [0, 1, 0])
    """
    if not is_set(x_sets):
        raise TypeError(f"x_sets is a {type(x_sets).__name__}: give a batched Box or LpBall.")
    unknown = [m for m in methods if isinstance(m, str) and m not in STAGES]
    stages = [m if unknown or m == "joint" else method_of(m) for m in methods]
    if unknown or not methods or len(set(stages)) < len(stages):
        raise ValueError(f"methods = {tuple(methods)}: name each once, of {', '.join(STAGES)}.")
    if "joint" in methods and outputs == "probabilities":
        raise ValueError(f'methods = {tuple(methods)}: "joint" takes logits, not probabilities.')
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: at least one point at once.")
    number = _number_of_points(apply, samples, x_sets, x, wanted)
    inputs = x_sets.center if x is None else x
    _check_points(x_sets, inputs)
    one_point = jax.tree.map(lambda leaf: leaf[0], (samples, inputs))
    normalised(classifier(apply, outputs)(*one_point), outputs)  # later all is traced
    open_points = np.arange(number)
    stage = np.zeros(number, int)
    best: dict[str, np.ndarray] = {}
    said: set[str] = set()
    for place, method in enumerate(methods):
        if not len(open_points):
            break
        one = jax.jit(jax.vmap(stage_of(apply, method, rounding, outputs), (None, 0, 0)))
        with tqdm(
            total=len(open_points), desc=_name_of(method), unit="point", disable=not progress
        ) as bar:
            for start in range(0, len(open_points), batch_size):
                rows = open_points[start : start + batch_size]
                filled = np.resize(rows, min(batch_size, number))
                part = jax.tree.map(lambda leaf, i=filled: leaf[i], (x_sets, inputs))
                found: Decision = one(samples, *part)
                said.add(found.arithmetic)
                _keep(best, rows, number, place == 0, found)
                stage[rows] = place
                bar.update(len(rows))
        left = ~best["robust"] if wanted is None else ~best["robust"] & np.asarray(wanted)
        open_points = np.flatnonzero(left)
    fields = {name: jnp.asarray(value) for name, value in best.items()}
    probability = Box(fields.pop("lower"), fields.pop("upper"))
    arithmetic = said.pop() if len(said) == 1 else "real"
    return Cascade(Decision(**fields, probability=probability, arithmetic=arithmetic), stage)


def _name_of(method: str | Method) -> str:
    return method if isinstance(method, str) else repr(method)


def _check_points(x_sets: Set, inputs: Array) -> None:
    """Raises ValueError at a set that is empty or does not hold its input: `jit` would not."""
    valid, inside = jax.vmap(lambda s, x: (is_valid(s), holds(s, x)))(x_sets, inputs)
    for passed, what in ((valid, "is empty or not finite"), (inside, "does not hold its x")):
        if is_concrete(passed) and not np.all(passed):
            raise ValueError(
                f"x_sets: set {np.argmin(passed)} {what}; make them by bnncert.ball(x, eps), with "
                "eps >= 0 and an x that lies in clip (pixels in 0..255: divide them by 255)."
            )


def stage_of(
    apply: Apply,
    method: str | Method,
    rounding: Rounding = "outward",
    outputs: str = "logits",
) -> Callable[..., Decision]:
    """Makes `(samples, x_set, x) -> Decision` by one method of a cascade, for one point.

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        method: one of `STAGES`, or an object with options.
        rounding: as for `bnncert.certify.decision`.
        outputs: as for `bnncert.certify.decision`.

    Returns:
        The certificate, to be jitted and vmapped.

    Cost: a call costs one `bnncert.certify.decision`, or one `joint_decision`.
    """

    def certify(samples: Any, x_set: Set, x: Array) -> Decision:
        if method == "joint":
            return joint_decision(
                apply, samples, x_set, x=x, outputs=outputs, rounding=rounding,
            )  # fmt: skip
        return decision(
            apply, samples, x_set, x=x, outputs=outputs, method=method, rounding=rounding,
        )  # fmt: skip

    return certify


def _number_of_points(
    apply: Apply, samples: Stacked, x_sets: Set, x: Array | None, wanted: Any
) -> int:
    """Checks that all there is belongs to one batch of sets, and counts these."""
    num_samples(samples)
    given = {"x_sets": x_sets, "samples": samples, "x": x, "wanted": wanted}
    traced = [k for k, v in given.items() if not all(map(is_concrete, jax.tree.leaves(v)))]
    if traced:
        raise TypeError(
            f"{' and '.join(traced)}: traced values, under jit or vmap, but what a cascade "
            "computes depends on what was proved. Call it outside; what can be jitted is "
            "bnncert.certify.decision."
        )
    way = "give a batch, e.g. jax.vmap(lambda x: bnncert.ball(x, eps))(xs) with xs of (N, ...)"
    kind = type(x_sets).__name__
    shapes = {f"{kind}.{k}": jnp.shape(v) for k, v in vars(x_sets).items() if k != "p"}
    for name, shape in shapes.items():
        if not shape:
            raise ValueError(f"x_sets: {name} has shape (), no axis of points: {way}.")
    numbers = {shape[0] for shape in shapes.values()}
    if len(numbers) > 1 or numbers == {0}:
        raise ValueError(f"x_sets: {shapes}: no point, or not as many in each: {way}.")
    number = numbers.pop()
    check_set(jax.tree.map(lambda leaf: leaf[0], x_sets), "the first of x_sets")
    for name, value in (("x", x), ("wanted", wanted)):
        if value is not None and jnp.shape(value)[:1] != (number,):
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}, but there are {number} sets: one for each."
            )
    first, center = jax.eval_shape(
        lambda s, region: (jax.tree.map(lambda leaf: leaf[0], s), region.center[0]), samples, x_sets
    )
    try:
        jax.eval_shape(apply, first, center)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"x_sets make one point of shape {center.shape}, which apply does not take: {error}. "
            f"If this is a single set, {way}; for one point there is bnncert.certify.decision."
        ) from error
    return number


def _keep(
    best: dict[str, np.ndarray], rows: np.ndarray, number: int, first: bool, found: Decision
) -> None:
    """Puts what was found of some points with what earlier methods found of them, if any did."""
    values = {
        "predicted": found.predicted,
        "robust": found.robust,
        "margins": found.margins,
        "lower": found.probability.lower,
        "upper": found.probability.upper,
        "confidence": found.confidence,
    }
    merge = {"robust": np.logical_or, "margins": np.maximum, "lower": np.maximum,
             "upper": np.minimum}  # fmt: skip
    for name, value in values.items():
        new = np.asarray(value)[: len(rows)]
        if first:
            best.setdefault(name, np.zeros((number, *new.shape[1:]), new.dtype))[rows] = new
        elif name in merge:
            best[name][rows] = merge[name](best[name][rows], new)
