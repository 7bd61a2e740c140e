"""Robust likelihoods: a true lower bound, the mixture's mathematics, the arithmetic mean's trap."""

import itertools
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.stats import norm

from bnncert import attack, gaussian, likelihood, prior
from bnncert.bounds import bound
from bnncert.infer import bbb, elbo
from bnncert.infer import map as maximum
from bnncert.likelihood import log_power_mean
from bnncert.posterior import MeanField
from bnncert.sets import ball
from bnncert.types import Batch, Threat

SIZE, WIDTH, CLASSES, BATCH = 4, 8, 3, 6
KEY = jax.random.key(0)


def mlp(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x + params["c"]) + params["b"]


def threat(eps, lam=0.25, power=0.0):
    return Threat(jnp.asarray(eps, float), jnp.asarray(lam, float), jnp.asarray(power, float))


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(1), 4)
    return {
        "w": jax.random.normal(keys[0], (WIDTH, SIZE)),
        "c": jax.random.normal(keys[1], (WIDTH,)),
        "v": jax.random.normal(keys[2], (CLASSES, WIDTH)),
        "b": jax.random.normal(keys[3], (CLASSES,)),
    }


@pytest.fixture(scope="module")
def data():
    return jax.random.uniform(jax.random.key(2), (BATCH, SIZE)), jnp.arange(BATCH) % CLASSES


def batched(loglik):
    """The likelihood of a batch, jitted."""
    return jax.jit(jax.vmap(loglik, in_axes=(None, None, 0, 0, None)))


@cache  # compiling is what costs: cases with the same options share it
def robust(method="ibp", clip=None):
    return batched(likelihood.robust_categorical(mlp, method=method, clip=clip))


@cache
def worst_case(method="ibp", clip=None):
    return batched(likelihood.certified_categorical(mlp, method=method, clip=clip))


clean = batched(likelihood.clean_categorical(mlp))
mean = jax.jit(log_power_mean)
shares = jax.jit(jax.grad(log_power_mean))


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_lam_one_or_eps_zero_is_the_clean_log_likelihood(params, data, power):
    expected = clean(KEY, params, *data, threat(9.0))
    logits = jax.vmap(partial(mlp, params))(data[0])
    by_hand = logits[jnp.arange(BATCH), data[1]] - jax.nn.logsumexp(logits, axis=1)
    np.testing.assert_allclose(expected, by_hand, rtol=1e-5)
    for eps, lam in [(0.5, 1.0), (0.0, 1.0), (0.0, 0.25), (0.0, 0.0)]:
        found = robust()(KEY, params, *data, threat(eps, lam, power))
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    several = robust()(KEY, params, *data, threat([0.0, 0.0, 0.0], 0.25, power))
    np.testing.assert_allclose(several, expected, rtol=2e-6, atol=2e-6)
    assert (robust()(KEY, params, *data, threat(0.3, 0.25, power)) < expected - 0.05).all()


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_at_lam_one_the_gradient_is_the_clean_one_even_where_bounds_overflow(power):
    def growing(params, x):
        return params @ jnp.exp(100 * x)

    params, x, y = jnp.array([[1.0, -1.0], [0.5, 2.0]]), jnp.array([0.0, 0.01]), jnp.array(0)
    loglik = likelihood.robust_categorical(growing)
    here = threat(2.0, 1.0, power)
    overflowed = jax.jit(likelihood.certified_categorical(growing))(KEY, params, x, y, here)
    assert overflowed == -jnp.inf
    found = jax.jit(jax.grad(lambda w, t: loglik(KEY, w, x, y, t)))(params, here)
    expected = jax.grad(lambda w: jax.nn.log_softmax(growing(w, x))[y])(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_several_radii_are_weighted_evenly(params, data):
    radii, lam = [0.02, 0.1, 0.3], 0.25
    logs = [clean(KEY, params, *data, threat(0.0))]
    logs += [worst_case()(KEY, params, *data, threat(eps)) for eps in radii]
    probs, weights = np.exp(np.array(logs, np.float64)), np.array([lam, 0.25, 0.25, 0.25])
    arithmetic = robust()(KEY, params, *data, threat(radii, lam, 1.0))
    np.testing.assert_allclose(arithmetic, np.log(weights @ probs), rtol=1e-5, atol=1e-6)
    geometric = robust()(KEY, params, *data, threat(radii, lam, 0.0))
    np.testing.assert_allclose(geometric, weights @ np.log(probs), rtol=1e-5, atol=1e-6)
    halfway = robust()(KEY, params, *data, threat(radii, lam, 0.5))
    np.testing.assert_allclose(halfway, 2 * np.log(weights @ probs**0.5), rtol=1e-5, atol=1e-6)


def test_equal_radii_are_one_radius(params, data):
    one = robust()(KEY, params, *data, threat(0.1, 0.3, 0.5))
    three = robust()(KEY, params, *data, threat([0.1] * 3, 0.3, 0.5))
    np.testing.assert_allclose(one, three, rtol=1e-5)


# --- the worst case is one ------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_worst_case_is_below_the_softmax_at_every_point(params, data, method, clip):
    xs, ys = data
    eps = 0.2
    lower = worst_case(method, clip)(KEY, params, xs, ys, threat(eps))
    found = _attacked(clip)(params, xs, ys, eps)
    for x, y, bound_here, attacked in zip(xs, ys, lower, found, strict=True):
        box = ball(x, eps, clip=clip)
        ends = np.array([box.lower, box.upper])  # pyright: ignore
        corners = np.array(list(itertools.product(*ends.T)), np.float32)
        inside = np.random.default_rng(0).uniform(ends[0], ends[1], (500, SIZE))
        points = jnp.concatenate([corners, inside.astype(np.float32), attacked[None]])
        least = jax.vmap(lambda p, y=y: jax.nn.log_softmax(mlp(params, p))[y])(points).min()
        assert bound_here <= least + 1e-5
        assert bound_here >= least - 3.0  # and it says something


@cache
def _attacked(clip):
    def one(params, x, y, eps):
        samples = jax.tree.map(lambda leaf: leaf[None], params)
        return attack.pgd(KEY, mlp, samples, x, y, eps, steps=10, clip=clip).x

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))


def test_tighter_methods_give_larger_likelihoods(params, data):
    ibp, crown_ibp, crown = (
        worst_case(method)(KEY, params, *data, threat(0.2))
        for method in ("ibp", "crown-ibp", "crown")
    )
    assert (ibp <= crown_ibp + 1e-6).all() and (crown_ibp <= crown + 1e-6).all()
    assert (crown > ibp + 0.05).any()


def test_worst_case_of_a_linear_model_is_exact_margin_by_margin():
    """The upper bound of each margin is (w_j - w_y).x + eps |w_j - w_y|_1."""
    w = jax.random.normal(jax.random.key(3), (CLASSES, SIZE))
    x, y, eps = jnp.arange(SIZE) / SIZE, jnp.array(1), 0.3
    loglik = likelihood.certified_categorical(lambda w, x: w @ x)
    rows = np.array(w - w[1], np.float64)
    margins = rows @ np.array(x) + eps * np.abs(rows).sum(axis=1)
    expected = -np.log(np.exp(margins).sum())
    np.testing.assert_allclose(loglik(KEY, w, x, y, Threat(eps)), expected, rtol=1e-5)


def test_merged_margins_beat_bounds_on_each_logit(params, data):
    xs, ys = data
    logits = jax.jit(jax.vmap(bound(mlp, "ibp"), in_axes=(None, 0)))(
        params, jax.vmap(lambda x: ball(x, 0.2))(xs)
    )
    own = jax.nn.one_hot(ys, CLASSES, dtype=bool)
    of_y = logits.lower[jnp.arange(BATCH), ys]
    apart = -jax.nn.logsumexp(jnp.where(own, 0.0, logits.upper - of_y[:, None]), axis=1)
    merged = worst_case()(KEY, params, xs, ys, threat(0.2))
    assert (merged >= apart - 1e-5).all()
    assert (merged > apart + 0.02).all() and (merged > apart + 0.5).any()


# --- the power mean -------------------------------------------------------------------------------


def _cases():
    """(logs, weights) of two to four terms, from near equal to very far apart."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        logs = -(10.0 ** rng.uniform(-3, 4, rng.integers(2, 5))).astype(np.float32)
        lam = rng.choice([0.0, 1.0, 1e-6, 1 - 1e-6, rng.uniform()])
        weights = np.r_[lam, np.full(len(logs) - 1, (1 - lam) / (len(logs) - 1))]
        yield logs, weights.astype(np.float32)


def _reference(logs, weights, power):
    """The definition in extended precision, from whichever side does not cancel."""
    logs, weights = np.longdouble(logs), np.longdouble(weights)
    weights = weights / weights.sum()
    if power == 0:
        return weights @ logs
    scaled = power * (logs - logs.max())
    excess = weights @ np.expm1(scaled)
    if excess > -0.5:
        return logs.max() + np.log1p(excess) / power
    kept = scaled[weights > 0].max()
    return logs.max() + (kept + np.log(weights @ np.exp(scaled - kept))) / power


@pytest.mark.parametrize("power", [0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0])
def test_power_mean_to_float_rounding(power):
    for logs, weights in _cases():
        expected = float(_reference(logs, weights, power))
        np.testing.assert_allclose(mean(logs, weights, power), expected, rtol=1e-5)


def test_power_mean_at_its_two_ends():
    for logs, weights in _cases():
        np.testing.assert_allclose(mean(logs, weights, 0.0), weights @ logs, rtol=1e-5)
        with np.errstate(divide="ignore"):
            arithmetic = np.logaddexp.reduce(np.log(weights) + logs)
        np.testing.assert_allclose(mean(logs, weights, 1.0), arithmetic, rtol=1e-5, atol=1e-6)


def test_power_mean_is_monotone_and_continuous_at_zero():
    """The power mean inequality; at power 0 Jensen's: the geometric is below the arithmetic."""
    powers = [0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.6, 1.0]
    strict = 0
    for logs, weights in _cases():
        values = np.array([mean(logs, weights, p) for p in powers])
        slack = 3e-6 * np.abs(values).max()
        assert (np.diff(values) >= -slack).all()
        strict += values[-1] > values[0] + 0.1
        near = mean(logs, weights, np.float32(1e-9))
        np.testing.assert_allclose(near, values[0], rtol=1e-4)
    assert strict > 20


@pytest.mark.parametrize("power", [0.0, 1e-6, 1e-2, 0.5, 1.0])
def test_shares_of_the_gradient_are_a_distribution(power):
    """d log M / d log p_i = w_i p_i^power / sum: finite, not negative, of sum 1."""
    for logs, weights in _cases():
        found = np.array(shares(logs, weights, power))
        assert np.isfinite(found).all() and (found >= 0).all()
        np.testing.assert_allclose(found.sum(), 1.0, atol=1e-3)
        assert (found[weights == 0] == 0).all()
        if power == 0:
            np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("power", [0.0, 1e-4, 1.0])
def test_gradients_of_the_weights_are_finite(params, data, lam, power):
    x, y = data[0][0], data[1][0]
    extreme = jax.tree.map(lambda leaf: 30 * leaf, params)  # the worst case is some e^-10,000
    here = threat(0.5, lam, power)
    value, found = _gradient(extreme, x, y, here)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert lam == 1 or worst_case()(KEY, extreme, *data, here)[0] < -1_000


@jax.jit
def _gradient(params, x, y, here):
    loglik = likelihood.robust_categorical(mlp)
    return jax.value_and_grad(lambda p: loglik(KEY, p, x, y, here))(params)


def test_no_gradient_reaches_the_schedule(params, data):
    """lam's own gradient is not finite at 0 and 1: it is scheduled, never learned."""
    for loglik in (
        likelihood.robust_categorical(mlp),
        likelihood.attacked_categorical(mlp, partial(attack.pgd, steps=2)),
    ):
        gradient = jax.jit(jax.grad(lambda t, f=loglik: f(KEY, params, data[0][0], data[1][0], t)))
        for lam, power in [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]:
            assert all(leaf == 0 for leaf in gradient(threat(0.1, lam, power)))


# --- the trap -------------------------------------------------------------------------------------


def test_the_arithmetic_mixture_forgets_the_worst_case_and_the_geometric_does_not(params, data):
    """The gradient with respect to the worst-case margin vanishes, or is 1 - lam exactly."""
    lam, weights = 0.25, jnp.array([0.25, 0.75])
    for worst in (-1.0, -10.0, -100.0, -10_000.0):
        logs = jnp.array([-0.01, worst])
        arithmetic, geometric = shares(logs, weights, 1.0)[1], shares(logs, weights, 0.0)[1]
        p_clean, p_worst = np.exp(-0.01), np.exp(np.float64(worst))
        formula = (1 - lam) * p_worst / (lam * p_clean + (1 - lam) * p_worst)
        np.testing.assert_allclose(arithmetic, formula, rtol=1e-5, atol=1e-12)
        assert geometric == 1 - lam
    assert arithmetic == 0.0

    # and so for a network: what is left of the arithmetic gradient is the clean one
    extreme = jax.tree.map(lambda leaf: 5 * leaf, params)
    x, y = data[0][0], jnp.argmax(mlp(extreme, data[0][0]))
    _, at_clean = _gradient(extreme, x, y, threat(0.0, 1.0))
    _, at_worst = _gradient(extreme, x, y, threat(0.5, 0.0))
    _, arithmetic = _gradient(extreme, x, y, threat(0.5, lam, 1.0))
    _, geometric = _gradient(extreme, x, y, threat(0.5, lam, 0.0))
    mixed = jax.tree.map(lambda a, b: lam * a + (1 - lam) * b, at_clean, at_worst)
    for name in params:
        np.testing.assert_allclose(arithmetic[name], at_clean[name], atol=1e-5)
        np.testing.assert_allclose(geometric[name], mixed[name], rtol=1e-4, atol=1e-4)
    assert jnp.abs(at_worst["w"]).max() > 1.0


def test_from_a_fragile_start_only_the_geometric_mixture_becomes_robust():
    """One feature is fragile and always right, another robust and right nine times in ten.

    A network that starts on the fragile one has p_worst near 0. On the arithmetic mixture it stays
    there, at a loss of the clean one plus log(1/lam); on the geometric one it crosses over.
    """
    eps, lam, num = 0.5, 0.25, 40
    y = jnp.arange(num) % 2
    sign = 2.0 * y - 1
    robust_feature = jnp.where(jnp.arange(num) < num // 10, -sign, sign)
    x = jnp.stack([0.25 * sign, robust_feature], axis=1)
    start = jnp.array([[0.0, 0.0], [40.0, 0.0]])

    def linear(w, x):
        return w @ x

    algorithm = maximum.build(
        likelihood.robust_categorical(linear),
        prior.normal(start),
        num_data=num,
        optimizer=optax.sgd(1.0 / num),
        prior_weight=0.0,
    )

    @jax.jit
    def train(power):
        def step(state, _):
            return algorithm.update(KEY, state, Batch(x, y, jnp.ones(num)), Threat(eps, lam, power))

        state, info = jax.lax.scan(step, algorithm.init(KEY, start), length=400)
        w = state.params
        of_clean = jax.vmap(lambda x, y: -jax.nn.log_softmax(linear(w, x))[y])(x, y).mean()
        margin = sign * (x @ (w[1] - w[0])) - eps * jnp.abs(w[1] - w[0]).sum()
        return info.loss[-1] / num, of_clean, jnp.mean(margin > 0)

    loss, nll, certified = train(jnp.asarray(1.0))
    np.testing.assert_allclose(loss, nll + np.log(1 / lam), atol=0.01)
    assert certified == 0
    loss, nll, certified = train(jnp.asarray(0.0))
    assert loss < np.log(1 / lam) and certified > 0.89


# --- attacked, gaussian, continuous ---------------------------------------------------------------


def test_attacked_worst_case_is_above_the_certified_one(params, data):
    pgd = partial(attack.pgd, steps=5, clip=(0.0, 1.0))
    attacked = batched(likelihood.attacked_categorical(mlp, pgd))
    here = threat(0.2, 0.0)
    upper = attacked(KEY, params, *data, here)
    lower = worst_case("ibp", (0.0, 1.0))(KEY, params, *data, here)
    assert (lower <= upper + 1e-5).all()
    assert (upper < clean(KEY, params, *data, here) - 0.05).all()  # it does attack
    at_lam_one = attacked(KEY, params, *data, threat(0.2, 1.0))
    np.testing.assert_allclose(at_lam_one, clean(KEY, params, *data, here), rtol=2e-6)
    radii = attacked(KEY, params, *data, threat([0.2, 0.2], 0.0))
    np.testing.assert_allclose(radii, upper, rtol=1e-5)


def test_attacked_uses_the_key_and_its_gradient_is_that_at_the_attacked_point(params, data):
    x, y, eps = data[0][0], data[1][0], 0.2

    def noise(key, apply, samples, x, y, eps):
        moved = x + eps * jax.random.uniform(key, x.shape, minval=-1.0)
        return attack.AttackResult(moved, y, jnp.array(True), jnp.array(0.0))

    loglik = jax.jit(likelihood.attacked_categorical(mlp, noise))
    keys = jax.random.split(KEY, 2)
    values = [loglik(key, params, x, y, Threat(eps, 0.0)) for key in keys]
    assert values[0] != values[1]
    moved = noise(keys[0], mlp, params, x, y, eps).x
    expected = jax.grad(lambda p: jax.nn.log_softmax(mlp(p, moved))[y])(params)
    found = jax.grad(lambda p: loglik(keys[0], p, x, y, Threat(eps, 0.0)))(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_gaussian_closed_form_of_a_linear_model(lam):
    """The mean moves by eps |w_i|_1 at most, away from y: log N(|error| + eps |w_i|_1)."""
    w = jax.random.normal(jax.random.key(4), (2, SIZE))
    x, eps, scale = jnp.arange(SIZE) / SIZE, 0.2, 0.7
    loglik = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=scale)
    for y in (jnp.array([3.0, -3.0]), w @ x):  # outside the interval of means, and inside
        error = jnp.abs(w @ x - y)
        worst = norm.logpdf(error + eps * jnp.abs(w).sum(axis=1), scale=scale).sum()
        expected = lam * norm.logpdf(error, scale=scale).sum() + (1 - lam) * worst
        found = loglik(KEY, w, x, y, Threat(eps, lam))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gaussian_clips_the_adversary():
    loglik = likelihood.robust_gaussian(lambda w, x: w * x, noise_scale=1.0, clip=(0.0, 1.0))
    found = loglik(KEY, jnp.array(2.0), jnp.array(1.0), jnp.array(2.0), Threat(0.5, 0.0))
    np.testing.assert_allclose(found, norm.logpdf(1.0), rtol=1e-6)  # x falls to .5, never to 1.5


@pytest.mark.parametrize(
    "radius", [dist.Uniform(0.02, 0.1), dist.Exponential(20.0), dist.HalfNormal(0.05)]
)
def test_continuous_radii_come_from_their_distribution(radius):
    found = likelihood.continuous_threat(KEY, radius, 4_000, power=0.5)
    eps = np.array(found.eps)
    assert eps.shape == (4_000,) and (eps >= 0).all()
    error = np.abs(eps.mean() - radius.mean) / np.sqrt(radius.variance / 4_000)
    assert error < 4 and eps.std() > 0.9 * np.sqrt(radius.variance)
    assert found.lam == 0 and found.power == 0.5
    other = likelihood.continuous_threat(jax.random.key(1), radius, 4_000)
    assert (np.array(other.eps) != eps).any()


def test_continuous_radii_are_an_average_over_worst_cases(params, data):
    here = likelihood.continuous_threat(KEY, dist.Uniform(0.0, 0.2), 3, power=1.0)
    found = robust()(KEY, params, *data, here)
    each = [worst_case()(KEY, params, *data, threat(eps)) for eps in np.array(here.eps)]
    np.testing.assert_allclose(found, np.log(np.exp(each).mean(axis=0)), rtol=1e-4)


# --- bad input ------------------------------------------------------------------------------------


def test_errors_name_the_value_and_the_way_out(params, data):
    x, y = data[0][0], data[1][0]
    loglik = likelihood.robust_categorical(mlp)
    with pytest.raises(ValueError, match="Normal"):
        likelihood.continuous_threat(KEY, dist.Normal(0.0, 1.0), 50)
    with pytest.raises(ValueError, match="num_radii = 0"):
        likelihood.continuous_threat(KEY, dist.Uniform(0.0, 1.0), 0)
    with pytest.raises(ValueError, match="scalar"):
        likelihood.continuous_threat(KEY, dist.Uniform(jnp.zeros(2), 1.0), 2)
    with pytest.raises(ValueError, match="noise_scale = 0"):
        likelihood.robust_gaussian(mlp, noise_scale=0.0)
    with pytest.raises(ValueError, match=r"method = 'guess'.*ibp"):
        likelihood.robust_categorical(mlp, method="guess")
    for bad in (Threat(-0.1), Threat(jnp.nan), threat([0.1, -0.1]), Threat(-0.1, 1.0)):
        with pytest.raises(ValueError, match="eps"):
            loglik(KEY, params, x, y, bad)
        with pytest.raises(ValueError, match="eps"):  # known under jit, too, if not an argument
            jax.jit(lambda p, bad=bad: loglik(KEY, p, x, y, bad))(params)
    for bad, name in ((Threat(0.1, 1.5), "lam"), (Threat(0.1, 0.5, -1.0), "power")):
        with pytest.raises(ValueError, match=rf"threat.{name} = .*\[0, 1\]"):
            loglik(KEY, params, x, y, bad)
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        loglik(KEY, params, x, y, threat([[0.1]]))
    with pytest.raises(ValueError, match="one radius"):
        # of x's own length: it would broadcast to one radius for each coordinate
        likelihood.certified_categorical(mlp)(KEY, params, x, y, threat([0.1] * SIZE))


SCALE = 0.05


def q_of(params, scale=SCALE):
    return MeanField(params, jax.tree.map(lambda leaf: jnp.full_like(leaf, scale), params))


@pytest.mark.parametrize("lam, power", [(0.0, 0.0), (0.4, 0.0), (0.4, 1.0)])
def test_of_a_posterior_that_is_nearly_a_point_it_is_that_of_the_point(params, lam, power):
    x, y = jax.random.normal(KEY, (SIZE,)), jnp.array(1)
    of_point = likelihood.robust_categorical(mlp, method="ibp")(
        KEY, params, x, y, threat(0.1, lam, power)
    )
    for depth in (0.0, 3.0):
        of_posterior = likelihood.quantile_categorical(mlp, depth=depth)
        found = of_posterior(KEY, q_of(params, 1e-7), x, y, threat(0.1, lam, power))
        np.testing.assert_allclose(found, of_point, rtol=1e-4)
        wide = of_posterior(KEY, q_of(params), x, y, threat(0.1, lam, power))
        assert float(wide) < float(found) - 1e-3


def test_it_is_what_most_draws_are_above(params):
    """Log-likelihoods of draws at attacked inputs lie above it, but for the share it says."""
    q, eps, depth = q_of(params), 0.1, 2.5
    x, y = jax.random.normal(KEY, (SIZE,)), jnp.array(1)
    found = likelihood.quantile_categorical(mlp, depth=depth)(KEY, q, x, y, threat(eps, 0.0))
    corners = jnp.array(list(itertools.product((-eps, eps), repeat=SIZE)))
    draws = q.sample(jax.random.key(3), 4000)

    def least(w):
        return jax.vmap(lambda d: jax.nn.log_softmax(mlp(w, x + d))[y])(corners).min()

    share = float((jax.vmap(least)(draws) < found).mean())
    assert share <= (CLASSES - 1) * norm.cdf(-depth) + 1e-3 + 5 * math.sqrt(0.02 / 4000)


def test_a_regression_of_a_posterior_is_below_that_of_most_draws(params):
    """At a scale of nearly 0 it is the likelihood of a point; wider, it lies below the draws'."""
    x, y, eps, depth = jax.random.normal(KEY, (SIZE,)), jnp.linspace(-1, 1, CLASSES), 0.1, 2.5
    fit = likelihood.quantile_gaussian(mlp, noise_scale=0.7, depth=depth, delta=1e-6)
    point = likelihood.robust_gaussian(mlp, noise_scale=0.7)
    for lam in (0.0, 0.3):
        found = fit(KEY, q_of(params, 1e-7), x, y, threat(eps, lam))
        np.testing.assert_allclose(found, point(KEY, params, x, y, threat(eps, lam)), rtol=1e-3)
    q = q_of(params)
    found = fit(KEY, q, x, y, threat(eps, 0.0))
    corners = jnp.array(list(itertools.product((-eps, eps), repeat=SIZE)))

    def least(w):
        errors = jax.vmap(lambda d: mlp(w, x + d) - y)(corners)
        return dist.Normal(0.0, 0.7).log_prob(jnp.abs(errors).max(0)).sum()

    share = float((jax.vmap(least)(q.sample(jax.random.key(3), 4000)) < found).mean())
    assert share <= 2 * CLASSES * norm.cdf(-depth) + 5 * math.sqrt(0.02 / 4000)
    slopes = jax.grad(lambda q: fit(KEY, q, x, y, threat(eps, 0.0)))(q)
    assert all((leaf < 0).any() for leaf in jax.tree.leaves(slopes.scale))
    for bad in (0.0, math.inf):
        with pytest.raises(ValueError, match=f"noise_scale = {bad}"):
            likelihood.quantile_gaussian(mlp, noise_scale=bad)
    with pytest.raises(ValueError, match=r"y has the shape \(1,\)"):
        fit(KEY, q, x, y[:1], threat(eps, 0.0))


def test_it_has_derivatives_and_radii_and_an_elbo(params):
    q, fit = q_of(params), likelihood.quantile_categorical(mlp, clip=(-3.0, 3.0))
    batch = Batch(jax.random.normal(KEY, (BATCH, SIZE)), jnp.arange(BATCH) % CLASSES,
                  jnp.ones(BATCH).at[-1].set(0.0))  # fmt: skip
    several = threat([0.05, 0.1], 0.3)
    p = prior.normal(params)

    def value(q):
        return elbo(fit, p, KEY, q, batch, several, num_data=50, kl_weight=0.1)

    terms = jnp.stack([fit(KEY, q, x, y, several) for x, y in zip(batch.x, batch.y, strict=True)])
    np.testing.assert_allclose(value(q).log_likelihood, 50 / 5 * terms[:-1].sum(), rtol=1e-5)
    slopes = jax.grad(lambda q: value(q).value)(q)
    assert all(jnp.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(slopes))
    # Narrower is better: a deviation costs, by its bound alone.
    only = jax.grad(lambda q: value(q).log_likelihood)(q).scale
    assert all((leaf <= 0).all() for leaf in jax.tree.leaves(only))
    fitted = elbo(fit, p, KEY, q, batch, several, num_data=50, fit_prior=True)
    mean, deviation = q.moments()
    np.testing.assert_allclose(fitted.kl, q.kl(prior.fitted(p, mean, deviation)), rtol=1e-6)
    for factor in (0.9, 1.1):  # no other scale is nearer
        other = jax.tree.map(lambda leaf, f=factor: f * leaf, prior.fitted(p, mean, deviation))
        assert q.kl(other) > fitted.kl


def test_one_logit_of_two_classes_under_a_posterior():
    q = MeanField({"w": jnp.ones(2)}, {"w": jnp.full(2, 0.1)})
    datum = jnp.array([0.5, -0.2]), threat(0.1)
    two = likelihood.quantile_categorical(lambda p, x: jnp.stack([jnp.zeros(()), p["w"] @ x]))
    for shape in ((), (1,)):
        one = likelihood.quantile_categorical(lambda p, x, s=shape: (p["w"] @ x).reshape(s))
        found = [[f(KEY, q, datum[0], jnp.array(y), datum[1]) for y in (0, 1)] for f in (one, two)]
        np.testing.assert_allclose(*found, rtol=1e-5)
        assert all(value < -0.1 for value in found[0])


def test_a_scale_is_fitted_to_normal_priors_alone(params):
    laplace = jax.tree.map(
        lambda v: dist.Laplace(0.0, 1.0).expand(v.shape).to_event(v.ndim), params
    )
    mean, deviation = q_of(params).moments()
    with pytest.raises(NotImplementedError, match="is a Laplace"):
        prior.fitted(laplace, mean, deviation)


def test_a_posterior_of_its_own_is_asked_for(params):
    fit = likelihood.quantile_categorical(mlp)
    datum = jnp.zeros(SIZE), jnp.array(0), threat(0.1)
    with pytest.raises(TypeError, match="posterior"):
        fit(KEY, params, *datum)
    with pytest.raises(ValueError, match=r"depth = -1"):
        likelihood.quantile_categorical(mlp, depth=-1.0)
    with pytest.raises(ValueError, match="'forward'"):
        likelihood.quantile_categorical(mlp, method="forward")(KEY, q_of(params), *datum)


def test_bbb_trains_a_posterior_that_is_certified_as_a_whole():
    """Two blobs: P_safe of the posterior rises to nearly 1, without a draw."""
    x = jnp.concatenate([jnp.full((20, SIZE), 0.5), jnp.full((20, SIZE), -0.5)])
    x = x + 0.1 * jax.random.normal(KEY, x.shape)
    y = jnp.repeat(jnp.arange(2), 20)
    keys = jax.random.split(KEY, 2)
    start = {"w": jax.random.normal(keys[0], (WIDTH, SIZE)), "c": jnp.zeros(WIDTH),
             "v": jax.random.normal(keys[1], (2, WIDTH)), "b": jnp.zeros(2)}  # fmt: skip
    fit = likelihood.quantile_categorical(mlp)
    method = bbb.build(
        fit, prior.normal(start), num_data=40, optimizer=optax.adam(0.02), kl_weight=0.01,
        initial_scale=0.05, fit_prior=True,
    )  # fmt: skip
    update = jax.jit(method.update)

    def safe(q):
        sign = jnp.where(y == 0, 1.0, -1.0)
        found = jax.vmap(
            lambda x, s: gaussian.margins(
                mlp, q, ball(x, 0.1), s * jnp.array([[1.0, -1.0]]), jnp.zeros(1)
            )
        )(x, sign)
        return (found.probability() > 0.99).mean()

    state = method.init(KEY, start)
    before = safe(method.posterior(state))
    for i in range(300):
        key = jax.random.fold_in(KEY, i)
        state, _ = update(key, state, Batch(x, y, jnp.ones(40)), threat(0.1, 0.2))
    assert before < 0.5 and safe(method.posterior(state)) > 0.95
