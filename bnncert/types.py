"""Names for the kinds of thing that pass between modules.

A *model* is a pure function `apply(params, x)` of ONE example: no batch axis; callers `jax.vmap`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Key: TypeAlias = PRNGKeyArray
"""A typed JAX random key, as made by `jax.random.key`."""

if TYPE_CHECKING:  # type checkers know of no pytrees; the tests check the leaves
    _Arrays: TypeAlias = Any
else:
    _Arrays = PyTree[Array]

Params: TypeAlias = _Arrays
"""The weights of one network: any pytree of floating-point arrays."""

Stacked: TypeAlias = _Arrays
"""The weights of S networks, stacked: as `Params`, every leaf with a leading axis S."""

Prior: TypeAlias = Any
"""A pytree of the structure of the params: a `dist.Distribution` for a random leaf, else None."""

Apply: TypeAlias = Callable[[Params, Array], Array]
"""`apply(params, x) -> outputs` (logits, or a regression mean) for one example."""

Prepare: TypeAlias = Callable[[Params, Array], Params]
"""`prepare(params, x_batch) -> params`, once per draw of the weights: batch-norm statistics."""


class Threat(NamedTuple):
    """What the error model guards against; arrays, so that a schedule costs no recompilation.

    Attributes:
        eps: radii of the perturbation, in the units of the input: shape () or (K,).
        lam: weight of the clean term, in [0, 1].
        power: exponent of the mixture of probabilities: 0 is geometric, 1 arithmetic.

    Source: Wicker et al., AISTATS 2021, section 4; see `bnncert.likelihood`.

    Example:
        >>> Threat(eps=0.1, lam=0.5)
        Threat(eps=0.1, lam=0.5, power=0.0)
    """

    eps: Float[Array, "*radii"] | float
    lam: Float[Array, ""] | float = 0.5
    power: Float[Array, ""] | float = 0.0


@runtime_checkable
class LogLikelihood(Protocol):
    """A function that gives `log p(y | x, params)` in nats, for one datum.

    Args:
        key: a PRNG key, for what draws.
        params: the weights of one network.
        x: one input.
        y: its target.
        threat: the error model.

    Returns:
        A scalar, nats.

    Example:
        >>> from bnncert.likelihood import clean_categorical
        >>> isinstance(clean_categorical(lambda w, x: w @ x), LogLikelihood)
        True
    """

    def __call__(self, key: Key, params: Params, x: Array, y: Array, threat: Threat) -> Array: ...


class Batch(NamedTuple):
    """A minibatch; `mask` is 0 for the padding that fills the last one.

    Attributes:
        x: inputs, shape (batch, ...).
        y: targets, shape (batch, ...).
        mask: 1 for a datum, 0 for padding, shape (batch,).

    Example:
        >>> import jax.numpy as jnp
        >>> batch = Batch(jnp.zeros((3, 2)), jnp.array([0, 1, 0]), mask=jnp.array([1.0, 1.0, 0.0]))
        >>> batch.mask.sum().item()  # data; the last one pads
        2.0
    """

    x: Array
    y: Array
    mask: Float[Array, " batch"]


class Algorithm(NamedTuple):
    """An inference method: `init(key, params)`, `update(key, state, batch, threat)`, `posterior`.

    Attributes:
        init: `(key, params) -> state`, from initial weights.
        update: `(key, state, batch, threat) -> (state, info)`, one step; jit it.
        posterior: `state -> Posterior`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import bnncert as bc
        >>> w = jnp.zeros((2, 3))
        >>> loglik = bc.likelihood.clean_categorical(lambda w, x: w @ x)
        >>> options = {"num_data": 4, "optimizer": optax.sgd(0.1)}
        >>> method = bc.infer.map.build(loglik, bc.prior.normal(w), **options)
        >>> state = method.init(jax.random.key(0), w)
        >>> batch = Batch(jnp.ones((4, 3)), jnp.array([0, 1, 0, 1]), jnp.ones(4))
        >>> state, info = method.update(jax.random.key(1), state, batch, Threat(0.0))
        >>> method.posterior(state).num_samples
        1
    """

    init: Callable[[Key, Params], Any]
    update: Callable[[Key, Any, Batch, Threat], tuple[Any, Any]]
    posterior: Callable[[Any], "Posterior"]


@runtime_checkable
class Posterior(Protocol):
    """A distribution over `Params`, of `bnncert.posterior` or of one's own.

    `sample(key, n)` gives stacked params, every leaf (n, ...); `log_prob(params)` the log density
    of one network and `kl(prior)` KL(self || prior), in nats summed over weights; `moments()` the
    mean and the standard deviation of every weight.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnncert.posterior import MeanField
        >>> isinstance(MeanField(jnp.zeros(2), jnp.ones(2)), Posterior)
        True
    """

    def sample(self, key: Key, n: int) -> Stacked:
        """Draws n networks, stacked: every leaf (n, ...)."""
        ...

    def log_prob(self, params: Params) -> Float[Array, ""]:
        """Computes the log density of one network, in nats."""
        ...

    def kl(self, prior: Prior) -> Float[Array, ""]:
        """Computes KL(self || prior), in nats summed over weights."""
        ...

    def moments(self) -> tuple[Params, Params]:
        """Gives the mean and the standard deviation of every weight."""
        ...
