"""HMC and NUTS: the potential and its gradient; the exact posterior of a conjugate model."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bnncert import likelihood, prior
from bnncert.infer import diagnostics, mcmc
from bnncert.posterior import MeanField, Samples
from bnncert.types import Batch, Threat

KEY = jax.random.key(0)

# --- the potential --------------------------------------------------------------------------------

SIZE, WIDTH, CLASSES, NUM = 3, 4, 3, 10
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.normal(size=(WIDTH, SIZE)),
    "v": RNG.normal(size=(CLASSES, WIDTH)),
    "b": RNG.normal(size=CLASSES),
}
X, Y = RNG.uniform(size=(NUM, SIZE)), RNG.integers(0, CLASSES, NUM)


def mlp(params, x):
    return params["v"] @ jnp.tanh(params["w"] @ x) + params["b"]


def threat(eps=0.1, lam=0.4, power=0.0):
    return Threat(*(jnp.asarray(value, jnp.result_type(float)) for value in (eps, lam, power)))


def params():
    """In the default type at the time of the call."""
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.result_type(float)), WEIGHTS)


def everything(mask=None) -> Batch:
    kind = jnp.result_type(float)
    return Batch(
        jnp.asarray(X, kind), jnp.asarray(Y), jnp.asarray(np.ones(NUM) if mask is None else mask)
    )


ROBUST = likelihood.robust_categorical(mlp)


def cheap(key, params, x, y, threat):
    """A likelihood that uses all of the threat, as a robust one does, and compiles fast."""
    logits = mlp(params, x)
    worst = logits - threat.eps * jnp.abs(params["w"]).sum() * jax.nn.one_hot(y, CLASSES)
    clean, worst = jax.nn.log_softmax(logits)[y], jax.nn.log_softmax(worst)[y]
    return threat.lam * clean + (1 - threat.lam) * worst


@partial(jax.jit, static_argnames=("loglik", "prepare", "batch_size"))
def value_and_gradient(params, data, threat, loglik=cheap, prepare=None, batch_size=64):
    """With a prior of sd 0.7 and a weight of 0.5, of the current type."""

    def of(params):
        return mcmc.potential(
            loglik,
            prior.normal(params, 0.7),
            KEY,
            params,
            data,
            threat,
            kl_weight=0.5,
            prepare=prepare,
            batch_size=batch_size,
        )

    return jax.value_and_grad(of)(params)


@pytest.mark.smoke
def test_potential_is_the_sum_it_states():
    found, _ = value_and_gradient(params(), everything(), threat())
    each = jax.vmap(cheap, (None, None, 0, 0, None))
    terms = each(KEY, params(), everything().x, everything().y, threat())
    squares = sum(float((np.asarray(v) ** 2).sum()) for v in WEIGHTS.values())
    count = sum(v.size for v in WEIGHTS.values())
    log_prior = -squares / (2 * 0.7**2) - count * np.log(0.7 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found, -terms.sum() / 0.5 - log_prior, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_gradient_is_that_of_the_robust_potential():
    """Central differences in float64, along random directions; and it sees the radius."""
    start, data = params(), everything()
    gradients = {}
    for name, here in (("robust", threat()), ("point", threat(eps=0.0)), ("plain", threat(lam=1))):
        _, gradients[name] = value_and_gradient(start, data, here, loglik=ROBUST)
        for seed in range(3):
            rng = np.random.default_rng(seed)
            direction = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), start)  # noqa: B023
            ends = [
                value_and_gradient(
                    jax.tree.map(lambda v, d: v + step * d, start, direction),  # noqa: B023
                    data,
                    here,
                    loglik=ROBUST,
                )[0]
                for step in (1e-6, -1e-6)
            ]
            slope = sum(
                jnp.vdot(g, d)
                for g, d in zip(
                    jax.tree.leaves(gradients[name]), jax.tree.leaves(direction), strict=True
                )
            )
            np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6)
    # at a point, and with all weight on the clean term, it is ordinary inference
    _, clean = value_and_gradient(start, data, threat(), loglik=likelihood.clean_categorical(mlp))
    chex.assert_trees_all_close(gradients["point"], clean, rtol=1e-9)
    chex.assert_trees_all_close(gradients["plain"], clean, rtol=1e-9)
    assert all(
        (jnp.abs(r - c) > 1e-3).any()
        for r, c in zip(jax.tree.leaves(gradients["robust"]), jax.tree.leaves(clean), strict=True)
    )


@pytest.mark.parametrize("batch_size", [3, 5])
def test_chunks_and_padding_change_nothing(batch_size):
    """Chunks that divide the data and that do not; masked data of any finite value."""
    mask = np.arange(NUM) < 7
    whole = value_and_gradient(params(), everything(mask.astype(np.float32)), threat())
    data = everything(mask.astype(np.float32))
    filled = data._replace(x=jnp.where(mask[:, None], data.x, 1e3))
    chunked = value_and_gradient(params(), filled, threat(), batch_size=batch_size)
    chex.assert_trees_all_close(chunked, whole, rtol=1e-4, atol=1e-5)
    kept = jax.tree.map(lambda v: v[:7], everything())
    alone = value_and_gradient(params(), kept, threat())
    chex.assert_trees_all_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_prepare_sees_all_the_data_at_once():
    """Centring by the mean of the inputs, though the data come in chunks."""

    def prepare(params, x):
        assert x.shape == (NUM, SIZE)
        return {**params, "shift": x.mean(0)}

    def shifted(params, x):
        return mlp(params, x - params["shift"])

    loglik = likelihood.clean_categorical(shifted)
    data = everything()
    found, _ = value_and_gradient(
        params(), data, threat(), loglik=loglik, prepare=prepare, batch_size=5
    )
    centred = data._replace(x=data.x - data.x.mean(0))
    expected, _ = value_and_gradient(
        params(), centred, threat(), loglik=likelihood.clean_categorical(mlp)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- what it samples ------------------------------------------------------------------------------

NOISE, SCALE, KL_WEIGHT, OFFSET = 0.5, 1.5, 0.5, 2.0
INPUTS = RNG.normal(size=(30, 2)) @ np.array([[1.0, 0.8], [0.0, 0.7]])
TARGETS = INPUTS @ np.array([1.0, -2.0]) + OFFSET + NOISE * RNG.normal(size=30)
PRECISION = INPUTS.T @ INPUTS / (NOISE**2 * KL_WEIGHT) + np.eye(2) / SCALE**2
COVARIANCE = np.linalg.inv(PRECISION)
MEAN = COVARIANCE @ (INPUTS.T @ (TARGETS - OFFSET) / (NOISE**2 * KL_WEIGHT))
# two data of padding
DATA = Batch(
    jnp.asarray(np.pad(INPUTS, ((0, 2), (0, 0)), constant_values=7.0), jnp.float32),
    jnp.asarray(np.pad(TARGETS, (0, 2)), jnp.float32),
    jnp.asarray(np.pad(np.ones(30), (0, 2)), jnp.float32),
)
START = {"w": jnp.zeros(2), "b": jnp.float32(OFFSET)}
PRIOR = {"w": dist.Normal(jnp.zeros(2), SCALE).to_event(1), "b": None}
TRACES = []


def affine(params, x):
    return params["w"] @ x + params["b"]


GAUSSIAN = likelihood.robust_gaussian(affine, noise_scale=NOISE)


def counted(key, params, x, y, threat):
    TRACES.append(None)
    return GAUSSIAN(key, params, x, y, threat)


def build(loglik: Any = GAUSSIAN, prior: Any = PRIOR, **options):
    settings = {"num_warmup": 200, "num_samples": 300, "num_chains": 3, "kl_weight": KL_WEIGHT}
    return mcmc.build(loglik, prior, **(settings | options))


NUTS = build(counted, batch_size=16)
PLAIN = threat(0.0, 1.0)


@pytest.fixture(scope="module")
def runs():
    """Two seeds, one compile."""
    first = NUTS.sample(jax.random.key(0), START, DATA, PLAIN)
    traces = len(TRACES)
    second = NUTS.sample(jax.random.key(1), START, DATA, PLAIN)
    assert len(TRACES) == traces > 0
    return first, second


def check_exact(samples, num_chains):
    """Means and covariances within 4 Monte Carlo errors, by the effective sample size."""
    w = np.asarray(samples["w"], np.float64)
    chains = w.reshape(num_chains, -1, 2)
    ess = diagnostics.of_values(chains).ess
    sd = np.diag(COVARIANCE) ** 0.5
    assert (ess > 100).all()
    assert (np.abs(w.mean(0) - MEAN) < 4 * sd / ess**0.5).all()
    outer = (chains - MEAN)[..., :, None] * (chains - MEAN)[..., None, :]
    error = outer.std((0, 1)) / diagnostics.of_values(outer).ess ** 0.5
    assert (np.abs(outer.mean((0, 1)) - COVARIANCE) < 4 * error).all()
    assert abs(COVARIANCE[0, 1]) > 0.3 * sd.min() * sd.max()  # a correlation is seen


def test_nuts_on_conjugate_linear_regression(runs):
    for samples, info in runs:
        assert isinstance(samples, Samples) and samples.num_samples == 900
        check_exact(samples.params, 3)
        assert (samples.params["b"] == OFFSET).all()  # no prior: it stays, and is repeated
        assert (info.divergences == 0).all()
        assert ((info.acceptance > 0.7) & (info.acceptance < 1)).all()
        assert info.num_steps.shape == info.potential.shape == (3, 300)
        assert ((info.num_steps >= 1) & (info.num_steps < 2**10)).all()


def test_samples_are_chain_after_chain(runs):
    """Their potentials are those that each chain reports."""
    (samples, info), _ = runs

    @jax.jit
    @jax.vmap
    def energy(params):
        return mcmc.potential(GAUSSIAN, PRIOR, KEY, params, DATA, PLAIN, kl_weight=KL_WEIGHT)

    np.testing.assert_allclose(
        energy(samples.params).reshape(3, 300), info.potential, rtol=1e-4, atol=1e-3
    )


def test_seeds_differ_and_draws_are_distinct(runs):
    (first, _), (second, _) = runs
    rows = np.concatenate([first.params["w"], second.params["w"]])
    assert len(np.unique(rows, axis=0)) > 0.95 * len(rows)  # a rejection repeats a draw
    assert not set(map(tuple, first.params["w"].tolist())) & set(
        map(tuple, second.params["w"].tolist())
    )
    again = NUTS.sample(jax.random.key(0), START, DATA, PLAIN)[0]
    chex.assert_trees_all_equal(again, first)


def test_hmc_by_one_thinned_chain():
    sampler = build(
        kernel="hmc", num_steps=3, num_chains=1, thinning=3, dense_mass=True, num_samples=400
    )
    samples, info = sampler.sample(KEY, START, DATA, PLAIN)
    assert samples.num_samples == 400
    check_exact(samples.params, 1)
    assert (info.num_steps == 3).all()


# --- starts ---------------------------------------------------------------------------------------


def noisy(key, params, x, y, threat):
    """A likelihood that is all key, as that of an attack with a random start is in part."""
    return jax.random.normal(key)


STILL = build(noisy, kernel="hmc", num_steps=1, num_warmup=0, num_samples=4, step_size=1e-6)


def test_starts_at_one_network_at_one_for_each_chain_or_at_draws_of_a_posterior():
    """A step of 1e-6 stays where it starts."""
    places = jnp.array([[0.0, 0.0], [1.0, -1.0], [2.0, 0.5]])
    stacked = {"w": places, "b": jnp.full(3, OFFSET)}
    posterior = MeanField(START, {"w": jnp.ones(2), "b": None})
    for start, expected in ((START, places[:1]), (stacked, places), (Samples(stacked), places)):
        samples, _ = STILL.sample(KEY, start, DATA, PLAIN)
        everywhere = jnp.repeat(jnp.broadcast_to(expected, (3, 2)), 4, axis=0)
        chex.assert_trees_all_close(samples.params["w"], everywhere, atol=1e-3)
        assert samples.params["b"].shape == (12,)
    drawn, _ = STILL.sample(KEY, posterior, DATA, PLAIN)
    assert np.ptp(drawn.params["w"], axis=0).min() > 0.1
    with pytest.raises(ValueError, match=r"'b' has no prior and differs"):
        STILL.sample(KEY, {**stacked, "b": jnp.arange(3.0)}, DATA, PLAIN)
    with pytest.raises(ValueError, match="shape") as raised:
        STILL.sample(KEY, {"w": places[:2], "b": jnp.zeros(2)}, DATA, PLAIN)
    assert "one for each of 3 chains" in str(raised.value.__notes__)
    with pytest.raises(ValueError, match="only the params have"):
        STILL.sample(KEY, {**START, "extra": jnp.zeros(1)}, DATA, PLAIN)


def test_a_likelihood_with_a_key_gets_the_same_one_in_a_run():
    samples, info = STILL.sample(KEY, START, DATA, PLAIN)
    log_prior = jax.vmap(partial(prior.log_prob, PRIOR))(samples.params).reshape(3, 4)
    noise = info.potential + log_prior
    np.testing.assert_allclose(noise, jnp.broadcast_to(noise[0, 0], (3, 4)), rtol=1e-5)
    _, other = STILL.sample(jax.random.key(1), START, DATA, PLAIN)
    assert abs(info.potential[0, 0] - other.potential[0, 0]) > 1e-2


@pytest.mark.usefixtures("float64")
def test_float32_weights_where_the_default_is_float64():
    """Their own type comes back; NumPyro, which computes in the default one, does not fail."""
    leaves = {"w": prior.normal({"w": START["w"]}, SCALE)["w"], "b": None}
    settings: Any = {"kernel": "hmc", "num_steps": 1, "num_warmup": 0, "num_samples": 2}
    sampler = build(prior=leaves, num_chains=1, **settings)
    samples, info = sampler.sample(KEY, START, DATA, PLAIN)
    assert samples.params["w"].dtype == jnp.float32 and samples.params["b"].dtype == jnp.float32
    assert np.isfinite(info.potential).all()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gibbs"}, "kernel = 'gibbs'"),
        ({"kernel": "hmc"}, "'hmc' needs one of the two"),
        ({"num_steps": 3}, "'nuts' neither"),
        ({"num_warmup": -1}, "num_warmup = -1"),
        ({"num_samples": 0}, "num_samples = 0"),
        ({"num_chains": 0}, "num_chains = 0"),
        ({"thinning": 0}, "thinning = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"max_tree_depth": 0}, "max_tree_depth = 0"),
        ({"kl_weight": 0.0}, "kl_weight = 0.0"),
        ({"target_accept": 1.0}, "target_accept = 1.0"),
        ({"step_size": float("nan")}, "step_size = nan"),
        ({"prior": {"w": None, "b": None}}, "no random leaf"),
        ({"prior": {"w": dist.HalfNormal(jnp.ones(2)).to_event(1), "b": None}}, "'w' has support"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# --- many weights ---------------------------------------------------------------------------------


def test_the_energy_of_many_momenta_is_not_lost_in_float32():
    momentum = {"w": jax.random.normal(KEY, (700, 500)), "b": jax.random.normal(KEY, (500,))}
    inverse_mass = jax.random.uniform(jax.random.key(1), (350_500,), minval=0.1, maxval=2.0)
    flat = np.concatenate([np.ravel(momentum[name]) for name in sorted(momentum)]).astype(float)
    exact = 0.5 * np.sum(np.asarray(inverse_mass, float) * flat**2)
    found = jax.jit(mcmc.kinetic_energy)(inverse_mass, momentum)
    assert abs(float(found) - exact) < 0.2  # nats, of 180,000
    few = {"w": jnp.array([1.0, 2.0])}
    assert mcmc.kinetic_energy(jnp.array([[2.0, 0.5], [0.5, 1.0]]), few) == 4.0


@pytest.mark.parametrize("kernel", ["hmc", "nuts"])
def test_chains_move_in_the_metric_of_the_scales(kernel):
    """Deviations from 1e-4 to 1: with them as scales no warm-up is needed to draw from all."""
    scales = {"w": jnp.logspace(-4, 0, 60)}
    target = {"w": dist.Normal(0.0, scales["w"]).to_event(1)}
    sampler = mcmc.build(
        lambda key, params, x, y, threat: jnp.zeros(()),
        target,
        num_warmup=0,
        num_samples=300,
        kernel=kernel,
        step_size=0.4,
        scales=scales,
        adapt_mass=False,
        num_steps=5 if kernel == "hmc" else None,
    )
    start = {"w": jnp.zeros(60)}
    data = Batch(jnp.zeros((1, 1)), jnp.zeros(1, int), jnp.ones(1))
    samples, info = sampler.sample(KEY, start, data, threat())
    ratio = np.asarray(samples.params["w"]).std(0) / np.asarray(scales["w"])
    assert float(info.acceptance.min()) > 0.7
    assert (ratio > 0.7).all() and (ratio < 1.3).all()
    with pytest.raises(ValueError, match="'w' has a deviation of 0"):
        mcmc.build(cheap, target, num_warmup=0, num_samples=4, scales={"w": jnp.zeros(60)})


def test_a_progress_bar_counts_finished_draws_and_changes_no_sample(capsys):
    target = {"w": dist.Normal(0.0, 1.0).expand([3]).to_event(1)}
    data = Batch(jnp.zeros((1, 1)), jnp.zeros(1, int), jnp.ones(1))

    def drawn(**options: Any):
        sampler = mcmc.build(
            lambda key, params, x, y, threat: jnp.zeros(()),
            target,
            num_warmup=4,
            num_samples=5,
            num_chains=2,
            **options,
        )
        return sampler.sample(KEY, {"w": jnp.zeros(3)}, data, threat())[0].params

    chex.assert_trees_all_equal(drawn(progress_bar=True), drawn())
    assert "9/9" in capsys.readouterr().err
