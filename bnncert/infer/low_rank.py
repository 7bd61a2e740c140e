"""Variational inference with a normal whose covariance is diagonal plus low rank.

    q(w)  =  N( w; loc, diag(scale^2) + D D^T ),      D of K columns over all random weights
    maximise over loc, log scale and D    E_q[ log p(D | w) ]  -  kl_weight KL(q || p)

by stochastic gradients (`bnncert.infer.elbo`). The KL to a normal prior is closed by the matrix
determinant lemma, a Cholesky factor of size K (`bnncert.posterior.LowRank`). With K as large as
what the exact posterior's covariance has off its diagonal, a conjugate model's posterior is met.

Source: Tomczak et al., "Efficient Low Rank Gaussian Variational Inference for Neural Networks",
NeurIPS 2020.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from bnncert import posterior as posteriors
from bnncert import prior as priors
from bnncert.infer import _variational
from bnncert.infer._elbo import one_draw, site_keys
from bnncert.infer._minibatch import Schedule, initial_scales
from bnncert.infer._variational import Values, by_leaf, log_scale
from bnncert.types import Algorithm, Key, LogLikelihood, Params, Prepare, Prior


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The guide of normals with K shared factors over all random leaves.

    The posterior that it makes is a `bnncert.posterior.LowRank`.

    Attributes:
        rank: K, >= 1.

    Example:
        >>> LowRank(rank=20)
        LowRank(rank=20)
    """

    rank: int = 10

    def __post_init__(self) -> None:
        """Refuses a rank without factors.

        Raises:
            ValueError: rank < 1.
        """
        if self.rank < 1:
            raise ValueError(f'rank = {self.rank}: take 1 or more factors, or guide="mean-field".')

    def check(self, prior: Prior) -> None:
        """Refuses a prior that is not normal.

        Args:
            prior: pytree of NumPyro distributions.

        Raises:
            NotImplementedError: naming the leaf.
        """
        priors.normal_parameters(prior)

    def start(self, key: Key, prior: Prior, params: Params, scale: float) -> Values:
        """Gives the values at the network's weights: half of the variance in either part.

        The factors start at random: at zero they have no gradient but noise.

        Args:
            key: of the factors.
            prior: says which leaves are random.
            params: the weights, which the means start at.
            scale: standard deviations, relative to the root mean square of each leaf.

        Returns:
            Means, log-scales and factors by name.
        """
        scales = initial_scales(prior, params, scale)
        values = priors.named(params) | {
            log_scale(name): jnp.log(v / 2**0.5) for name, v in scales.items()
        }
        keys = jax.random.split(key, len(scales))
        for here, (name, v) in zip(keys, scales.items(), strict=True):
            normal = jax.random.normal(here, (self.rank, *v.shape), v.dtype)
            values[_deviations(name)] = v * normal / (2 * self.rank) ** 0.5
        return values

    def posterior(self, prior: Prior, values: Values) -> posteriors.LowRank:
        """Makes the posterior of the values.

        Args:
            prior: gives the structure.
            values: means, log-scales and factors by name.

        Returns:
            A normal of covariance diagonal plus low rank.
        """
        return posteriors.LowRank(
            priors.unflatten(prior, values),
            by_leaf(prior, lambda name: jnp.exp(values[log_scale(name)])),
            by_leaf(prior, lambda name: values[_deviations(name)]),
        )

    def draw(self, key: Key, q: posteriors.LowRank) -> Params:
        """Draws one network, all its leaves together.

        Args:
            key: a PRNG key.
            q: a normal of covariance diagonal plus low rank.

        Returns:
            Params, differentiable by q's leaves.
        """
        return one_draw(site_keys(key, 1)[0], q)


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    rank: int = 10,
    kl_weight: float | Schedule = 1.0,
    initial_scale: float = 0.1,
    num_particles: int = 1,
    prepare: Prepare | None = None,
    fit_prior: bool = False,
) -> Algorithm:
    """Makes low-rank variational inference as an `Algorithm`.

        q(w) = N(w; loc, diag(scale^2) + D D^T)
        maximise   E_q[ log p(D | w) ] - kl_weight KL(q || p)

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of normal distributions with the params' structure, None for leaves that are
            deterministic: these are trained by the likelihood alone.
        num_data: N, the size of the training set.
        optimizer: from Optax; put clipping and schedules in its chain.
        rank: K, shared factors, >= 1.
        kl_weight: of KL(q || p), > 0; 1 is the ELBO. Or a schedule of the step, > 0 at each.
        initial_scale: sd of the posterior at the start, relative to the root mean square of each
            leaf (of the smallest of the others, for leaves that start at zero).
        num_particles: draws of the weights for each update; they are vmapped.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.
        fit_prior: fit the prior's scale to the posterior at each step, leaf by leaf
            (`bnncert.prior.fitted`).

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `bnncert.posterior.LowRank`.

    Raises:
        ValueError: num_data, rank or num_particles < 1, a kl_weight or an initial_scale that is not
            positive, a prior without a random leaf; from `init`, params that do not match it.
        NotImplementedError: a prior that is not normal, naming the leaf.

    Cost: of a step beside the likelihood's, O(P K^2) for P random weights; memory (K + 2) P, and
    the optimiser's multiple of that.

    Source: Tomczak et al., NeurIPS 2020, section 3.

    Example:
        >>> import bnncert
        >>> fit = bnncert.likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> method = build(
        ...     fit, bnncert.prior.normal(w), num_data=9, optimizer=optax.adam(0.01), rank=5
        ... )
        >>> method.posterior(method.init(jax.random.key(0), w)).deviations.shape
        (5, 2)
    """
    return _variational.build(
        LowRank(rank),
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


def _deviations(name: str) -> str:
    return f"{name}/deviations"
