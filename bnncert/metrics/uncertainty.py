"""How sure a posterior predictive is, and of which kind its doubt is.

Functions of probabilities (S, N, C), one row for each weight sample:

    H[mean_s p_s]  =  mean_s H[p_s]  +  MI,      MI = mean_s KL(p_s || mean_s p_s)

all of the uncertainty, the part that more data would not remove, and the disagreement of the
samples: nats, 0 to log C.

Source: Depeweg et al., "Decomposition of uncertainty in Bayesian deep learning", ICML 2018.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def predictive_entropy(
    sample_probs: Float[Array, "samples batch classes"],
) -> Float[Array, " batch"]:
    """Computes the entropy of the predictive, H[mean_s p_s]: all of the uncertainty.

    Args:
        sample_probs: probabilities under each weight sample.

    Returns:
        Nats, between 0 and log C, one for each datum.

    Source: Depeweg et al., ICML 2018.

    Example:
        >>> print(f"{float(predictive_entropy(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))[0]):.4f}")
        0.6931
    """
    return jnp.sum(jax.scipy.special.entr(jnp.mean(sample_probs, axis=0)), axis=-1)


def expected_entropy(
    sample_probs: Float[Array, "samples batch classes"],
) -> Float[Array, " batch"]:
    """Computes the samples' mean entropy, mean_s H[p_s]: the part more data would not remove.

    Args:
        sample_probs: probabilities under each weight sample.

    Returns:
        Nats, between 0 and log C, one for each datum.

    Source: Depeweg et al., ICML 2018.

    Example:
        >>> print(f"{float(expected_entropy(jnp.array([[[0.5, 0.5]], [[0.0, 1.0]]]))[0]):.4f}")
        0.3466
    """
    return jnp.mean(jnp.sum(jax.scipy.special.entr(sample_probs), axis=-1), axis=0)


def mutual_information(
    sample_probs: Float[Array, "samples batch classes"],
) -> Float[Array, " batch"]:
    """Computes the information between weights and label, mean_s KL(p_s || mean_s p_s).

    It is how far the samples disagree.

    Equal to `predictive_entropy - expected_entropy`, but summed from terms that are not negative,
    so that a small disagreement is not lost in the difference of two entropies.

    Args:
        sample_probs: probabilities under each weight sample.

    Returns:
        Nats, >= 0, one for each datum.

    Source: Depeweg et al., ICML 2018.

    Example:
        >>> print(f"{float(mutual_information(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))[0]):.4f}")
        0.6931
    """
    # The floor: a mean of numbers near the smallest may flush to 0, where the KL is infinite.
    tiny = jnp.finfo(sample_probs.dtype).tiny
    predictive = jnp.maximum(jnp.mean(sample_probs, axis=0), tiny)
    terms = jax.scipy.special.kl_div(sample_probs, predictive)
    return jnp.maximum(jnp.mean(jnp.sum(terms, axis=-1), axis=0), 0)
