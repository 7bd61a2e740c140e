"""Radii: proof below the true one, attacks above it, and the grid where the truth is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert import attack
from bnncert.certify import (
    attacked_radius,
    class_stays,
    decision,
    posterior_radius,
    radius,
    safety,
    statistical,
    statistical_radius,
)
from bnncert.posterior import MeanField, Samples
from bnncert.sets import ball

KEY = jax.random.key(0)
LARGEST, STEPS, SIZE = 1.0, 6, 4
UNIT = LARGEST / 2**STEPS


def linear(w, x):
    return w @ x


def relu(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x)


def true_radius(w, x, p):
    """Of one linear network: the nearest hyperplane between its class and another, dual norm."""
    logits = w @ x
    c = logits.argmax()
    gaps = np.delete(logits[c] - logits, c)
    duals = np.linalg.norm(np.delete(w[c] - w, c, axis=0), {np.inf: 1, 2: 2, 1: np.inf}[p], axis=1)
    return (gaps / duals).min()


@pytest.mark.parametrize("p", [np.inf, 2, 1])
def test_one_linear_network_has_its_radius_up_to_the_grid(p):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, SIZE)).astype(np.float32)
    x = rng.normal(size=(20, SIZE)).astype(np.float32) * 0.3
    found = jax.jit(
        jax.vmap(partial(radius, linear, jnp.asarray(w)[None], largest=LARGEST, steps=STEPS, p=p))
    )(x)
    true = np.array([true_radius(w.astype(np.float64), one, p) for one in x.astype(np.float64)])
    assert (found.predicted == (x @ w.T).argmax(1)).all() and (found.confidence == 1).all()
    assert (found.radius <= true).all()
    assert (found.radius >= np.minimum(true, LARGEST) - 1.05 * UNIT).all()
    assert ((found.radius / UNIT) % 1 == 0).all() and ((found.radius > 0) == found.robust).all()
    assert len(set(found.radius.tolist())) > 5


def test_certified_is_at_most_attacked_and_each_is_what_it_says():
    """On a network of two samples: the certificate holds at the radius, the point is broken."""
    keys = jax.random.split(KEY, 2)
    samples = {
        "w": jax.random.normal(keys[0], (2, 6, SIZE)),
        "v": jax.random.normal(keys[1], (2, 3, 6)),
    }
    xs = jax.random.uniform(jax.random.key(5), (12, SIZE))
    clip = (0.0, 1.0)

    @jax.jit
    @jax.vmap
    def both(x):
        proof = radius(relu, samples, x, largest=LARGEST, steps=STEPS, clip=clip, method="ibp")
        found = attacked_radius(
            KEY, relu, samples, x, proof.predicted, largest=LARGEST, steps=STEPS, clip=clip
        )
        again = decision(relu, samples, ball(x, proof.radius, clip=clip), x=x, method="ibp")
        broken = attack.transfer(relu, samples, found.x[None], proof.predicted).broken
        other = attacked_radius(
            KEY, relu, samples, x, (proof.predicted + 1) % 3, largest=LARGEST, steps=2
        )
        return proof, found, again.robust, broken, other

    proof, found, robust, broken, other = both(xs)
    assert proof.robust.sum() > 5 and found.broken.sum() > 5
    assert (proof.radius < found.radius).all()
    assert (robust | ~proof.robust).all() and (broken == found.broken).all()
    assert ((found.x >= 0) & (found.x <= 1)).all()
    distance = np.abs(found.x - xs).max(1)
    np.testing.assert_allclose(distance[found.broken], found.radius[found.broken])
    assert np.isinf(found.radius[~found.broken]).all() and (distance[~found.broken] == 0).all()
    # A class that is not chosen at the input itself is lost at distance 0.
    assert (other.radius == 0).all() and other.broken.all()


def test_the_statistical_radius_unites_over_the_grid_and_stays_below_the_truth():
    q = MeanField({"w": jnp.array([[2.0], [-2.0]])}, {"w": jnp.full((2, 1), 0.1)})

    def apply(params, x):
        return params["w"] @ x

    x = jnp.array([1.0])

    @jax.jit
    def all_of_it():
        found = statistical_radius(
            KEY, apply, q, x, largest=2.0, steps=5, num_samples=500, method="ibp"
        )
        at = partial(statistical, KEY, apply, q, num_samples=500, method="ibp")
        one = at(ball(x, found.radius)).margins[1]
        together = at(ball(x, found.radius), num_stages=31)
        return found, one, together.margins[1], together.robust

    found, alone, together, robust = all_of_it()
    assert int(found.predicted) == 0 and 0.949 < float(found.confidence) < 0.951
    assert 0.5 < found.radius < 1.0  # the classes tie at x = 0
    # As if one radius alone had been tried, the slack would be smaller.
    assert robust and 0 < together < alone


def test_errors_name_the_fault():
    w, x = jnp.ones((1, 2, SIZE)), jnp.ones(SIZE)
    for message, options in [
        ("largest = 0", {"largest": 0.0}),
        ("largest = inf", {"largest": float("inf")}),
        ("steps = 0", {"largest": 1.0, "steps": 0}),
        ("clip", {"largest": 1.0, "p": 2, "clip": (0.0, 1.0)}),
        ("p = 3", {"largest": 1.0, "p": 3}),
    ]:
        with pytest.raises(ValueError, match=message):
            radius(linear, w, x, **options)
    with pytest.raises(ValueError, match="steps = 30"):
        attacked_radius(KEY, linear, w, x, 0, largest=1.0, steps=30)


def a_posterior(scale):
    keys = jax.random.split(KEY, 2)
    loc = {"w": jax.random.normal(keys[0], (6, SIZE)), "v": jax.random.normal(keys[1], (3, 6))}
    return MeanField(loc, jax.tree.map(lambda leaf: jnp.full(leaf.shape, scale), loc))


@pytest.mark.parametrize("p", [np.inf, 2])
def test_a_radius_under_a_posterior_is_one_that_safety_proves(p):
    q, x = a_posterior(0.02), jax.random.normal(jax.random.key(4), (12, SIZE))
    at = partial(posterior_radius, relu, q, largest=LARGEST, steps=STEPS, p=p)
    found = jax.jit(jax.vmap(at))(x)
    assert found.robust.any() and len(set(found.radius.tolist())) > 4
    for one, r, c in zip(x, found.radius, found.predicted, strict=True):
        rows = class_stays(int(c), 3)
        if r > 0:
            proved = safety(KEY, relu, q, ball(one, r - 1e-6, p=p), rows)
            assert proved.lower >= 0.99
        if r < LARGEST - UNIT:
            beyond = safety(KEY, relu, q, ball(one, r + UNIT + 1e-6, p=p), rows)
            assert beyond.lower <= 0.9901
    # The wider the posterior, the smaller the radius; a larger share of it likewise.
    wider = jax.vmap(partial(posterior_radius, relu, a_posterior(0.1), largest=LARGEST, p=p))(x)
    assert (wider.radius <= found.radius + UNIT).all() and (wider.radius < found.radius).any()
    most = jax.vmap(partial(at, probability=0.9985, delta=1e-4))(x)
    assert (most.radius <= found.radius).all()


def test_what_a_radius_under_a_posterior_refuses():
    q, x = a_posterior(0.1), jnp.zeros(SIZE)
    for probability in (0.0, 0.9995, 1.0):
        with pytest.raises(ValueError, match="probability = "):
            posterior_radius(relu, q, x, largest=1.0, probability=probability)
    with pytest.raises(TypeError, match="Samples"):
        posterior_radius(relu, Samples(q.sample(KEY, 2)), x, largest=1.0)
    assert not posterior_radius(relu, q, x, largest=1.0).robust  # all logits are 0


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_logit_of_two_classes_under_a_posterior(shape):
    """z stands for (0, z): it loses its sign at x = 0, one unit away."""
    q = MeanField({"w": jnp.ones(1)}, {"w": jnp.full(1, 0.01)})

    def one(p, x):
        return (p["w"] @ x).reshape(shape)

    def two(p, x):
        return jnp.stack([jnp.zeros(()), p["w"] @ x])

    for at in (1.0, -1.0):
        found = [posterior_radius(f, q, jnp.full(1, at), largest=4.0) for f in (one, two)]
        assert [int(f.predicted) for f in found] == [int(at > 0)] * 2
        assert found[0].radius == found[1].radius and 0.9 < float(found[0].radius) < 1
