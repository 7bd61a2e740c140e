"""One adversarial input for all samples: never less than one for each, and true at every point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert import attack
from bnncert.certify import decision, joint_decision
from bnncert.certify.exact.joint import corner_bound, corner_terms
from bnncert.certify.exact.softmax import least_differences
from bnncert.sets import Box, LpBall, ball

KEY = jax.random.key(0)
SIZE, WIDTH, CLASSES, SAMPLES = 4, 6, 3, 3


def differences(margins):
    p = jax.nn.softmax(margins)
    return p[0] - p


def random_box(rng, scale):
    ends = np.sort(scale * rng.normal(size=(2, 5)) - 0.5, axis=0)
    ends[:, 0] = 0.0  # the margin of the predicted class against itself
    return Box(*jnp.asarray(ends, jnp.float32))


@pytest.mark.parametrize("scale", [0.3, 1.5, 4.0])
def test_corner_terms_are_below_and_meet_the_exact_minimum(scale):
    rng = np.random.default_rng(0)
    below = jax.jit(lambda m, terms: corner_bound(terms, m))
    for _ in range(10):
        box = random_box(rng, scale)
        # Corners too: there the minimum is.
        inside = np.concatenate([rng.uniform(size=(200, 5)), rng.integers(0, 2, (200, 5))])
        points = jnp.float32(box.lower + inside * (box.upper - box.lower))
        exact = jax.vmap(differences)(points)
        for anchor in (0.0, 0.5, 1.0):
            found = jax.vmap(below, (0, None))(points, corner_terms(box, anchor))
            assert np.all(found <= exact + 1e-5), anchor
        # At u, or where u_j > 0 at u_j and the other l, the last is the minimum itself.
        terms = corner_terms(box, 1.0)
        least = least_differences(box)
        assert np.all(least <= exact.min(0) + 1e-6)
        for j in range(1, 5):
            others = box.lower if box.upper[j] > 0 else box.upper
            worst = others.at[j].set(box.upper[j]).at[0].set(0.0)
            np.testing.assert_allclose(differences(worst)[j], least[j], atol=1e-5)
            np.testing.assert_allclose(below(worst, terms)[j], least[j], atol=1e-5)


def mlp(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x) + params["b"]


SHAPES = {"w": (WIDTH, SIZE), "v": (CLASSES, WIDTH), "b": (CLASSES,)}
NETWORKS = {
    name: jax.random.normal(key, (SAMPLES, *shape))
    for key, (name, shape) in zip(jax.random.split(KEY, 3), SHAPES.items(), strict=True)
}
XS = jax.random.normal(jax.random.key(1), (8, SIZE))


@jax.jit
def certified(eps):
    def one(x):
        here = ball(x, eps)
        return [
            (
                joint_decision(mlp, NETWORKS, here, rounding=rounding),
                decision(mlp, NETWORKS, here, method="crown", rounding=rounding),
            )
            for rounding in ("outward", "nearest")
        ]

    return jax.vmap(one)(XS)


def averaged(x):
    return jax.vmap(lambda p: jax.nn.softmax(mlp(p, x)))(NETWORKS).mean(0)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
def test_it_is_true_at_every_point_and_never_less_than_the_separate_form(eps):
    (outward, alone), (joint, separate) = certified(jnp.float32(eps))
    assert (joint.margins >= separate.margins).all()
    assert (outward.margins >= alone.margins).all()
    assert (joint.arithmetic, outward.arithmetic) == ("real", "float32")
    rng = np.random.default_rng(0)
    unit = np.concatenate([rng.uniform(-1, 1, (300, SIZE)), rng.choice([-1, 1], (100, SIZE))])
    for i, x in enumerate(XS):
        attacked = attack.pgd(KEY, mlp, NETWORKS, x, joint.predicted[i], eps, steps=30).x
        points = jnp.concatenate([x + jnp.float32(0.9999 * eps * unit), attacked[None]])
        pi = np.asarray(jax.vmap(averaged)(points))
        c = int(joint.predicted[i])
        others = np.arange(CLASSES) != c
        least = (pi[:, [c]] - pi).min(0)
        assert (np.asarray(joint.margins[i])[others] <= least[others] + 1e-5).all()
        assert (np.asarray(outward.margins[i])[others] <= least[others]).all()
        if eps == 0:
            np.testing.assert_allclose(joint.margins[i], pi[0, c] - pi[0], atol=1e-5)
    if eps == 0.3:  # what it is for
        for found, other in ((joint, separate), (outward, alone)):
            assert ((found.margins - other.margins).max(1) > 1e-3).sum() >= 3


def test_members_that_fail_at_opposite_inputs_are_certified_together_alone():
    """Each member errs on one side of the set, never both at once."""

    def apply(w, x):
        return jnp.stack([jnp.zeros(()), (w * x).sum() - 1.0])

    samples, region = jnp.array([[3.0], [-3.0]]), Box(jnp.array([-1.0]), jnp.array([1.0]))
    joint = joint_decision(apply, samples, region)
    separate = decision(apply, samples, region, method="crown", rounding="nearest")
    assert int(joint.predicted) == 0
    assert float(separate.margins[1]) < -0.7
    xs = jnp.linspace(-1, 1, 101)[:, None]
    pi = jax.vmap(lambda x: jax.vmap(lambda w: jax.nn.softmax(apply(w, x)))(samples).mean(0))(xs)
    assert float(separate.margins[1]) + 0.1 < float(joint.margins[1]) <= (pi[:, 0] - pi[:, 1]).min()


def test_balls_and_infinite_bounds():
    x = XS[0]
    inner = joint_decision(mlp, NETWORKS, LpBall(x, jnp.float32(0.2), 2))
    outer = joint_decision(mlp, NETWORKS, ball(x, 0.2))
    assert (inner.margins >= outer.margins - 1e-5).all()
    huge = joint_decision(mlp, jax.tree.map(lambda v: 1e20 * v, NETWORKS), ball(x, 0.2))
    assert not bool(huge.robust) and not bool(jnp.isnan(huge.margins).any())
