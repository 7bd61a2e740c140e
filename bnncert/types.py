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
    """

    eps: Float[Array, "*radii"] | float
    lam: Float[Array, ""] | float = 0.5
    power: Float[Array, ""] | float = 0.0


@runtime_checkable
class LogLikelihood(Protocol):
    """`log p(y | x, params)` in nats, for one datum."""

    def __call__(self, key: Key, params: Params, x: Array, y: Array, threat: Threat) -> Array: ...


class Batch(NamedTuple):
    """A minibatch; `mask` is 0 for the padding that fills the last one.

    Attributes:
        x: inputs, shape (batch, ...).
        y: targets, shape (batch, ...).
        mask: 1 for a datum, 0 for padding, shape (batch,).
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
    """

    init: Callable[[Key, Params], Any]
    update: Callable[[Key, Any, Batch, Threat], tuple[Any, Any]]
    posterior: Callable[[Any], "Posterior"]


@runtime_checkable
class Posterior(Protocol):
    """A distribution over `Params`."""

    def sample(self, key: Key, n: int) -> Stacked: ...

    def log_prob(self, params: Params) -> Float[Array, ""]: ...

    def kl(self, prior: Prior) -> Float[Array, ""]: ...

    def moments(self) -> tuple[Params, Params]: ...
