"""SWAG: moments of the iterates it saw, the paper's covariance of them, and what that estimates."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import prior
from bnncert.infer import map as maximum
from bnncert.infer import swag
from bnncert.posterior import LowRank, MeanField
from bnncert.types import Batch, Threat

NUM, BATCH, STEPS, NOISE = 24, 6, 23, 0.5
KEY = jax.random.key(0)
THREAT = Threat(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0))
KEYS = jax.random.split(jax.random.key(1), 4)
X = jax.random.normal(KEYS[0], (NUM, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5]) + NOISE * jax.random.normal(KEYS[1], (NUM,))
PARAMS = {"w": jax.random.normal(KEYS[2], (3,)), "b": jnp.zeros(1)}
PRIOR = {**prior.normal(PARAMS, 1.5), "b": None}
BATCHES = jax.random.randint(KEYS[3], (STEPS, BATCH), 0, NUM)


def gaussian(key, params, x, y, threat):
    """A likelihood that reads the threat, as a robust one does, and compiles fast."""
    error = jnp.abs(params["w"] @ x + params["b"][0] - y) + threat.eps
    return -0.5 * (error / NOISE) ** 2


def build(module: Any = swag, loglik: Any = gaussian, leaves: Any = PRIOR, **options) -> Any:
    settings = {"num_data": NUM, "optimizer": optax.sgd(2e-3)} | options
    return module.build(loglik, leaves, **settings)


def data(indices, mask=None):
    return Batch(X[indices], Y[indices], jnp.ones(len(indices)) if mask is None else mask)


def run(algorithm, params, steps=STEPS):
    """The last state, and every state's params on the way."""

    def step(state, inputs):
        state, info = algorithm.update(inputs[0], state, data(inputs[1]), THREAT)
        return state, (getattr(state, "map", state).params, info)

    inputs = (jax.random.split(KEY, STEPS)[:steps], BATCHES[:steps])
    return jax.lax.scan(step, algorithm.init(KEY, params), inputs)


SETTINGS: dict[str, Any] = {"start": 4, "every": 3, "rank": 5}
ALGORITHM = build(**SETTINGS)
STATE, (ITERATES, INFOS) = jax.jit(lambda params: run(ALGORITHM, params))(PARAMS)
COLLECTED = np.arange(4, STEPS, 3)  # 7 iterates


@pytest.mark.smoke
def test_it_collects_the_moments_of_the_iterates_of_map():
    _, (expected, _) = jax.jit(lambda params: run(build(maximum), params))(PARAMS)
    chex.assert_trees_all_close(ITERATES, expected, rtol=1e-6)
    seen = np.asarray(ITERATES["w"], np.float64)[COLLECTED]
    np.testing.assert_allclose(STATE.mean["w"], seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(STATE.mean["b"], ITERATES["b"][COLLECTED].mean(axis=0), rtol=1e-5)
    second = (seen**2).mean(axis=0) - seen.mean(axis=0) ** 2
    np.testing.assert_allclose(STATE.variance["w"], second, rtol=1e-4)
    counts = [(COLLECTED <= step).sum() for step in range(STEPS)]
    np.testing.assert_array_equal(INFOS.num_collected, counts)


def test_the_posterior_is_the_papers_equation():
    """Deviations are from the running mean, and the last five of seven are kept."""
    seen = np.asarray(ITERATES["w"], np.float64)[COLLECTED]
    running = np.cumsum(seen, axis=0) / np.arange(1, 8)[:, None]
    last = (seen - running)[-5:]
    for scale in (1.0, 0.3):
        q = build(**SETTINGS, scale=scale).posterior(STATE)
        assert isinstance(q, LowRank) and q.scale["b"] is None and q.deviations["b"] is None
        np.testing.assert_allclose(q.loc["w"], seen.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(q.scale["w"], scale * seen.std(axis=0) / 2**0.5, rtol=1e-4)
        columns = np.asarray(q.deviations["w"], np.float64)
        covariance = scale**2 * last.T @ last / (2 * 4)
        np.testing.assert_allclose(columns.T @ columns, covariance, rtol=1e-3, atol=1e-6)


def test_rank_zero_is_the_diagonal_alone_with_all_of_the_variance():
    algorithm = build(start=4, every=3, rank=0, scale=2.0)
    state, _ = jax.jit(lambda params: run(algorithm, params))(PARAMS)
    q = algorithm.posterior(state)
    assert isinstance(q, MeanField)
    seen = np.asarray(ITERATES["w"], np.float64)[COLLECTED]
    np.testing.assert_allclose(q.scale["w"], 2 * seen.std(axis=0), rtol=1e-4)
    chex.assert_trees_all_close(q.loc, STATE.mean, rtol=1e-6)


def test_a_posterior_of_too_few_iterates_is_a_point_and_never_nan():
    never = build(start=10_000, rank=5)
    state, (iterates, _) = jax.jit(lambda params: run(never, params, 3))(PARAMS)
    after_one = ALGORITHM.init(KEY, PARAMS)
    for step in range(5):
        after_one, _ = update(jax.random.split(KEY, STEPS)[step], after_one, data(BATCHES[step]))
    assert after_one.num_collected == 1
    points = [ALGORITHM.init(KEY, PARAMS), state, after_one]
    expected = [PARAMS["w"], iterates["w"][-1], ITERATES["w"][4]]

    @jax.jit
    def look(state):
        q = ALGORITHM.posterior(state)
        return q.sample(KEY, 3)["w"], q.log_prob(q.loc), q.kl(PRIOR)

    for point, weights in zip(points, expected, strict=True):
        draws, log_prob, kl = look(point)
        np.testing.assert_allclose(draws, np.tile(weights, (3, 1)), rtol=1e-5)
        assert jnp.isfinite(log_prob) and jnp.isfinite(kl)


# --- what its covariance is -----------------------------------------------------------------------


def test_its_covariance_solves_the_lyapunov_equation_of_sgd():
    """Linear regression, 64 runs of 8,000 steps: within 10% of what the docstring derives.

    The tolerance holds the noise that depends on w, of relative size h N^2 Var(x^2) / (2 B A) = 2%,
    and five standard errors of the estimate.
    """
    rate, batch, rank, every, scale = 3e-4, 4, 20, 50, 1.5
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    hessian = x.T @ x / NOISE**2 + np.eye(3) / scale**2
    mode = np.linalg.solve(hessian, x.T @ y / NOISE**2)
    gradients = x * (x @ mode - y)[:, None] / NOISE**2
    noise = NUM**2 / batch * np.cov(gradients.T, bias=True)
    identity = np.eye(3)
    operator = np.kron(hessian, identity) + np.kron(identity, hessian)
    lyapunov = np.linalg.solve(operator, rate * noise.ravel()).reshape(3, 3)
    operator -= rate * np.kron(hessian, hessian)
    stationary = np.linalg.solve(operator, rate * noise.ravel()).reshape(3, 3)
    size = np.sqrt(np.outer(np.diag(stationary), np.diag(stationary)))
    assert (np.abs(stationary - lyapunov) < 0.05 * size).all()  # the small-h form of Mandt et al.
    # nothing like the posterior's: a method that returned that would fail here
    assert not 0.5 < np.trace(stationary) / np.trace(np.linalg.inv(hessian)) < 2

    start = jnp.float32(mode)
    algorithm = build(
        loglik=lambda key, w, x, y, threat: -0.5 * ((w @ x - y) / NOISE) ** 2,
        leaves=prior.normal(start, scale),
        optimizer=optax.sgd(rate),
        start=500,
        every=every,
        rank=rank,
    )

    @jax.jit
    @jax.vmap
    def chain(key):
        def step(state, key):
            indices = jax.random.randint(key, (batch,), 0, NUM)
            return algorithm.update(key, state, data(indices), THREAT)[0], None

        keys = jax.random.split(key, 8_000)
        return algorithm.posterior(jax.lax.scan(step, algorithm.init(key, start), keys)[0])

    q = chain(jax.random.split(KEY, 64))
    diagonal = 2 * np.mean(np.square(q.scale), axis=0)
    np.testing.assert_allclose(diagonal, np.diag(stationary), rtol=0.1)
    low_rank = np.einsum("cki,ckj->ij", q.deviations, q.deviations) / 64
    expected = rank / (rank - 1) * stationary / 2
    assert (np.abs(low_rank - expected) < 0.1 * size).all()
    np.testing.assert_allclose(np.mean(q.loc, axis=0), mode, atol=0.02)


# --- anatomy --------------------------------------------------------------------------------------

TRACES = []


@jax.jit
def jitted(*args):
    TRACES.append(args)
    return ALGORITHM.update(*args)


def update(key, state, batch, threat=THREAT):
    return jitted(key, state, batch, threat)


def test_many_steps_are_one_trace_and_types_do_not_drift():
    new, _ = update(KEY, STATE, data(BATCHES[0]))
    before = len(TRACES)
    assert before > 0
    for i in range(3):
        threat = Threat(jnp.float32(0.1 * i), jnp.float32(1 - 0.2 * i), jnp.float32(0.1 * i))
        new, _ = update(jax.random.key(i), new, data(BATCHES[i]), threat)
    assert len(TRACES) == before
    start = ALGORITHM.init(KEY, PARAMS)
    kinds = [jax.tree.map(lambda v: str(jax.typeof(v)), tree) for tree in (start, new)]
    assert kinds[0] == kinds[1]
    weak = [jax.tree.map(lambda v: jax.typeof(v).weak_type, tree) for tree in (start, new)]
    assert weak[0] == weak[1]


def test_padding_changes_nothing():
    half = data(BATCHES[0][:3])
    expected, plain = update(KEY, STATE, half)
    for fill in (0.0, 1e3):
        x, y = jnp.full((3, 3), fill), jnp.full(3, -fill)
        padded = Batch(*map(jnp.concatenate, zip(half, (x, y, jnp.zeros(3)), strict=True)))
        found, info = update(KEY, STATE, padded)
        np.testing.assert_allclose(info.loss, plain.loss, rtol=1e-6)
        chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_prepare_is_used():
    """Centring the inputs inside `prepare` is centring the data."""

    def prepare(params, xs):
        return {**params, "b": params["b"] - params["w"] @ xs.mean(axis=0)}

    algorithm = build(prepare=prepare)
    batch = data(BATCHES[0])
    _, info = jax.jit(algorithm.update)(KEY, algorithm.init(KEY, PARAMS), batch, THREAT)
    centred = batch._replace(x=batch.x - batch.x.mean(axis=0))
    _, expected = update(KEY, ALGORITHM.init(KEY, PARAMS), centred)
    np.testing.assert_allclose(info.loss, expected.loss, rtol=1e-5)


def test_a_restored_state_continues():
    """Saved as plain arrays, and taken up by an algorithm on which `init` was never called."""
    leaves, treedef = jax.tree.flatten(STATE)
    restored = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    fresh = build(**SETTINGS)
    found, _ = jax.jit(fresh.update)(KEY, restored, data(BATCHES[0]), THREAT)
    chex.assert_trees_all_equal(found, update(KEY, STATE, data(BATCHES[0]))[0])


def test_it_keeps_float64(float64):
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), PARAMS)
    leaves = {**prior.normal(params, 1.5), "b": None}
    algorithm = build(leaves=leaves, **SETTINGS)
    batch = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), data(BATCHES[0]))
    threat = Threat(*(jnp.float64(v) for v in THREAT))
    state = algorithm.init(KEY, params)
    new, _ = jax.jit(algorithm.update)(KEY, state, batch, threat)
    chex.assert_trees_all_equal_dtypes(state, new)
    q = algorithm.posterior(new)
    assert {leaf.dtype for leaf in jax.tree.leaves(q)} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data = 0"),
        ({"kl_weight": 0.0}, "kl_weight = 0.0"),
        ({"start": -1}, "start = -1"),
        ({"every": 0}, "every = 0"),
        ({"rank": 1}, "rank = 1"),
        ({"rank": -2}, "rank = -2"),
        ({"scale": 0.0}, "scale = 0.0"),
        ({"leaves": dict.fromkeys(PARAMS)}, "no random leaf"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
