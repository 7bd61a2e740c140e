"""SGLD and SGHMC: the bias of their step in closed form, exact posteriors, and what is kept."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

from bnncert import likelihood, prior
from bnncert.infer import sgmcmc
from bnncert.posterior import Samples
from bnncert.types import Batch, Threat

KEY = jax.random.key(0)
THREAT = Threat(jnp.float32(0.1), jnp.float32(0.4), jnp.float32(0.0))
RNG = np.random.default_rng(0)


# --- stationary distributions ---------------------------------------------------------------------

CHAINS = 400
LOCATIONS = jnp.asarray(RNG.normal(size=64), jnp.float32)
WIDE = {"w": dist.Normal(0.0, 2.0)}


def at_a_location(key, params, x, y, threat):
    """y ~ N(w, 1), of which U is a quadratic."""
    return -0.5 * (y - params["w"]) ** 2


def location_moments(algorithm, num_batch, steps=300):
    """Means and variances of w, and of its momentum, over chains and the second half of steps."""

    def chain(key):
        def step(state, key):
            pick, key = jax.random.split(key)
            index = jax.random.randint(pick, (num_batch,), 0, 64) if num_batch else jnp.arange(64)
            y = LOCATIONS[index]
            state, _ = algorithm.update(key, state, Batch(y, y, jnp.ones_like(y)), THREAT)
            return state, (state.params["w"], state.momentum["w"])

        start = algorithm.init(KEY, {"w": jnp.zeros(())})
        return jax.lax.scan(step, start, jax.random.split(key, steps))[1]

    w, v = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(3), CHAINS))
    w, v = (np.asarray(z[:, steps // 2 :], np.float64) for z in (w, v))
    return w.mean(), w.var(), v.var()


@pytest.mark.parametrize(("friction", "num_batch"), [(None, 0), (0.3, 0), (None, 16), (0.3, 16)])
def test_the_bias_of_a_step_is_the_known_one(friction, num_batch):
    """On a quadratic, with a large step, with all the data or minibatches with replacement."""
    kl_weight, h = 2.0, 0.05
    curvature = 1 / 4 + 64 / kl_weight
    mean = float(LOCATIONS.sum()) / kl_weight / curvature
    a = 1.0 if friction is None else friction
    noise = (64 / kl_weight) ** 2 * float(LOCATIONS.var()) / num_batch if num_batch else 0.0
    variance = (1 + h * noise / (4 * a)) / (curvature * (1 - h * curvature / (4 * (2 - a))))
    assert variance > 1.2 / curvature  # the bias is seen
    algorithm = sgmcmc.build(
        at_a_location,
        WIDE,
        num_data=64,
        step_size=h,
        friction=friction,
        kl_weight=kl_weight,
        num_samples=1,
    )
    found_mean, found, momentum = location_moments(algorithm, num_batch)
    np.testing.assert_allclose(found, variance, rtol=0.04)
    assert abs(found_mean - mean) < 0.05 * variance**0.5
    if not num_batch:  # E v^2 = h / (2 - a - h c / 4)
        np.testing.assert_allclose(momentum, h / (2 - a - h * curvature / 4), rtol=0.04)


NOISE, SCALE, KL_WEIGHT = 0.5, 1.5, 0.5
INPUTS = RNG.normal(size=(30, 2)) @ np.array([[1.0, 0.8], [0.0, 0.7]])
TARGETS = INPUTS @ np.array([1.0, -2.0]) + 1.0 + NOISE * RNG.normal(size=30)


def affine(params, x):
    return params["w"] @ x + params["b"]


@pytest.mark.parametrize("friction", [None, 0.1])
def test_conjugate_linear_regression(friction):
    """Mean and covariance of many short chains, and the offset, which has no prior, trained."""
    precision = INPUTS.T @ INPUTS / (NOISE**2 * KL_WEIGHT) + np.eye(2) / SCALE**2
    # at the offset that is best on average, given which w has its mean
    gram = np.hstack([precision, INPUTS.sum(0)[:, None] / (NOISE**2 * KL_WEIGHT)])
    last = np.append(INPUTS.sum(0), 30.0) / (NOISE**2 * KL_WEIGHT)
    right = np.append(INPUTS.T @ TARGETS, TARGETS.sum()) / (NOISE**2 * KL_WEIGHT)
    exact = np.linalg.solve(np.vstack([gram, last]), right)
    covariance = np.linalg.inv(precision)

    h = 0.2 / np.linalg.eigvalsh(precision).max()
    algorithm = sgmcmc.build(
        likelihood.robust_gaussian(affine, noise_scale=NOISE),
        {"w": dist.Normal(jnp.zeros(2), SCALE).to_event(1), "b": None},
        num_data=30,
        step_size=h,
        friction=friction,
        kl_weight=KL_WEIGHT,
        num_samples=20,
        every=25,
        burn_in=500,
        deterministic=optax.sgd(2e-4),
    )
    data = Batch(jnp.float32(INPUTS), jnp.float32(TARGETS), jnp.ones(30))
    plain = Threat(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0))

    @jax.jit
    @jax.vmap
    def run(key):
        state = algorithm.init(KEY, {"w": jnp.zeros(2), "b": jnp.zeros(())})
        step = lambda state, key: (algorithm.update(key, state, data, plain)[0], None)  # noqa: E731
        return jax.lax.scan(step, state, jax.random.split(key, 1_000))[0]

    states = run(jax.random.split(jax.random.key(1), 200))
    assert (states.collected == 20).all()
    w = np.asarray(states.samples["w"], np.float64).reshape(-1, 2)
    sd = np.diag(covariance) ** 0.5
    assert (np.abs(w.mean(0) - exact[:2]) < 0.1 * sd).all()
    np.testing.assert_allclose(np.cov(w.T), covariance, atol=0.12 * sd.min() * sd.max())
    assert abs(covariance[0, 1]) > 0.3 * sd.min() * sd.max()  # the correlation is seen
    np.testing.assert_allclose(np.mean(states.params["b"]), exact[2], atol=0.03)
    assert abs(exact[2] - TARGETS.mean()) > 0.1


# --- one step -------------------------------------------------------------------------------------

SIZE, CLASSES, NUM, BATCH = 3, 3, 20, 8
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(CLASSES, SIZE)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=CLASSES), jnp.float32),
}
DATA = Batch(
    jnp.asarray(RNG.uniform(size=(BATCH, SIZE)), jnp.float32),
    jnp.asarray(RNG.integers(0, CLASSES, BATCH)),
    jnp.ones(BATCH),
)
PRIOR = prior.normal(PARAMS, 0.7)


def linear(params, x):
    return params["w"] @ x + params["b"]


def cheap(key, params, x, y, threat):
    """A likelihood that uses all of the threat, as a robust one does, and compiles fast."""
    logits = linear(params, x)
    worst = logits - threat.eps * jnp.abs(params["w"]).sum() * jax.nn.one_hot(y, CLASSES)
    clean, worst = jax.nn.log_softmax(logits)[y], jax.nn.log_softmax(worst)[y]
    return threat.lam * clean + (1 - threat.lam) * worst


def build(loglik=cheap, prior: Any = PRIOR, **options) -> Any:
    settings = {"num_data": NUM, "step_size": 1e-3, "kl_weight": 0.3, "num_samples": 3}
    return sgmcmc.build(loglik, prior, **(settings | options))


SGHMC = build(friction=0.25)
TRACES = []


@jax.jit
def update(*args):
    TRACES.append(None)
    return SGHMC.update(*args)


@jax.jit
def negative(params, data):
    """-(N/B sum of log-likelihoods) / 0.3 - log prior, written out; and its two parts."""
    terms = jax.vmap(cheap, (None, None, 0, 0, None))(KEY, params, data.x, data.y, THREAT)
    log_prior = sum(
        (-0.5 * (v / 0.7) ** 2 - jnp.log(0.7 * jnp.sqrt(2 * jnp.pi))).sum() for v in params.values()
    )
    log_lik = NUM / len(data.x) * terms.sum()
    return -log_lik / 0.3 - log_prior, (log_lik, log_prior)


@pytest.mark.smoke
def test_one_step_is_the_recursion():
    """The same noise at another momentum cancels in the difference; the gradient is left."""
    start = SGHMC.init(KEY, PARAMS)
    pushed = start._replace(momentum={"b": jnp.ones(CLASSES), "w": jnp.ones((CLASSES, SIZE))})
    state, info = update(KEY, start, DATA, THREAT)
    other, _ = update(KEY, pushed, DATA, THREAT)
    for name in PARAMS:
        np.testing.assert_allclose(
            other.momentum[name] - state.momentum[name], 0.75 * jnp.ones_like(PARAMS[name]), 1e-5
        )
        np.testing.assert_allclose(
            state.params[name], PARAMS[name] + state.momentum[name], rtol=1e-6
        )
    (value, parts), gradient = jax.value_and_grad(negative, has_aux=True)(PARAMS, DATA)
    np.testing.assert_allclose(info.loss, 0.3 * value, rtol=1e-5)
    np.testing.assert_allclose((info.log_likelihood, info.log_prior), parts, rtol=1e-5)
    # the drift, from the mean over noise: that of 2,000 keys
    keys = jax.random.split(KEY, 2_000)
    steps = jax.jit(jax.vmap(lambda k: SGHMC.update(k, start, DATA, THREAT)[0].momentum))(keys)
    for name, g in gradient.items():
        noise = np.asarray(steps[name] + 0.5e-3 * g)
        sd = (0.25 * 1e-3) ** 0.5
        assert (np.abs(noise.mean(0)) < 4.5 * sd / 2_000**0.5).all(), name
        np.testing.assert_allclose(noise.std(0), sd, rtol=0.08)


def test_sgld_is_sghmc_without_momentum():
    sgld, still = build(friction=None), build(friction=1.0)
    states = [algorithm.init(KEY, PARAMS) for algorithm in (sgld, still)]
    for i in range(3):
        states = [
            jax.jit(algorithm.update)(jax.random.key(i), state, DATA, THREAT)[0]
            for algorithm, state in zip((sgld, still), states, strict=True)
        ]
    chex.assert_trees_all_equal(*states)
    pushed = states[0]._replace(momentum=jax.tree.map(jnp.ones_like, states[0].momentum))
    chex.assert_trees_all_equal(
        *(jax.jit(sgld.update)(KEY, s, DATA, THREAT)[0].params for s in (states[0], pushed))
    )


def test_padding_changes_nothing():
    half = jax.tree.map(lambda v: v[:4], DATA)
    states = [update(KEY, SGHMC.init(KEY, PARAMS), half, THREAT)]
    for fill in (0.0, 1e3):
        x = jnp.concatenate([half.x, jnp.full((4, SIZE), fill)])
        padded = Batch(x, DATA.y, jnp.concatenate([half.mask, jnp.zeros(4)]))
        states.append(update(KEY, SGHMC.init(KEY, PARAMS), padded, THREAT))
    chex.assert_trees_all_equal(states[1], states[2])
    chex.assert_trees_all_close(states[0], states[1], rtol=1e-5)


def test_prepare_sees_the_minibatch_and_deterministic_leaves_have_their_optimiser():
    def shifted(key, params, x, y, threat):
        return cheap(key, params, x - params["shift"], y, threat)

    def prepare(params, x):
        return {**params, "shift": x.mean(0)}

    params = {**PARAMS, "shift": jnp.full(SIZE, 1e3), "steps": jnp.asarray(7)}
    leaves = {"w": PRIOR["w"], "b": None, "shift": None, "steps": None}
    algorithm = build(shifted, leaves, prepare=prepare, deterministic=optax.sgd(0.1))
    state, info = jax.jit(algorithm.update)(KEY, algorithm.init(KEY, params), DATA, THREAT)
    centred = DATA._replace(x=DATA.x - DATA.x.mean(0))
    (_, (log_lik, _)), gradient = jax.value_and_grad(negative, has_aux=True)(PARAMS, centred)
    np.testing.assert_allclose(info.log_likelihood, log_lik, rtol=1e-5)
    # -log p(D | w) alone: without b's prior and the factor of the likelihood
    slope = 0.3 * (gradient["b"] - PARAMS["b"] / 0.7**2)
    np.testing.assert_allclose(state.params["b"], PARAMS["b"] - 0.1 * slope, rtol=1e-4, atol=1e-5)
    assert set(state.momentum) == {"w"}
    assert (state.params["shift"] == 1e3).all() and state.params["steps"] == 7
    assert (algorithm.posterior(state).params["steps"] == jnp.full(1, 7)).all()

    with pytest.raises(ValueError, match=r"\['b', 'shift'\] have no prior: give `deterministic`"):
        build(shifted, leaves).init(KEY, params)


# --- what is kept ---------------------------------------------------------------------------------


def path(algorithm, steps):
    """The weights after every step, what was kept, and the states."""
    state, states, infos = algorithm.init(KEY, PARAMS), [], []
    step = jax.jit(algorithm.update)
    for i in range(steps):
        state, info = step(jax.random.key(i), state, DATA, THREAT)
        states.append(state)
        infos.append(info)
    return states, infos


def test_the_posterior_holds_only_what_was_collected_oldest_first():
    algorithm = build(burn_in=2, every=2)
    states, infos = path(algorithm, 11)
    assert [bool(info.kept) for info in infos] == [i in (3, 5, 7, 9) for i in range(11)]
    with pytest.raises(ValueError, match=r"nothing is collected after 3 steps \(burn_in = 2"):
        algorithm.posterior(states[2])
    for after, kept in ((3, [3]), (6, [3, 5]), (8, [3, 5, 7]), (10, [5, 7, 9])):
        q = algorithm.posterior(states[after])
        assert isinstance(q, Samples)
        expected = [states[i].params for i in kept]
        chex.assert_trees_all_equal(q.params, jax.tree.map(lambda *v: jnp.stack(v), *expected))
    for transform in (jax.jit, jax.vmap):
        stacked = jax.tree.map(lambda v: v[None], states[10])
        with pytest.raises(ValueError, match="not known inside jit or vmap"):
            transform(algorithm.posterior)(stacked)


def test_cycles_explore_without_noise_then_sample_evenly():
    length = 10
    algorithm = build(cycle_length=length, exploration=0.5, every=2, step_size=2e-3, burn_in=10)
    states, infos = path(algorithm, 3 * length)
    kept = [i for i, info in enumerate(infos) if info.kept]
    assert kept == [15, 17, 19, 25, 27, 29]
    r = np.arange(3 * length) % length / length
    np.testing.assert_allclose(
        [info.step_size for info in infos], 1e-3 * (1 + np.cos(np.pi * r)), rtol=1e-5
    )
    gradient = jax.jit(jax.grad(lambda params: negative(params, DATA)[0]))
    for i, quiet in ((12, True), (14, True), (15, False)):
        before = states[i - 1].params
        moved = jax.tree.map(
            lambda v, g: v - infos[i].step_size / 2 * g,  # noqa: B023
            before,
            gradient(before),
        )
        gap = max(
            float(jnp.abs(p - q).max())
            for p, q in zip(jax.tree.leaves(moved), jax.tree.leaves(states[i].params), strict=True)
        )
        assert (gap < 1e-5) == quiet, i


def test_step_size_may_be_a_schedule():
    _, infos = path(build(step_size=optax.linear_schedule(1e-3, 0.0, 4)), 3)
    np.testing.assert_allclose(
        [info.step_size for info in infos], [1e-3, 0.75e-3, 0.5e-3], rtol=1e-5
    )


# --- state ----------------------------------------------------------------------------------------


def test_many_steps_are_one_trace_and_types_do_not_drift():
    start = state = SGHMC.init(KEY, jax.tree.map(lambda v: v, PARAMS))
    state, _ = update(KEY, state, DATA, THREAT)
    before = len(TRACES)
    for i in range(3):
        here = Threat(jnp.float32(0.1 * i), jnp.float32(0.5), jnp.float32(0.1))
        state, _ = update(jax.random.key(i), state, DATA, here)
    assert len(TRACES) == before
    chex.assert_trees_all_equal_shapes_and_dtypes(start, state)
    weak = [[jax.typeof(v).weak_type for v in jax.tree.leaves(s)] for s in (start, state)]
    assert weak[0] == weak[1]


@pytest.mark.usefixtures("float64")
def test_float32_weights_where_the_default_is_float64():
    start = SGHMC.init(KEY, PARAMS)
    state, _ = jax.jit(SGHMC.update)(KEY, start, DATA, THREAT)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, state)


def test_a_restored_state_continues():
    state, _ = update(KEY, SGHMC.init(KEY, PARAMS), DATA, THREAT)
    restored = jax.tree.map(lambda v: jnp.asarray(np.asarray(v)), state)
    fresh = build(friction=0.25)
    chex.assert_trees_all_equal(
        jax.jit(fresh.update)(jax.random.key(5), restored, DATA, THREAT),
        update(jax.random.key(5), state, DATA, THREAT),
    )


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data = 0"),
        ({"kl_weight": 0.0}, "kl_weight = 0.0"),
        ({"step_size": 0.0}, "step_size = 0.0"),
        ({"step_size": float("nan")}, "step_size = nan"),
        ({"friction": 0.0}, "friction = 0.0"),
        ({"friction": 1.5}, "friction = 1.5"),
        ({"num_samples": 0}, "num_samples = 0"),
        ({"every": 0}, "every = 0"),
        ({"burn_in": -1}, "burn_in = -1"),
        ({"cycle_length": 0}, "cycle_length = 0"),
        ({"exploration": 1.0}, "exploration = 1.0"),
        ({"cycle_length": 4}, "a cycle of 4 steps has none left"),
        ({"prior": dict.fromkeys(PARAMS)}, "no random leaf"),
        ({"prior": {**PRIOR, "b": dist.HalfNormal(jnp.ones(3)).to_event(1)}}, "'b' has support"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_prior_that_does_not_match_the_params():
    with pytest.raises(ValueError, match="only the params have"):
        SGHMC.init(KEY, {**PARAMS, "extra": jnp.zeros(1)})
