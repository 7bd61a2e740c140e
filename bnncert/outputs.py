"""What a classifier's `apply` returns, and so which predictor it is.

    outputs            C numbers                one number, of two classes
    "logits"           z:  p = softmax z        z:  p = softmax (0, z)
    "probabilities"    p, as they are           q:  p = (1 - q, q)

What is deployed is the average over samples, pi = mean_s p(w_s, x). The two are different
predictors of the same numbers: a softmax of probabilities, which lie in [0, 1], is nearly uniform,
and the class that its average over networks chooses need not be that of their own average.

Probabilities are *normalised*: in [0, 1], of sum 1, up to (64 + 4 C) u, with u the unit roundoff;
that is more than a softmax computed in their dtype is off by, and less than what a difference of
two averages gives way by (`bnncert.certify.exact.decision`). It is looked at where a certificate
has the outputs at the nominal input, and is a promise elsewhere. Their logarithms, of no less than
the smallest normal number, are logits of the same predictor: softmax log p = p.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bnncert.bounds.tracing.endings import ends_in_probabilities
from bnncert.bounds.tracing.randomness import advised
from bnncert.sets import is_concrete
from bnncert.types import Apply, Params

OUTPUTS = ("logits", "probabilities")
_NEAR = 1e-3  # of 1: a sum of C numbers that are meant as probabilities


def classifier(apply: Apply, outputs: str) -> Apply:
    """`apply` with one output for each class, where it may have one for two classes.

    Args:
        apply: `(params, x) -> outputs`, of shape (C,), C >= 2, or (1,) or () for two classes.
        outputs: "logits" or "probabilities".

    Returns:
        `(params, x) -> outputs (C,)`, which raises ValueError for outputs of another shape.

    Raises:
        ValueError: unknown outputs.
    """
    check_outputs(outputs)

    def each(params: Params, x: Array) -> Float[Array, " classes"]:
        with advised():
            found = apply(params, x)
        if found.ndim > 1 or found.size < 1:
            raise ValueError(
                f"apply returned shape {found.shape} for one example; it must return {outputs} "
                "(C,) of C >= 2 classes, or one number of two classes. x is one example, without "
                "a batch axis."
            )
        if found.size > 1:
            return found
        one = found.reshape(1)
        return jnp.concatenate([jnp.zeros_like(one) if outputs == "logits" else 1 - one, one])

    return each


def watched(apply: Apply, outputs: str) -> Apply:
    """`classifier`, with `look_at_ending` wherever it is evaluated."""
    each = classifier(apply, outputs)

    def network(params: Params, x: Array) -> Float[Array, " classes"]:
        look_at_ending(apply, outputs, params, x, stacked=False)
        return each(params, x)

    return network


def logits_of(apply: Apply, outputs: str) -> Apply:
    """`(params, x) -> logits (C,)` of the predictor that `apply` and `outputs` are.

    Args:
        apply: as for `classifier`.
        outputs: as for `classifier`.

    Raises:
        ValueError: as `classifier`.
    """
    each = classifier(apply, outputs)
    return each if outputs == "logits" else lambda params, x: log(each(params, x))


def probabilities(values: Float[Array, "*shape"], outputs: str) -> Float[Array, "*shape"]:
    """The probabilities that outputs of a `classifier`, classes last, stand for."""
    return values if outputs == "probabilities" else jax.nn.softmax(values)


def log_probabilities(values: Float[Array, "*shape"], outputs: str) -> Float[Array, "*shape"]:
    """The logarithm of `probabilities`, by `log` where these are the outputs."""
    return log(values) if outputs == "probabilities" else jax.nn.log_softmax(values)


def log(p: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The logarithm of no less than the smallest normal number: finite, and its gradient too."""
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


def tolerance(classes: int, dtype: jnp.dtype) -> float:
    """How far normalised probabilities may be from [0, 1], and their sum from 1."""
    return (64 + 4 * classes) * 0.5 * float(jnp.finfo(dtype).eps)


def normalised(
    values: Float[Array, "*networks classes"], outputs: str
) -> Bool[Array, ""] | np.ndarray:
    """Whether a `classifier`'s outputs at one input may be what they are said to be.

    Logits always may, but that probabilities are called logits is a warning.

    Args:
        values: of some networks.
        outputs: what they are said to be.

    Returns:
        True, or where values are traced whether they are.

    Raises:
        ValueError: they are known, and are not normalised.
    """
    known = is_concrete(values)
    if outputs == "logits":
        if known and _seem_normalised(np.asarray(values, np.float64)):
            _warn("its outputs at the nominal input are in [0, 1] and add up to 1")
        return np.asarray(True)
    slack = tolerance(values.shape[-1], values.dtype)
    total = values.sum(-1)
    inside = (values >= -slack) & (values <= 1 + slack)
    valid = jnp.all(inside) & jnp.all(jnp.abs(total - 1) <= slack)
    if known and not bool(valid):
        flat = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
        worst = flat[
            np.argmax(np.abs(flat.sum(-1) - 1) + np.abs(flat - np.clip(flat, 0, 1)).sum(-1))
        ]
        raise ValueError(
            f'outputs="probabilities", but apply returned {worst} for one network, of sum '
            f"{worst.sum():.6g}: they must be in [0, 1] and add up to 1, up to {slack:.1e}. "
            'Return p / p.sum(); what a softmax is yet to be taken of is outputs="logits".'
        )
    return valid


def look_at_ending(
    apply: Apply, outputs: str, samples: Any, x: Any, *, stacked: bool = True
) -> None:
    """Warns where outputs are said to be logits, and the trace of apply ends in probabilities.

    Args:
        apply: the user's own.
        outputs: what its outputs are said to be.
        samples: stacked weights, or their shapes and dtypes.
        x: one input, or its shape and dtype.
        stacked: whether samples are; else the weights of one network.

    Raises:
        ValueError: unknown outputs.
    """
    check_outputs(outputs)
    if outputs == "logits":
        first = samples
        if stacked:
            first = jax.eval_shape(lambda s: jax.tree.map(lambda leaf: leaf[0], s), samples)
        if ends_in_probabilities(apply, first, x):
            _warn("it ends in a softmax, a sigmoid, or a division by the sum")


def check_outputs(outputs: str) -> None:
    """Raises ValueError unless outputs are of a known kind."""
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs = {outputs!r}: choose one of {', '.join(map(repr, OUTPUTS))}.")


def _seem_normalised(values: np.ndarray) -> bool:
    """Whether all networks' outputs look it; zeros and ones alone may be anything."""
    inside = ((values >= 0) & (values <= 1)).all() and (np.abs(values.sum(-1) - 1) < _NEAR).all()
    return bool(inside and not np.isin(values, (0, 1)).all())


def _warn(why: str) -> None:
    warnings.warn(
        f"apply seems to return probabilities: {why}. Its outputs are taken as logits, so that "
        "another predictor, the softmax of probabilities, is looked at. Give "
        'outputs="probabilities", or return what comes before.',
        UserWarning,
        stacklevel=4,
    )
