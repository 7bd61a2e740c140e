"""Logits or probabilities: which predictor is certified, attacked and trained."""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert import attack, certify, likelihood
from bnncert.bounds.tracing.endings import ends_in_probabilities
from bnncert.posterior import MeanField
from bnncert.sets import Box, LpBall, ball
from bnncert.types import Threat

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
SIZE, WIDTH, SAMPLES, POINTS = 3, 5, 4, 6
XS = jax.random.normal(jax.random.key(1), (POINTS, SIZE))
CLASSES = {"softmax": 3, "sigmoid": 1, "two": 1}


def weights(classes):
    shapes = {"w": (WIDTH, SIZE), "v": (classes, WIDTH)}
    keys = jax.random.split(jax.random.key(classes), 4)
    return {
        name: jax.random.normal(keys[2 * i], shape)
        + 0.3 * jax.random.normal(keys[2 * i + 1], (SAMPLES, *shape))
        for i, (name, shape) in enumerate(shapes.items())
    }


def logits(params, x):
    return 2 * params["v"] @ jax.nn.relu(params["w"] @ x)


def one(params, x):  # of two classes, a number without an axis
    return logits(params, x)[0]


def softmax(params, x):
    return jax.nn.softmax(logits(params, x))


def sigmoid(params, x):
    return jax.nn.sigmoid(one(params, x))


def two(params, x):
    q = jax.nn.sigmoid(logits(params, x))
    return jnp.concatenate([1 - q, q])


MODELS = {"softmax": (softmax, logits), "sigmoid": (sigmoid, one), "two": (two, logits)}


def averages(name, points):
    """The deployed predictor by its definition, in float64 of the outputs."""
    apply, _ = MODELS[name]
    each = jax.jit(jax.vmap(jax.vmap(apply, (None, 0)), (0, None)))(weights(CLASSES[name]), points)
    p = np.asarray(each, np.float64)
    return (p if p.ndim == 3 else np.stack([1 - p, p], -1)).mean(0)


@cache  # compiling is what costs
def certifier(name, outputs, method):
    apply = MODELS[name][outputs == "logits"]
    samples, options = weights(CLASSES[name]), {"outputs": outputs, "method": method}

    def at(x, eps):
        region = ball(x, eps)
        return (
            certify.decision(apply, samples, region, **options),
            certify.uncertainty(apply, samples, region, **options),
        )

    return jax.jit(jax.vmap(at, (0, None)))


def certified(name, outputs, method, eps):
    return certifier(name, outputs, method)(XS, jnp.float32(eps))


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "ibp") for name in MODELS), ("softmax", "crown-ibp")]
)
def test_probabilities_are_bounded_at_random_and_corner_points_of_the_set(name, method):
    eps = 0.1
    found, around = certified(name, "probabilities", method, eps)
    moves = np.random.default_rng(0).uniform(-1, 1, (400, 1, SIZE))
    moves[200:] = np.sign(moves[200:])
    p = averages(name, (XS + eps * moves).reshape(-1, SIZE)).reshape(400, POINTS, -1)
    own = np.take_along_axis(p, np.asarray(found.predicted)[None, :, None], 2)
    assert (own - p >= np.asarray(found.margins) - 1e-9).all()
    assert (own[..., 0] >= np.asarray(found.probability.lower)).all()
    assert (own[..., 0] <= np.asarray(found.probability.upper)).all()
    assert (p >= np.asarray(around.probability.lower)).all()
    assert (p <= np.asarray(around.probability.upper)).all()
    entropy = -(p * np.log(p)).sum(-1)
    assert (entropy >= np.asarray(around.entropy.lower)).all()
    assert (entropy <= np.asarray(around.entropy.upper)).all()
    assert (p.max(-1) <= np.asarray(around.confidence.upper)).all()
    assert found.robust.any() and not found.robust.all()  # the bounds say something, not all


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_a_softmax_composed_into_the_network_is_the_same_predictor_as_its_logits(name):
    (p, around), (z, of_z) = (certified(name, o, "ibp", 0.0) for o in ("probabilities", "logits"))
    np.testing.assert_array_equal(p.predicted, z.predicted)
    np.testing.assert_allclose(p.margins, z.margins, atol=1e-4)
    np.testing.assert_allclose(p.probability.lower, z.probability.lower, atol=1e-4)
    np.testing.assert_allclose(around.probability.upper, of_z.probability.upper, atol=1e-4)


def test_probabilities_taken_for_logits_are_another_predictor():
    """The class that a softmax of probabilities chooses on average need not be theirs."""
    samples = jnp.array([[1.0, 0.0, 0.0], [0.10, 0.46, 0.44], [0.10, 0.46, 0.44]])
    near = Box(jnp.ones(1), jnp.ones(1))
    apply = lambda p, x: p * x  # noqa: E731
    right = certify.decision(apply, samples, near, outputs="probabilities")
    with pytest.warns(UserWarning, match='outputs="probabilities"'):
        wrong = certify.decision(apply, samples, near)
    assert right.predicted == jnp.argmax(samples.mean(0)) == 0
    assert float(right.margins[1]) == pytest.approx(0.4 - 0.92 / 3, abs=1e-3)
    assert float(wrong.margins[1]) < 0.6 * float(right.margins[1])


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_certified_is_at_most_attacked_at_most_clean(name):
    apply, before = MODELS[name]
    samples, eps = weights(CLASSES[name]), 0.2
    y = jnp.argmax(averages(name, XS), -1)

    @jax.jit
    @jax.vmap
    def attacked(x, y):
        target = KEY, apply, samples, x, y, eps
        hard = attack.pgd(*target, outputs="probabilities", steps=5)
        easy = attack.pgd(KEY, before, samples, x, y, eps, steps=5)
        return hard, easy

    found, of_logits = attacked(XS, y)
    robust = certified(name, "probabilities", "ibp", eps)[0]
    np.testing.assert_array_equal(robust.predicted, y)
    assert not (robust.robust & found.broken).any()
    assert found.broken.any()
    # What was found is so of the predictor itself, and as much as its logits show.
    margins = averages(name, found.x)
    assert (np.argmax(margins, -1) == np.asarray(found.predicted)).all()
    np.testing.assert_allclose(found.margin, of_logits.margin, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("softmax", "probabilities"), ("sigmoid", "probabilities"), ("sigmoid", "logits")],
)
def test_likelihoods_are_those_of_the_predictor_and_ordered(name, outputs):
    apply = MODELS[name][outputs == "logits"]
    params = jax.tree.map(lambda leaf: leaf[0], weights(CLASSES[name]))
    pgd = partial(attack.pgd, steps=3)
    build = {
        "clean": likelihood.clean_categorical(apply, outputs=outputs),
        "attacked": likelihood.attacked_categorical(apply, pgd, outputs=outputs),
        "certified": likelihood.certified_categorical(apply, outputs=outputs),
        "robust": likelihood.robust_categorical(apply, outputs=outputs),
    }

    @jax.jit
    def all_of(params, x, y):
        threat = Threat(jnp.float32(0.1), jnp.float32(0.0))
        return {k: jax.value_and_grad(f, 1)(KEY, params, x, y, threat) for k, f in build.items()}

    found = [all_of(params, XS[0], y) for y in range(max(CLASSES[name], 2))]
    total = sum(np.exp(each["clean"][0]) for each in found)
    assert total == pytest.approx(1, abs=1e-5)
    for each in found:
        assert each["certified"][0] <= each["attacked"][0] + 1e-5
        assert each["attacked"][0] <= each["clean"][0] + 1e-5
        assert each["robust"][0] == pytest.approx(float(each["certified"][0]), abs=1e-5)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(each))


def test_one_logit_speaks_for_the_second_class():
    samples = jnp.array([[1.0], [3.0]])
    region = ball(jnp.array([1.0]), 0.5)
    short, full = lambda w, x: w * x, lambda w, x: jnp.concatenate([0 * x, w * x])
    for first, second in zip(
        jax.tree.leaves(certify.decision(short, samples, region)),
        jax.tree.leaves(certify.decision(full, samples, region)),
        strict=True,
    ):
        np.testing.assert_allclose(first, second, atol=1e-5)
    assert int(certify.decision(short, samples, region).predicted) == 1
    assert certify.proves_class(short, region, 1)(samples[0])
    assert not certify.proves_class(short, region, 0)(samples[0])
    below = lambda q, x: 0.1 * q * x  # noqa: E731
    assert certify.proves_class(below, region, 0, outputs="probabilities")(samples[0])


OUT = {"outputs": "probabilities"}
NET = weights(3)
Q = MeanField(jax.tree.map(lambda leaf: leaf[0], NET), jax.tree.map(lambda v: 0 * v[0] + 0.01, NET))
REGION, SETS = ball(XS[0], 0.01), jax.vmap(lambda x: ball(x, 0.01))(XS)
CALLS = {
    "decision": lambda f, **o: certify.decision(f, NET, REGION, method="ibp", **o),
    "predictive": lambda f, **o: certify.predictive(f, NET, REGION, method="ibp", **o),
    "uncertainty": lambda f, **o: certify.uncertainty(f, NET, REGION, method="ibp", **o),
    "radius": lambda f, **o: certify.radius(f, NET, XS[0], largest=0.1, steps=2, method="ibp", **o),
    "cascade": lambda f, methods=("ibp",), **o: certify.cascade(f, NET, SETS, methods=methods, **o),
    "statistical": lambda f, **o: certify.statistical(
        KEY, f, Q, REGION, num_samples=100, method="ibp", **o
    ),
    "statistical_radius": lambda f, **o: certify.statistical_radius(
        KEY, f, Q, XS[0], largest=0.1, steps=2, num_samples=100, method="ibp", **o
    ),
    "attacked_radius": lambda f, **o: certify.attacked_radius(
        KEY, f, NET, XS[0], 0, largest=3.0, steps=2, **o
    ),
    "pgd": lambda f, **o: attack.pgd(KEY, f, NET, XS[0], 0, 0.1, steps=2, **o),
    "fgsm": lambda f, **o: attack.fgsm(f, NET, XS[0], 0, 0.1, **o),
    "square": lambda f, **o: attack.square(KEY, f, NET, XS[0], 0, 0.1, queries=4, **o),
    "targeted_apgd": lambda f, **o: attack.targeted_apgd(KEY, f, NET, XS[0], 0, 0.1, steps=2, **o),
    "strongest": lambda f, **o: attack.strongest(
        KEY, f, NET, XS[0], 0, 0.1, steps=2, queries=2, **o
    ),
    "transfer": lambda f, **o: attack.transfer(f, NET, XS, 0, **o),
    "clean_categorical": lambda f, **o: likelihood.clean_categorical(f, **o)(
        KEY, Q.loc, XS[0], jnp.asarray(0), Threat(0.1)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_softmax_called_logits_is_a_warning_everywhere_and_jit_sees_it(name):
    call = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a trace is enough: it stops at the warning
        with pytest.raises(UserWarning, match=r'seems to.*outputs="probabilities"'):
            call(softmax)
        if name != "cascade":
            with pytest.raises(UserWarning, match='outputs="probabilities"'):
                jax.eval_shape(lambda: call(softmax))
            jax.eval_shape(lambda: call(softmax, **OUT))
    with pytest.raises(ValueError, match=r"outputs = 'log'.*'probabilities'"):
        call(softmax, outputs="log")


@pytest.mark.parametrize("name", ["decision", "predictive", "cascade", "statistical"])
def test_logits_called_probabilities_are_an_error_and_certify_nothing_under_jit(name):
    with pytest.raises(ValueError, match=r'outputs="probabilities".*add up to 1'):
        CALLS[name](logits, **OUT)
    if name == "cascade":
        return
    found = jax.jit(lambda: CALLS[name](logits, **OUT))()
    box = found if name == "predictive" else found.probability
    assert jnp.isneginf(box.lower).all() and jnp.isposinf(box.upper).all()
    if name != "predictive":
        assert not found.robust


def test_the_statistical_tier_and_radii_take_probabilities():
    z, p = CALLS["statistical"](logits), CALLS["statistical"](softmax, **OUT)
    assert p.predicted == z.predicted and bool(p.robust) and bool(z.robust)
    np.testing.assert_allclose(p.margins, z.margins, atol=0.1)
    assert CALLS["radius"](softmax, **OUT).radius > 0
    found = CALLS["cascade"](softmax, **OUT).decision.robust
    assert found.shape == (POINTS,) and found.any()


def test_joint_bounds_are_of_logits():
    with pytest.raises(ValueError, match=r"joint.*takes logits"):
        CALLS["cascade"](softmax, **OUT, methods=("ibp", "joint"))
    with pytest.raises(ValueError, match=r"joint bounds.*decision"):
        certify.joint_decision(softmax, NET, LpBall(XS[0], 0.1, 2), outputs="probabilities")


ENDS = {
    "jax.nn": lambda z: jax.nn.softmax(z),
    "jitted": jax.jit(lambda z: jax.nn.softmax(z)),
    "by hand": lambda z: jnp.exp(z) / jnp.exp(z).sum(),
    "by a reduction": lambda z: (e := jnp.exp(z)) / e.sum(),
    "exp log": lambda z: jnp.exp(jax.nn.log_softmax(z)),
    "half": lambda z: jax.nn.softmax(z.astype(jnp.float16)).astype(jnp.float32).reshape(-1),
    "rows": lambda z: jax.nn.softmax(z[None])[0],
    "one": lambda z: jax.nn.sigmoid(z[:1]),
    "scalar": lambda z: jax.nn.sigmoid(z[0]),
    "pair": lambda z: jnp.stack([(q := jax.nn.sigmoid(z[0])), 1 - q]),
}
OPEN = {
    "logits": lambda z: z,
    "log": jax.nn.log_softmax,
    "scaled": lambda z: 5 * jax.nn.softmax(z),
    "attention": lambda z: jax.nn.softmax(z) * z,
    "several": lambda z: jax.nn.softmax(jnp.stack([z, -z]), axis=0).reshape(-1),
    "bounded": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "other sum": lambda z: z / jnp.exp(z).sum(),
    "constant": lambda z: jnp.zeros(3),
    "two outputs": lambda z: (z, z),
}


def test_what_ends_in_probabilities_is_seen_in_its_trace_and_nothing_else_is():
    z = jnp.array([0.1, 2.0, -1.0])
    ends = partial(ends_in_probabilities, params=0, x=z)
    assert {k for k, f in (ENDS | OPEN).items() if ends(lambda _, x, f=f: f(x))} == set(ENDS)
