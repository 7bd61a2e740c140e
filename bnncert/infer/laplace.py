"""Laplace approximation: a Gaussian around trained weights, of the robust loss's own curvature.

    q(w) = N(w; w*, (H / kappa + S^-2)^-1),      H = sum_{i <= N} -d^2 log p(y_i | x_i, w*) / dw^2

over the random leaves, for a prior of independent normals with standard deviations S and the
tempered posterior p(w) p(D | w)^(1 / kappa); the other leaves are fixed at w*. With a prior that is
random in the last layer alone (`bnncert.prior.normal(params, scale, where=...)`) it is the
last-layer Laplace approximation, an afterthought to any training. It is exact where the log joint
is quadratic and w* its maximum: linear regression.

    kind        q                                     memory     time
    full        Gaussian, all of the P x P matrix     P^2        H, and its eigenvectors O(P^3)
    diagonal    MeanField, the diagonal of the same   P          H's diagonal alone

    curvature   H
    hessian     exact, by P products with a vector (of which "diagonal" keeps one number each)
    fisher      sum_i g_i g_i^T of the gradients of single data: the *empirical* Fisher, positive,
                equal to the Hessian in expectation for a true model and many data, and only then

The Hessian of a network is not positive, and that of a robust loss less so: the log of a mixture
(power > 0) is not concave in its terms, and a worst case has kinks. Directions of negative
curvature are given the prior's width. For "full" they are the eigenvectors of S H S, H in units of
the prior's precision, with eigenvalues l_j clipped at 0:

    covariance = S V diag(1 / (1 + max(l, 0) / kappa)) V^T S

which cannot fail to be positive in any arithmetic. For "diagonal" entries of S H S are clipped.

Source: MacKay, "A Practical Bayesian Framework for Backpropagation Networks", 1992, section 2;
Daxberger et al., "Laplace Redux - Effortless Bayesian Deep Learning", NeurIPS 2021, section 2;
Kunstner et al., "Limitations of the Empirical Fisher Approximation", NeurIPS 2019.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bnncert import prior as priors
from bnncert.infer._minibatch import check_settings, log_likelihoods
from bnncert.posterior import Gaussian, MeanField
from bnncert.posterior.leaves import flatten, unflatten
from bnncert.types import Batch, Key, LogLikelihood, Params, Prepare, Prior, Threat


class LaplaceInfo(NamedTuple):
    """What a Laplace approximation found at the weights.

    Attributes:
        log_likelihood: log p(D | w*), nats summed over the data (those seen, times N over their
            number).
        num_negative: negative eigenvalues of S H S (full) or entries of its diagonal (diagonal)
            that were clipped at 0: those further below 0 than rounding, P eps max |l|.
        negative_mass: their sum over the sum of all absolute values, in [0, 1].
        distance: sqrt(g^T C g), g the gradient of the log joint at w* and C the covariance: how
            many standard deviations of q the weights are from the mode of the quadratic.
    """

    log_likelihood: Float[Array, ""]
    num_negative: Int[Array, ""]
    negative_mass: Float[Array, ""]
    distance: Float[Array, ""]


class Laplace(NamedTuple):
    """The method: `fit(key, params, data, threat) -> (posterior, LaplaceInfo)`.

    `data` is one `Batch`, cut into chunks of `batch_size`, or an iterable of batches, which are
    taken as they come (a progress bar wraps around it); padding adds nothing. Data that are fewer
    than N stand for all of them. A `prepare` sees chunk by chunk.

    Attributes:
        fit: fits the Gaussian at the weights given.
    """

    fit: Callable[
        [Key, Params, Batch | Iterable[Batch], Threat], tuple[Gaussian | MeanField, LaplaceInfo]
    ]


class _Sums(NamedTuple):
    """What is summed over the data: their number, log-likelihood, its gradient and curvature."""

    num_seen: Array
    log_likelihood: Array
    gradient: Array
    curvature: Array


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    kl_weight: float = 1.0,
    kind: str = "full",
    curvature: str = "hessian",
    batch_size: int = 256,
    num_products: int = 32,
    prepare: Prepare | None = None,
) -> Laplace:
    """Makes a Laplace approximation, to be fitted at trained weights.

        q(w) = N(w; w*, (H / kappa + S^-2)^-1),    H = sum_i -d^2 log p(y_i | x_i, w*) / dw^2

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of normal distributions with the params' structure, None for leaves that stay
            as they are.
        num_data: N, the size of the training set.
        kl_weight: kappa, > 0; 1 is Bayes.
        kind: "full" or "diagonal".
        curvature: "hessian" or "fisher".
        batch_size: data in a chunk, where `data` is one batch.
        num_products: products of the Hessian with a vector that are computed together.
        prepare: `(params, x_batch) -> params`, on each chunk: e.g. batch-norm statistics. Fisher
            gradients go through it datum by datum, at the price of a chunk each.

    Returns:
        `Laplace(fit)`; the posterior is a `Gaussian` (full) or a `MeanField` (diagonal).

    Raises:
        ValueError: num_data, batch_size or num_products < 1, a kl_weight that is not positive, an
            unknown kind or curvature, a prior without a random leaf; from `fit`, a prior that does
            not match the params, or no data.
        NotImplementedError: a prior that is not normal, naming the leaf.

    Cost, for P random weights: "hessian" takes P evaluations of a Hessian-vector product a chunk,
    in the memory of `num_products` of them at once (activations of num_products x batch_size data);
    "fisher" the gradients of a chunk, batch_size x P. The full kind then adds the eigenvectors,
    O(P^3) in 5 P^2 numbers: P = 5,000 is 500 MB.

    Source: MacKay, 1992, section 2; Daxberger et al., NeurIPS 2021, section 2.

    Example:
        >>> from bnncert import likelihood, prior
        >>> params = {"first": jnp.ones((4, 3)), "last": jnp.ones((2, 4))}
        >>> method = build(
        ...     likelihood.clean_categorical(lambda p, x: p["last"] @ jnp.tanh(p["first"] @ x)),
        ...     prior.normal(params, where=lambda name: name == "last"),
        ...     num_data=5,
        ... )
        >>> data = Batch(jnp.ones((5, 3)), jnp.array([0, 0, 1, 0, 1]), jnp.ones(5))
        >>> q, info = method.fit(jax.random.key(0), params, data, Threat(0.0, 1.0))
        >>> q.random, q.scale_tril.shape
        (('last',), (8, 8))
    """
    check_settings(prior, num_data, kl_weight)
    for name, value, known in (
        ("kind", kind, ("full", "diagonal")),
        ("curvature", curvature, ("hessian", "fisher")),
    ):
        if value not in known:
            raise ValueError(f"{name} = {value!r}: choose one of {known}.")
    for name, size in (("batch_size", batch_size), ("num_products", num_products)):
        if size < 1:
            raise ValueError(f"{name} = {size}: it must be at least 1.")
    priors.normal_parameters(prior)  # raises if it is not one
    full = kind == "full"
    model = (log_likelihood, prepare, priors.names(prior), full)
    sums = _fisher if curvature == "fisher" else partial(_hessian, num_products)
    each = jax.jit(partial(sums, *model))
    return Laplace(partial(_fit, prior, num_data, kl_weight, batch_size, full, each))


def _fit(
    prior: Prior,
    num_data: int,
    kl_weight: float,
    batch_size: int,
    full: bool,
    sums: Callable[..., _Sums],
    key: Key,
    params: Params,
    data: Batch | Iterable[Batch],
    threat: Threat,
) -> tuple[Gaussian | MeanField, LaplaceInfo]:
    """Sums over chunks, and makes the posterior from the sums."""
    # 1. Log-likelihood, gradient and curvature at the weights, of the data as if they were all N.
    priors.check(prior, params)
    total = None
    for i, chunk in enumerate(_chunks(data, batch_size) if isinstance(data, Batch) else data):
        found = sums(jax.random.fold_in(key, i), params, chunk, threat)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("no data: the iterable gave no batch (a generator that was used up?).")
    seen = jax.tree.map(lambda leaf: leaf * (num_data / total.num_seen), total)

    # 2. The gradient of the log joint: 0 at its mode.
    names = priors.names(prior)
    locs, widths = priors.normal_parameters(prior)
    width, loc = flatten(widths, names), flatten(params, names)
    score = seen.gradient / kl_weight - (loc - flatten(locs, names)) / width**2
    # 3. The covariance, negative curvature apart, and how far from the mode the weights are in it.
    solve = _full if full else _diagonal
    factor, eigenvalues, moved = solve(seen.curvature, width, kl_weight, score)
    info = LaplaceInfo(seen.log_likelihood, *_negative(eigenvalues), jnp.linalg.norm(moved))
    if full:
        return Gaussian(params, factor, names), info
    values = unflatten(factor, params, names)
    scale = {name: values.get(name) for name in priors.named(prior)}
    return MeanField(params, priors.unflatten(prior, scale)), info


def _full(
    curvature: Array, width: Array, kl_weight: float, score: Array
) -> tuple[Array, Array, Array]:
    """Finds a Cholesky factor of the covariance, eigenvalues of S H S, the score in units of q."""
    # 1. The eigenvectors of S H S; a negative eigenvalue counts as 0.
    whitened = width[:, None] * curvature * width
    eigenvalues, vectors = jnp.linalg.eigh((whitened + whitened.T) / 2)
    shrink = jax.lax.rsqrt(1 + jnp.maximum(eigenvalues, 0.0) / kl_weight)
    # 2. A root of the covariance, and by QR its triangular one: root root^T = (Q R)^T (Q R).
    root = width[:, None] * vectors * shrink
    upper = jnp.linalg.qr(root.T, mode="r")
    sign = jnp.where(jnp.diagonal(upper) < 0, -1.0, 1.0).astype(upper.dtype)
    return (sign[:, None] * upper).T, eigenvalues, score @ root


def _diagonal(
    curvature: Array, width: Array, kl_weight: float, score: Array
) -> tuple[Array, Array, Array]:
    """Finds standard deviations, the diagonal of S H S, and the score in units of q."""
    entries = width**2 * curvature
    scale = width * jax.lax.rsqrt(1 + jnp.maximum(entries, 0.0) / kl_weight)
    return scale, entries, score * scale


def _negative(values: Array) -> tuple[Array, Array]:
    """Counts those below 0 by more than rounding, and takes their share of the absolute sum."""
    size = jnp.abs(values)
    below = values < -len(values) * jnp.finfo(values.dtype).eps * size.max()
    share = jnp.sum(size, where=below) / jnp.maximum(size.sum(), jnp.finfo(values.dtype).tiny)
    return below.sum().astype(jnp.int32), share


def _hessian(
    num_products: int,
    log_likelihood: LogLikelihood,
    prepare: Prepare | None,
    names: tuple[str, ...],
    full: bool,
    key: Key,
    params: Params,
    batch: Batch,
    threat: Threat,
) -> _Sums:
    """Sums the Hessian row by row, or its diagonal, by products with unit vectors."""

    def total(flat: Array) -> Array:
        moved = priors.replace(params, unflatten(flat, params, names))
        return log_likelihoods(log_likelihood, prepare, key, moved, batch, threat).sum()

    flat = flatten(params, names)
    value = total(flat)
    gradient, product = jax.linearize(jax.grad(total), flat)

    def row(i: Array) -> Array:
        found = -product(jnp.zeros_like(flat).at[i].set(1.0))
        return found if full else found[i]

    curvature = jax.lax.map(row, jnp.arange(flat.size), batch_size=num_products)
    return _Sums(batch.mask.sum(), value, gradient, curvature)


def _fisher(
    log_likelihood: LogLikelihood,
    prepare: Prepare | None,
    names: tuple[str, ...],
    full: bool,
    key: Key,
    params: Params,
    batch: Batch,
    threat: Threat,
) -> _Sums:
    """Sums outer products, or squares, of the gradients of single data."""

    def term(flat: Array, key: Key, x: Array, y: Array) -> Array:
        moved = priors.replace(params, unflatten(flat, params, names))
        prepared = moved if prepare is None else prepare(moved, batch.x)
        return log_likelihood(key, prepared, x, y, threat)

    keys = jax.random.split(key, batch.mask.shape[0])
    each = jax.vmap(jax.value_and_grad(term), in_axes=(None, 0, 0, 0))
    values, gradients = each(flatten(params, names), keys, batch.x, batch.y)
    seen = batch.mask > 0
    values = jnp.where(seen, values, 0.0)
    gradients = jnp.where(seen[:, None], gradients, 0.0)
    weighted = batch.mask[:, None] * gradients
    if full:
        curvature = jnp.matmul(weighted.T, gradients, precision=jax.lax.Precision.HIGHEST)
    else:
        curvature = jnp.sum(weighted * gradients, axis=0)
    return _Sums(batch.mask.sum(), batch.mask @ values, weighted.sum(axis=0), curvature)


def _chunks(data: Batch, size: int) -> Iterator[Batch]:
    """Cuts the data into chunks; the last may be smaller: `prepare` sees no padding of ours."""
    for start in range(0, data.mask.shape[0], size):
        yield Batch(*(leaf[start : start + size] for leaf in data))
