"""Robust log-likelihoods: the error model that makes a posterior robust.

For a random radius eps ~ p_eps, the adversary moves the input inside the ball of radius eps:

    p_rob(y | x, w) = E_eps[ min_{|x' - x|_inf <= eps} softmax_y f(w, x') ]

It does not sum to 1 over y, so what follows from it is a generalised (Gibbs) posterior, not a Bayes
posterior of a normalised model. The minimum is bounded below by bound propagation,

    p_worst(eps) = 1 / (1 + sum_{j != y} exp ub_j),   ub_j >= max_{x'} f_j(w, x') - f_y(w, x')

with the *margin* f_j - f_y bounded as one function (the last affine layer merged in); where outputs
are probabilities already, p_y itself is bounded. A two-point p_eps (weight lam at 0) and K drawn
radii are both

    p_rob = M_power( p_clean, p_worst(eps_1), ..., p_worst(eps_K);  weights lam, (1 - lam)/K, ... )

the weighted power mean, inside the log. `power = 1` is the arithmetic mean, the expectation above.
It has a bad optimum: where p_worst is small against p_clean its share of the gradient is

    (1 - lam) p_worst / (lam p_clean + (1 - lam) p_worst)  ->  0

and a network pays log(1/lam) for ever, never becoming robust. `power = 0` is the geometric mean,
lam log p_clean + (1 - lam) mean_k log p_worst(eps_k): the shares are lam and 1 - lam whatever the
values. By Jensen it is a lower bound on the arithmetic one, so its ELBO is still a lower bound on
the robust evidence. Powers between anneal from one to the other.

Source: Wicker et al., "Bayesian Inference with Certifiable Adversarial Robustness", AISTATS 2021,
section 4; the geometric form as in the mixed cross-entropy of Gowal et al. 2018.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bnncert import gaussian
from bnncert.bounds import bound
from bnncert.bounds.margins import margin_bounds
from bnncert.bounds.methods import Method
from bnncert.outputs import classifier, log, log_probabilities, logits_of, watched
from bnncert.sets import Box, Set, ball, check_radius, is_concrete
from bnncert.types import Apply, Key, Params, Threat

Outputs = Callable[[Key, Params, Array, Array, Threat], Array]
"""`outputs(key, params, x, y, threat) -> (K,)`: all that a log-likelihood reads off a network."""


@dataclasses.dataclass(frozen=True)
class Composed:
    """A log-likelihood in two parts: what is read off a network, and its log-probability.

        log p(y | x, w) = log_prob(outputs(w), y),   Gauss-Newton matrix = J^T H J

    with J the Jacobian of the outputs in w and H the Hessian of -log_prob in the outputs. Called,
    it is the log-likelihood; apart, the parts give its Gauss-Newton matrix.

    Attributes:
        outputs: see `Outputs`; for robust likelihoods, bounds are among the K outputs.
        log_prob: `(outputs, y, threat) -> nats`, concave in the outputs for ordinary likelihoods
            and the geometric mixture (power 0), and not for other powers.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
    Neural Computation 2002 (the generalised Gauss-Newton matrix).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> square = Composed(
        ...     outputs=lambda key, params, x, y, threat: params * x,
        ...     log_prob=lambda outputs, y, threat: -((outputs - y) ** 2).sum() / 2,
        ... )
        >>> one = jnp.ones(1)
        >>> square(jax.random.key(0), 3 * one, one, one, Threat(0.0)).item()
        -2.0
    """

    outputs: Outputs
    log_prob: Callable[[Array, Array, Threat], Array]

    def __call__(self, key: Key, params: Params, x: Array, y: Array, threat: Threat) -> Array:
        """Returns the log-likelihood of one datum, in nats; arguments as a `LogLikelihood`'s."""
        return self.log_prob(self.outputs(key, params, x, y, threat), y, threat)


@dataclasses.dataclass(frozen=True)
class OfPosterior:
    """A log-likelihood of a whole posterior, which no weights are drawn for.

        log p(y | x, q),    in the place of E_q[ log p(y | x, w) ]

    It is called as a `LogLikelihood` is, with the posterior where that takes one network's params;
    `bnncert.infer.elbo` hands it the posterior, and so do the methods that climb the ELBO.

    Attributes:
        log_prob: `(posterior, x, y, threat) -> nats`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnncert.posterior import MeanField
        >>> at_mean = OfPosterior(lambda q, x, y, threat: -((q.loc * x - y) ** 2).sum())
        >>> one = jnp.ones(1)
        >>> at_mean(jax.random.key(0), MeanField(3 * one, one), one, one, Threat(0.0)).item()
        -4.0
    """

    log_prob: Callable[[Any, Array, Array, Threat], Array]

    def __call__(self, key: Key, params: Any, x: Array, y: Array, threat: Threat) -> Array:
        """Returns the log-likelihood of one datum, in nats; `params` is the posterior."""
        del key
        return self.log_prob(params, x, y, threat)


Attack = Callable[[Key, Apply, Params, Array, Array, Array], Any]
"""`attack(key, apply, samples, x, y, eps) -> result` with the attacked input in `result.x`."""


def continuous_threat(
    key: Key, radius: dist.Distribution, num_radii: int, power: float | Array = 0.0
) -> Threat:
    """Draws K radii from a continuous p_eps (Exponential, Rayleigh, Uniform, ...).

        p_rob = E_eps[ p_worst(eps) ]  ~  (1/K) sum_k p_worst(eps_k)     (power 1)

    Args:
        key: random key.
        radius: NumPyro distribution of a scalar radius >= 0, in the units of the input.
        num_radii: K, the number of radii; the cost of the likelihood grows with it.
        power: of the mixture.

    Returns:
        A `Threat` with `eps` of shape (K,) and lam = 0.

    Raises:
        ValueError: for a distribution of vectors or of negative radii, or num_radii < 1.

    Source: Wicker et al., AISTATS 2021, section 4.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> continuous_threat(jax.random.key(0), dist.Uniform(0.0, 0.1), 4).eps.shape
        (4,)
    """
    if num_radii < 1:
        raise ValueError(f"num_radii = {num_radii}: draw at least one radius.")
    if radius.batch_shape or radius.event_shape:
        raise ValueError(
            f"radius has shape {radius.batch_shape + radius.event_shape}: give a distribution of "
            "scalars."
        )
    eps = jnp.asarray(radius.sample(key, (num_radii,)))
    if is_concrete(eps) and bool((eps < 0).any()):
        raise ValueError(
            f"radius drew {eps}: radii must not be negative (a Normal? use a HalfNormal)."
        )
    return Threat(eps, jnp.zeros(()), jnp.asarray(power, eps.dtype))


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

        return jnp.concatenate([values, _per_radius(worst, threat).reshape(-1)])

    def log_prob(values: Array, y: Array, threat: Threat) -> Array:
        # Outputs of the network, and at each radius what `_worst` says.
        rows = values.reshape(1 + jnp.size(threat.eps), -1)
        worsts = jax.vmap(lambda row: _log_worst(row, y, outputs))(rows[1:])
        return _mixture(log_probabilities(rows[0], outputs)[y], worsts, threat)

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

        return jnp.concatenate([network(params, x), _per_radius(worst, threat).reshape(-1)])

    def log_prob(values: Array, y: Array, threat: Threat) -> Array:
        rows = values.reshape(1 + jnp.size(threat.eps), -1)
        each = log_probabilities(rows, outputs)[:, y]
        return _mixture(each[0], each[1:], threat)

    return Composed(read, log_prob)


def quantile_categorical(
    apply: Apply,
    *,
    depth: float = 3.0,
    method: str | Method = "ibp",
    clip: tuple[float, float] | None = None,
    delta: float = 1e-3,
) -> OfPosterior:
    """Makes the robust log-likelihood of a Gaussian posterior itself, which nothing is drawn for.

        log M_power( p(0), p(eps_1), ..., p(eps_K) ),    p(eps) = 1 / (1 + sum_{j != y} exp -m_j)

    with m_j = E_j - depth L_j, which the margin f_y - f_j lies above over the whole ball for a
    share of Phi(depth) of the posterior, or more, but for delta (`bnncert.gaussian.margins`). So
    where all m_j are positive, all margins are for a share of 1 - delta - (C - 1) Phi(-depth) at
    least. p(0) is of the ball of radius 0: the input.

    What is trained by it is certified as a whole (`bnncert.certify.safety`), without the noise of
    draws. It is no expected log-likelihood: what follows is a generalised posterior.

    Args:
        apply: `(params, x) -> logits (C,)` for one example; one logit z of two classes is (0, z).
        depth: how many Lipschitz constants below its mean a margin is taken at, >= 0.
        method: as for `bnncert.gaussian.margins`: "ibp" costs some 4 evaluations of the network.
        clip: `(low, high)`: the adversary stays in this range of values.
        delta: as for `bnncert.gaussian.margins`.

    Returns:
        An `OfPosterior` of a `bnncert.posterior.MeanField`, `LowRank` or `Gaussian`, with
        `threat.eps` of shape () or (K,); for `bnncert.infer.bbb`, `low_rank` and `elbo`.

    Raises:
        ValueError: a negative depth; when called: other outputs, or as `bnncert.gaussian.margins`.
        TypeError: when called with another posterior.

    Cost: 1 + K times `bnncert.gaussian.margins`.

    Source: Wicker et al., AISTATS 2021, section 4 (the mixture), with a bound of the posterior in
    the place of one of a draw.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnncert.posterior import MeanField
        >>> loglik = quantile_categorical(lambda w, x: w @ x)
        >>> x, y, threat = jnp.array([1.0, 0.0]), jnp.array(0), Threat(0.1, lam=0.0)
        >>> for scale in (1e-6, 0.1):                        # the margin is 0.8 at the mean
        ...     q = MeanField(jnp.eye(2), jnp.full((2, 2), scale))
        ...     print(f"{loglik(jax.random.key(0), q, x, y, threat):.4f}")
        -0.3711
        -0.5411
    """
    if not depth >= 0:
        raise ValueError(f"depth = {depth}: give a number that is not negative, e.g. 3.")
    network = watched(apply, "logits")

    def log_prob(q: Any, x: Array, y: Array, threat: Threat) -> Array:
        gaussian.leaves_of(q)  # raises for another posterior
        (classes,) = jax.eval_shape(network, q.loc, x).shape
        unit = jnp.eye(classes, dtype=jnp.result_type(x))
        rows = unit[y] - unit, jnp.zeros(classes, unit.dtype)

        def at(region: Set) -> Array:
            found = gaussian.margins(
                network, q, region, *rows, method=method, rounding="nearest", delta=delta
            )
            low = found.mean - depth * found.lipschitz
            return -jax.nn.logsumexp(jnp.where(jnp.arange(classes) == y, 0.0, -low))

        def worst(eps: Array) -> Array:
            return at(ball(x, jax.lax.stop_gradient(eps), clip=clip))

        return _mixture(at(Box(x, x)), _per_radius(worst, threat), threat)

    return OfPosterior(log_prob)


def robust_gaussian(
    apply: Apply,
    *,
    noise_scale: float,
    method: str | Method = "ibp",
    clip: tuple[float, float] | None = None,
) -> Composed:
    """Makes the certified robust log-likelihood of regression, y ~ N(f(w, x), noise_scale^2).

        p_worst(eps) = N( max(|u - y|, |y - l|); 0, noise_scale^2 ),   l <= f(w, x') <= u

    The worst case puts the mean at the end of its interval that is farther from y.

    Args:
        apply: `(params, x) -> mean`, any shape, for one example.
        noise_scale: standard deviation of the noise, in the units of y.
        method: of the bounds, as for `bnncert.bound`.
        clip: `(low, high)`: the adversary stays in this range of values.

    Returns:
        `loglik(key, params, x, y, threat)` in nats, summed over the outputs.

    Raises:
        ValueError: a noise scale that is not positive.

    Cost: one clean evaluation and K bounds (`bnncert.bound`).

    Source: Wicker et al., AISTATS 2021, section 4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loglik = robust_gaussian(lambda w, x: w * x, noise_scale=1.0)
        >>> datum = jnp.ones(1), jnp.ones(1), jnp.ones(1)  # the mean is right, and off by 0.5
        >>> for lam in (1.0, 0.0):
        ...     print(f"{loglik(jax.random.key(0), *datum, Threat(0.5, lam)):.4f}")
        -0.9189
        -1.0439
    """
    if not noise_scale > 0:
        raise ValueError(f"noise_scale = {noise_scale}: a standard deviation must be positive.")
    bounded = bound(apply, method)

    def outputs(key: Key, params: Params, x: Array, y: Array, threat: Threat) -> Array:
        del key

        def worst(eps: Array) -> Array:
            mean: Box = bounded(params, ball(x, jax.lax.stop_gradient(eps), clip=clip))
            return jnp.maximum(jnp.abs(mean.upper - y), jnp.abs(y - mean.lower)).reshape(-1)

        errors = (apply(params, x) - y).reshape(-1)
        return jnp.concatenate([errors, _per_radius(worst, threat).reshape(-1)])

    def log_prob(errors: Array, y: Array, threat: Threat) -> Array:
        del y  # the errors are from it already
        rows = errors.reshape(1 + jnp.size(threat.eps), -1)
        each = dist.Normal(0.0, noise_scale).log_prob(rows).sum(1)
        return _mixture(each[0], each[1:], threat)

    return Composed(outputs, log_prob)


def log_power_mean(
    logs: Float[Array, " n"], weights: Float[Array, " n"], power: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Computes the logarithm of a weighted power mean from the logarithms of its terms.

        log ( sum_i w_i p_i^power )^(1/power);    at power 0  sum_i w_i log p_i

    Stable for every power in [0, 1]: through log1p and expm1 where the sum is near 1 (a small
    power, or nearly all weight on the largest), elsewhere as a log-sum-exp.

    Args:
        logs: log p_i, in nats.
        weights: non-negative, of sum 1.
        power: 0 geometric, 1 arithmetic.

    Returns:
        A scalar, nats.

    Example:
        >>> import jax.numpy as jnp
        >>> logs, weights = jnp.log(jnp.array([1.0, 0.25])), jnp.array([0.5, 0.5])
        >>> [f"{jnp.exp(log_power_mean(logs, weights, power)):.3f}" for power in (0.0, 1.0)]
        ['0.500', '0.625']
    """
    top = jax.lax.stop_gradient(jnp.max(logs))
    below = logs - top
    geometric = jnp.sum(weights * below)
    safe = jnp.where(power > 0, power, 1.0)
    scaled = safe * below
    excess = jnp.sum(weights * jnp.expm1(scaled))  # of the sum over 1, in [-1, 0]
    near = excess > -0.5
    # Each branch sees harmless values where the other is taken: no NaN reaches a gradient.
    by_log1p = jnp.log1p(jnp.where(near, excess, 0.0))
    gone = jnp.max(jnp.where(weights > 0, logs, -jnp.inf)) == -jnp.inf  # a mean of zeros
    by_sum = jax.nn.logsumexp(jnp.where(near | gone, 0.0, scaled), b=weights)
    mean = jnp.where(near, by_log1p, jnp.where(gone, -jnp.inf, by_sum)) / safe
    return top + jnp.where(power > 0, mean, geometric)


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


def _mixture(clean: Array, worsts: Array, threat: Threat) -> Array:
    for name, value in (("lam", threat.lam), ("power", threat.power)):
        # NumPy: under `jit`, JAX would stage a comparison of known numbers too.
        if is_concrete(value) and not 0 <= np.asarray(value) <= 1:
            raise ValueError(f"threat.{name} = {value}: it must be in [0, 1].")
    lam, power = jax.lax.stop_gradient((jnp.asarray(threat.lam), jnp.asarray(threat.power)))
    count = worsts.shape[0]
    worsts = jnp.where(lam < 1, worsts, clean)  # -inf does not count either
    weights = jnp.concatenate([lam[None], jnp.full((count,), (1 - lam) / count)])
    logs = jnp.concatenate([clean[None], worsts])
    return log_power_mean(logs, weights, power)


def _per_radius(worst: Callable[[Array], Array], threat: Threat) -> Array:
    """Stacks the worst case at each radius, shape (K,); one radius costs no extra axis."""
    eps = jnp.asarray(threat.eps)
    if eps.ndim > 1:
        raise ValueError(f"threat.eps has shape {eps.shape}: give one radius, or K of shape (K,).")
    check_radius(threat.eps, "threat.eps")
    # At lam = 1 no worst case counts: an overflow there must not reach the gradient as 0 * inf.
    eps = jnp.where(jnp.asarray(threat.lam) < 1, eps, jnp.zeros_like(eps))
    return worst(eps)[None] if eps.ndim == 0 else jax.vmap(worst)(eps)
