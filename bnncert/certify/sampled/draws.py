"""Independent draws of a continuous posterior, one network at a time.

Each draw is a call of `posterior.sample(key, 1)` with a key of its own: those of one call may be
stratified (`bnncert.posterior.Mixture`), which is no independence. The members of `Samples` are
refused: a chain's states are not independent, and an ensemble's members come from no continuous
posterior that could be drawn from again.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from bnncert.posterior import Mixture, Samples
from bnncert.types import Key, Params, Posterior


def over_draws(
    one: Callable[[Params], Any], posterior: Posterior, keys: Array, batch_size: int | None
) -> Any:
    """Evaluates `one` at an independent draw for each key, stacked.

    Args:
        one: of one network's params.
        posterior: what is drawn from.
        keys: one a draw.
        batch_size: draws at once; one by default. A draw lives as long as it is used.

    Returns:
        What `one` returns, with a leading axis of draws.

    Cost: one draw and one call of `one` a key; memory of `batch_size` of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnncert.posterior import MeanField
        >>> q = MeanField(jnp.zeros(2), jnp.ones(2))
        >>> over_draws(jnp.sum, q, jax.random.split(jax.random.key(0), 5), None).shape
        (5,)
    """

    def at(key: Key) -> Any:
        return one(jax.tree.map(lambda leaf: leaf[0], posterior.sample(key, 1)))

    return jax.lax.map(at, keys, batch_size=batch_size)


def check_posterior(posterior: Any) -> None:
    """Checks that independent draws of a continuous posterior can be made.

    Args:
        posterior: what was given as one; of a `Mixture`, its members count.

    Raises:
        TypeError: `Samples`, or no posterior.

    Example:
        >>> import jax.numpy as jnp
        >>> check_posterior(Samples(jnp.zeros((4, 2))))
        Traceback (most recent call last):
        TypeError: posterior is Samples, a finite set of networks: ...
    """
    if isinstance(posterior, Mixture):
        check_posterior(posterior.members)
        return
    if isinstance(posterior, Samples):
        raise TypeError(
            "posterior is Samples, a finite set of networks: the states of a Markov chain are not "
            "independent draws, and no continuous posterior stands behind an ensemble. What is "
            "deployed is their average: bnncert.certify.decision(apply, posterior.params, x_set) "
            "proves it, with no slack."
        )
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"posterior is a {type(posterior).__name__}: give one that independent draws can be "
            "made of, such as bnncert.MeanField. Stacked weights have bnncert.certify.decision."
        )
