"""Stochastic gradient ascent on the ELBO over a family of posteriors with a closed KL.

    values  <-  values + optimizer( grad_values ELBO( q_values ) )

q_values being the posterior that a family makes of the numbers that the optimiser moves
(`bnncert.infer.elbo`). A deterministic leaf is one of these numbers, and trained by the likelihood
alone.

q starts at given weights, a network's own initialisation, with small scales: bounds widen with the
posterior's noise (a layer adds about .8 fan_in scale), and a start uniform in +-2, NumPyro's own,
ruins a certificate.

Source: Blundell et al., ICML 2015, section 3.2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bnncert import prior as priors
from bnncert.infer._elbo import elbo
from bnncert.infer._minibatch import Schedule, check_settings
from bnncert.types import (
    Algorithm,
    Batch,
    Key,
    LogLikelihood,
    Params,
    Posterior,
    Prepare,
    Prior,
    Threat,
)

Values = dict[str, Any]
"""What an optimiser moves, by name; None where params hold None."""


@runtime_checkable
class Family(Protocol):
    """A family of posteriors that the ELBO can be differentiated over: `MeanField`, `LowRank`.

        w = draw(key, posterior(prior, values)),   differentiable by the values

    `check(prior)` raises where the KL to a prior is not known; `start(key, prior, params, scale)`
    gives the values at the network's weights, with standard deviations relative to them;
    `posterior(prior, values)` is q, and `draw(key, q)` a network of it.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014 (reparameterisation).

    Example:
        >>> from bnncert.infer import LowRank, MeanField
        >>> isinstance(MeanField(), Family), isinstance(LowRank(rank=2), Family)
        (True, True)
    """

    def check(self, prior: Prior) -> None:
        """Refuses a prior to which the KL is not known."""
        ...

    def start(self, key: Key, prior: Prior, params: Params, scale: float) -> Values:
        """Gives the values at a network's weights, its deviations relative to them."""
        ...

    def posterior(self, prior: Prior, values: Values) -> Posterior:
        """Makes the posterior of the values."""
        ...

    def draw(self, key: Key, q: Any) -> Params:
        """Draws one network, differentiable by the values."""
        ...


class VIState(NamedTuple):
    """The state of variational inference: where the ascent on the ELBO is.

    Attributes:
        values: q's parameters by name, as the optimiser moves them.
        opt_state: of the optimiser.
        step: how many updates were made.
    """

    values: Values
    opt_state: optax.OptState
    step: Int[Array, ""]


class SVIInfo(NamedTuple):
    """What one update of variational inference saw, before its step.

    Attributes:
        loss: the negative ELBO, nats summed over the data.
        log_likelihood: E_q[log p(D | w)], estimated from the minibatch and the draws.
        kl: KL(q || p), unweighted; of a guide of one's own, as its draws estimate it.
    """

    loss: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    kl: Float[Array, ""]


def build(
    family: Family,
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    kl_weight: float | Schedule,
    initial_scale: float,
    num_particles: int,
    prepare: Prepare | None,
    fit_prior: bool = False,
) -> Algorithm:
    """Makes ascent on the ELBO as an `Algorithm`; `bbb`, `low_rank` and `svi` call it.

    Args:
        family: of q.
        log_likelihood: of one datum.
        prior: pytree of NumPyro distributions, None for deterministic leaves.
        num_data: N, the size of the training set.
        optimizer: from Optax.
        kl_weight: of KL(q || p), > 0, or a schedule of the step.
        initial_scale: sd of q at the start, relative to the root mean square of each leaf.
        num_particles: draws of the weights for each update.
        prepare: `(params, x_batch) -> params`, applied to each draw, or None.
        fit_prior: as for `bnncert.infer.elbo`.

    Returns:
        `Algorithm(init, update, posterior)`.

    Raises:
        ValueError: a number out of its range, a prior without a random leaf.
        NotImplementedError: a prior whose KL the family does not know.
    """
    check_settings(prior, num_data, kl_weight, initial_scale)
    if num_particles < 1:
        raise ValueError(f"num_particles = {num_particles}: draw at least one.")
    family.check(prior)
    objective = partial(
        elbo,
        log_likelihood,
        prior,
        num_data=num_data,
        num_particles=num_particles,
        draw=family.draw,
        prepare=prepare,
        fit_prior=fit_prior,
    )

    def init(key: Key, params: Params) -> VIState:
        priors.check(prior, params)
        values = family.start(jax.random.fold_in(key, 1), prior, params, initial_scale)
        values = jax.tree.map(lambda v: jnp.asarray(v, jnp.result_type(v)), values)  # no weak types
        return VIState(values, optimizer.init(values), jnp.zeros((), jnp.int32))

    def update(key: Key, state: VIState, batch: Batch, threat: Threat) -> tuple[VIState, SVIInfo]:
        weight = kl_weight(state.step) if callable(kl_weight) else kl_weight
        here = jax.random.split(key)[1]  # of a step of NumPyro's SVI, which keeps the first

        def loss(values: Values) -> tuple[Array, SVIInfo]:
            q = family.posterior(prior, values)
            found = objective(here, q, batch, threat, kl_weight=weight)
            return -found.value, SVIInfo(-found.value, found.log_likelihood, found.kl)

        (_, info), gradient = jax.value_and_grad(loss, has_aux=True)(state.values)
        steps, opt_state = optimizer.update(gradient, state.opt_state, state.values)
        values = cast(Values, optax.apply_updates(state.values, steps))
        return VIState(values, opt_state, state.step + 1), info

    return Algorithm(init, update, lambda state: family.posterior(prior, state.values))


def by_leaf(prior: Prior, read: Callable[[str], Array]) -> Any:
    """Makes a tree of what is read for each random leaf, with None for the deterministic ones."""
    leaves = priors.named(prior).items()
    return priors.unflatten(prior, {n: None if leaf is None else read(n) for n, leaf in leaves})


def log_scale(name: str) -> str:
    """Names the logarithm of a leaf's standard deviations; its means have the leaf's own name."""
    return f"{name}/log_scale"
