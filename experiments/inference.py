"""From the settings of a run to its inference method: one function of the table for each name.

All share the error model, the prior, the schedules and the loop; they differ in what they optimise
with, and in what they return.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from tqdm import tqdm

from bnncert import attack, infer, likelihood
from bnncert import prior as priors
from bnncert.infer.svi import Schedule
from bnncert.posterior import Samples
from bnncert.types import Algorithm, Apply, Batch, Key, LogLikelihood, Posterior, Threat
from experiments.data import Split
from experiments.models import Model, freeze
from experiments.schedule import kl_weight_schedule, learning_rate_schedule
from experiments.settings import PIXELS, RunConfig, TrainConfig


def build_algorithm(
    config: RunConfig,
    model: Model,
    params: PyTree,
    num_data: int,
    steps_per_epoch: int,
    log_likelihood: LogLikelihood | None = None,
) -> Algorithm:
    """The inference method of a run, on its likelihood; of hmc, nuts and laplace the first stage.

    Args:
        config: the run's settings.
        model: the network.
        params: gives structure and shapes.
        num_data: training data.
        steps_per_epoch: minibatches in an epoch.
        log_likelihood: of one datum; by default that of an image, as the settings say.
    """
    last = config.train.random_layers == "last"
    task = _task(config, model, params, num_data, steps_per_epoch, last)
    own = task.log_likelihood if log_likelihood is None else log_likelihood
    return BUILDERS[config.inference](task._replace(log_likelihood=own))


def refine(
    config: RunConfig, model: Model, posterior: Posterior, images: Split
) -> tuple[Posterior, dict[str, Any]]:
    """What comes after the training loop: sampling with HMC or NUTS, or a Laplace approximation.

    Args:
        config: the run's settings.
        model: the network.
        posterior: of the training loop.
        images: the training images.

    Returns:
        The posterior that is deployed, and what there is to report about it; other methods return
        theirs as it is.
    """
    stage = REFINEMENTS.get(config.inference)
    if stage is None:
        return posterior, {}
    key = jax.random.fold_in(jax.random.key(config.seed), 6)
    mean, scales = posterior.moments()
    last = config.inference == "laplace" or config.train.random_layers == "last"
    task = _task(config, model, mean, len(images.y), 1, last)
    threat = Threat(*map(jnp.float32, (config.train.eps, config.train.lam, config.train.power)))
    return stage(task, key, mean, scales, images, threat)


class _Task(NamedTuple):
    """What every method is built from."""

    inference: str
    settings: TrainConfig
    model: Model
    log_likelihood: LogLikelihood
    prior: PyTree
    num_data: int
    total_steps: int
    rate: optax.Schedule
    kl_weight: float | Schedule


def _task(
    config: RunConfig, model: Model, params: PyTree, num_data: int, steps_per_epoch: int, last: bool
) -> _Task:
    """With a prior on the last layer alone, or on all of them."""
    settings = config.train
    return _Task(
        config.inference,
        settings,
        model,
        error_model(settings, model.apply),
        priors.normal(params, settings.prior_scale, where=_random(params, last)),
        num_data,
        settings.epochs * steps_per_epoch,
        learning_rate_schedule(settings, steps_per_epoch),
        cast(Any, kl_weight_schedule(settings, steps_per_epoch)),
    )


def error_model(settings: TrainConfig, apply: Apply) -> LogLikelihood:
    """The log-likelihood of one image: certified, attacked (adversarial training), or plain."""
    if settings.likelihood == "certified":
        return likelihood.robust_categorical(apply, method=settings.method, clip=PIXELS)
    if settings.likelihood == "attacked":
        found = partial(attack.pgd, steps=settings.attack_steps, clip=PIXELS)
        return likelihood.attacked_categorical(apply, found)
    return likelihood.clean_categorical(apply)


def _random(params: PyTree, last: bool) -> Callable[[str], bool]:
    """Picks the leaves with a prior, by name: all, or those of the last layer (Dense_1).

    Not those of batch-norm: its scale and bias are trained, and its statistics are the data's.
    """
    layer = list(priors.named(params))[-1].split("/")[0]

    def where(name: str) -> bool:
        here = name.split("/")[0]
        return here == layer if last else not here.startswith("BatchNorm")

    return where


def _adam(task: _Task) -> optax.GradientTransformation:
    return optax.chain(
        # The loss is summed over the data: per image, the norm is num_data times smaller.
        optax.clip_by_global_norm(task.settings.clip_norm * task.num_data),
        optax.adam(task.rate),
    )


def _plain_adam() -> optax.GradientTransformation:
    """Of leaves without a prior: `task.rate` is in the units of the random ones' own steps."""
    return optax.adam(TrainConfig.learning_rate)


def _map(task: _Task) -> Algorithm:
    return infer.map.build(
        task.log_likelihood,
        task.prior,
        num_data=task.num_data,
        prepare=task.model.prepare,
        optimizer=_adam(task),
        prior_weight=task.kl_weight,
    )


def _bbb(task: _Task) -> Algorithm:
    return infer.svi.build(
        task.log_likelihood,
        task.prior,
        num_data=task.num_data,
        prepare=task.model.prepare,
        optimizer=_adam(task),
        kl_weight=task.kl_weight,
        guide=task.settings.guide,
        rank=task.settings.rank,
        initial_scale=task.settings.initial_scale,
    )


def _natural_gradient(module: Any, task: _Task) -> Algorithm:
    settings = task.settings
    return module.build(
        task.log_likelihood,
        task.prior,
        num_data=task.num_data,
        prepare=task.model.prepare,
        optimizer=optax.chain(
            optax.clip(settings.clip_step), optax.scale_by_learning_rate(task.rate)
        ),
        kl_weight=task.kl_weight,
        initial_scale=settings.initial_scale,
        beta1=settings.beta1,
        beta2=settings.beta2,
        deterministic=_plain_adam(),
    )


def _swag(task: _Task) -> Algorithm:
    start, every = _collection(task)
    return infer.swag.build(
        task.log_likelihood,
        task.prior,
        num_data=task.num_data,
        prepare=task.model.prepare,
        optimizer=_adam(task),
        kl_weight=task.kl_weight,
        start=start,
        every=every,
        rank=task.settings.rank,
    )


def _ensemble(task: _Task) -> Algorithm:
    members = infer.ensemble.build(
        _map(task), task.settings.members, vectorize=jax.default_backend() != "cpu"
    )
    # Each member has an initialisation of its own.
    return members._replace(init=lambda key, params: members.init(key, task.model.init))


def _sgmcmc(task: _Task) -> Algorithm:
    settings, (start, every) = task.settings, _collection(task)
    # Of the loss per image the gradient is taken with step h N / (2 kl_weight).
    unit = 2 * settings.kl_weight / task.num_data
    sampler = infer.sgmcmc.build(
        task.log_likelihood,
        task.prior,
        num_data=task.num_data,
        prepare=task.model.prepare,
        step_size=lambda step: unit * jnp.asarray(task.rate(step)),
        num_samples=settings.collect,
        friction=settings.friction if task.inference == "sghmc" else None,
        kl_weight=settings.kl_weight,
        every=every,
        burn_in=start,
        deterministic=_plain_adam(),
    )

    def posterior(state: Any) -> Samples:
        if int(state.collected):
            return cast(Samples, sampler.posterior(state))
        return Samples(jax.tree.map(lambda leaf: leaf[None], state.params))  # before the first

    return sampler._replace(posterior=posterior)


def _collection(task: _Task) -> tuple[int, int]:
    """The first step whose weights are collected, and the steps from one to the next."""
    start = round(task.settings.collect_from * task.total_steps)
    return start, max((task.total_steps - start) // task.settings.collect, 1)


def _mcmc(
    task: _Task, key: Key, mean: PyTree, scales: PyTree, images: Split, threat: Threat
) -> tuple[Posterior, dict[str, Any]]:
    settings, part = task.settings, slice(task.settings.mcmc_images)
    depth = {"num_steps": 2**settings.mcmc_depth} if task.inference == "hmc" else {}
    sampler = infer.mcmc.build(
        task.log_likelihood,
        task.prior,
        prepare=task.model.prepare,
        num_warmup=settings.mcmc_warmup,
        num_samples=settings.mcmc_samples,
        num_chains=settings.mcmc_chains,
        kernel=task.inference,
        kl_weight=settings.kl_weight,
        scales=scales,
        adapt_mass=False,  # so many weights' deviations take thousands of draws to learn
        progress_bar=True,
        **(depth or {"max_tree_depth": settings.mcmc_depth}),
    )
    x, y = jnp.asarray(images.x[part]), jnp.asarray(images.y[part])
    samples, info = sampler.sample(key, mean, Batch(x, y, jnp.ones(len(y))), threat)
    chains, networks = settings.mcmc_chains, freeze(task.model, samples.params, x)
    found = infer.diagnostics.of_predictions(
        # probabilities of float32 stop moving near 1, their logarithms do not
        task.model.apply,
        networks,
        chains,
        x[:100],
        link=jax.nn.log_softmax,
    )
    return samples, {
        "divergences": int(info.divergences.sum()),
        "acceptance": float(info.acceptance.mean()),
        "leapfrog_steps": float(info.num_steps.mean()),
        "r_hat": worst(found.r_hat, np.max),
        "median_r_hat": worst(found.r_hat, np.median),
        "effective_sample_size": worst(found.ess, np.min),
        "mcmc_images": len(y),
    }


def worst(values: np.ndarray, extreme: Callable[[np.ndarray], Any]) -> float | None:
    """A statistic of a diagnostic, NaN apart; None if it is infinite: a chain did not move.

    >>> worst(np.array([1.0, np.nan, 1.2]), np.max), worst(np.array([1.0, np.inf]), np.max)
    (1.2, None)
    """
    known = values[~np.isnan(values)]
    found = float(extreme(known)) if known.size else np.nan
    return found if np.isfinite(found) else None


def _laplace(
    task: _Task, key: Key, mean: PyTree, scales: PyTree, images: Split, threat: Threat
) -> tuple[Posterior, dict[str, Any]]:
    method = infer.laplace.build(
        task.log_likelihood,
        task.prior,
        num_data=task.num_data,
        prepare=task.model.prepare,
        kl_weight=task.settings.kl_weight,
        curvature=task.settings.curvature,
    )
    size = task.settings.batch_size
    starts = tqdm(range(0, len(images.y), size), desc="curvature", unit="batch")

    def batch(start: int) -> Batch:
        rows = np.arange(start, start + size)
        mask = jnp.asarray(rows < len(images.y), jnp.float32)
        rows = np.minimum(rows, len(images.y) - 1)
        return Batch(jnp.asarray(images.x[rows]), jnp.asarray(images.y[rows]), mask)

    posterior, info = method.fit(key, mean, map(batch, starts), threat)
    return posterior, {
        "negative_curvatures": int(info.num_negative),
        "negative_curvature_mass": float(info.negative_mass),
    }


BUILDERS: dict[str, Callable[[_Task], Algorithm]] = {
    "map": _map,
    "bbb": _bbb,
    "vogn": partial(_natural_gradient, infer.vogn),
    "noisy-adam": partial(_natural_gradient, infer.noisy_adam),
    "ivon": partial(_natural_gradient, infer.ivon),
    "swag": _swag,
    "ensemble": _ensemble,
    "laplace": _map,
    "sgld": _sgmcmc,
    "sghmc": _sgmcmc,
    "hmc": _bbb,
    "nuts": _bbb,
}
"""What trains, by the name on the command line."""

REFINEMENTS: dict[str, Callable[..., tuple[Posterior, dict[str, Any]]]] = {
    "laplace": _laplace,
    "hmc": _mcmc,
    "nuts": _mcmc,
}
"""What follows training, where something does."""
