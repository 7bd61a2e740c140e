"""Variational inference over a family of q, one door to all of them.

    maximise   E_q[ log p(D | w) ]  -  kl_weight KL(q || p)                                (nats)

    guide                            q                               door of its own
    "mean-field", `MeanField()`      independent normals             `bnncert.infer.bbb`
    "low-rank", `LowRank(rank=)`     diagonal plus low rank          `bnncert.infer.low_rank`
    a function that makes one        any that NumPyro can express    `bnncert.infer.guide`

The objective itself is `bnncert.infer.elbo`.

Source: Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015; Tomczak et al., NeurIPS
2020; Bingham et al., JMLR 2019; with the robust likelihood, Wicker et al., AISTATS 2021, section 5.
"""

from collections.abc import Callable

import optax
from jaxtyping import Array

from bnncert.infer import _variational
from bnncert.infer import guide as guides
from bnncert.infer._minibatch import Schedule, check_settings
from bnncert.infer._variational import Family, SVIInfo, VIState
from bnncert.infer.bbb import MeanField
from bnncert.infer.guide import MakeGuide
from bnncert.infer.low_rank import LowRank
from bnncert.types import Algorithm, LogLikelihood, Posterior, Prepare, Prior

__all__ = ["Family", "LowRank", "MeanField", "SVIInfo", "Schedule", "VIState", "build"]


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    kl_weight: float | Schedule = 1.0,
    guide: str | Family | MakeGuide = "mean-field",
    rank: int = 10,
    posterior: Callable[[dict[str, Array]], Posterior] | None = None,
    num_draws: int = 100,
    initial_scale: float = 0.1,
    num_particles: int = 1,
    prepare: Prepare | None = None,
    fit_prior: bool = False,
) -> Algorithm:
    """Makes variational inference as an `Algorithm`.

        maximise   E_q[ log p(D | w) ] - kl_weight KL(q || p)    over the q of a guide

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, None for leaves that are
            deterministic: these are trained by the likelihood alone. For mean-field NumPyro must
            know the KL to it from a normal (in practice: it is normal); for low-rank it is normal.
        num_data: N, the size of the training set.
        optimizer: from Optax; put clipping and schedules in its chain.
        kl_weight: of KL(q || p), > 0; 1 is the ELBO. Or a schedule of the step, > 0 at each.
        guide: `MeanField()` or `LowRank(rank=)`; "mean-field" or "low-rank" for short; or a
            function that makes a NumPyro guide, as for `bnncert.infer.guide.build`.
        rank: K >= 1, of the short form "low-rank".
        posterior: for a guide of your own: what is deployed, as for `bnncert.infer.guide.build`.
        num_draws: for a guide of your own without it: how many draws are deployed, >= 1.
        initial_scale: sd of the posterior at the start, relative to the root mean square of each
            leaf (of the smallest of the others, for leaves that start at zero). A guide of your own
            has its own.
        num_particles: draws of the weights for each update; they are vmapped.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.
        fit_prior: fit the prior's scale to the posterior at each step, leaf by leaf
            (`bnncert.prior.fitted`); for the known guides.

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `MeanField`, a `LowRank` (of
        `bnncert.posterior`), or what `posterior` says.

    Raises:
        ValueError: num_data, rank or num_draws < 1, a kl_weight or an initial_scale that is not
            positive, a prior without a random leaf, an unknown guide, `posterior` for a known one,
            fit_prior for one of your own;
            from `init`, a guide that leaves out a random leaf.
        NotImplementedError: a prior whose KL the guide does not know.

    Cost: of a step beside the likelihood's, O(P) for mean-field, O(P K^2) for low-rank; memory 2 P
    and (K + 2) P, for P random weights, and the optimiser's multiple of these.

    Source: Blundell et al., ICML 2015; Tomczak et al., NeurIPS 2020; Bingham et al., JMLR 2019.

    Example:
        >>> import bnncert, jax, jax.numpy as jnp
        >>> w, rate = jnp.zeros(2), optax.adam(0.01)
        >>> fit = bnncert.likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> method = build(
        ...     fit, bnncert.prior.normal(w), num_data=9, optimizer=rate, guide=LowRank(rank=5)
        ... )
        >>> method.posterior(method.init(jax.random.key(0), w)).rank
        5
    """
    check_settings(prior, num_data, kl_weight, initial_scale)
    if not isinstance(guide, str | Family):
        if fit_prior:
            raise ValueError(
                "fit_prior=True is for the known guides: a prior of your own is yours."
            )
        return guides.build(
            log_likelihood,
            prior,
            guide,
            num_data=num_data,
            optimizer=optimizer,
            posterior=posterior,
            num_draws=num_draws,
            kl_weight=kl_weight,
            num_particles=num_particles,
            prepare=prepare,
        )
    if posterior is not None:
        raise ValueError(f"posterior= is for a guide of your own; that of {guide!r} is known.")
    return _variational.build(
        _family(guide, rank) if isinstance(guide, str) else guide,
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


def _family(name: str, rank: int) -> Family:
    """Makes the guide that a short form stands for."""
    if name == "mean-field":
        return MeanField()
    if name == "low-rank":
        return LowRank(rank)
    raise ValueError(
        f'guide = {name!r}: it is "mean-field", "low-rank", `MeanField()`, `LowRank(rank=)`, or a '
        "function that makes a NumPyro guide, e.g. numpyro.infer.autoguide.AutoMultivariateNormal."
    )
