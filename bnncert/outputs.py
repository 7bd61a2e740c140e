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
    """Makes an `apply` of one output for each class of one that may have one for two classes.

    Args:
        apply: `(params, x) -> outputs`, of shape (C,), C >= 2, or (1,) or () for two classes.
        outputs: "logits" or "probabilities".

    Returns:
        `(params, x) -> outputs (C,)`, which raises ValueError for outputs of another shape.

    Raises:
        ValueError: unknown outputs.

    Example:
        >>> classifier(lambda w, x: w * x, "probabilities")(jnp.array(0.5), jnp.array(0.5)).tolist()
        [0.75, 0.25]
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
    """Makes the `classifier`, with `look_at_ending` wherever it is evaluated.

    Args:
        apply: as for `classifier`.
        outputs: as for `classifier`.

    Returns:
        `(params, x) -> outputs (C,)`.

    Raises:
        ValueError: as `classifier`.

    Example:
        >>> watched(lambda w, x: w @ x, "logits")(jnp.eye(2), jnp.array([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    each = classifier(apply, outputs)

    def network(params: Params, x: Array) -> Float[Array, " classes"]:
        look_at_ending(apply, outputs, params, x, stacked=False)
        return each(params, x)

    return network


def logits_of(apply: Apply, outputs: str) -> Apply:
    """Makes `(params, x) -> logits (C,)` of the predictor that `apply` and `outputs` are.

    Args:
        apply: as for `classifier`.
        outputs: as for `classifier`.

    Returns:
        `(params, x) -> logits (C,)`: the logarithms, where outputs are probabilities.

    Raises:
        ValueError: as `classifier`.

    Example:
        >>> logits = logits_of(lambda w, x: w, "probabilities")
        >>> jax.nn.softmax(logits(jnp.array([0.25, 0.75]), jnp.ones(1))).round(4).tolist()
        [0.25, 0.75]
    """
    each = classifier(apply, outputs)
    return each if outputs == "logits" else lambda params, x: log(each(params, x))


def probabilities(values: Float[Array, "*shape"], outputs: str) -> Float[Array, "*shape"]:
    """Computes the probabilities that outputs of a `classifier` stand for.

    Args:
        values: outputs, classes last.
        outputs: "logits" or "probabilities".

    Returns:
        Probabilities of the same shape.

    Example:
        >>> probabilities(jnp.zeros(2), "logits").tolist()
        [0.5, 0.5]
    """
    return values if outputs == "probabilities" else jax.nn.softmax(values)


def log_probabilities(values: Float[Array, "*shape"], outputs: str) -> Float[Array, "*shape"]:
    """Computes the logarithm of `probabilities`, by `log` where these are the outputs.

    Args:
        values: outputs, classes last.
        outputs: "logits" or "probabilities".

    Returns:
        Nats, of the same shape.

    Example:
        >>> log_probabilities(jnp.array([0.0, 1.0]), "probabilities").round(1).tolist()[1]
        0.0
    """
    return log(values) if outputs == "probabilities" else jax.nn.log_softmax(values)


def log(p: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the logarithm of no less than the smallest normal number: its slope is finite.

    Args:
        p: probabilities.

    Returns:
        Nats; at least -87.4 in float32.

    Example:
        >>> print(f"{log(jnp.array(0.0)):.2f}")
        -87.34
    """
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


def tolerance(classes: int, dtype: jnp.dtype) -> float:
    """Computes how far normalised probabilities may be from [0, 1], and their sum from 1.

    Args:
        classes: number C of them.
        dtype: of the probabilities.

    Returns:
        (64 + 4 C) u, u the unit roundoff of the dtype.

    Example:
        >>> print(f"{tolerance(10, jnp.dtype('float32')):.1e}")
        6.2e-06
    """
    return (64 + 4 * classes) * 0.5 * float(jnp.finfo(dtype).eps)


def normalised(
    values: Float[Array, "*networks classes"], outputs: str
) -> Bool[Array, ""] | np.ndarray:
    """Says whether a `classifier`'s outputs at one input may be what they are said to be.

    Logits always may, but that probabilities are called logits is a warning.

    Args:
        values: of some networks.
        outputs: what they are said to be.

    Returns:
        True, or where values are traced whether they are.

    Raises:
        ValueError: they are known, and are not normalised.

    Example:
        >>> bool(normalised(jnp.array([[0.5, 0.5], [0.0, 1.0]]), "probabilities"))
        True
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

    Cost: one trace of apply; nothing is computed.

    Example:
        >>> apply = lambda w, x: jax.nn.softmax(w @ x)
        >>> with warnings.catch_warnings(record=True) as found:
        ...     warnings.simplefilter("always")
        ...     look_at_ending(apply, "logits", jnp.zeros((1, 2, 3)), jnp.zeros(3))
        >>> len(found)
        1
    """
    check_outputs(outputs)
    if outputs == "logits":
        first = samples
        if stacked:
            first = jax.eval_shape(lambda s: jax.tree.map(lambda leaf: leaf[0], s), samples)
        if ends_in_probabilities(apply, first, x):
            _warn("it ends in a softmax, a sigmoid, or a division by the sum")


def check_outputs(outputs: str) -> None:
    """Checks that outputs are of a known kind.

    Args:
        outputs: "logits" or "probabilities".

    Raises:
        ValueError: they are not.

    Example:
        >>> check_outputs("odds")
        Traceback (most recent call last):
        ValueError: outputs = 'odds': choose one of 'logits', 'probabilities'.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs = {outputs!r}: choose one of {', '.join(map(repr, OUTPUTS))}.")


def _seem_normalised(values: np.ndarray) -> bool:
    """Says whether all networks' outputs look normalised; zeros and ones alone may be anything."""
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
