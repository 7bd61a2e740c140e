"""The evidence lower bound: what variational inference maximises.

    ELBO(q)  =  E_q[ log p(D | w) ]  -  kl_weight KL(q || p)                               (nats)

             ~  (1/M) sum_m (N/B) sum_{i in batch} log p(y_i | x_i, w_m)  -  kl_weight KL(q || p)

summed over the data, with w_m = g(noise_m) ~ q (the reparameterisation: gradients reach q's
parameters through g), N data, a minibatch of B and M draws. The second line is unbiased for the
first. At kl_weight 1, and a likelihood that sums to 1 over y, it is a lower bound on the evidence
log p(D), and lacks of it KL(q || p(w | D)); a weight below 1 tempers the posterior: report it.

One draw serves a whole minibatch: behind the bounds on an input set must stand one network, which
rules out local reparameterisation.

Keys are split as NumPyro's TraceMeanField_ELBO splits them for the same model and guide, so that
both give one number from one key.

Source: Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015, equations 1 and 2;
Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, section 2.3 (minibatches and
draws); with the robust likelihood, Wicker et al., AISTATS 2021, section 5.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.infer._minibatch import log_likelihoods
from bnncert.likelihood import OfPosterior
from bnncert.types import Batch, Key, LogLikelihood, Params, Posterior, Prepare, Prior, Threat


class ELBO(NamedTuple):
    """An evidence lower bound and its two parts, in nats summed over the data.

    Attributes:
        value: `log_likelihood - kl_weight * kl`.
        log_likelihood: E_q[log p(D | w)], estimated from the minibatch and the draws.
        kl: KL(q || p), unweighted, exact.

    Source: Blundell et al., ICML 2015, equations 1 and 2.

    Example:
        >>> ELBO(value=-3.5, log_likelihood=-3.0, kl=0.5).kl
        0.5
    """

    value: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    kl: Float[Array, ""]


def one_draw(key: Key, q: Posterior) -> Params:
    """Draws one network from a posterior.

    Args:
        key: a PRNG key.
        q: the posterior.

    Returns:
        Params, not stacked.
    """
    return jax.tree.map(lambda draws: draws[0], q.sample(key, 1))


def elbo(
    log_likelihood: LogLikelihood,
    prior: Prior,
    key: Key,
    q: Any,
    batch: Batch,
    threat: Threat,
    *,
    num_data: int,
    kl_weight: float | Float[Array, ""] = 1.0,
    num_particles: int = 1,
    draw: Callable[[Key, Posterior], Params] = one_draw,
    prepare: Prepare | None = None,
    fit_prior: bool = False,
) -> ELBO:
    """Estimates the evidence lower bound of a posterior from a minibatch.

        E_q[ log p(D | w) ] - kl_weight KL(q || p)
          ~  (1/M) sum_m (N/B) sum_{i in batch} log p(y_i | x_i, w_m) - kl_weight KL(q || p)

    It is pure: differentiate it by q, whose leaves are its parameters.

    Args:
        log_likelihood: of one datum, in nats, e.g. `bnncert.likelihood.robust_categorical(apply)`;
            or one of the posterior, `bnncert.likelihood.OfPosterior`, for which nothing is drawn.
        prior: pytree of NumPyro distributions, None for leaves that are deterministic.
        key: a PRNG key: of the draws, and of a likelihood that uses one.
        q: a posterior with a closed `kl` and differentiable draws: those of `bnncert.posterior` but
            `Samples` and `Mixture`.
        batch: the minibatch; what its mask leaves out may hold any finite values and adds nothing.
        threat: what the error model guards against.
        num_data: N, the size of the training set.
        kl_weight: of KL(q || p), >= 0; 1 is the ELBO.
        num_particles: M >= 1, draws of the weights; they are vmapped.
        draw: `(key, q) -> params`, how q is drawn from.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics;
            of a posterior, to its means.
        fit_prior: fit the prior's scale to q, leaf by leaf (`bnncert.prior.fitted`).

    Returns:
        An `ELBO`, to be maximised.

    Raises:
        ValueError, NotImplementedError: as `q.kl`: of a prior that is random in other leaves, or
            whose KL from a normal is not known.

    Cost: M evaluations of the minibatch, and O(P) for the KL of P weights (O(P K^2) for a low rank
    K). Memory: M networks with their activations.

    Source: Blundell et al., ICML 2015, equation 2; Kingma and Welling, ICLR 2014, equation 10.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnncert import likelihood, prior
        >>> from bnncert.posterior import MeanField
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> p, q = prior.normal(jnp.zeros(2)), MeanField(jnp.zeros(2), jnp.ones(2))
        >>> data, plain = Batch(jnp.ones((3, 2)), jnp.ones(3), jnp.ones(3)), Threat(0.0, 1.0)
        >>> found = elbo(fit, p, jax.random.key(0), q, data, plain, num_data=3)
        >>> float(found.kl), bool(found.value == found.log_likelihood)  # q is the prior
        (0.0, True)
    """

    def at_posterior(key: Key) -> Array:
        loc = q.loc if prepare is None else prepare(q.loc, batch.x)
        prepared = dataclasses.replace(q, loc=loc)
        terms = log_likelihoods(log_likelihood, None, key, prepared, batch, threat)
        return num_data / batch.mask.sum() * terms.sum()

    def at_one_draw(key: Key) -> Array:
        likelihood_key, draw_key = jax.random.split(key)
        # The likelihood's key comes after those of the weights, which are q's to draw.
        last = site_keys(likelihood_key, len(priors.sites(prior)) + 1)[-1]
        terms = log_likelihoods(log_likelihood, prepare, last, draw(draw_key, q), batch, threat)
        return num_data / batch.mask.sum() * terms.sum()

    if isinstance(log_likelihood, OfPosterior):
        expected = at_posterior(key)
    elif num_particles == 1:
        expected = at_one_draw(key)
    else:
        expected = jax.vmap(at_one_draw)(jax.random.split(key, num_particles)).mean()
    kl = q.kl(priors.fitted(prior, *q.moments()) if fit_prior else prior)
    return ELBO(expected - kl_weight * kl, expected, kl)


def site_keys(key: Key, num: int) -> list[Key]:
    """Splits off one key after another, as NumPyro's `seed` gives them to the sites of a program.

    Args:
        key: a PRNG key.
        num: how many, >= 1.

    Returns:
        Independent keys; the first of them do not depend on `num`.
    """
    found = []
    for _ in range(num):
        key, here = jax.random.split(key)
        found.append(here)
    return found
