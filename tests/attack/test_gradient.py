"""Attacks: inside their ball, exact where a closed form exists, no weaker than the clean input."""

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from bnncert import attack
from bnncert.attack._predictive import ascent
from bnncert.sets import ball
from tests.attack.networks import (
    BATCH,
    CLASSES,
    SIZE,
    clean_margins,
    linear,
    margin_of,
    mlp,
    mlp_samples,
    predictive,
)


@pytest.fixture(scope="module")
def samples():
    return mlp_samples()


@pytest.fixture(scope="module")
def xs():
    return jax.random.uniform(jax.random.key(1), (BATCH, SIZE))


@pytest.fixture(scope="module")
def ys(samples, xs):
    """The predicted classes, so that every margin starts positive."""
    return jax.vmap(lambda x: predictive(mlp, samples, x).argmax())(xs)


@cache  # compiling is what costs: cases with the same options share it
def batched(apply=mlp, **options):
    """`pgd` over a batch, jitted: the form in which it is used."""

    @jax.jit
    def run(key, samples, xs, ys, eps):
        keys = jax.random.split(key, len(xs))
        one = partial(attack.pgd, **options)
        return jax.vmap(lambda k, x, y: one(k, apply, samples, x, y, eps))(keys, xs, ys)

    return run


def boxes(xs, eps, clip) -> Any:
    return jax.vmap(lambda x: ball(x, jnp.float32(eps), clip=clip))(xs)


@pytest.mark.parametrize("p", [jnp.inf, 2])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_never_leaves_the_ball_or_the_clip_and_never_beats_the_clean_margin(
    samples, xs, ys, p, clip
):
    eps = 0.3
    found = batched(p=p, clip=clip, restarts=3, steps=5)(jax.random.key(2), samples, xs, ys, eps)
    if p == jnp.inf:  # float for float the box that a certificate speaks of
        box = boxes(xs, eps, clip)
        assert (found.x >= box.lower).all() and (found.x <= box.upper).all()
    else:
        distance = np.linalg.norm(np.asarray(found.x, np.float64) - np.asarray(xs), axis=1)
        assert (distance <= eps + 2 * np.finfo(np.float32).eps).all()
    if clip is not None:
        assert (found.x >= 0).all() and (found.x <= 1).all()
    clean = clean_margins(mlp, samples, xs, ys)
    assert (found.margin <= clean + 1e-5).all()
    assert (found.margin < clean - 0.05).mean() > 0.9  # and it does attack


@pytest.mark.parametrize("p", [jnp.inf, 2])
def test_result_describes_the_point_it_returns(samples, xs, ys, p):
    run = batched(p=p, clip=None, restarts=3, steps=5)
    found = run(jax.random.key(3), samples, xs, ys, 0.15 if p == jnp.inf else 0.4)
    assert found.broken.any() and not found.broken.all()
    for i in range(BATCH):
        probs = predictive(mlp, samples, found.x[i])
        np.testing.assert_allclose(found.margin[i], margin_of(probs, ys[i]), atol=1e-5)
        assert found.predicted[i] == probs.argmax()
        assert found.broken[i] == (probs.argmax() != ys[i])


@pytest.mark.parametrize("batch_size", [None, 2])
def test_direction_is_the_gradient_of_the_log_of_the_mean(samples, xs, batch_size):
    def loss(x, y):
        return -jnp.log(predictive(mlp, samples, x)[y])

    @jax.jit
    def gradient(x, y):
        up = ascent(mlp, samples, x, y, batch_size)
        return jnp.exp(up.log_weight - up.log_probs[y]) * up.direction

    mean_of_gradients = jax.grad(
        lambda x: -jax.vmap(lambda w: jax.nn.log_softmax(mlp(w, x))[1])(samples).mean()
    )
    for x in xs[:4]:
        for y in range(CLASSES):
            expected = jax.grad(loss)(x, y)
            np.testing.assert_allclose(gradient(x, y), expected, rtol=1e-5, atol=1e-5)
        # the two differ, so the equality above says something
        assert jnp.abs(gradient(x, 1) - mean_of_gradients(x)).max() > 1e-2


@pytest.fixture(scope="module")
def two_classes():
    """One linear network of two classes, with margins z_0 - z_1 = a.x + c."""
    w = jax.random.normal(jax.random.key(4), (1, 2, SIZE))
    b = jnp.array([[3.0, 0.0]])
    return {"w": w, "b": b}, w[0, 0] - w[0, 1], b[0, 0] - b[0, 1]


def test_linear_model_worst_corner(two_classes, xs):
    samples, a, c = two_classes
    eps, ys = 0.1, jnp.zeros(BATCH, int)
    for clip in (None, (0.0, 1.0)):
        found = batched(linear, clip=clip)(jax.random.key(5), samples, xs, ys, eps)
        box = boxes(xs, eps, clip)
        # to an ulp: of points whose margins are equal floats the first is kept
        np.testing.assert_allclose(found.x, jnp.where(a > 0, box.lower, box.upper), atol=2e-7)
        np.testing.assert_allclose(found.margin, found.x @ a + c, rtol=1e-5, atol=1e-5)
        one_step = jax.vmap(lambda x, c=clip: attack.fgsm(linear, samples, x, 0, eps, clip=c))(xs)
        np.testing.assert_array_equal(one_step.x, jnp.where(a > 0, box.lower, box.upper))


def test_linear_model_worst_point_of_the_l2_ball(two_classes, xs):
    samples, a, c = two_classes
    found = batched(linear, p=2)(jax.random.key(5), samples, xs, jnp.zeros(BATCH, int), 0.4)
    np.testing.assert_allclose(found.x, xs - 0.4 * a / jnp.linalg.norm(a), atol=1e-6)
    expected = xs @ a + c - 0.4 * jnp.linalg.norm(a)
    np.testing.assert_allclose(found.margin, expected, rtol=1e-5, atol=1e-5)


def test_more_steps_and_more_restarts_never_weaken_it(samples, xs, ys):
    def margins(**options):
        run = batched(step_size=0.1, **options)
        return run(jax.random.key(6), samples, xs, ys, 0.4).margin

    base, longer, wider = margins(steps=2), margins(steps=6), margins(steps=2, restarts=4)
    tolerance = 1e-6  # two compilations of one sum
    assert (longer <= base + tolerance).all() and (longer < base - 1e-3).any()
    assert (wider <= base + tolerance).all() and (wider < base - 1e-3).any()


@pytest.mark.parametrize("p", [jnp.inf, 2])
def test_radius_zero_returns_the_input(samples, xs, ys, p):
    run = batched(p=p, clip=None, restarts=3, steps=5)
    found = run(jax.random.key(7), samples, xs, ys, 0.0)
    np.testing.assert_array_equal(found.x, xs)
    assert not found.broken.any()
    np.testing.assert_array_equal(found.predicted, ys)
    wrong = run(jax.random.key(7), samples, xs, (ys + 1) % CLASSES, 0.0)
    assert wrong.broken.all() and (wrong.margin < 0).all()
    np.testing.assert_array_equal(wrong.predicted, ys)


def test_an_input_on_the_edge_of_the_clip_moves_only_inwards(samples):
    x = jnp.array([1.0, 0.0, 0.5, 0.5, 0.5, 0.5])
    for p in (jnp.inf, 2):
        found = attack.pgd(
            jax.random.key(8), mlp, samples, x, 0, 0.3, steps=3, restarts=2, clip=(0.0, 1.0), p=p
        )
        assert (found.x >= 0).all() and (found.x <= 1).all()


def test_chunks_of_samples_do_not_change_the_attack(samples, xs, ys):
    """Five samples one by one, two by two with one left over, and all at once."""
    key = jax.random.key(9)
    expected = batched(steps=3)(key, samples, xs, ys, 0.2)
    for batch_size in (2, 64):
        found = batched(steps=3, batch_size=batch_size)(key, samples, xs, ys, 0.2)
        np.testing.assert_allclose(found.x, expected.x, atol=1e-6)
        np.testing.assert_allclose(found.margin, expected.margin, atol=1e-5)


def test_a_batch_is_a_loop_over_examples(samples, xs, ys):
    key = jax.random.key(10)
    together = batched(p=jnp.inf, clip=None, restarts=3, steps=5)(key, samples, xs, ys, 0.2)
    alone = jax.jit(partial(attack.pgd, apply=mlp, steps=5, restarts=3))
    for i, k in enumerate(jax.random.split(key, BATCH)[:4]):
        single = alone(k, samples=samples, x=xs[i], y=ys[i], eps=0.2)
        np.testing.assert_allclose(single.x, together.x[i], atol=1e-6)
        np.testing.assert_allclose(single.margin, together.margin[i], atol=1e-5)


def test_the_order_of_samples_does_not_matter_and_copies_add_nothing(samples, xs, ys):
    key, run = jax.random.key(11), batched(steps=3)
    expected = run(key, samples, xs, ys, 0.2).margin
    reverse = run(key, jax.tree.map(lambda leaf: leaf[::-1], samples), xs, ys, 0.2).margin
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), samples)
    np.testing.assert_allclose(reverse, expected, atol=1e-5)
    np.testing.assert_allclose(run(key, twice, xs, ys, 0.2).margin, expected, atol=1e-5)


def test_one_sample_is_the_plain_network(samples, xs):
    """Against a textbook PGD on the cross-entropy of a single network, written out."""
    params, x, y, eps, steps = jax.tree.map(lambda a: a[0], samples), xs[0], 1, 0.3, 4
    loss = jax.jit(jax.grad(lambda x: -jax.nn.log_softmax(mlp(params, x))[y]))
    points = [x]
    for _ in range(steps):
        step = points[-1] + 2.5 * eps / steps * jnp.sign(loss(points[-1]))
        points.append(jnp.clip(step, x - eps, x + eps))
    margins = jnp.array([margin_of(jax.nn.softmax(mlp(params, point)), y) for point in points])

    one = jax.tree.map(lambda a: a[:1], samples)
    found = attack.pgd(jax.random.key(12), mlp, one, x, y, eps, steps=steps)
    np.testing.assert_allclose(found.margin, margins.min(), atol=1e-5)
    np.testing.assert_allclose(found.x, points[int(margins.argmin())], atol=1e-6)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_sure_networks_are_attacked_in_the_right_direction(two_classes, shift):
    """Where all p_y are e^-200, or all rivals' are, and the loss or its gradient underflows."""
    samples, a, _ = two_classes
    spread = jax.random.normal(jax.random.key(13), (3, 1, 1))
    samples = {
        "w": samples["w"] * jnp.exp(0.1 * spread),  # three networks that agree on the direction
        "b": jnp.tile(jnp.array([[shift, 0.0]]), (3, 1)),
    }
    x, eps = jnp.full(SIZE, 0.5), 0.1
    for p, worst in ((jnp.inf, x - eps * jnp.sign(a)), (2, x - eps * a / jnp.linalg.norm(a))):
        found = attack.pgd(jax.random.key(14), linear, samples, x, 0, eps, p=p)
        np.testing.assert_allclose(found.x, worst, atol=1e-6)
        assert jnp.isfinite(found.margin) and found.broken == (shift < 0)


def test_a_sample_that_is_sure_does_not_drown_one_that_wavers():
    """p_y is 1/2 in one network and 1 - e^-30 in another with far steeper logits."""
    samples = {
        "w": jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, -50.0], [0.0, 0.0]]]),
        "b": jnp.array([[0.0, 0.0], [30.0, 0.0]]),
    }
    x, eps = jnp.zeros(2), 0.1
    up = ascent(linear, samples, x, 0, None)
    assert up.direction[0] < -0.99 and abs(up.direction[1]) < 1e-6
    found = attack.pgd(jax.random.key(15), linear, samples, x, 0, eps, p=2)
    np.testing.assert_allclose(found.x, [-eps, 0.0], atol=1e-3)


def test_ties_and_nan_count_as_broken():
    tied = {"w": jnp.zeros((2, 2, SIZE)), "b": jnp.zeros((2, 2))}
    x = jnp.full(SIZE, 0.5)
    found = attack.fgsm(linear, tied, x, 0, 0.1)
    assert found.broken and found.margin == 0 and found.predicted == 1

    def broken(params, x):
        return linear(params, x) * jnp.nan

    found = attack.fgsm(broken, tied, x, 0, 0.1)
    assert found.broken and found.margin == -jnp.inf
    np.testing.assert_array_equal(found.x, x)


def test_an_undefined_gradient_does_not_move_the_point_out_of_the_ball():
    """The norm's gradient at 0 is NaN, its value is not: NaN must not pass for success."""

    def apply(params, x):
        return params * jnp.array([1.0 - jnp.linalg.norm(x), 0.0])

    found = attack.pgd(jax.random.key(16), apply, jnp.ones((1, 2)), jnp.zeros(3), 0, 0.1, steps=3)
    np.testing.assert_array_equal(found.x, 0.0)
    assert not found.broken and found.margin == 1
    found = attack.pgd(
        jax.random.key(16), apply, jnp.ones((1, 2)), jnp.zeros(3), 0, 0.1, steps=3, restarts=2
    )
    np.testing.assert_allclose(found.margin, 1 - 0.1 * np.sqrt(3), rtol=1e-6)


def test_another_radius_or_label_does_not_compile_again(samples, xs, ys):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(key, x, y, eps):
        return attack.pgd(key, mlp, samples, x, y, eps, steps=2, clip=(0.0, 1.0))

    margins = [
        run(jax.random.key(17), xs[i], ys[i], jnp.float32(eps)).margin
        for i, eps in enumerate((0.0, 0.1, 0.2))
    ]
    assert len(set(map(float, margins))) == 3


def test_a_batched_attack_loops_over_samples_with_batched_convolutions():
    """Under vmap over x no kernel is batched: no convolution has feature groups."""

    def cnn(kernel, x):
        out = jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "VALID")
        return jnp.tanh(out).mean(axis=(0, 2, 3))

    kernels = jax.random.normal(jax.random.key(18), (4, 3, 1, 2, 2))
    xs = jax.random.uniform(jax.random.key(19), (7, 1, 5, 5))
    jaxpr = jax.make_jaxpr(
        jax.vmap(lambda x: attack.pgd(jax.random.key(20), cnn, kernels, x, 0, 0.1, steps=2))
    )(xs)
    text = str(jaxpr)
    assert "conv_general_dilated" in text and "feature_group_count=1\n" in text
    assert not any(f"_group_count={n}\n" in text for n in range(2, 30))


def test_integer_dtypes_and_double_precision(samples, xs):
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), samples)
        x = jnp.asarray(np.asarray(xs[0], np.float64))
        found = attack.pgd(jax.random.key(21), mlp, double, x, np.int32(1), 0.1, steps=2)
        assert found.x.dtype == found.margin.dtype == jnp.float64
    mixed = attack.pgd(
        jax.random.key(21),
        mlp,
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), samples),
        xs[0],
        1,
        0.1,
        steps=2,
    )
    np.testing.assert_allclose(mixed.margin, found.margin, atol=0.1)


@pytest.fixture
def unchecked():
    """What a user meets: outside these tests nothing checks the annotations first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps = -0.1"),
        ({"eps": float("nan")}, ValueError, "eps = nan"),
        ({"eps": jnp.ones(3)}, ValueError, r"eps has shape \(3,\)"),
        ({"steps": 0}, ValueError, "steps = 0: it must be at least 1"),
        ({"restarts": 0}, ValueError, "restarts = 0"),
        ({"batch_size": 0}, ValueError, "batch_size = 0"),
        ({"step_size": -1.0}, ValueError, "step_size = -1.0"),
        ({"p": 1}, ValueError, r"p = 1: choose 2 or jnp\.inf"),
        ({"clip": (1.0, 0.0)}, ValueError, r"clip = \(1\.0, 0\.0\)"),
        ({"clip": (1.0, 0.0), "p": 2}, ValueError, r"clip = \(1\.0, 0\.0\)"),
        ({"x": jnp.zeros(SIZE, jnp.uint8)}, TypeError, "dtype uint8.*255"),
        ({"y": 3}, ValueError, r"y = 3: labels must be in 0\.\.2"),
        ({"y": -1}, ValueError, r"y = -1: labels must be in 0\.\.2"),
        ({"y": 1.0}, TypeError, "y has dtype float32"),
        ({"y": jnp.zeros(2, int)}, ValueError, r"y has shape \(2,\)"),
        ({"samples": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}}, ValueError, "must be stacked"),
        ({"samples": {"w": jnp.zeros(())}}, ValueError, "must be stacked"),
        ({"apply": lambda params, x: mlp(params, x)[None]}, ValueError, r"returned shape \(1, 3\)"),
    ],
)
def test_bad_arguments_are_named(samples, unchecked, change, error, message):
    arguments = {"apply": mlp, "samples": samples, "x": jnp.zeros(SIZE), "y": 0, "eps": 0.1}
    with pytest.raises(error, match=message):
        attack.pgd(jax.random.key(0), **(arguments | change))
