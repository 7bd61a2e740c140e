"""Ensembles: every member is the run it would have been alone, whatever the method."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import prior
from bnncert.infer import ensemble, svi, swag
from bnncert.infer import map as maximum
from bnncert.posterior import LowRank, MeanField, Mixture, Samples
from bnncert.types import Algorithm, Batch, Threat

NUM, BATCH, MEMBERS, STEPS = 20, 8, 3, 6
KEY = jax.random.key(0)
KEYS = jax.random.split(jax.random.key(1), 3)
X, Y = jax.random.normal(KEYS[0], (NUM, 3)), jax.random.normal(KEYS[1], (NUM,))
THREATS = Threat(0.01 * jnp.arange(STEPS), jnp.ones(STEPS), jnp.zeros(STEPS))
INDICES = jax.random.randint(KEYS[2], (STEPS, BATCH), 0, NUM)


def initialise(key):
    first, second = jax.random.split(key)
    return {"w": jax.random.normal(first, (4, 3)), "v": jax.random.normal(second, (4,))}


STARTS = jax.vmap(initialise)(jax.random.split(jax.random.key(2), MEMBERS))
PRIOR = prior.normal(initialise(KEY), 0.8)


def gaussian(key, params, x, y, threat):
    """Noisy, so that keys count, and of the whole threat."""
    noise = 0.1 * jax.random.normal(key)
    return -0.5 * (jnp.abs(params["v"] @ jnp.tanh(params["w"] @ x) - y + noise) + threat.eps) ** 2


SETTINGS: dict[str, Any] = {"num_data": NUM, "optimizer": optax.adam(0.05)}
SINGLE: dict[str, Algorithm] = {
    "map": maximum.build(gaussian, PRIOR, **SETTINGS),
    "svi": svi.build(gaussian, PRIOR, **SETTINGS),
    "swag": swag.build(gaussian, {**PRIOR, "v": None}, **SETTINGS, rank=2),
}


def run(algorithm, state, keys):
    """Final state and all infos; member k of K has the k-th of a split of each step's key."""

    def step(state, inputs):
        key, indices, threat = inputs
        batch = Batch(X[indices], Y[indices], jnp.ones(BATCH))
        return algorithm.update(key, state, batch, threat)

    return jax.lax.scan(step, state, (keys, INDICES, THREATS))


STEP_KEYS = jax.random.split(jax.random.key(3), STEPS)


@pytest.fixture(scope="module", params=list(SINGLE))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def alone(name):
    """The members' posteriors and infos, run one by one."""
    algorithm = SINGLE[name]

    @jax.jit
    def one(init_key, keys, start):
        state, infos = run(algorithm, algorithm.init(init_key, start), keys)
        return algorithm.posterior(state), infos

    init_keys = jax.random.split(KEY, MEMBERS)
    step_keys = [jax.random.split(key, MEMBERS) for key in STEP_KEYS]
    return [
        one(
            init_keys[k],
            jnp.stack([keys[k] for keys in step_keys]),
            jax.tree.map(lambda leaf, k=k: leaf[k], STARTS),
        )
        for k in range(MEMBERS)
    ]


@pytest.fixture(scope="module", params=[True, False], ids=["vmapped", "unrolled"])
def together(name, request):
    algorithm = ensemble.build(SINGLE[name], MEMBERS, vectorize=request.param)

    @jax.jit
    def all_of_them(starts):
        state, infos = run(algorithm, algorithm.init(KEY, starts), STEP_KEYS)
        return algorithm.posterior(state), infos

    return all_of_them(STARTS)


def test_members_are_the_runs_they_would_have_been_alone(name, alone, together):
    found, infos = together
    members = [posterior for posterior, _ in alone]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    if name == "map":
        assert isinstance(found, Samples) and found.num_samples == MEMBERS
        expected = jax.tree.map(lambda leaf: leaf[:, 0], stacked.params)
        chex.assert_trees_all_close(found.params, expected, rtol=1e-5, atol=1e-5)
        assert not np.allclose(expected["w"][0], expected["w"][1], atol=0.1)  # they differ
    else:
        assert isinstance(found, Mixture) and found.num_members == MEMBERS
        assert isinstance(found.members, MeanField if name == "svi" else LowRank)
        chex.assert_trees_all_close(found.members, stacked, rtol=1e-5, atol=1e-5)
        draws = jax.jit(found.sample, static_argnums=1)(KEY, MEMBERS)  # MultiSWAG: one of each
        distance = jnp.abs(draws["v"][:, None] - stacked.loc["v"]).sum(axis=-1)
        assert sorted(distance.argmin(axis=1).tolist()) == list(range(MEMBERS))
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(infos for _, infos in alone))
    assert type(infos) is type(alone[0][1])
    chex.assert_trees_all_close(infos, mean, rtol=1e-5)


def test_a_function_starts_each_member_from_its_own_key():
    algorithm: Any = ensemble.build(SINGLE["map"], MEMBERS)
    found = algorithm.posterior(algorithm.init(KEY, initialise)).params
    keys = [jax.random.split(key)[0] for key in jax.random.split(KEY, MEMBERS)]
    expected = jax.vmap(initialise)(jnp.stack(keys))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    unrolled: Any = ensemble.build(SINGLE["map"], MEMBERS, vectorize=False)
    chex.assert_trees_all_close(
        unrolled.posterior(unrolled.init(KEY, initialise)).params, expected, rtol=1e-6
    )


@pytest.mark.parametrize("vectorize", [True, False])
def test_many_steps_are_one_trace_and_types_do_not_drift(vectorize):
    algorithm = ensemble.build(SINGLE["svi"], 2, vectorize=vectorize)
    state = start = algorithm.init(KEY, jax.tree.map(lambda leaf: leaf[:2], STARTS))
    traces = []

    @jax.jit
    def update(*args):
        traces.append(args)
        return algorithm.update(*args)

    batch = Batch(X[:BATCH], Y[:BATCH], jnp.ones(BATCH))
    for i in range(3):
        threat = jax.tree.map(lambda leaf, i=i: leaf[i], THREATS)
        state, _ = update(jax.random.key(i), state, batch, threat)
    assert len(traces) == 1
    for kind in (lambda v: str(jax.typeof(v)), lambda v: jax.typeof(v).weak_type):
        assert jax.tree.map(kind, start) == jax.tree.map(kind, state)


def test_bad_input():
    with pytest.raises(ValueError, match="num_members = 0"):
        ensemble.build(SINGLE["map"], 0)
    algorithm = ensemble.build(SINGLE["map"], 4)
    with pytest.raises(ValueError, match=r"leaf 'v' has shape \(3, 4\): stack the params of 4"):
        algorithm.init(KEY, STARTS)
    with pytest.raises(ValueError, match=r"leaf 'b' has shape \(\)"):
        algorithm.init(KEY, {"b": jnp.zeros(())})
