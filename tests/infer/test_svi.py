"""Bayes by Backprop: its ELBO is NumPyro's and the hand-written one; its optimum the known one."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, TraceMeanField_ELBO

from bnncert import likelihood, prior
from bnncert.infer import svi
from bnncert.types import Batch, Threat

SIZE, WIDTH, CLASSES, NUM, BATCH = 3, 4, 3, 20, 8
KEY = jax.random.key(0)
PRIOR_SCALE, KL_WEIGHT = 0.7, 0.3


def mlp(params, x):
    return params["v"] @ jnp.tanh(params["w"] @ x) + params["b"]


def threat(eps=0.1, lam=0.4, power=0.0):
    return Threat(jnp.float32(eps), jnp.float32(lam), jnp.float32(power))


keys = jax.random.split(jax.random.key(1), 5)
PARAMS = {
    "w": jax.random.normal(keys[0], (WIDTH, SIZE)),
    "v": jax.random.normal(keys[1], (CLASSES, WIDTH)),
    "b": jax.random.normal(keys[2], (CLASSES,)),
}
X, Y = jax.random.uniform(keys[3], (NUM, SIZE)), jax.random.randint(keys[4], (NUM,), 0, CLASSES)
PRIOR = prior.normal(PARAMS, PRIOR_SCALE)


def cheap(key, params, x, y, threat):
    """A likelihood that uses all of the threat, as a robust one does, and compiles fast."""
    logits = mlp(params, x)
    worst = logits - threat.eps * jnp.abs(params["w"]).sum() * jax.nn.one_hot(y, CLASSES)
    clean, worst = jax.nn.log_softmax(logits)[y], jax.nn.log_softmax(worst)[y]
    return threat.lam * clean + (1 - threat.lam) * worst


def batch(indices, mask=None):
    indices = np.asarray(indices)
    return Batch(X[indices], Y[indices], jnp.ones(len(indices)) if mask is None else mask)


def build(loglik=cheap, prior=PRIOR, **options) -> Any:
    settings = {"num_data": NUM, "optimizer": optax.sgd(1e-3), "kl_weight": KL_WEIGHT} | options
    return svi.build(loglik, prior, **settings)


ALGORITHM = build()
STATE = ALGORITHM.init(KEY, PARAMS)
TRACES = []


@jax.jit
def update(*args):
    """One compile for every test that needs no other options."""
    TRACES.append(args)
    return ALGORITHM.update(*args)


@partial(jax.jit, static_argnames=("kl_weight", "loglik"))
def elbo_by_hand(q, weights, here, kl_weight=KL_WEIGHT, loglik=cheap):
    """N/B sum of log-likelihoods at these weights - weight * sum of KLs between normals."""
    data = batch(range(BATCH))
    terms = jax.vmap(loglik, (None, None, 0, 0, None))(KEY, weights, data.x, data.y, here)
    kl = sum(
        (jnp.log(PRIOR_SCALE / scale) + (scale**2 + loc**2) / (2 * PRIOR_SCALE**2) - 0.5).sum()
        for loc, scale in zip(jax.tree.leaves(q.loc), jax.tree.leaves(q.scale), strict=True)
    )
    return NUM / len(data.x) * terms.sum() - kl_weight * kl, kl


def normal(loc, scale) -> Any:
    return dist.Normal(loc, scale).to_event()


def independent_model(x, y):
    """A user's own NumPyro model and guide of the same posterior, without this library."""
    sites: Any = {
        name: numpyro.sample(name, normal(jnp.zeros(leaf.shape), jnp.float32(PRIOR_SCALE)))
        for name, leaf in sorted(PARAMS.items())
    }
    with numpyro.plate("all", NUM, subsample_size=len(x)):
        logits = jnp.tanh(x @ sites["w"].T) @ sites["v"].T + sites["b"]
        numpyro.sample("y", dist.CategoricalLogits(logits), obs=y)


def independent_guide(x, y):
    q = ALGORITHM.posterior(STATE)
    for name in sorted(PARAMS):
        numpyro.sample(name, normal(q.loc[name], q.scale[name]))


@pytest.mark.smoke
def test_elbo_is_that_of_numpyro_on_an_independent_model():
    data = batch(range(BATCH))
    loglik = likelihood.clean_categorical(mlp)
    algorithm = build(loglik, kl_weight=1.0)
    state = algorithm.init(KEY, PARAMS)
    _, info = jax.jit(algorithm.update)(jax.random.key(5), state, data, threat())
    # the same key where SVI itself would have it
    theirs = SVI(
        independent_model, independent_guide, numpyro.optim.Adam(1e-2), TraceMeanField_ELBO()
    )
    their_state = theirs.init(KEY, data.x, data.y)._replace(rng_key=jax.random.key(5))
    expected = theirs.evaluate(their_state, data.x, data.y)
    np.testing.assert_allclose(info.loss, expected, rtol=1e-5)

    # and at the same draw the hand-written one
    step_key = jax.random.split(jax.random.key(5))[1]
    seeded = numpyro.handlers.seed(independent_guide, jax.random.split(step_key)[1])
    trace = numpyro.handlers.trace(seeded).get_trace(data.x, data.y)
    weights = {name: site["value"] for name, site in trace.items()}
    elbo, kl = elbo_by_hand(
        algorithm.posterior(state), weights, threat(), kl_weight=1.0, loglik=loglik
    )
    np.testing.assert_allclose(info.loss, -elbo, rtol=1e-5)
    np.testing.assert_allclose(info.kl, kl, rtol=1e-5)


def test_robust_elbo_by_hand_where_the_posterior_is_almost_a_point():
    """Then the draw is the location, and every term of the robust objective is known."""
    loglik = likelihood.robust_categorical(mlp)
    algorithm = build(loglik, initial_scale=1e-6)
    state = algorithm.init(KEY, PARAMS)
    robust_update = jax.jit(algorithm.update)
    for here in (threat(), threat(0.3, 0.2, 1.0)):
        _, info = robust_update(KEY, state, batch(range(BATCH)), here)
        elbo, kl = elbo_by_hand(algorithm.posterior(state), PARAMS, here, loglik=loglik)
        np.testing.assert_allclose(info.loss, -elbo, rtol=1e-5)
        np.testing.assert_allclose(info.log_likelihood, elbo + KL_WEIGHT * kl, rtol=1e-4)
        np.testing.assert_allclose(info.kl, kl, rtol=1e-5)


def test_kl_is_zero_where_q_is_the_prior():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    algorithm = build(prior=prior.normal(PARAMS, 0.1), initial_scale=0.1)  # of 1 at zero weights
    state = algorithm.init(KEY, zeros)
    chex.assert_trees_all_close(
        algorithm.posterior(state).scale, jax.tree.map(lambda v: jnp.full_like(v, 0.1), PARAMS)
    )
    _, info = jax.jit(algorithm.update)(KEY, state, batch(range(BATCH)), threat())
    np.testing.assert_allclose(info.kl, 0.0, atol=1e-4)
    np.testing.assert_allclose(info.loss, -info.log_likelihood, rtol=1e-5)


def test_kl_weight_scales_the_kl_alone():
    data = batch(range(BATCH))
    _, base = update(KEY, STATE, data, threat())
    other = build(kl_weight=1.0)
    _, info = jax.jit(other.update)(KEY, other.init(KEY, PARAMS), data, threat())
    np.testing.assert_allclose(info.kl, base.kl, rtol=1e-6)
    np.testing.assert_allclose(info.log_likelihood, base.log_likelihood, rtol=1e-5)
    np.testing.assert_allclose(info.loss, info.kl - info.log_likelihood, rtol=1e-5)
    np.testing.assert_allclose(base.loss, KL_WEIGHT * info.kl - info.log_likelihood, rtol=1e-5)


def test_minibatches_of_an_epoch_average_to_the_full_batch():
    """Weighted by their sizes: the last one is mostly padding."""
    order = np.random.default_rng(0).permutation(NUM)
    total = 0.0
    for start in range(0, NUM, BATCH):
        indices = np.resize(order[start : start + BATCH], BATCH)
        size = min(BATCH, NUM - start)
        mask = jnp.arange(BATCH) < size
        _, info = update(KEY, STATE, batch(indices, mask.astype(float)), threat())
        total += size / NUM * info.log_likelihood
    _, full = update(KEY, STATE, batch(range(NUM)), threat())
    np.testing.assert_allclose(total, full.log_likelihood, rtol=1e-5)


def test_padding_changes_nothing():
    half = batch(range(4))
    results = []
    for fill in (0.0, 1e3, -7.0):
        x = jnp.concatenate([half.x, jnp.full((4, SIZE), fill)])
        y = jnp.concatenate([half.y, jnp.full(4, int(fill) % CLASSES)])
        mask = jnp.concatenate([half.mask, jnp.zeros(4)])
        results.append(update(KEY, STATE, Batch(x, y, mask), threat()))
    chex.assert_trees_all_equal(results[0], results[1], results[2])
    plain_state, plain = update(KEY, STATE, half, threat())
    np.testing.assert_allclose(results[0][1].loss, plain.loss, rtol=1e-6)
    found, expected = ALGORITHM.posterior(results[0][0]), ALGORITHM.posterior(plain_state)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


# --- deterministic leaves, prepare, the start -----------------------------------------------------


def test_leaves_without_a_prior_are_deterministic_and_trained():
    partly = {**PRIOR, "b": None}
    algorithm = build(prior=partly)
    state = algorithm.init(KEY, PARAMS)
    new, info = jax.jit(algorithm.update)(KEY, state, batch(range(BATCH)), threat())
    q = algorithm.posterior(new)
    assert q.scale["b"] is None
    assert (q.loc["b"] != PARAMS["b"]).any()
    draws = q.sample(jax.random.key(1), 3)
    assert (draws["b"] == q.loc["b"]).all() and (draws["w"][0] != draws["w"][1]).any()
    np.testing.assert_allclose(info.kl, q_kl(algorithm.posterior(state), ("w", "v")), rtol=1e-5)


def q_kl(q, names):
    kept = {name: PRIOR[name] for name in names}
    normals = {name: dist.Normal(q.loc[name], q.scale[name]).to_event() for name in names}
    return sum(jnp.sum(dist.kl_divergence(normals[n], kept[n])) for n in names)


def test_prepare_sees_the_minibatch_and_its_output_is_used():
    """Centring by the minibatch's mean inside `prepare` is the same as centring the data."""

    def shifted(params, x):
        return mlp(params, x - params["shift"])

    def prepare(params, xs):
        assert xs.shape == (BATCH, SIZE)
        return {**params, "shift": xs.mean(axis=0)}

    params = {**PARAMS, "shift": jnp.full(SIZE, 1e3)}
    with_shift = {**PRIOR, "shift": None}
    algorithm = build(
        likelihood.clean_categorical(shifted), with_shift, prepare=prepare, num_particles=2
    )
    data = batch(range(BATCH))
    centred = data._replace(x=data.x - data.x.mean(axis=0))
    state, info = jax.jit(algorithm.update)(KEY, algorithm.init(KEY, params), data, threat())
    other = build(likelihood.clean_categorical(mlp), num_particles=2)
    _, expected = jax.jit(other.update)(KEY, other.init(KEY, PARAMS), centred, threat())
    np.testing.assert_allclose(info.loss, expected.loss, rtol=1e-5)
    assert (algorithm.posterior(state).loc["shift"] == 1e3).all()  # overwritten, so untrained


def test_starts_at_the_given_weights_with_scales_relative_to_each_leaf():
    params = {**PARAMS, "b": jnp.zeros(CLASSES)}
    q = build(initial_scale=0.2).posterior(build(initial_scale=0.2).init(KEY, params))
    chex.assert_trees_all_equal(q.loc, params)
    rms = {name: jnp.sqrt(jnp.mean(leaf**2)) for name, leaf in params.items()}
    rms["b"] = jnp.minimum(rms["w"], rms["v"])  # zero itself: the smallest of the others
    for name, leaf in q.scale.items():
        np.testing.assert_allclose(leaf, jnp.full(params[name].shape, 0.2 * rms[name]), rtol=1e-5)


@pytest.mark.parametrize("name", ["data", "log_likelihood", "w/weight", "start"])
def test_leaves_may_have_any_name(name):
    params = {name: PARAMS["w"], "scale": PARAMS["b"]}
    loglik = likelihood.clean_categorical(lambda p, x: (p[name] @ x)[:CLASSES] + p["scale"])
    for leaves in (prior.normal(params), {**prior.normal(params), name: None}):
        algorithm = build(loglik, leaves)
        state, info = algorithm.update(KEY, algorithm.init(KEY, params), batch([0, 1]), threat())
        assert jnp.isfinite(info.loss)
        assert (algorithm.posterior(state).loc[name] != params[name]).any()


def test_params_may_be_any_pytree():
    for params, apply in [
        (PARAMS["w"][:CLASSES], lambda p, x: p @ x),
        ((PARAMS["w"], [PARAMS["b"], None]), lambda p, x: (p[0] @ x)[:CLASSES] + p[1][0]),
    ]:
        algorithm = build(likelihood.clean_categorical(apply), prior.normal(params))
        state, _ = algorithm.update(KEY, algorithm.init(KEY, params), batch([0, 1]), threat())
        q = algorithm.posterior(state)
        assert jax.tree.structure(q.loc) == jax.tree.structure(params)
        chex.assert_trees_all_equal_shapes(q.scale, params)


# --- what it converges to -------------------------------------------------------------------------


def test_reaches_the_mean_field_optimum_of_conjugate_linear_regression():
    """The optimum of a factorised normal has the exact mean, and 1/diag(precision) as variances."""
    num, noise, scale = 30, 0.5, 1.5
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, 3)) @ np.array([[1.0, 0.6, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    y = x @ np.array([1.0, -2.0, 0.5]) + noise * rng.normal(size=num)
    precision = x.T @ x / noise**2 + np.eye(3) / scale**2
    mean, sd = np.linalg.solve(precision, x.T @ y / noise**2), np.diag(precision) ** -0.5
    assert (
        np.abs(1 - sd / np.diag(np.linalg.inv(precision)) ** 0.5).max() > 0.1
    )  # not the exact sds

    start = jnp.ones(3)
    algorithm: Any = svi.build(
        likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=noise),
        prior.normal(start, scale),
        num_data=num,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.03, 1_500)),
        num_particles=8,
    )
    data = Batch(jnp.float32(x), jnp.float32(y), jnp.ones(num))

    @jax.jit
    def train(state):
        def step(state, key):
            return algorithm.update(key, state, data, threat(0.0, 1.0))

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(3), 1_500))[0]

    q = algorithm.posterior(train(algorithm.init(KEY, start)))
    assert (np.abs(q.loc - mean) < 0.1 * sd).all()
    np.testing.assert_allclose(q.scale, sd, rtol=0.05)


# --- state: pure, one compile, restored -----------------------------------------------------------


def test_update_is_pure_and_uses_its_key():
    data = batch(range(BATCH))
    first, second = (update(KEY, STATE, data, threat()) for _ in range(2))
    chex.assert_trees_all_equal(first[1], second[1])
    chex.assert_trees_all_equal(jax.tree.map(_raw, first[0]), jax.tree.map(_raw, second[0]))
    _, other = update(jax.random.key(1), STATE, data, threat())
    assert other.log_likelihood != first[1].log_likelihood


def _raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def test_many_steps_are_one_trace():
    state, _ = update(KEY, ALGORITHM.init(KEY, PARAMS), batch(range(BATCH)), threat())
    before = len(TRACES)
    assert before > 0
    for i in range(4):
        data = batch(np.arange(BATCH) + i)
        state, _ = update(jax.random.key(i), state, data, threat(0.1 * i, 1 - 0.2 * i, 0.1 * i))
    assert len(TRACES) == before


def test_types_do_not_drift():
    new, _ = update(KEY, STATE, batch(range(BATCH)), threat())
    kinds = [jax.tree.map(lambda v: jax.typeof(v).str_short(), tree) for tree in (STATE, new)]
    assert kinds[0] == kinds[1]
    weak = [jax.tree.map(lambda v: jax.typeof(v).weak_type, tree) for tree in (STATE, new)]
    assert weak[0] == weak[1]


def test_a_restored_state_continues_in_a_fresh_process():
    """Saved as plain arrays, and taken up by an algorithm on which `init` was never called."""
    data = batch(range(BATCH))
    state, _ = update(KEY, STATE, data, threat())
    leaves, treedef = jax.tree.flatten(state)
    saved = [np.asarray(_raw(leaf)) for leaf in leaves]

    fresh = build()
    arrays = [
        jax.random.wrap_key_data(jnp.asarray(value))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.asarray(value)
        for value, leaf in zip(saved, leaves, strict=True)
    ]
    restored = jax.tree.unflatten(treedef, arrays)
    chex.assert_trees_all_equal(fresh.posterior(restored), ALGORITHM.posterior(state))
    ours, theirs = (
        run(jax.random.key(7), start, data, threat())
        for run, start in ((update, state), (jax.jit(fresh.update), restored))
    )
    chex.assert_trees_all_equal(ours[1], theirs[1])
    chex.assert_trees_all_equal(fresh.posterior(theirs[0]), ALGORITHM.posterior(ours[0]))


def test_init_can_be_jitted_and_vmapped():
    chex.assert_trees_all_close(
        ALGORITHM.posterior(jax.jit(ALGORITHM.init)(KEY, PARAMS)), ALGORITHM.posterior(STATE)
    )
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    states = jax.jit(jax.vmap(ALGORITHM.init))(jax.random.split(KEY), stacked)
    chex.assert_trees_all_close(jax.vmap(ALGORITHM.posterior)(states).loc, stacked)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data = 0"),
        ({"kl_weight": -1.0}, "kl_weight = -1.0"),
        ({"kl_weight": 0.0}, "kl_weight = 0.0"),
        ({"kl_weight": float("nan")}, "kl_weight = nan"),
        ({"initial_scale": 0.0}, "initial_scale = 0.0"),
        ({"prior": dict.fromkeys(PARAMS)}, "no random leaf"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_prior_that_does_not_match_the_params():
    with pytest.raises(ValueError, match="only the params have"):
        ALGORITHM.init(KEY, {**PARAMS, "extra": jnp.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        ALGORITHM.init(KEY, {**PARAMS, "b": jnp.zeros(CLASSES + 1)})
