"""Bounds on confidence, entropy, mean and variance: true at every point, nearly exact at one."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bnncert import metrics
from bnncert.certify import mean_and_variance, uncertainty
from bnncert.certify.exact.uncertainty import _entropy, _on_the_simplex
from bnncert.sets import Box, ball

SIZE, WIDTH, CLASSES, SAMPLES = 3, 5, 3, 4
KEY = jax.random.key(0)


def mlp(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x) + params["b"]


SHAPES = {"w": (WIDTH, SIZE), "v": (CLASSES, WIDTH), "b": (CLASSES,)}
NETWORKS = {
    name: jax.random.normal(key, (SAMPLES, *shape))
    for key, (name, shape) in zip(jax.random.split(KEY, 3), SHAPES.items(), strict=True)
}
XS = jax.random.normal(jax.random.key(1), (6, SIZE))


@pytest.fixture(scope="module", params=[0.0, 0.05, 0.5])
def found(request):
    """Bounds on balls, and what the networks say at points of them, in float64."""
    eps = request.param

    @jax.jit
    @jax.vmap
    def bounds(x):
        here = ball(x, eps)
        return uncertainty(mlp, NETWORKS, here, method="ibp"), mean_and_variance(
            mlp, NETWORKS, here, method="ibp"
        )

    rng = np.random.default_rng(0)
    unit = np.concatenate([list(itertools.product((-1, 1), repeat=SIZE)), np.zeros((1, SIZE)),
                           rng.uniform(-1, 1, (200, SIZE))])  # fmt: skip
    inside = np.asarray(XS)[:, None].astype(np.float64) + 0.9999 * eps * unit
    w, v, b = (np.asarray(NETWORKS[name], np.float64) for name in SHAPES)
    hidden = np.maximum(np.einsum("swi,npi->npsw", w, inside), 0)
    return eps, bounds(XS), np.einsum("scw,npsw->npsc", v, hidden) + b


def test_confidence_and_entropy_hold_at_points(found):
    eps, (bounds, _), outputs = found
    pi = np.exp(outputs - outputs.max(-1, keepdims=True))
    pi = (pi / pi.sum(-1, keepdims=True)).mean(2)
    entropy = -(pi * np.log(pi)).sum(2)
    assert (bounds.probability.lower[:, None] <= pi).all()
    assert (pi <= bounds.probability.upper[:, None]).all()
    for box, value in ((bounds.confidence, np.max(pi, axis=2)), (bounds.entropy, entropy)):
        assert (box.lower <= value.min(1)).all() and (value.max(1) <= box.upper).all()
        if eps == 0:
            np.testing.assert_allclose(box.upper, value[:, 0], atol=3e-4)
            np.testing.assert_allclose(box.lower, value[:, 0], atol=0.03 if box is bounds.entropy
                                       else 3e-4)  # fmt: skip
        if eps == 0.05:
            trivial = 1.0 if box is bounds.confidence else float(np.log(3))
            assert bool(jnp.any(box.upper < 0.999 * trivial))


def test_mean_and_variance_hold_at_points(found):
    eps, (_, bounds), outputs = found
    for box, value in ((bounds.mean, outputs.mean(2)), (bounds.variance, outputs.var(2))):
        assert (box.lower[:, None] <= value).all() and (value <= box.upper[:, None]).all()
        if eps == 0:
            np.testing.assert_allclose(box.lower, value[:, 0], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(box.upper, value[:, 0], rtol=1e-3, atol=1e-4)
    assert (bounds.variance.lower >= 0).all() and (eps == 0.5 or (bounds.variance.lower > 0).any())


def vertices(lower, upper):
    """All points of box and simplex with at most one coordinate off its ends."""
    for i in range(len(lower)):
        for rest in itertools.product(*(z for j, z in enumerate(zip(lower, upper, strict=True))
                                        if j != i)):  # fmt: skip
            left = 1 - sum(rest)
            if lower[i] - 1e-12 <= left <= upper[i] + 1e-12:
                yield np.insert(np.array(rest), i, left)


def test_entropy_lies_between_its_extremes_over_box_and_simplex():
    """Its minimum is at a vertex; its maximum is known by bisection in float64."""
    rng = np.random.default_rng(1)
    entropy = jax.jit(lambda lower, upper: _entropy(_on_the_simplex(Box(lower, upper))))
    gaps = []
    for _ in range(200):
        pi = rng.dirichlet(np.full(4, rng.choice([0.1, 1.0, 10.0])))
        reach = rng.uniform(0, 0.3, (2, 4)) * rng.choice([0.0, 0.1, 1.0])
        lower, upper = np.clip(pi - reach[0], 0, 1), np.clip(pi + reach[1], 0, 1)
        box = entropy(jnp.float32(lower), jnp.float32(upper))
        least = min((stats.entropy(np.clip(v, 0, 1)) for v in vertices(lower, upper)),
                    default=stats.entropy(pi))  # fmt: skip
        low, high = 0.0, 1.0
        for _ in range(60):
            t = 0.5 * (low + high)
            low, high = (low, t) if np.clip(t, lower, upper).sum() > 1 else (t, high)
        most = stats.entropy(np.clip(high, lower, upper))
        assert box.lower <= least + 1e-6 and most - 1e-6 <= box.upper
        gaps.append((least - box.lower, box.upper - most))
    assert np.max(gaps, axis=0)[1] < 1e-3 and np.mean(gaps, axis=0)[0] < 0.12


def test_nothing_is_nan_where_bounds_are_infinite_or_underflow():
    """Where exp overflows over the set; and where a probability is a number that flushes to 0."""
    far = ball(jnp.array([100.0]), 50.0)
    found = mean_and_variance(lambda w, x: jnp.exp(w * x), jnp.array([[1.0], [-1.0]]), far)
    assert jnp.isinf(found.variance.upper).all() and jnp.isinf(found.mean.upper).all()
    assert not any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(found))
    apart = mean_and_variance(
        lambda w, x: w * x, jnp.array([[1e25], [-1e25]]), ball(XS[0, :1], 0.0)
    )
    assert jnp.isfinite(apart.variance.lower).all()  # not more than it is, though squares overflow
    tiny = jnp.array([1e-40, 0.0, 1.0])
    entropy = _entropy(_on_the_simplex(Box(tiny, tiny)))
    assert 0 <= entropy.lower <= 1e-5 and 0 <= entropy.upper <= 1e-3


def test_detection_is_certified_below_what_it_is_without_an_adversary():
    """In-distribution inputs far out, where the networks are sure; others near the origin."""
    inner, outer = 0.05 * XS, 10 * XS
    bounded = jax.jit(jax.vmap(lambda x: uncertainty(mlp, NETWORKS, ball(x, 0.01), method="ibp")))
    clean = jax.jit(jax.vmap(lambda x: uncertainty(mlp, NETWORKS, ball(x, 0.0), method="ibp")))
    sure, unsure, worst = (f(x).confidence.upper for f, x in
                           ((clean, outer), (clean, inner), (bounded, inner)))  # fmt: skip
    assert (worst > unsure).all()
    certified, usual = metrics.auroc(sure, worst), metrics.auroc(sure, unsure)
    assert 0.5 < certified <= usual


def test_errors_name_the_fault():
    for function in (uncertainty, mean_and_variance):
        with pytest.raises(TypeError, match="x_set"):
            partial(function, mlp, NETWORKS)(XS[0])
        with pytest.raises(ValueError, match="leading axes"):
            function(mlp, {**NETWORKS, "b": jnp.ones((2, CLASSES))}, ball(XS[0], 0.1))
