"""Log-likelihoods of classification: clean, robust by bounds, certified, and by an attack.

log M_power( p_clean, p_worst(eps_1), ..., p_worst(eps_K) ),    p_worst by bounds or an attack
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds import bound
from bnncert.bounds.margins import margin_bounds
from bnncert.bounds.methods import Method
from bnncert.likelihood.mixture import mixture, per_radius
from bnncert.likelihood.parts import Attack, Composed
from bnncert.outputs import classifier, log, log_probabilities, logits_of, watched
from bnncert.sets import Set, ball
from bnncert.types import Apply, Key, Params, Threat


def clean_categorical(apply: Apply, *, outputs: str = "logits") -> Composed:
    """Makes the ordinary log-likelihood of classification; the threat is not used.

        log p(y | x, w) = log softmax_y f(w, x)

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        outputs: what apply returns: "logits", one of two classes z being (0, z), or
            "probabilities" (`bnncert.outputs`), whose logarithm is cut off at the smallest normal
            number, -87 nats in float32, here and in what is bounded.

    Returns:
        `loglik(key, params, x, y, threat)` in nats.

    Raises:
        ValueError: unknown outputs; when called: outputs of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loglik = clean_categorical(lambda w, x: w @ x)
        >>> datum = jnp.eye(2), jnp.array([0.0, 0.0]), jnp.array(1)
        >>> print(f"{loglik(jax.random.key(0), *datum, Threat(0.1)):.4f}")
        -0.6931
    """
    network = watched(apply, outputs)
    return Composed(
        lambda key, params, x, y, threat: network(params, x),
        lambda values, y, threat: log_probabilities(values, outputs)[y],
    )


def robust_categorical(
    apply: Apply,
    *,
    outputs: str = "logits",
    method: str | Method = "ibp",
    clip: tuple[float, float] | None = None,
) -> Composed:
    """Makes the certified robust log-likelihood of classification.

        log M_power( p_clean, p_worst(eps_1), ..., p_worst(eps_K) )

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        outputs: as for `clean_categorical`. Logits are bounded more tightly.
        method: of the bounds, as for `bnncert.bound`.
        clip: `(low, high)`: the adversary stays in this range of values.

    Returns:
        `loglik(key, params, x, y, threat)` in nats, with `threat.eps` of shape () or (K,). lam = 1
        gives the ordinary log-likelihood, lam = 0 that of the worst case alone. lam, power and eps
        are not differentiated: they are scheduled, not learned. Where the ball is traced and empty
        (x outside `clip`, a negative radius) the worst case has log-probability -inf.

    Raises:
        ValueError, UnsupportedPrimitiveError: as `bnncert.bound`.

    Cost: one clean evaluation and K bounds (`bnncert.bound`; "ibp" of a network in which affine
    operations do not follow one another: 2 to 3 evaluations each, and its margins).

    Source: Wicker et al., AISTATS 2021, section 4; the mixture of logarithms (power 0), Gowal et
    al. 2018.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loglik = robust_categorical(lambda w, x: w @ x)
        >>> datum = jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array(0)
        >>> for lam in (1.0, 0.5, 0.0):  # the margin is 1, and 0.8 at worst
        ...     print(f"{loglik(jax.random.key(0), *datum, Threat(0.1, lam)):.4f}")
        -0.3133
        -0.3422
        -0.3711
    """
    network = watched(apply, outputs)
    bounded = _worst(classifier(apply, outputs), outputs, method)

    def read(key: Key, params: Params, x: Array, y: Array, threat: Threat) -> Array:
        del key
        values = network(params, x)

        def worst(eps: Array) -> Array:
            return bounded(params, ball(x, jax.lax.stop_gradient(eps), clip=clip), y)

        return jnp.concatenate([values, per_radius(worst, threat).reshape(-1)])

    def log_prob(values: Array, y: Array, threat: Threat) -> Array:
        # Outputs of the network, and at each radius what `_worst` says.
        rows = values.reshape(1 + jnp.size(threat.eps), -1)
        worsts = jax.vmap(lambda row: _log_worst(row, y, outputs))(rows[1:])
        return mixture(log_probabilities(rows[0], outputs)[y], worsts, threat)

    return Composed(read, log_prob)


def certified_categorical(
    apply: Apply,
    *,
    outputs: str = "logits",
    method: str | Method = "ibp",
    clip: tuple[float, float] | None = None,
) -> Composed:
    """Makes a lower bound on the log-likelihood of the worst case.

        -log(1 + sum_{j != y} exp ub_j)  <=  log min_{x'} softmax_y f(w, x')

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        outputs: as for `clean_categorical`. Logits are bounded more tightly.
        method: of the bounds, as for `bnncert.bound`.
        clip: `(low, high)`: the adversary stays in this range of values.

    Returns:
        `loglik(key, params, x, y, threat)` in nats; `threat.eps` is one radius.

    Raises:
        ValueError, UnsupportedPrimitiveError: as `bnncert.bound`; several radii, when called.

    Cost: one bound (`bnncert.bound`).

    Source: Wicker et al., AISTATS 2021, section 4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loglik = certified_categorical(lambda w, x: w @ x)
        >>> datum = jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array(0)
        >>> print(f"{loglik(jax.random.key(0), *datum, Threat(0.1)):.4f}")  # the margin is 0.8
        -0.3711
    """
    bounded = _worst(watched(apply, outputs), outputs, method)

    def read(key: Key, params: Params, x: Array, y: Array, threat: Threat) -> Array:
        del key
        if jnp.ndim(threat.eps) > 0:
            raise ValueError(
                f"threat.eps has shape {jnp.shape(threat.eps)}: this is the worst case at one "
                "radius; for K of them use robust_categorical."
            )
        return bounded(params, ball(x, jax.lax.stop_gradient(threat.eps), clip=clip), y)

    return Composed(read, lambda worst, y, threat: _log_worst(worst, y, outputs))


def attacked_categorical(apply: Apply, attack: Attack, *, outputs: str = "logits") -> Composed:
    """Makes the robust log-likelihood with the worst case *found* by an attack.

        log M_power( p_clean, p_attacked(eps_1), ..., p_attacked(eps_K) )

    It is adversarial training. An upper bound on the true worst case: nothing is certified.

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        attack: e.g. `partial(bnncert.attack.pgd, steps=7, clip=(0.0, 1.0))`; it is given logits of
            the same predictor, whatever the outputs.
        outputs: as for `clean_categorical`.

    Returns:
        `loglik(key, params, x, y, threat)` in nats, as `robust_categorical`; gradients reach the
        weights at the attacked input, not through the attack.

    Raises:
        ValueError: unknown outputs; when called, as the attack.

    Cost: 1 + K evaluations and K attacks on one network.

    Source: Madry et al., ICLR 2018, equation 2.1 (training at the points of an attack).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnncert.attack import pgd
        >>> loglik = attacked_categorical(lambda w, x: w @ x, pgd)
        >>> datum = jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array(0)
        >>> print(f"{loglik(jax.random.key(0), *datum, Threat(0.1, lam=0.0)):.4f}")
        -0.3711
    """
    network, attacked = watched(apply, outputs), logits_of(apply, outputs)

    def read(key: Key, params: Params, x: Array, y: Array, threat: Threat) -> Array:
        fixed = jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf[None], params))

        def worst(eps: Array) -> Array:
            found = jax.lax.stop_gradient(attack(key, attacked, fixed, x, y, eps).x)
            empty = jnp.any(jnp.isnan(found))  # no point lies in an empty set
            values = network(params, jnp.where(empty, x, found))
            least = 0.0 if outputs == "probabilities" else -jnp.inf
            impossible = jnp.where(jnp.arange(values.shape[-1]) == y, least, 0.0)
            return jnp.where(empty, impossible, values)

        return jnp.concatenate([network(params, x), per_radius(worst, threat).reshape(-1)])

    def log_prob(values: Array, y: Array, threat: Threat) -> Array:
        rows = values.reshape(1 + jnp.size(threat.eps), -1)
        each = log_probabilities(rows, outputs)[:, y]
        return mixture(each[0], each[1:], threat)

    return Composed(read, log_prob)


def _worst(
    network: Apply, outputs: str, method: str | Method
) -> Callable[[Params, Set, Array], Array]:
    """Makes `(params, region, y) -> (C,)` of which `_log_worst` gives log min p_y.

    Upper bounds on the margins f_j - f_y of logits, or lower bounds on probabilities.
    """
    if outputs == "logits":
        margins = margin_bounds(network, method)
        return lambda params, region, y: margins(params, region, y).upper
    bounded = bound(network, method)
    return lambda params, region, y: bounded(params, region).lower


def _log_worst(values: Array, y: Array, outputs: str) -> Array:
    # Margins: row y is exactly 0, the 1 of the formula.
    return -jax.nn.logsumexp(values) if outputs == "logits" else log(values)[y]
