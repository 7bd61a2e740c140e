"""What a log-likelihood is made of: what is read off a network, and its log-probability."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

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
