"""APGD: in its set, exact where a closed form exists, at rest where fixed steps never are."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert import attack
from bnncert.sets import ball
from tests.attack.networks import BATCH, SIZE, chosen, clean_margins, linear, mlp, mlp_samples

ATTACKS = {
    "ce": partial(attack.apgd, loss="ce"),
    "dlr": partial(attack.apgd, loss="dlr"),
    "targeted": attack.targeted_apgd,
}
XS = jax.random.uniform(jax.random.key(1), (BATCH, SIZE))
USUAL: dict[str, Any] = {"clip": (0.0, 1.0), "restarts": 2, "steps": 8}


@cache  # compiling is what costs: cases with the same options share it
def batched(name, apply=mlp, **options):
    @jax.jit
    def run(key, samples, xs, ys, eps):
        one = partial(ATTACKS[name], **options)
        keys = jax.random.split(key, len(xs))
        return jax.vmap(lambda k, x, y: one(k, apply, samples, x, y, eps))(keys, xs, ys)

    return run


@pytest.mark.parametrize(("name", "p"), [("ce", jnp.inf), ("dlr", 2), ("targeted", jnp.inf)])
def test_stays_in_the_set_and_never_beats_the_clean_margin(name, p):
    samples, eps, clip = mlp_samples(), 0.3, (0.0, 1.0)
    ys = chosen(mlp, samples, XS)
    run = batched(name, p=p, **USUAL)
    found = run(jax.random.key(2), samples, XS, ys, eps)
    if p == jnp.inf:
        box: Any = jax.vmap(lambda x: ball(x, jnp.float32(eps), clip=clip))(XS)
        assert (found.x >= box.lower).all() and (found.x <= box.upper).all()
    else:
        distance = np.linalg.norm(np.asarray(found.x, np.float64) - np.asarray(XS), axis=1)
        assert (distance <= eps + 2 * np.finfo(np.float32).eps).all()
        assert (found.x >= 0).all() and (found.x <= 1).all()
    clean = clean_margins(mlp, samples, XS, ys)
    assert (found.margin <= clean + 1e-5).all()
    assert (found.margin < clean - 0.05).mean() > 0.9  # and it does attack
    there = clean_margins(mlp, samples, found.x, ys)
    np.testing.assert_allclose(found.margin, there, atol=1e-5)
    again = run(jax.random.key(2), samples, XS, ys, eps)
    np.testing.assert_array_equal(found.x, again.x)
    still = run(jax.random.key(2), samples, XS, ys, 0.0)
    np.testing.assert_array_equal(still.x, XS)


@pytest.mark.parametrize(
    ("name", "p"), [("ce", jnp.inf), ("ce", 2), ("dlr", jnp.inf), ("targeted", 2)]
)
def test_a_linear_network_of_two_classes_is_attacked_at_its_optimum(name, p):
    w = jax.random.normal(jax.random.key(4), (1, 2, SIZE))
    samples, a, eps = {"w": w, "b": jnp.array([[3.0, 0.0]])}, w[0, 0] - w[0, 1], 0.2
    found = batched(name, linear, p=p)(jax.random.key(5), samples, XS, jnp.zeros(BATCH, int), eps)
    dual = jnp.abs(a).sum() if p == jnp.inf else jnp.linalg.norm(a)
    np.testing.assert_allclose(found.margin, XS @ a + 3.0 - eps * dual, rtol=1e-5, atol=2e-5)


def test_the_targeted_attack_finds_the_best_of_all_rivals():
    """Linear, five classes: the least margin over the ball is a minimum of four closed forms."""
    w = jax.random.normal(jax.random.key(6), (1, 5, SIZE))
    samples, eps = {"w": w, "b": jnp.zeros((1, 5))}, 0.4
    ys = jnp.argmax(XS @ w[0].T, axis=1)
    found = batched("targeted", linear)(jax.random.key(5), samples, XS, ys, eps)
    a = w[0, ys][:, None] - w[0][None]  # (batch, rival, SIZE)
    each = jnp.einsum("ns,nrs->nr", XS, a) - eps * jnp.abs(a).sum(-1)
    each = jnp.where(jnp.arange(5) == ys[:, None], jnp.inf, each)
    # the ratio's best point is near the difference's, not at it
    assert (found.margin >= each.min(1) - 1e-5).all()
    np.testing.assert_allclose(found.margin, each.min(1), atol=0.1)
    # the nearest rival at the clean input is not always the best one: it takes all targets
    one = batched("targeted", linear, num_targets=1)(jax.random.key(5), samples, XS, ys, eps)
    assert (one.margin > found.margin + 0.1).any()
    assert (one.margin >= found.margin - 1e-5).all()


def test_comes_to_rest_in_a_valley_that_fixed_steps_jump_over():
    """Margin |x - 0.3125| - 0.01 in [-1, 1]: steps of 1/40 from 0 land 1/80 away on either side."""

    def apply(params, x):
        return params * jnp.array([jnp.abs(x[0] - 0.3125) - 0.01, 0.0])

    @jax.jit
    def run(key):
        problem = apply, jnp.ones((1, 1)), jnp.zeros(1), 0, 1.0
        attacks = (attack.pgd, ATTACKS["ce"], ATTACKS["dlr"])
        return [one(key, *problem, steps=100) for one in attacks]

    fixed, *others = run(jax.random.key(0))
    np.testing.assert_allclose(fixed.margin, 1 / 80 - 0.01, atol=1e-6)
    for found in others:
        assert found.broken and not fixed.broken
        assert jnp.abs(found.x[0] - 0.3125) < 0.01


@pytest.mark.parametrize("name", ["ce", "targeted"])
def test_steep_networks_are_attacked_as_others_are(name):
    """Logits times 1e3: probabilities are 0 and 1 in float32."""
    samples = mlp_samples()
    steep = {**samples, "v": 1e3 * samples["v"], "b": 1e3 * samples["b"]}
    ys = chosen(mlp, steep, XS)
    run = batched(name, p=jnp.inf, **USUAL)
    found = run(jax.random.key(7), steep, XS, ys, 0.3)
    plain = run(jax.random.key(7), samples, XS, ys, 0.3)
    assert jnp.isfinite(found.x).all() and jnp.isfinite(found.margin).all()
    assert plain.broken.mean() > 0.5
    assert found.broken.mean() >= plain.broken.mean() - 0.2


def test_more_restarts_only_add_candidates():
    samples = mlp_samples()
    ys = chosen(mlp, samples, XS)
    one, two = (
        batched("ce", p=jnp.inf, **{**USUAL, "restarts": n})(
            jax.random.key(8), samples, XS, ys, 0.4
        ).margin
        for n in (1, 2)
    )
    assert (two <= one + 1e-6).all() and (two < one - 1e-3).any()


def test_an_undefined_gradient_is_no_step_and_no_success():
    """The norm's gradient at 0 is NaN, its value is not."""

    def apply(params, x):
        return params * jnp.array([1.0 - jnp.linalg.norm(x), 0.0])

    @jax.jit
    def run(key):
        problem = apply, jnp.ones((1, 2)), jnp.zeros(3), 0, 0.1
        return [attack.apgd(key, *problem, steps=5, restarts=n) for n in (1, 2)]

    still, found = run(jax.random.key(9))
    np.testing.assert_array_equal(still.x, 0.0)
    assert not still.broken and still.margin == 1
    np.testing.assert_allclose(found.margin, 1 - 0.1 * np.sqrt(3), rtol=1e-6)


def test_bad_arguments_are_named():
    problem = jax.random.key(0), mlp, mlp_samples(), jnp.zeros(SIZE), 0, 0.1
    with pytest.raises(ValueError, match=r"loss = 'hinge': choose one of ce, dlr"):
        attack.apgd(*problem, loss="hinge")
    with pytest.raises(ValueError, match=r"num_targets = 3: choose 1\.\.2"):
        attack.targeted_apgd(*problem, num_targets=3)
    with pytest.raises(ValueError, match="steps = 0"):
        attack.apgd(*problem, steps=0)
    with pytest.raises(ValueError, match=r"p = 1: choose"):
        attack.targeted_apgd(*problem, p=1)
