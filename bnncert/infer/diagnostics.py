"""Do Markov chains agree, and how many independent draws are theirs worth?

Asked of *predictions*: weights can be permuted, so that chains that agree on every prediction still
disagree on weights.

Source: Gelman et al., "Bayesian Data Analysis", 3rd edition, section 11; computed by NumPyro.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

from bnncert.types import Apply, Params


class Diagnostics(NamedTuple):
    """What Markov chains say of one or many scalars; every field has their shape.

    Attributes:
        r_hat: split R-hat: variance over all halves of chains against that within them, as a
            ratio of deviations. 1 where they agree; NaN where all draws are equal.
        ess: how many independent draws would estimate the mean as well.

    Example:
        >>> apart = np.stack([np.arange(8.0), 100 + np.arange(8.0)])    # two chains, far apart
        >>> bool(of_values(apart).r_hat > 2)
        True
    """

    r_hat: Float[np.ndarray, "..."]
    ess: Float[np.ndarray, "..."]


def of_predictions(
    apply: Apply,
    samples: Params,
    num_chains: int,
    x: Array,
    *,
    link: Callable[[Array], Array] = jax.nn.softmax,
    batch_size: int = 64,
) -> Diagnostics:
    """Computes R-hat and the effective sample size of predictions.

    R-hat^2 = 1 - 1/n + B / (n W),    ess = m n / (1 + 2 sum_t rho_t)

    for m half-chains of n draws, B and W the variances between and within them, rho_t the
    autocorrelation at lag t.

    Args:
        apply: `(params, x) -> outputs (C,)` for one example.
        samples: stacked params, chain after chain, as the samples of `bnncert.infer.mcmc`.
        num_chains: how many chains they are.
        x: inputs, shape (n, ...).
        link: from outputs to what is diagnosed: class probabilities by default; for a regression
            `lambda outputs: outputs`.
        batch_size: networks evaluated at once.

    Returns:
        Diagnostics of shape (n, C): for every input and class.

    Raises:
        ValueError: as `of_values`; samples that are not num_chains of equal length.

    Cost: one evaluation of all samples at n inputs. Memory: as many outputs, on the host.

    Source: Gelman et al., "Bayesian Data Analysis", 3rd edition, section 11.4.

    Example:
        >>> import jax.numpy as jnp
        >>> draws = jax.random.normal(jax.random.key(0), (8, 1))        # two chains of four draws
        >>> found = of_predictions(lambda w, x: w * x, draws, 2, jnp.ones((3, 1)))
        >>> found.r_hat.shape
        (3, 1)
    """
    total = jax.tree.leaves(samples)[0].shape[0]
    if num_chains < 1 or total % num_chains:
        raise ValueError(f"{total} samples are not {num_chains} chains of equal length.")

    def predict(params: Params) -> Array:
        return jax.vmap(lambda point: link(apply(params, point)))(x)

    values = jax.lax.map(predict, samples, batch_size=batch_size)
    return of_values(values.reshape(num_chains, total // num_chains, *values.shape[1:]))


def of_values(values: Float[Array | np.ndarray, "chains draws ..."]) -> Diagnostics:
    """Computes R-hat and the effective sample size of scalars along chains.

    Args:
        values: shape (chains, draws, ...), chains of at least 4 draws.

    Returns:
        `Diagnostics` of the shape that is left.

    Raises:
        ValueError: for chains that are too short.

    Cost: on the host, in float64: O(n log n) for n draws of each scalar.

    Source: Gelman et al., "Bayesian Data Analysis", 3rd edition, section 11.4.

    Example:
        >>> found = of_values(np.random.default_rng(0).normal(size=(4, 500)))
        >>> bool(found.r_hat < 1.05), bool(found.ess > 1000)
        (True, True)
    """
    if values.shape[1] < 4:
        raise ValueError(f"chains of {values.shape[1]} draws: diagnostics need at least 4.")
    array = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # all draws equal: NaN
        return Diagnostics(
            np.asarray(split_gelman_rubin(array)), np.asarray(effective_sample_size(array))
        )
