"""Bounds on the posterior predictive: true at every point, and exact where they can be."""

import itertools
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import attack, likelihood, prior
from bnncert.certify import Decision, decision, predictive
from bnncert.certify.inputs import num_samples
from bnncert.infer import svi
from bnncert.sets import Box, LpBall, ball
from bnncert.types import Batch, Threat

SIZE, WIDTH, CLASSES, BATCH = 4, 6, 3, 5
KEY = jax.random.key(0)


def mlp(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x + params["c"]) + params["b"]


def network(key, count):
    """Stacked weights that differ from one another by a tenth."""
    shapes = {"w": (WIDTH, SIZE), "c": (WIDTH,), "v": (CLASSES, WIDTH), "b": (CLASSES,)}
    keys = jax.random.split(key, 2 * len(shapes))
    return {
        name: jax.random.normal(keys[2 * i], shape)
        + 0.3 * jax.random.normal(keys[2 * i + 1], (count, *shape))
        for i, (name, shape) in enumerate(shapes.items())
    }


def average(apply, samples, x):
    """The deployed predictor, by its definition."""
    return jax.vmap(lambda params: jax.nn.softmax(apply(params, x)))(samples).mean(axis=0)


at_points = jax.jit(jax.vmap(partial(average, mlp), in_axes=(None, 0)))
XS = jax.random.uniform(jax.random.key(1), (BATCH, SIZE))


@cache  # compiling is what costs: cases with the same options share it
def decide(**options):
    """Decisions and predictive bounds on a batch of sets, with their nominal inputs."""

    def one(samples, box, x):
        return (
            decision(mlp, samples, box, x=x, **options),
            predictive(mlp, samples, box, **options),
        )

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))


def boxes(xs, eps, clip=None):
    return jax.vmap(lambda x: ball(x, jnp.float32(eps), clip=clip))(xs)


@cache
def attacker(clip):
    def one(samples, x, y, eps):
        return attack.pgd(KEY, mlp, samples, x, y, eps, steps=15, restarts=2, clip=clip)

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))


def points_of(box, extra=()):
    """Corners, points inside, and those given."""
    ends = np.array([box.lower, box.upper])
    corners = np.array(list(itertools.product(*ends.T)), np.float32)
    inside = np.random.default_rng(0).uniform(ends[0], ends[1], (400, SIZE)).astype(np.float32)
    return jnp.concatenate([corners, inside, *extra])


# --- proofs ---------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("count", [1, 3, 8])
def test_holds_at_random_corner_and_attacked_points_of_the_averaged_predictive(count):
    samples, clip = network(jax.random.key(2), count), (0.0, 1.0)
    seen = []
    for eps in (0.03, 0.3):
        sets = boxes(XS, eps, clip)
        nominal = at_points(samples, XS).argmax(axis=1)
        attacked = attacker(clip)(samples, XS, nominal, jnp.float32(eps))
        for method in ("ibp", "crown") if count == 3 else ("ibp",):
            found, probs = decide(method=method)(samples, sets, XS)
            np.testing.assert_array_equal(found.predicted, nominal)
            for i, c in enumerate(nominal):
                box = jax.tree.map(lambda end, i=i: end[i], sets)
                pi = at_points(samples, points_of(box, [attacked.x[i][None]]))
                differences = (pi[:, c, None] - pi).min(axis=0)
                # Computed in float32, and no tolerance: bounds are rounded outward.
                assert (found.margins[i] <= differences).all()
                assert (found.probability.lower[i] <= pi[:, c]).all()
                assert (pi[:, c] <= found.probability.upper[i]).all()
                assert (probs.lower[i] <= pi).all() and (pi <= probs.upper[i]).all()
                if found.robust[i]:
                    assert (pi.argmax(axis=1) == c).all() and not attacked.broken[i]
            seen.extend(found.robust.tolist())
    assert any(seen) and not all(seen)  # both answers were tested


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_a_set_of_one_point_gives_the_predictive_itself(method):
    samples = network(jax.random.key(2), 3)
    found, probs = decide(method=method, rounding="nearest")(samples, Box(XS, XS), XS)
    pi = at_points(samples, XS)
    np.testing.assert_allclose(probs.lower, pi, atol=1e-6)
    np.testing.assert_allclose(probs.upper, pi, atol=1e-6)
    top = pi.max(axis=1)
    np.testing.assert_allclose(found.probability.lower, top, atol=1e-6)
    np.testing.assert_allclose(found.probability.upper, top, atol=1e-6)
    np.testing.assert_allclose(found.margins, top[:, None] - pi, atol=1e-6)
    assert found.robust.all()


def test_a_tie_is_not_robust():
    """The winner has to be strict: at 0 the two classes are equally probable."""
    found = decision(lambda w, x: w * x, jnp.ones((2, 2)), Box(jnp.zeros(1), jnp.zeros(1)))
    assert not found.robust and (found.margins <= 0).all()


def test_difference_of_probabilities_is_exact_over_independent_margins():
    """With logits (0, x_1, ..., x_k) the margins fill their box: its corners hold the minimum."""

    def independent(w, x):
        return w * jnp.concatenate([jnp.zeros(1), x])

    one = jnp.ones((1, 1))
    run = jax.jit(lambda x, box: decision(independent, one, box, x=x, rounding="nearest"))
    rng = np.random.default_rng(1)
    signs = set()
    for _ in range(20):
        center = rng.uniform(-3, 0, SIZE)
        radius = rng.uniform(0.1, 3, SIZE)
        box = Box(jnp.float32(center - radius), jnp.float32(center + radius))
        found = run(jnp.float32(center), box)
        assert found.predicted == 0
        corners = np.array(list(itertools.product(*zip(box.lower, box.upper, strict=True))))
        logits = np.concatenate([np.zeros((len(corners), 1)), corners], axis=1)
        pi = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.margins, (pi[:, :1] - pi).min(axis=0), atol=1e-6)
        np.testing.assert_allclose(found.probability.lower, pi[:, 0].min(), rtol=1e-5)
        np.testing.assert_allclose(found.probability.upper, pi[:, 0].max(), rtol=1e-5)
        signs |= set(np.sign(np.array(box.upper)).tolist())
    assert signs == {-1.0, 1.0}  # rivals that can win, and rivals that cannot


def test_differences_certify_more_than_probabilities_do():
    """pi_c - pi_j is bounded as one function: never below the gap of the two bounds."""
    samples = network(jax.random.key(2), 3)
    found, probs = decide(method="ibp")(samples, boxes(XS, 0.2), XS)
    rows = jnp.arange(BATCH)
    gap = probs.lower[rows, found.predicted][:, None] - probs.upper
    rival = ~jax.nn.one_hot(found.predicted, CLASSES, dtype=bool)
    assert (found.margins >= gap - 1e-6)[rival].all()
    assert (found.margins > gap + 0.1)[rival].any()
    np.testing.assert_allclose(
        found.probability.lower, probs.lower[rows, found.predicted], atol=1e-6
    )
    np.testing.assert_allclose(
        found.probability.upper, probs.upper[rows, found.predicted], atol=1e-6
    )


def test_tighter_methods_prove_more():
    samples = network(jax.random.key(2), 3)
    sets = boxes(XS, 0.1)
    results = [decide(method=m)(samples, sets, XS) for m in ("ibp", "crown-ibp", "crown")]
    for (loose, loose_box), (tight, tight_box) in itertools.pairwise(results):
        assert (tight.margins >= loose.margins - 1e-6).all()
        assert (tight_box.lower >= loose_box.lower - 1e-6).all()
        assert (tight_box.upper <= loose_box.upper + 1e-6).all()
    assert (results[2][0].margins > results[0][0].margins + 1e-3).any()


def test_the_statement_is_about_the_deployed_samples_and_no_estimate():
    """Order and repetition do not matter, confidence is 1, one more sample is another predictor."""
    samples, sets = network(jax.random.key(2), 3), boxes(XS, 0.1)
    run = decide(method="ibp")
    found, probs = run(samples, sets, XS)
    for index in (np.array([2, 0, 1]), np.array([0, 0, 1, 1, 2, 2])):
        again, others = run(jax.tree.map(lambda v, i=index: v[i], samples), sets, XS)
        np.testing.assert_allclose(again.margins, found.margins, atol=1e-6)
        chex.assert_trees_all_close(others, probs, atol=1e-6)
    fewer, _ = run(jax.tree.map(lambda v: v[:2], samples), sets, XS)
    assert jnp.abs(fewer.margins - found.margins).max() > 1e-3
    assert (found.confidence == 1.0).all() and found.arithmetic == "float32"


def test_an_overflow_proves_nothing_and_is_no_nan():
    def growing(w, x):
        return w @ jnp.exp(100 * x)

    samples, box = jnp.array([[[1.0, -1.0], [0.5, 2.0]]]), Box(jnp.zeros(2), jnp.ones(2))
    found = decision(growing, samples, box, x=jnp.zeros(2))
    assert not found.robust
    nothing = jnp.where(found.predicted == jnp.arange(2), 0, -1)
    np.testing.assert_allclose(found.margins, nothing, atol=1e-4)
    probs = predictive(growing, samples, box)
    assert (probs.lower == 0).all() and (probs.upper >= 1).all() and (probs.upper < 1.001).all()


# --- the nominal input, the set -------------------------------------------------------------------


def test_the_nominal_input_need_not_be_the_center_of_a_clipped_ball():
    """Near the edge of [0, 1] the box's center predicts another class than the image itself."""

    def apply(w, x):
        return w * jnp.array([x[0] - 0.1, 0.1 - x[0]])

    x, samples = jnp.array([0.05]), jnp.ones((1, 1))
    box = ball(x, 0.3, clip=(0.0, 1.0))
    assert decision(apply, samples, box).predicted == 0
    at_image = decision(apply, samples, box, x=x)
    assert at_image.predicted == 1 and not at_image.robust
    # sigmoid(2 m) - sigmoid(-2 m) = tanh(m), m = -.25 at the far end
    np.testing.assert_allclose(at_image.margins[0], np.tanh(-0.25), atol=1e-4)


@pytest.mark.parametrize("p", [1, 2])
def test_lp_balls(p):
    samples = network(jax.random.key(2), 3)
    eps = 0.15
    run = jax.jit(lambda x: decision(mlp, samples, ball(x, eps, p=p), method="crown"))
    rng = np.random.default_rng(0)
    gains = []
    for x in XS[:3]:
        found = run(x)
        steps = rng.normal(size=(400, SIZE))
        steps *= eps / np.linalg.norm(steps, ord=p, axis=1, keepdims=True)
        axes = np.concatenate([eps * np.eye(SIZE), -eps * np.eye(SIZE)])
        pi = at_points(samples, jnp.float32(x + np.concatenate([steps, axes])))
        differences = pi[:, found.predicted, None] - pi
        assert (found.margins <= differences.min(axis=0) + 1e-6).all()
        hull, _ = decide(method="crown")(samples, boxes(x[None], eps), x[None])
        gains.append(found.margins - hull.margins[0])
    assert (jnp.stack(gains) >= -1e-6).all() and (jnp.stack(gains) > 0.01).any()


def test_errors_name_the_fault():
    samples, box = network(jax.random.key(2), 3), ball(XS[0], 0.1)
    cases = [
        ("outside", partial(decision, mlp, samples, box, x=XS[0] + 0.2)),
        ("outside", partial(decision, mlp, samples, box, x=jnp.full(SIZE, jnp.nan))),
        ("outside", partial(decision, mlp, samples, LpBall(XS[0], 0.1, 2), x=XS[0] + 0.1)),
        ("shape", partial(decision, mlp, samples, box, x=XS)),
        ("leading axes", partial(decision, mlp, {**samples, "b": samples["b"][:2]}, box)),
        ("leading axes", partial(predictive, mlp, {**samples, "b": jnp.float32(0)}, box)),
        ("S >= 1", partial(decision, mlp, jax.tree.map(lambda v: v[:0], samples), box)),
        ("S >= 1", partial(decision, mlp, {}, box)),
        ("method", partial(decision, mlp, samples, box, method="guess")),
        ("rounding", partial(predictive, mlp, samples, box, rounding="up")),
        ("batch_size = 0", partial(decision, mlp, samples, box, batch_size=0)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    no_set: Any = XS[0]
    for certify in (decision, predictive):
        with pytest.raises(TypeError):
            certify(mlp, samples, no_set)
    assert num_samples(samples) == 3


def test_a_model_that_returns_no_logits_of_one_example_is_not_certified():
    """A batch axis too many would make every input robust; one number is of two classes."""
    samples, box = network(jax.random.key(2), 2), ball(XS[0], 10.0)
    for certify in (decision, predictive):
        for wrong in (lambda w, x: mlp(w, x)[None], lambda w, x: mlp(w, x)[:0]):
            with pytest.raises(ValueError, match=r"logits \(C,\)"):
                certify(wrong, samples, box)
    for one in (lambda w, x: mlp(w, x)[:1], lambda w, x: mlp(w, x)[0]):
        found = decision(one, samples, box, method="ibp")
        assert found.margins.shape == (2,) and not found.robust


# --- JAX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_chunks_change_nothing(batch_size):
    samples, sets = network(jax.random.key(2), 8), boxes(XS, 0.1)
    expected = decide(method="ibp")(samples, sets, XS)
    found = decide(method="ibp", batch_size=batch_size)(samples, sets, XS)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_vmap_is_a_loop_and_jit_takes_the_static_field():
    samples, sets = network(jax.random.key(2), 3), boxes(XS, 0.1)
    batched, probs = decide(method="ibp")(samples, sets, XS)
    for i in range(2):
        box = jax.tree.map(lambda end, i=i: end[i], sets)
        one = decision(mlp, samples, box, x=XS[i], method="ibp")
        assert isinstance(one, Decision) and isinstance(one.probability, Box)
        chex.assert_trees_all_close(jax.tree.map(lambda v, i=i: v[i], batched), one, atol=1e-6)
        chex.assert_trees_all_close(
            jax.tree.map(lambda v, i=i: v[i], probs),
            predictive(mlp, samples, box, method="ibp"),
            atol=1e-6,
        )
    again = jax.jit(lambda d: d)(batched)
    assert again.arithmetic == "float32" and len(jax.tree.leaves(again)) == 6


def test_float32_weights_stay_float32_under_x64():
    samples, box = network(jax.random.key(2), 2), ball(XS[0], 0.1)
    with jax.enable_x64(True):
        found = decision(mlp, samples, box, method="ibp")
        probs = predictive(mlp, samples, box, method="ibp")
    assert found.margins.dtype == probs.lower.dtype == jnp.float32


# --- attack and certificate speak of one network --------------------------------------------------


def test_certified_is_at_most_attacked_on_a_trained_posterior():
    """Three blobs, trained for robustness: each image certified or broken, never both."""
    rng = np.random.default_rng(0)
    num, clip = 12 * BATCH, (0.0, 1.0)
    centers = np.array([[0.2, 0.2, 0.5, 0.5], [0.8, 0.2, 0.5, 0.5], [0.5, 0.8, 0.5, 0.5]])
    y = np.arange(num) % CLASSES
    x = np.clip(centers[y] + 0.12 * rng.normal(size=(num, SIZE)), 0, 1)
    data = Batch(jnp.float32(x), jnp.asarray(y), jnp.ones(num))
    start = jax.tree.map(lambda v: 0.5 * v[0], network(jax.random.key(3), 1))
    algorithm = svi.build(
        likelihood.robust_categorical(mlp, clip=clip),
        prior.normal(start),
        num_data=num,
        optimizer=optax.adam(0.02),
        kl_weight=0.1,
    )
    here = Threat(jnp.float32(0.1), jnp.float32(0.3), jnp.float32(0.0))

    @jax.jit
    def train(state):
        def step(state, key):
            return algorithm.update(key, state, data, here)

        return jax.lax.scan(step, state, jax.random.split(KEY, 300))[0]

    q = algorithm.posterior(train(algorithm.init(KEY, start)))
    samples = q.sample(jax.random.key(4), 8)
    assert jax.tree.leaves(samples)[0].std(axis=0).min() > 0  # eight different networks
    counts = []
    for eps in (0.02, 0.1, 0.2):
        total = np.zeros(3, int)
        for start in range(0, num, BATCH):
            x, y = data.x[start : start + BATCH], data.y[start : start + BATCH]
            clean = at_points(samples, x).argmax(axis=1) == y
            found, _ = decide(method="ibp")(samples, boxes(x, eps, clip), x)
            certified = found.robust & (found.predicted == y)
            withstood = ~attacker(clip)(samples, x, y, jnp.float32(eps)).broken
            assert not (certified & ~withstood).any()
            assert not (withstood & ~clean).any()
            total += [int(v.sum()) for v in (certified, withstood, clean)]
        counts.append(total)
    assert counts[0][0] > 0.7 * num
    assert (np.diff(counts[2]) > 0).all()  # certified < withstood < clean: all three are seen
