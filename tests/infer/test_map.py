"""Maximum a posteriori: the objective it states, its gradient, and ridge regression."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import likelihood, prior
from bnncert.infer import map as maximum
from bnncert.posterior import Samples
from bnncert.types import Batch, Threat

SIZE, CLASSES, NUM, BATCH = 3, 3, 20, 8
KEY = jax.random.key(0)
THREAT = Threat(jnp.float32(0.1), jnp.float32(0.4), jnp.float32(0.0))


def linear(params, x):
    return params["w"] @ x + params["b"]


keys = jax.random.split(jax.random.key(1), 4)
PARAMS = {
    "w": jax.random.normal(keys[0], (CLASSES, SIZE)),
    "b": jax.random.normal(keys[1], (CLASSES,)),
}
DATA = Batch(
    jax.random.uniform(keys[2], (BATCH, SIZE)),
    jax.random.randint(keys[3], (BATCH,), 0, CLASSES),
    jnp.ones(BATCH),
)
PRIOR = prior.normal(PARAMS, 0.7)


def cheap(key, params, x, y, threat):
    """A likelihood that uses all of the threat, as a robust one does, and compiles fast."""
    logits = linear(params, x)
    worst = logits - threat.eps * jnp.abs(params["w"]).sum() * jax.nn.one_hot(y, CLASSES)
    clean, worst = jax.nn.log_softmax(logits)[y], jax.nn.log_softmax(worst)[y]
    return threat.lam * clean + (1 - threat.lam) * worst


def build(loglik=cheap, prior=PRIOR, **options):
    settings = {"num_data": NUM, "optimizer": optax.sgd(0.1), "prior_weight": 0.5} | options
    return maximum.build(loglik, prior, **settings)


@partial(jax.jit, static_argnames=("weight", "random"))
def negative(params, data=DATA, weight=0.5, random=("w", "b")):
    """-(N/B sum of log-likelihoods + weight * log prior), written out."""
    terms = jax.vmap(cheap, (None, None, 0, 0, None))(KEY, params, data.x, data.y, THREAT)
    log_prior = sum(
        (-0.5 * (params[n] / 0.7) ** 2 - jnp.log(0.7 * jnp.sqrt(2 * jnp.pi))).sum() for n in random
    )
    return -NUM / len(data.x) * terms.sum() - weight * log_prior


negative_and_gradient = jax.jit(jax.value_and_grad(negative))
ALGORITHM = build()
update = jax.jit(ALGORITHM.update)


@pytest.mark.smoke
def test_a_step_descends_the_stated_objective():
    """The loss is the objective by hand, and one step of SGD its plain gradient."""
    state = ALGORITHM.init(KEY, PARAMS)
    new, info = update(KEY, state, DATA, THREAT)
    expected, gradient = negative_and_gradient(PARAMS, DATA)
    np.testing.assert_allclose(info.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(info.loss, -info.log_likelihood - 0.5 * info.log_prior, rtol=1e-5)
    np.testing.assert_allclose(info.log_prior, prior.log_prob(PRIOR, PARAMS), rtol=1e-6)
    stepped = jax.tree.map(lambda v, g: v - 0.1 * g, PARAMS, gradient)
    chex.assert_trees_all_close(new.params, stepped, rtol=1e-4, atol=1e-5)


def test_prior_weight_zero_is_maximum_likelihood_and_flat_leaves_have_no_prior():
    for options, arguments in [
        ({"prior_weight": 0.0}, {"weight": 0.0}),
        ({"prior": {**PRIOR, "b": None}}, {"random": ("w",)}),
        ({"prior": {"w": None, "b": None}}, {"random": ()}),
    ]:
        algorithm = build(**options)
        _, info = jax.jit(algorithm.update)(KEY, algorithm.init(KEY, PARAMS), DATA, THREAT)
        np.testing.assert_allclose(info.loss, negative(PARAMS, **arguments), rtol=1e-5)


def test_padding_changes_nothing():
    half = Batch(*(leaf[:4] for leaf in DATA))
    expected = negative(PARAMS, half)
    states = []
    for fill in (0.0, 1e3):
        x = DATA.x.at[4:].set(fill)
        mask = DATA.mask.at[4:].set(0.0)
        state, info = update(KEY, ALGORITHM.init(KEY, PARAMS), Batch(x, DATA.y, mask), THREAT)
        np.testing.assert_allclose(info.loss, expected, rtol=1e-5)
        states.append(state)
    chex.assert_trees_all_equal(*states)


def test_prepare_sees_the_minibatch_and_its_gradient_flows():
    def prepare(params, xs):
        return {**params, "b": params["b"] - params["w"] @ xs.mean(axis=0)}

    algorithm = build(prepare=prepare)
    state, info = jax.jit(algorithm.update)(KEY, algorithm.init(KEY, PARAMS), DATA, THREAT)

    centred = DATA._replace(x=DATA.x - DATA.x.mean(axis=0))
    expected, gradient = negative_and_gradient(PARAMS, centred)
    np.testing.assert_allclose(info.loss, expected, rtol=1e-5)
    stepped = jax.tree.map(lambda v, g: v - 0.1 * g, PARAMS, gradient)
    chex.assert_trees_all_close(state.params, stepped, rtol=1e-4, atol=1e-5)


def test_reaches_ridge_regression():
    num, noise, scale = 30, 0.5, 0.8
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + noise * rng.normal(size=num)
    ridge = np.linalg.solve(x.T @ x + noise**2 / scale**2 * np.eye(3), x.T @ y)
    assert np.abs(ridge - np.linalg.lstsq(x, y)[0]).max() > 0.01  # the prior is seen

    start = jnp.zeros(3)
    algorithm: Any = maximum.build(
        likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=noise),
        prior.normal(start, scale),
        num_data=num,
        optimizer=optax.sgd(2e-3),
    )
    data = Batch(jnp.float32(x), jnp.float32(y), jnp.ones(num))
    at_clean = Threat(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0))
    step = partial(algorithm.update, KEY, batch=data, threat=at_clean)

    @jax.jit
    def train(state):
        return jax.lax.scan(lambda s, _: step(state=s), state, length=500)[0]

    q = algorithm.posterior(train(algorithm.init(KEY, start)))
    np.testing.assert_allclose(q.params[0], ridge, atol=1e-4)


def test_its_posterior_is_one_member():
    q = ALGORITHM.posterior(ALGORITHM.init(KEY, PARAMS))
    assert isinstance(q, Samples) and q.num_samples == 1
    chex.assert_trees_all_equal(jax.tree.map(lambda v: v[0], q.sample(KEY, 1)), PARAMS)


def test_many_steps_are_one_trace_and_types_do_not_drift():
    state = start = ALGORITHM.init(KEY, PARAMS)
    traced = jax.jit(chex.assert_max_traces(ALGORITHM.update, n=1))
    for i in range(3):
        here = Threat(jnp.float32(0.1 * i), jnp.float32(0.5), jnp.float32(0.1))
        state, _ = traced(jax.random.key(i), state, DATA, here)
    chex.clear_trace_counter()
    chex.assert_trees_all_equal_shapes_and_dtypes(start, state)


def test_bad_settings():
    with pytest.raises(ValueError, match="num_data = 0"):
        build(num_data=0)
    with pytest.raises(ValueError, match="prior_weight = -1"):
        build(prior_weight=-1.0)
    with pytest.raises(ValueError, match="only the params have"):
        ALGORITHM.init(KEY, {**PARAMS, "extra": jnp.zeros(1)})


def test_a_scheduled_prior_weight_is_that_of_its_step_in_one_trace():
    traces = []
    scheduled = build(prior_weight=lambda step: 0.25 * step)

    @jax.jit
    def update(*args):
        traces.append(args)
        return scheduled.update(*args)

    state = scheduled.init(KEY, PARAMS)
    for step in range(3):
        params = state.params
        state, info = update(KEY, state, DATA, THREAT)
        np.testing.assert_allclose(info.loss, negative(params, weight=0.25 * step), rtol=1e-5)
        slope = jax.grad(negative)(params, weight=0.25 * step)
        stepped = jax.tree.map(lambda w, g: w - 0.1 * g, params, slope)
        chex.assert_trees_all_close(state.params, stepped, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1
