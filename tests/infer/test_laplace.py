"""Laplace: exact for linear regression; stated curvatures elsewhere, kept positive."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bnncert import likelihood, prior
from bnncert.infer import laplace
from bnncert.posterior import Gaussian, MeanField
from bnncert.types import Batch, Threat

NUM, NOISE, KL_WEIGHT = 22, 0.5, 0.4
KEY = jax.random.key(0)
THREAT = Threat(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0))
RANDOM = np.random.default_rng(0)
MIX = np.array([[1.0, 0.6, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
X = RANDOM.normal(size=(NUM, 3)) @ MIX
Y = 0.7 + X @ np.array([1.0, -2.0, 0.5]) + NOISE * RANDOM.normal(size=NUM)
WIDTHS = np.array([0.8, 0.8, 1.5])  # of "u" (two weights) and "v" (one)
CENTER = 0.3  # of the prior of "v"


def gaussian(key, params, x, y, threat):
    mean = params["u"] @ x[:2] + params["v"][0] * x[2] + params["b"] - threat.eps
    return -0.5 * ((mean - y) / NOISE) ** 2


def exact(kl_weight=KL_WEIGHT):
    """Mean and precision of the tempered conjugate posterior at the bias of .7."""
    precision = X.T @ X / NOISE**2 / kl_weight + np.diag(WIDTHS**-2)
    right = X.T @ (Y - 0.7) / NOISE**2 / kl_weight + np.array([0, 0, CENTER]) / WIDTHS**2
    return np.linalg.solve(precision, right), precision


def params_at(w, dtype: Any = np.float32):
    return {
        "b": jnp.asarray(0.7, dtype),
        "u": jnp.asarray(w[:2], dtype),
        "v": jnp.asarray(w[2:], dtype),
    }


def leaves(dtype: Any = np.float32):
    u = dist.Normal(jnp.zeros(2, dtype), jnp.asarray(WIDTHS[0], dtype)).to_event(1)
    v = dist.Normal(jnp.full(1, CENTER, dtype), jnp.asarray(WIDTHS[2], dtype)).to_event(1)
    return {"b": None, "u": u, "v": v}


def data(dtype: Any = np.float32, x: Any = X, y: Any = Y):
    return Batch(jnp.asarray(x, dtype), jnp.asarray(y, dtype), jnp.ones(len(y), dtype))


def build(loglik: Any = gaussian, dtype: Any = np.float32, **options) -> Any:
    settings = {"prior": leaves(dtype), "num_data": NUM, "kl_weight": KL_WEIGHT} | options
    return laplace.build(loglik, **settings)


def covariance(q):
    tril = np.asarray(q.scale_tril, np.float64)
    assert (np.triu(tril, 1) == 0).all() and (np.diag(tril) > 0).all()
    return np.einsum("ik,jk->ij", tril, tril)


def check_exact(dtype, tolerance):
    mean, precision = exact()
    threat = Threat(*(jnp.asarray(v, dtype) for v in THREAT))
    q, info = build(dtype=dtype).fit(KEY, params_at(mean, dtype), data(dtype), threat)
    assert isinstance(q, Gaussian) and q.random == ("u", "v")
    assert q.scale_tril.dtype == dtype
    inverse = np.linalg.inv(precision)
    size = np.sqrt(np.outer(np.diag(inverse), np.diag(inverse)))
    assert (np.abs(covariance(q) - inverse) < tolerance * size).all()
    np.testing.assert_allclose(q.loc["u"], mean[:2], rtol=1e-6)
    assert info.distance < 100 * tolerance and info.num_negative == 0 and info.negative_mass == 0
    errors = 0.7 + X @ mean - Y
    np.testing.assert_allclose(info.log_likelihood, -0.5 * (errors**2).sum() / NOISE**2, rtol=1e-5)


@pytest.mark.smoke
def test_it_is_the_exact_posterior_of_conjugate_linear_regression():
    check_exact(np.float32, 1e-4)


def test_it_is_exact_to_double_precision(float64):
    check_exact(np.float64, 1e-8)


def test_distance_counts_standard_deviations_from_the_mode():
    mean, precision = exact()
    off = np.array([0.1, -0.2, 0.05])
    q, info = fit_at(mean + off)
    np.testing.assert_allclose(info.distance, np.sqrt(off @ precision @ off), rtol=1e-3)
    np.testing.assert_allclose(covariance(q), np.linalg.inv(precision), rtol=1e-3)  # as everywhere


def fit_at(w, threat=THREAT, batch: Any = None, **options):
    return build(**options).fit(KEY, params_at(w), data() if batch is None else batch, threat)


def test_diagonal_is_the_mean_field_optimum():
    """Variances are 1 / diag(precision), not the diagonal of the inverse."""
    mean, precision = exact()
    q, info = fit_at(mean, kind="diagonal")
    assert isinstance(q, MeanField) and q.scale["b"] is None
    found = np.concatenate([q.scale["u"], q.scale["v"]])
    np.testing.assert_allclose(found, np.diag(precision) ** -0.5, rtol=1e-5)
    assert info.distance < 1e-2


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_fisher_sums_the_outer_products_of_gradients(kind):
    mean, precision = exact()
    w = mean + 0.3
    gradients = X * (0.7 + X @ w - Y)[:, None] / NOISE**2
    fisher = np.einsum("ni,nj->ij", gradients, gradients) / KL_WEIGHT + np.diag(WIDTHS**-2)
    q, info = fit_at(w, kind=kind, curvature="fisher")
    if kind == "full":
        np.testing.assert_allclose(covariance(q), np.linalg.inv(fisher), rtol=2e-3, atol=1e-6)
    else:
        found = np.concatenate([q.scale["u"], q.scale["v"]])
        np.testing.assert_allclose(found, np.diag(fisher) ** -0.5, rtol=1e-5)
    assert info.num_negative == 0
    assert np.abs(np.diag(fisher) / np.diag(precision) - 1).max() > 0.1  # not the Hessian


# --- negative curvature ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_directions_of_negative_curvature_keep_the_priors_width(kind):
    """-log p = w' M w / 2 a datum, with one known eigenvalue below 0."""
    rotation = np.linalg.qr(RANDOM.normal(size=(3, 3)))[0] if kind == "full" else np.eye(3)
    matrix = rotation @ np.diag([-2.0, 0.5, 3.0]) @ rotation.T
    quadratic = jnp.float32(matrix)
    method: Any = laplace.build(
        lambda key, params, x, y, threat: -0.5 * params @ quadratic @ params,
        prior.normal(jnp.zeros(3), 0.7),
        num_data=NUM,
        kind=kind,
    )
    q, info = method.fit(KEY, jnp.zeros(3), data(), THREAT)
    variances = 1 / (np.array([0.0, 0.5, 3.0]) * NUM + 0.7**-2)
    expected = rotation @ np.diag(variances) @ rotation.T
    found = covariance(q) if kind == "full" else np.diag(np.asarray(q.scale) ** 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert info.num_negative == 1
    np.testing.assert_allclose(info.negative_mass, 2 / 5.5, rtol=1e-5)


def test_a_robust_mixture_is_curved_both_ways_and_its_posterior_inside_the_prior():
    """Power 1: the log of a mixture. Every direction is at most as wide as the prior."""
    robust = likelihood.robust_categorical(lambda w, x: w @ x)
    random = np.random.default_rng(1)
    x = random.uniform(size=(12, 3))
    batch = Batch(jnp.float32(x), jnp.arange(12) % 3, jnp.ones(12))
    w = jnp.float32(random.normal(size=(3, 3)))
    threat = Threat(jnp.float32(1.0), jnp.float32(0.4), jnp.float32(1.0))
    leaf = prior.normal(w, 1.3)
    q, info = laplace.build(robust, leaf, num_data=12).fit(KEY, w, batch, threat)

    def negative(flat):
        each = jax.vmap(partial(robust, KEY, flat.reshape(3, 3), threat=threat))
        return -sum(each(batch.x, batch.y))

    hessian = np.asarray(jax.jit(jax.hessian(negative))(w.ravel()), np.float64)
    values, vectors = np.linalg.eigh(hessian)
    assert values[0] < -0.1 and info.num_negative == (values < -1e-4).sum()
    share = np.abs(values[values < 0]).sum() / np.abs(values).sum()
    np.testing.assert_allclose(info.negative_mass, share, rtol=1e-3)
    clipped = 1 / (np.maximum(values, 0) + 1.3**-2)
    np.testing.assert_allclose(covariance(q), (vectors * clipped) @ vectors.T, atol=1e-3)
    assert np.linalg.eigvalsh(covariance(q)).max() < 1.3**2 * 1.001
    assert jnp.isfinite(q.kl(leaf)) and q.kl(leaf) > 0


# --- data in chunks -------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
def test_chunks_padding_and_subsets_are_the_same_data(curvature):
    mean, _ = exact()
    twice = data(x=np.concatenate([X, X]), y=np.concatenate([Y, Y]))
    method = build(curvature=curvature, num_data=2 * NUM, batch_size=9)
    whole, info = method.fit(KEY, params_at(mean), twice, THREAT)  # 4 chunks of 9, and 8
    half = data()
    filled = [  # padding of two fillings; half of the data stands for all
        Batch(
            jnp.concatenate([half.x[part], jnp.full((4, 3), fill)]),
            jnp.concatenate([half.y[part], jnp.full(4, -fill)]),
            jnp.concatenate([half.mask[part], jnp.zeros(4)]),
        )
        for part, fill in ((slice(11), 1e3), (slice(11, 22), 0.0))
    ]
    found, other = method.fit(KEY, params_at(mean), iter(filled), THREAT)
    np.testing.assert_allclose(covariance(found), covariance(whole), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(other.log_likelihood, info.log_likelihood, rtol=1e-5)


def test_prepare_is_differentiated_through_for_both_curvatures():
    """Centring the inputs inside `prepare`, by moving the bias, is centring the data."""
    mean, _ = exact()

    def prepare(params, xs):
        mean = xs.mean(axis=0)
        return {**params, "b": params["b"] - params["u"] @ mean[:2] - params["v"][0] * mean[2]}

    centred = data(x=X - X.mean(axis=0))
    for curvature in ("hessian", "fisher"):
        q, _ = fit_at(mean, curvature=curvature, prepare=prepare)
        expected, _ = fit_at(mean, curvature=curvature, batch=centred)
        np.testing.assert_allclose(covariance(q), covariance(expected), rtol=1e-3, atol=1e-6)


def test_the_threat_and_the_kl_weight_are_used():
    """The shift by eps is a change of the log-likelihood; a larger kappa widens."""
    mean, precision = exact(2.0)
    _, info = fit_at(mean, THREAT._replace(eps=jnp.float32(0.2)), kl_weight=2.0)
    errors = 0.5 + X @ mean - Y
    np.testing.assert_allclose(info.log_likelihood, -0.5 * (errors**2).sum() / NOISE**2, rtol=1e-5)
    q, _ = fit_at(mean, kl_weight=2.0)
    np.testing.assert_allclose(covariance(q), np.linalg.inv(precision), rtol=1e-3)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data = 0"),
        ({"kl_weight": 0.0}, "kl_weight = 0.0"),
        ({"kind": "block"}, "kind = 'block': choose one of"),
        ({"curvature": "ggn"}, "curvature = 'ggn': choose one of"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"num_products": 0}, "num_products = 0"),
        ({"prior": dict.fromkeys("buv")}, "no random leaf"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_priors_and_data():
    with pytest.raises(NotImplementedError, match="leaf 'v' is a Laplace"):
        build(prior={**leaves(), "v": dist.Laplace(jnp.zeros(1), 1.0)})
    with pytest.raises(ValueError, match="no batch"):
        build().fit(KEY, params_at(np.zeros(3)), iter([]), THREAT)
    with pytest.raises(ValueError, match="only the params have"):
        build().fit(KEY, {**params_at(np.zeros(3)), "c": jnp.zeros(1)}, data(), THREAT)
