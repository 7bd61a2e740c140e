"""VOGN: the natural-gradient step with squared gradients of single data as the curvature.

    h  =  E_q[ (1/N) sum_i (grad -log p(y_i | x_i, w))^2 ]            (elementwise)

the diagonal of the empirical Fisher matrix in place of the Hessian. The sum of squares over a
minibatch needs no gradient of a single datum: with independent signs e_i = +-1,

    E_e[ (sum_i e_i grad_i)^2 ]  =  sum_i grad_i^2,

because the cross terms cancel. So one more backward pass gives an unbiased estimate from *all* data
of the minibatch, where gradients one by one, by vmap, cost tens of times a step; its relative
standard deviation, at most sqrt(2 / num_probes), is averaged out over some 1 / (1 - beta2) steps.

What it converges to, for linear regression with noise s and q's variances v:

    h_j = (1/N) sum_i x_ij^2 ((y_i - x_i loc)^2 + sum_k x_ik^2 v_k) / s^4,
    v_j = kl_weight / (N (h_j + d)),

while the exact curvature is (1/N) sum_i x_ij^2 / s^2: the squared residuals stand where the noise's
variance should. The two agree as far as the model's noise is that of the data, and N is large.

`curvature="gauss-newton"` takes (1/N) sum_i diag(J_i^T H_i J_i) instead, with the outputs' Jacobian
J and the Hessian H of the negative log-likelihood in the outputs, H = R R^T (its negative
eigenvalues, which a mixture with power > 0 can have, left out). By the same signs it costs one more
backward pass, of sum_i J_i^T R_i e_i. It is the exact curvature of a linear model.

Source: Khan et al., "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", ICML
2018, section 3; Osawa et al., "Practical Deep Learning with Bayesian Principles", NeurIPS 2019.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bnncert.infer import _natural_gradient
from bnncert.infer._minibatch import Schedule
from bnncert.infer._natural_gradient import Draw, Leaves
from bnncert.likelihood import Composed
from bnncert.types import Algorithm, Key, LogLikelihood, Prepare, Prior


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    beta2: float = 0.999,
    num_probes: int = 1,
    curvature: str = "squared-gradients",
    kl_weight: float | Schedule = 1.0,
    initial_scale: float = 0.1,
    beta1: float = 0.9,
    num_particles: int = 1,
    deterministic: optax.GradientTransformation | None = None,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes VOGN as an `Algorithm`.

        h <- beta2 h + (1 - beta2) (1/B) sum_i (grad -log p(y_i | x_i, w))^2,    w ~ q
        loc <- loc - a (g + d (loc - mu)) / (h + d),    scale^2 = kl_weight / (N (h + d))

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions, normal; None for deterministic leaves.
        num_data: N, the size of the training set.
        optimizer: from Optax, given the natural gradient, in units of the weights, e.g.
            `optax.sgd(0.1)` with a schedule; 1 would be Newton's step.
        beta2: decay of the running mean of the curvature, in [0, 1).
        num_probes: vectors of signs an update; a backward pass each.
        curvature: "squared-gradients" (VOGN) or "gauss-newton".
        kl_weight: of KL(q || p), > 0; 1 is the ELBO. Or a schedule of the step.
        initial_scale: sd of the posterior at the start, relative to the root mean square of each
            leaf; never above the prior's.
        beta1: decay of the running mean of gradients, in [0, 1).
        num_particles: draws of the weights for each update; they are vmapped.
        deterministic: optimiser of the leaves without a prior, given the gradient of the negative
            log-likelihood, nats summed over the data; needed where there are any.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `MeanField`.

    Raises:
        ValueError: a number out of its range, a log-likelihood without parts for "gauss-newton",
            deterministic leaves without an optimiser.
        NotImplementedError: a prior that is not normal, naming the leaf.

    Cost: of a step, num_particles forward and backward passes and num_probes backward, and O(P) for
    P random weights. Memory: 3 P, and the optimiser's.

    Source: Khan et al., ICML 2018, section 3; Osawa et al., NeurIPS 2019.

    Example:
        >>> from bnncert import likelihood, prior
        >>> from bnncert.types import Batch, Threat
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> method = build(fit, prior.normal(w), num_data=4, optimizer=optax.sgd(0.1))
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> state = method.init(jax.random.key(0), w)
        >>> print(method.posterior(state).scale.round(3))
        [0.354 0.354]
        >>> state, info = method.update(jax.random.key(1), state, data, Threat(0.0, 1.0))
        >>> bool(jnp.all(method.posterior(state).loc < w))              # towards 1 = w_0 + w_1
        True
    """
    if num_probes < 1:
        raise ValueError(f"num_probes = {num_probes}: take at least one.")
    if curvature not in ("squared-gradients", "gauss-newton"):
        raise ValueError(f"curvature = {curvature!r}: squared-gradients or gauss-newton.")
    estimate = squared_gradients
    if curvature == "gauss-newton":
        if not isinstance(log_likelihood, Composed):
            raise ValueError(
                f"curvature='gauss-newton' with the log-likelihood {log_likelihood}: it needs one "
                "in two parts, bnncert.likelihood.Composed(outputs, log_prob), as those of "
                "bnncert.likelihood are; squared-gradients works with any."
            )
        estimate = partial(gauss_newton, log_likelihood)
    return _natural_gradient.build(
        partial(over_probes, estimate, num_probes),
        _natural_gradient.moving_average(beta2),
        log_likelihood,
        prior,
        num_data=num_data,
        optimizer=optimizer,
        kl_weight=kl_weight,
        initial_scale=initial_scale,
        beta1=beta1,
        num_particles=num_particles,
        deterministic=deterministic,
        prepare=prepare,
    )


def squared_gradients(draw: Draw, key: Key) -> Leaves:
    """Estimates (1/B) sum_i grad_i^2 over the data of a minibatch, without bias.

    Args:
        draw: what the minibatch says at one draw of the weights.
        key: of the signs.

    Returns:
        The estimate, by name of the random leaf.

    Cost: one backward pass of the minibatch.

    Source: Khan et al., ICML 2018, section 3 (the curvature).
    """
    mask = draw.batch.mask
    combined = draw.pull(jax.random.rademacher(key, mask.shape, mask.dtype))
    return {name: jnp.square(combined[name]) / mask.sum() for name in draw.scale}


def gauss_newton(log_likelihood: Composed, draw: Draw, key: Key) -> Leaves:
    """Estimates (1/B) sum_i diag(J_i^T H_i J_i) without bias, H_i without negative eigenvalues.

    Args:
        log_likelihood: in its two parts.
        draw: what the minibatch says at one draw of the weights.
        key: of the signs.

    Returns:
        The estimate, by name of the random leaf.
    """
    outputs, pull = draw.over(log_likelihood.outputs)

    def root(output: Array, y: Array) -> Array:
        hessian = jax.hessian(lambda o: -log_likelihood.log_prob(o, y, draw.threat))(output)
        values, vectors = jnp.linalg.eigh(hessian)
        return vectors * jnp.sqrt(jnp.maximum(values, 0))

    roots = jax.vmap(root)(jax.lax.stop_gradient(outputs), draw.batch.y)
    signs = jax.random.rademacher(key, outputs.shape, outputs.dtype)
    mask = draw.batch.mask
    combined = pull(mask[:, None] * jnp.einsum("bij,bj->bi", roots, signs))
    return {name: jnp.square(combined[name]) / mask.sum() for name in draw.scale}


def over_probes(estimate: Callable[[Draw, Key], Leaves], num_probes: int, draw: Draw) -> Leaves:
    """Averages an estimate over independent keys, one at a time.

    Args:
        estimate: of the curvature, from a draw and a key.
        num_probes: keys, >= 1.
        draw: what the minibatch says at one draw of the weights.

    Returns:
        The mean estimate, by name of the random leaf.

    Cost: num_probes estimates.
    """
    if num_probes == 1:
        return estimate(draw, draw.key)
    found = jax.lax.map(partial(estimate, draw), jax.random.split(draw.key, num_probes))
    return jax.tree.map(lambda squares: squares.mean(0), found)
