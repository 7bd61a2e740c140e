"""The step that VOGN, noisy Adam and IVON share: what it is, by hand, and what each must keep."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

from bnncert import likelihood, prior
from bnncert.infer import _natural_gradient as natural_gradient
from bnncert.infer import ivon, noisy_adam, vogn
from bnncert.types import Batch, Threat

SIZE, CLASSES, NUM, BATCH = 3, 3, 20, 8
KEY = jax.random.key(0)
PRIOR_SCALE, KL_WEIGHT, RATE = 0.7, 0.3, 0.05
METHODS: dict[str, Any] = {"vogn": vogn, "noisy-adam": noisy_adam, "ivon": ivon}

keys = jax.random.split(jax.random.key(1), 4)
PARAMS = {
    "w": jax.random.normal(keys[0], (CLASSES, SIZE)),
    "b": jax.random.normal(keys[1], (CLASSES,)),
}
X, Y = jax.random.uniform(keys[2], (NUM, SIZE)), jax.random.randint(keys[3], (NUM,), 0, CLASSES)
PRIOR = prior.normal(PARAMS, PRIOR_SCALE)


def linear(params, x):
    return params["w"] @ x + params["b"]


def cheap(key, params, x, y, threat):
    """A likelihood that uses all of the threat, as a robust one does, and compiles fast."""
    logits = linear(params, x)
    worst = logits - threat.eps * jnp.abs(params["w"]).sum() * jax.nn.one_hot(y, CLASSES)
    clean, worst = jax.nn.log_softmax(logits)[y], jax.nn.log_softmax(worst)[y]
    return threat.lam * clean + (1 - threat.lam) * worst


def threat(eps=0.1, lam=0.4, power=0.0):
    return Threat(jnp.float32(eps), jnp.float32(lam), jnp.float32(power))


def batch(indices, mask=None):
    indices = np.asarray(indices)
    return Batch(X[indices], Y[indices], jnp.ones(len(indices)) if mask is None else mask)


def build(method, loglik=cheap, prior=PRIOR, **options) -> Any:
    settings = {"num_data": NUM, "optimizer": optax.sgd(RATE), "kl_weight": KL_WEIGHT} | options
    return METHODS[method].build(loglik, prior, **settings)


TRACES: list[str] = []


@partial(jax.jit, static_argnums=0)
def _update(method, *args):
    TRACES.append(method)
    return ALGORITHMS[method].update(*args)


ALGORITHMS = {name: build(name) for name in METHODS}
STATES = {name: ALGORITHMS[name].init(KEY, PARAMS) for name in METHODS}
UPDATES: dict[str, Any] = {name: partial(_update, name) for name in METHODS}
each_method = pytest.mark.parametrize("method", METHODS)


# --- the step by hand -----------------------------------------------------------------------------


def constant(value):
    return lambda draw: {name: jnp.full_like(s, value) for name, s in draw.scale.items()}


def seen(**options) -> Any:
    """One update with a known curvature, and the draw it saw."""
    draws = []

    def estimate(draw):
        draws.append(draw)
        return constant(2.0)(draw)

    settings = {"num_data": NUM, "optimizer": optax.sgd(RATE), "kl_weight": KL_WEIGHT} | options
    algorithm = natural_gradient.build(
        estimate, natural_gradient.moving_average(0.9), cheap, PRIOR, **settings
    )
    state = algorithm.init(KEY, PARAMS)
    new, info = algorithm.update(jax.random.key(5), state, batch(range(BATCH)), threat())
    return algorithm, state, new, info, draws[0]


@pytest.mark.smoke
def test_a_step_by_hand():
    algorithm, state, new, info, draw = seen()
    q, after = algorithm.posterior(state), algorithm.posterior(new)
    weights = {name: q.loc[name] + draw.offset[name] for name in PARAMS}
    data = batch(range(BATCH))

    def loss(params):
        each = jax.vmap(cheap, (None, None, 0, 0, None))
        return -each(KEY, params, data.x, data.y, threat()).mean()

    value, gradient = jax.value_and_grad(loss)(weights)
    np.testing.assert_allclose(info.log_likelihood, -NUM * value, rtol=1e-5)
    np.testing.assert_allclose(info.kl, q.kl(PRIOR), rtol=1e-5)
    np.testing.assert_allclose(info.loss, KL_WEIGHT * info.kl - info.log_likelihood, rtol=1e-5)
    damping = KL_WEIGHT / (NUM * PRIOR_SCALE**2)
    for name, leaf in PARAMS.items():
        np.testing.assert_allclose(draw.gradient[name], gradient[name], rtol=1e-4, atol=1e-6)
        before = KL_WEIGHT / (NUM * q.scale[name] ** 2) - damping
        h = 0.9 * before + 0.1 * 2.0
        # debiased, the first average is the gradient itself
        step = RATE * (gradient[name] + damping * leaf) / (h + damping)
        np.testing.assert_allclose(after.loc[name], leaf - step, rtol=1e-4, atol=1e-6)
        expected = jnp.sqrt(KL_WEIGHT / (NUM * (h + damping)))
        np.testing.assert_allclose(after.scale[name], expected, rtol=1e-4)


def test_the_prior_mean_is_where_the_prior_pulls_to():
    """Without data's gradient, and at a = 1 without curvature, one step is the prior's mean."""
    centred = {name: dist.Normal(leaf + 1.0, 0.7).to_event() for name, leaf in PARAMS.items()}
    algorithm: Any = natural_gradient.build(
        constant(0.0),
        lambda h, estimate, damping: 0 * h,
        lambda key, params, x, y, threat: jnp.float32(0),
        centred,
        num_data=NUM,
        optimizer=optax.sgd(1.0),
    )
    state = algorithm.init(KEY, PARAMS)
    q = algorithm.posterior(algorithm.update(KEY, state, batch([0]), threat())[0])
    chex.assert_trees_all_close(q.loc, jax.tree.map(lambda v: v + 1.0, PARAMS), rtol=1e-5)
    chex.assert_trees_all_close(q.scale, jax.tree.map(lambda v: jnp.full_like(v, 0.7), PARAMS))


def test_gradients_are_averaged_before_they_are_divided():
    algorithm, _, new, *_ = seen(beta1=0.5)
    again, _ = algorithm.update(jax.random.key(6), new, batch(range(BATCH)), threat())
    first, second = (s.momentum.ema for s in (new, again))
    assert int(again.momentum.count) == 2 and not jnp.allclose(first["w"], second["w"])
    plain, _, after, *_ = seen(beta1=0.0)
    chex.assert_trees_all_close(  # the first step is the same: the average is debiased
        plain.posterior(after).loc, algorithm.posterior(new).loc, rtol=1e-5
    )


def test_kl_weight_may_follow_a_schedule():
    schedule = optax.linear_schedule(0.1, 0.5, 4)
    algorithm = build("vogn", kl_weight=schedule)
    state = algorithm.init(KEY, PARAMS)
    for step in range(3):
        new, info = jax.jit(algorithm.update)(KEY, state, batch(range(BATCH)), threat())
        np.testing.assert_allclose(
            info.loss, schedule(step) * info.kl - info.log_likelihood, rtol=1e-5
        )
        state = new
    h, damping = state.curvature["b"], schedule(3) / (NUM * PRIOR_SCALE**2)
    np.testing.assert_allclose(
        algorithm.posterior(state).scale["b"], np.sqrt(schedule(3) / (NUM * (h + damping))), 1e-5
    )


def test_scales_start_relative_to_each_leaf_and_never_above_the_prior():
    q = build("ivon", initial_scale=0.2).posterior(
        build("ivon", initial_scale=0.2).init(KEY, PARAMS)
    )
    for name, leaf in PARAMS.items():
        expected = 0.2 * jnp.sqrt(jnp.mean(leaf**2))
        np.testing.assert_allclose(q.scale[name], jnp.full(leaf.shape, expected), rtol=1e-4)
    wide = build("ivon", initial_scale=100.0)
    for leaf in wide.posterior(wide.init(KEY, PARAMS)).scale.values():
        np.testing.assert_allclose(leaf, PRIOR_SCALE, rtol=1e-5)


def test_particles_are_averaged():
    algorithm = build("noisy-adam", num_particles=400, beta1=0.0)
    _, info = jax.jit(algorithm.update)(
        KEY, algorithm.init(KEY, PARAMS), batch(range(BATCH)), threat()
    )
    q = algorithm.posterior(algorithm.init(KEY, PARAMS))
    draws = q.sample(jax.random.key(8), 400)
    data = batch(range(BATCH))
    each = jax.vmap(jax.vmap(cheap, (None, None, 0, 0, None)), (None, 0, None, None, None))
    values = NUM * each(KEY, draws, data.x, data.y, threat()).mean(1)
    error = np.std(values) / np.sqrt(400)
    assert abs(info.log_likelihood - values.mean()) < 6 * error


# --- what each method keeps -----------------------------------------------------------------------


@each_method
def test_padding_changes_nothing(method):
    half = batch(range(4))
    algorithm, update = ALGORITHMS[method], UPDATES[method]
    results = []
    for fill in (0.0, 1e3):
        x = jnp.concatenate([half.x, jnp.full((4, SIZE), fill)])
        y = jnp.concatenate([half.y, jnp.full(4, int(fill) % CLASSES)])
        mask = jnp.concatenate([half.mask, jnp.zeros(4)])
        results.append(update(KEY, STATES[method], Batch(x, y, mask), threat()))
    chex.assert_trees_all_equal(results[0], results[1])
    if method == "vogn":  # its signs are another draw for another batch size
        return
    plain_state, plain = update(KEY, STATES[method], half, threat())
    np.testing.assert_allclose(results[0][1].loss, plain.loss, rtol=1e-5)
    found, expected = algorithm.posterior(results[0][0]), algorithm.posterior(plain_state)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@each_method
def test_lam_1_or_eps_0_is_ordinary_inference(method):
    robust = build(method, likelihood.robust_categorical(linear))
    plain = build(method, likelihood.clean_categorical(linear))
    data = batch(range(BATCH))
    step, ordinary = jax.jit(robust.update), jax.jit(plain.update)
    for here in (threat(0.2, 1.0), threat(0.0, 0.3)):
        a, b = robust.init(KEY, PARAMS), plain.init(KEY, PARAMS)
        for i in range(2):
            a, found = step(jax.random.key(i), a, data, here)
            b, expected = ordinary(jax.random.key(i), b, data, here)
            np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
        chex.assert_trees_all_close(robust.posterior(a), plain.posterior(b), rtol=1e-3, atol=1e-5)


@each_method
def test_leaves_without_a_prior_are_trained_by_their_own_optimizer(method):
    partly = {**PRIOR, "b": None}
    algorithm = build(method, prior=partly, deterministic=optax.sgd(0.01))
    state = algorithm.init(KEY, PARAMS)
    new, _ = jax.jit(algorithm.update)(KEY, state, batch(range(BATCH)), threat())
    q = algorithm.posterior(new)
    assert q.scale["b"] is None and (q.loc["b"] != PARAMS["b"]).any()
    draws = q.sample(jax.random.key(1), 3)
    assert (draws["b"] == q.loc["b"]).all() and (draws["w"][0] != draws["w"][1]).any()


@each_method
def test_prepare_sees_the_minibatch_and_its_output_is_used(method):
    """Centring by the minibatch's mean inside `prepare` is the same as centring the data."""

    def shifted(key, params, x, y, threat):
        return cheap(key, {"w": params["w"], "b": params["b"]}, x - params["shift"], y, threat)

    params = {**PARAMS, "shift": jnp.full(SIZE, 1e3)}
    algorithm = build(
        method,
        shifted,
        {**PRIOR, "shift": None},
        prepare=lambda params, xs: {**params, "shift": xs.mean(axis=0)},
        deterministic=optax.sgd(0.1),
    )
    data = batch(range(BATCH))
    centred = data._replace(x=data.x - data.x.mean(axis=0))
    state, info = jax.jit(algorithm.update)(KEY, algorithm.init(KEY, params), data, threat())
    _, expected = UPDATES[method](KEY, STATES[method], centred, threat())
    np.testing.assert_allclose(info.loss, expected.loss, rtol=1e-4)
    assert (algorithm.posterior(state).loc["shift"] == 1e3).all()  # overwritten, so untrained


@each_method
def test_many_steps_are_one_trace_and_types_do_not_drift(method):
    state, _ = UPDATES[method](KEY, STATES[method], batch(range(BATCH)), threat())
    before = TRACES.count(method)
    for i in range(3):
        here = threat(0.1 * i, 1 - 0.2 * i, 0.1 * i)
        state, _ = UPDATES[method](jax.random.key(i), state, batch(np.arange(BATCH) + i), here)
    assert TRACES.count(method) == before > 0
    for kind in (lambda v: jax.typeof(v).str_short(), lambda v: jax.typeof(v).weak_type):
        assert jax.tree.map(kind, state) == jax.tree.map(kind, STATES[method])


@each_method
def test_steps_run_in_a_scan_and_equal_the_loop(method):
    data, here = batch(range(BATCH)), threat()

    def step(state, key):
        return ALGORITHMS[method].update(key, state, data, here)

    steps = jax.random.split(KEY, 3)
    scanned, _ = jax.jit(lambda s: jax.lax.scan(step, s, steps))(STATES[method])
    looped = STATES[method]
    for key in steps:
        looped, _ = UPDATES[method](key, looped, data, here)
    chex.assert_trees_all_close(
        ALGORITHMS[method].posterior(scanned), ALGORITHMS[method].posterior(looped), rtol=1e-4
    )


@each_method
def test_a_restored_state_continues(method):
    """Saved as plain arrays, and taken up by an algorithm on which `init` was never called."""
    state, _ = UPDATES[method](KEY, STATES[method], batch(range(BATCH)), threat())
    leaves, treedef = jax.tree.flatten(state)
    restored = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    ours = UPDATES[method](jax.random.key(7), state, batch(range(BATCH)), threat())
    theirs = jax.jit(build(method).update)(
        jax.random.key(7), restored, batch(range(BATCH)), threat()
    )
    chex.assert_trees_all_equal(ours, theirs)


@each_method
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data = 0"),
        ({"kl_weight": 0.0}, "kl_weight = 0.0"),
        ({"initial_scale": -1.0}, "initial_scale = -1.0"),
        ({"beta1": 1.0}, "beta1 = 1.0"),
        ({"beta2": 1.0}, "beta2 = 1.0"),
        ({"num_particles": 0}, "num_particles = 0"),
        ({"prior": dict.fromkeys(PARAMS)}, "no random leaf"),
        ({"prior": {**PRIOR, "b": None}}, "deterministic=optax.adam"),
        ({"prior": {**PRIOR, "b": dist.Laplace(jnp.zeros(CLASSES)).to_event()}}, "'b' is a Laplac"),
    ],
)
def test_bad_settings(method, options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        build(method, **options)
