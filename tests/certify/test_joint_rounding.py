"""Joint certificates hold for the float32 predictor: in any order of sums, and exactly as well."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.certify import joint_decision
from bnncert.certify.exact.joint import ANCHORS, corner_terms
from bnncert.sets import Box, LpBall

pytestmark = pytest.mark.slow


def one_sum(w, x):
    return jnp.stack([w @ x, jnp.zeros(())])


CANCELLING = (
    (
        [-59947.765625, -24114.58203125, 8210.525390625, 52484.72265625, 37901.92578125],
        [1.3044649362564087, 0.748953104019165, 1.2999812364578247, 0.5576988458633423,
         1.4858413934707642],
    ),
    (
        [5237.1591796875, -6515.01220703125, -1267.6483154296875, -1787.6419677734375,
         3371.4384765625],
        [0.7442758679389954, 0.8708288669586182, 1.0988036394119263, 1.0252022743225098,
         1.4833908081054688],
    ),
)  # fmt: skip


def in_every_order(w, x):
    """Sums of the products in float32, and the exact one to double precision."""
    products = np.asarray(w) * np.asarray(x)
    sums = [float(one_sum(w, x)[0]), float(jax.jit(one_sum)(w, x)[0])]
    for order in itertools.permutations(range(len(x))):
        total = np.float32(0)
        for i in order:
            total += products[i]
        sums.append(float(total))
    return np.array([*sums, float(np.asarray(w, np.float64) @ np.asarray(x, np.float64))])


def test_a_class_that_another_order_of_the_same_sum_does_not_choose_is_not_certified():
    certify = {
        r: jax.jit(partial(joint_decision, one_sum, rounding=r)) for r in ("nearest", "outward")
    }
    for numbers in CANCELLING:
        w, x = map(jnp.float32, numbers)
        sums = in_every_order(w, x)
        assert sums.min() < 0 < sums.max()
        differences = np.tanh(sums / 2)  # of the two probabilities
        for rounding, found in certify.items():
            decision = found(w[None], Box(x, x))
            c = int(decision.predicted)
            least = (differences if c == 0 else -differences).min()
            assert (decision.margins[1 - c] <= least) == (rounding == "outward")


# --- networks whose logits cancel -----------------------------------------------------------------

INPUTS, WIDTH, CLASSES, NETWORKS = 5, 6, 5, 40


def mlp(params, x):
    w, v = params
    return v @ jax.nn.relu(w @ x)


def averaged(samples, x):
    return jax.vmap(lambda params: jax.nn.softmax(mlp(params, x)))(samples).mean(0)


def cancelling(rng, count):
    """Posteriors of `count` samples; logits of order one are sums of far larger terms."""
    x = rng.uniform(0.5, 1.5, (NETWORKS, INPUTS)).astype(np.float32)
    w = np.float32(rng.normal(size=(NETWORKS, count, WIDTH, INPUTS)))
    hidden = np.maximum(np.einsum("nshi,ni->nsh", w, x), 0)
    size = 10 ** rng.uniform(2, 5, (NETWORKS, 1, 1, 1))
    v = rng.normal(size=(NETWORKS, count, CLASSES, WIDTH))
    along = np.einsum("nsch,nsh->nsc", v, hidden)[..., None] * hidden[:, :, None]
    v = v - along / np.maximum((hidden**2).sum(-1), 1e-9)[..., None, None]
    logits = 0.05 * rng.normal(size=(NETWORKS, count, CLASSES, 1))
    v = size * v + logits * hidden[:, :, None] / np.maximum((hidden**2).sum(-1), 1)[..., None, None]
    return (w, np.float32(v)), x


REGIONS = {
    "box": lambda x, eps: Box(x - eps, x + eps),
    "l1": lambda x, eps: LpBall(x, eps, 1),
    "l2": lambda x, eps: LpBall(x, eps, 2),
}


def points_of(name, rng, x, eps):
    """Float32 points of the set: its centre, its corners, and inside."""
    step = rng.uniform(-1, 1, (20, INPUTS)) if name == "l2" else np.eye(INPUTS)[np.arange(20) % 5]
    if name == "box":
        step = rng.choice([-1.0, 1.0, 0.3], (20, INPUTS))
    size = {"box": 1.0, "l1": 1.0, "l2": np.linalg.norm(step, axis=1, keepdims=True)}[name]
    step = step / size * rng.choice([-0.99, 0.99], (20, 1))
    moved = np.asarray(x[:, None] + eps[:, None, None] * step, np.float32)
    centre = np.broadcast_to(x[:, None], moved.shape)
    return np.where(eps[:, None, None] > 0, moved, centre)


@pytest.mark.parametrize(("name", "count"), [("box", 2), ("l1", 1), ("l2", 8)])
def test_margins_are_below_those_of_cancelling_networks_however_they_are_computed(name, count):
    rng = np.random.default_rng(count)
    samples, x = cancelling(rng, count)
    eps = rng.choice([0.0, 1e-6, 1e-5, 1e-3], NETWORKS).astype(np.float32)

    def certify(samples, x, eps):
        region = REGIONS[name](x, eps)
        # One by "nearest" shows that these networks do find what rounding cuts.
        other = [joint_decision(mlp, samples, region, rounding="nearest")] if name == "l1" else []
        return joint_decision(mlp, samples, region), other

    outward, nearest = jax.jit(jax.vmap(certify))(samples, x, eps)
    points = points_of(name, rng, x, eps)
    compiled = jax.jit(jax.vmap(jax.vmap(averaged, (None, 0))))(samples, points)
    w, v = map(np.asarray, samples)
    reversed_ = (w[:, :, ::-1, ::-1], v[..., ::-1])
    backwards = jax.vmap(jax.vmap(averaged, (None, 0)))(reversed_, points[..., ::-1])
    with jax.enable_x64(True):
        wide = [np.asarray(leaf, np.float64) for leaf in (*samples, points)]
        exact = jax.jit(jax.vmap(jax.vmap(averaged, (None, 0))))((wide[0], wide[1]), wide[2])
        exact = np.asarray(exact)
    c = np.asarray(outward.predicted)
    violations = 0
    for pi in (compiled, backwards, exact):
        pi = np.asarray(pi)
        won = np.take_along_axis(pi, c[:, None, None], -1) - pi
        least = won.min(1)
        assert (np.asarray(outward.margins) <= least).all()
        violations += sum((np.asarray(cut.margins) > least).sum() for cut in nearest)
    assert (violations > 0) == (name == "l1")
    assert (outward.margins > -0.9).any()


# --- the form at the worst corner -----------------------------------------------------------------


def exact_bound(terms, m):
    """What computed terms say of margins m, in double precision."""
    a, b, at, value, shift, weight = (np.asarray(term, np.float64)[:, None] for term in terms)
    powers = np.exp(m - shift)
    return a * (weight * powers).sum(-1, keepdims=True) + b * (powers - at) + value


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 8.0, 60.0, 1e4])
def test_computed_corner_terms_are_below_exact_differences(dtype, scale):
    rng = np.random.default_rng(0)
    classes = 5
    middle = rng.normal(size=(300, 1, classes)) * rng.choice([0.0, 1.0, scale], (300, 1, 1))
    ends = np.sort(middle + scale * rng.normal(size=(300, 2, classes)), axis=1).astype(dtype)
    ends[:, :, 0] = 0.0
    low, high = ends[:, 0].astype(np.float64), ends[:, 1].astype(np.float64)
    part = np.concatenate([rng.uniform(size=(100, classes)), rng.integers(0, 2, (100, classes))])
    m = low[:, None] + part * (high - low)[:, None]
    powers = np.exp(m - m.max(-1, keepdims=True))
    p = powers / powers.sum(-1, keepdims=True)
    exact = p[..., :1] - p
    boxes = Box(jnp.asarray(ends[:, 0]), jnp.asarray(ends[:, 1]))
    for anchor in ANCHORS:
        terms = jax.jit(jax.vmap(partial(corner_terms, anchor=anchor, rounding="outward")))(boxes)
        assert all(leaf.dtype == dtype for leaf in terms)
        assert (exact_bound(terms, m) <= exact).all()


@pytest.mark.parametrize("end", [np.inf, 3e38, 80.0])
def test_bounds_that_overflow_leave_the_separate_form(end):
    box = Box(jnp.float32([0, -end, -1.0]), jnp.float32([0, end, -0.5]))
    terms = corner_terms(box, 0.5, "outward")
    assert all(np.isfinite(leaf).all() for leaf in terms)
    assert (np.asarray(terms.a) == 0).all() and (np.asarray(terms.b) == 0).all()
    assert terms.value[0] == 0 and terms.value[1] < -0.99


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e-30), ("float32", 1e18), ("float16", 1)])
def test_networks_of_any_magnitude(dtype, size):
    rng = np.random.default_rng(1)
    (w, v), x = cancelling(rng, 2)
    samples = jnp.asarray(w, dtype), jnp.asarray(size * v / np.abs(v).max(), dtype)
    x = jnp.asarray(x, dtype)
    found = jax.jit(
        jax.vmap(lambda s, x: joint_decision(mlp, s, Box(x, x + jnp.asarray(1e-3, dtype)), x=x))
    )(samples, x)
    pi = np.asarray(jax.jit(jax.vmap(averaged))(samples, x))
    won = np.take_along_axis(pi, np.asarray(found.predicted)[:, None], -1) - pi
    assert (np.asarray(found.margins) <= won).all()
    assert found.arithmetic == dtype and not np.isnan(found.margins).any()
