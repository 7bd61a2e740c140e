"""How wide a posterior is, in one number.

    spread(q) = median_i sd_q(w_i) / median_i |E_q w_i|

over the weights of the random leaves: how far a posterior is from a single network, without unit.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.posterior.gaussian import Gaussian
from bnncert.posterior.low_rank import LowRank
from bnncert.posterior.mean_field import MeanField
from bnncert.posterior.mixture import Mixture
from bnncert.posterior.samples import Samples


def spread(posterior: MeanField | LowRank | Gaussian | Samples | Mixture) -> Float[Array, ""]:
    """Computes a posterior's median standard deviation over its median |mean|.

        spread(q) = median_i sd_q(w_i) / median_i |E_q w_i|     over the random leaves' weights

    For `Samples` mean and deviation are those of the members (unbiased variance), for `Mixture`
    those of the mixture; a leaf in which all members agree is deterministic.

    Args:
        posterior: any of this package.

    Returns:
        A scalar >= 0; 0 if nothing is random, inf if most means are 0.

    Cost: two medians of all random weights.

    Example:
        >>> print(spread(MeanField({"w": jnp.full(3, 2.0)}, {"w": jnp.ones(3)})))
        0.5
    """
    locs, scales = (priors.named(tree) for tree in posterior.moments())
    random = [name for name, scale in scales.items() if scale is not None]
    if not random:
        return jnp.zeros(())
    # NaN hides the leaves that turn out deterministic: which ones is not known under a trace
    shown = {name: jnp.where(jnp.any(scales[name] > 0), 0.0, jnp.nan) for name in random}
    scale = jnp.concatenate([jnp.ravel(scales[name] + shown[name]) for name in random])
    loc = jnp.concatenate([jnp.ravel(jnp.abs(locs[name]) + shown[name]) for name in random])
    return jnp.nan_to_num(jnp.nanmedian(scale) / jnp.nanmedian(loc), nan=0.0, posinf=jnp.inf)
