"""Bayes by Backprop: variational inference with independent normals.

    q(w)  =  prod_i N(w_i; loc_i, scale_i^2)
    maximise over loc and log scale   E_q[ log p(D | w) ]  -  kl_weight KL(q || p)

by stochastic gradients through w = loc + scale noise (`bnncert.infer.elbo`).

What it converges to: in a conjugate model, the exact mean, and 1 / precision_ii as variances, which
are smaller than the exact ones wherever weights correlate; `bnncert.infer.low_rank` has room for
correlations. The natural-gradient methods (`vogn`, `noisy_adam`, `ivon`) aim at the same family.

Source: Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015; with the robust
likelihood, Wicker et al., AISTATS 2021, section 5.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from bnncert import posterior as posteriors
from bnncert import prior as priors
from bnncert.infer import _variational
from bnncert.infer._elbo import site_keys
from bnncert.infer._minibatch import Schedule, initial_scales
from bnncert.infer._variational import Values, by_leaf, log_scale
from bnncert.types import Algorithm, Key, LogLikelihood, Params, Prepare, Prior


@dataclasses.dataclass(frozen=True)
class MeanField:
    """The guide of independent normals, with scales by their logarithm.

        q(w) = prod_i N(w_i; loc_i, scale_i^2)

    The posterior that it makes is a `bnncert.posterior.MeanField`. It has no options.

    Cost: 2 P numbers for P random weights.

    Source: Blundell et al., ICML 2015, section 3.2.

    Example:
        >>> MeanField()
        MeanField()
    """

    def check(self, prior: Prior) -> None:
        """Accepts any prior: what NumPyro knows the KL to is seen at the first step.

        Args:
            prior: any.
        """

    def start(self, key: Key, prior: Prior, params: Params, scale: float) -> Values:
        """Gives the values at the network's weights.

        Args:
            key: not used.
            prior: says which leaves are random.
            params: the weights, which the means start at.
            scale: standard deviations, relative to the root mean square of each leaf.

        Returns:
            Means and log-scales by name.
        """
        del key
        scales = initial_scales(prior, params, scale)
        return priors.named(params) | {log_scale(n): jnp.log(v) for n, v in scales.items()}

    def posterior(self, prior: Prior, values: Values) -> posteriors.MeanField:
        """Makes the posterior of the values.

        Args:
            prior: gives the structure.
            values: means and log-scales by name.

        Returns:
            Independent normals.
        """
        scale = by_leaf(prior, lambda name: jnp.exp(values[log_scale(name)]))
        return posteriors.MeanField(priors.unflatten(prior, values), scale)

    def draw(self, key: Key, q: posteriors.MeanField) -> Params:
        """Draws one network, w = loc + scale noise, leaf by leaf.

        Args:
            key: a PRNG key.
            q: independent normals.

        Returns:
            Params, differentiable by loc and scale.
        """
        scales = {n: s for n, s in priors.named(q.scale).items() if s is not None}
        locs, keys = priors.named(q.loc), site_keys(key, len(scales))
        draws = {
            name: locs[name] + scale * jax.random.normal(here, scale.shape, scale.dtype)
            for here, (name, scale) in zip(keys, scales.items(), strict=True)
        }
        return priors.replace(q.loc, draws)


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    kl_weight: float | Schedule = 1.0,
    initial_scale: float = 0.1,
    num_particles: int = 1,
    prepare: Prepare | None = None,
    fit_prior: bool = False,
) -> Algorithm:
    """Makes Bayes by Backprop as an `Algorithm`.

        q(w) = prod_i N(w_i; loc_i, scale_i^2)
        maximise   E_q[ log p(D | w) ] - kl_weight KL(q || p)

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`; or of
            the posterior, e.g. `bnncert.likelihood.quantile_categorical(apply)`, without draws.
        prior: pytree of NumPyro distributions with the params' structure, None for leaves that are
            deterministic: these are trained by the likelihood alone. NumPyro must know the KL to it
            from a normal (in practice: it is normal).
        num_data: N, the size of the training set.
        optimizer: from Optax; put clipping and schedules in its chain.
        kl_weight: of KL(q || p), > 0; 1 is the ELBO. Or a schedule of the step, > 0 at each.
        initial_scale: sd of the posterior at the start, relative to the root mean square of each
            leaf (of the smallest of the others, for leaves that start at zero).
        num_particles: draws of the weights for each update; they are vmapped.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.
        fit_prior: fit the prior's scale to the posterior at each step, leaf by leaf
            (`bnncert.prior.fitted`).

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `bnncert.posterior.MeanField`.

    Raises:
        ValueError: num_data or num_particles < 1, a kl_weight or an initial_scale that is not
            positive, a prior without a random leaf; from `init`, params that do not match it.
        NotImplementedError: from `update`, a prior whose KL from a normal is not known.

    Cost: of a step beside the likelihood's, O(P) for P random weights; memory 2 P, and the
    optimiser's multiple of that.

    Source: Blundell et al., ICML 2015, section 3.2.

    Example:
        >>> import bnncert
        >>> fit = bnncert.likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> method = build(fit, bnncert.prior.normal(w), num_data=9, optimizer=optax.adam(0.01))
        >>> q = method.posterior(method.init(jax.random.key(0), w))
        >>> print(q.loc, q.scale.round(3))
        [3. 4.] [0.354 0.354]
    """
    return _variational.build(
        MeanField(),
        log_likelihood,
        prior,
        num_data=num_data,
        optimizer=optimizer,
        kl_weight=kl_weight,
        initial_scale=initial_scale,
        num_particles=num_particles,
        prepare=prepare,
        fit_prior=fit_prior,
    )
