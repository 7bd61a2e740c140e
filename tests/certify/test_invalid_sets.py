"""An empty set, or one that does not hold the nominal input, certifies nothing, by any function.

Known numbers raise. Traced ones are run in one batch with valid sets: these come out as they do
among valid ones alone, and the others say nothing.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnncert as bc
from bnncert import attack, certify, likelihood
from bnncert.bounds import mean_bound
from bnncert.sets import Box, LpBall, ball
from tests.bounds.networks import in_few_steps

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
SIZE, HIDDEN, CLASSES, CLIP = 3, 4, 3, (0.0, 1.0)
X = jnp.array([0.4, 0.5, 0.6])
NAN, INF = float("nan"), float("inf")
METHODS = ("ibp", "forward", "crown-ibp", "crown", "alpha-crown")


def mlp(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x)


def weights(count=()):
    keys = jax.random.split(KEY)
    w = 0.05 * jax.random.normal(keys[0], (*count, HIDDEN, SIZE))
    # Far apart, so that every method proves what there is to prove.
    v = 0.05 * jax.random.normal(keys[1], (*count, CLASSES, HIDDEN))
    return {"w": w + 0.5, "v": v + jnp.array([2.0, 0.0, -2.0])[:, None]}


SAMPLES, PARAMS = weights((2,)), weights()
POSTERIOR = bc.MeanField(PARAMS, jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), PARAMS))


def sets(p):
    """Sets and nominal inputs of one batch, those that are valid first; and the number of these."""
    if p == jnp.inf:
        pairs = [(-0.01, 0.01), (0.0, 0.0), (0.005, -0.005), (NAN, 0.1), (-0.1, NAN), (-INF, INF),
                 (0.1, INF), (INF, -INF)]  # fmt: skip
        below, above = (jnp.array(ends)[:, None] for ends in zip(*pairs, strict=True))
        # One coordinate alone is bad, and the centre is the nominal input wherever there is one.
        first = jnp.arange(SIZE) == 0
        lower = X + jnp.where(first | (below == -0.01), below, 0.0)
        region: Any = Box(lower, X + jnp.where(first | (above == 0.01), above, 0.0))
    else:
        eps = jnp.array([0.01, 0.0, -0.005, NAN, INF, -INF])
        region = LpBall(jnp.tile(X, (len(eps), 1)), eps, p)
        last = LpBall(region.center.at[-1, 0].set(NAN), eps.at[-1].set(0.01), p)
        region = jax.tree.map(lambda a, b: jnp.concatenate([a, b[-1:]]), region, last)
    count = len(jax.tree.leaves(region)[0])
    # Valid sets, and nominal inputs that they do not hold.
    outside = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 2), region)
    region = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), region, outside)
    x = jnp.tile(X, (count + 2, 1)).at[count, 0].add(0.1).at[count + 1, 1].set(NAN)
    return region, x, 2


def valid_alone(batch, count):
    return jax.tree.map(lambda leaf: leaf[np.arange(len(leaf)) % count], batch)


def assert_unchanged(found, alone, count):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a[:count], b[:count])


def assert_unbounded(box, places):
    assert (np.asarray(box.lower)[places] == -np.inf).all()
    assert (np.asarray(box.upper)[places] == np.inf).all()


def assert_nothing_proved(found, count):
    assert found.robust[:count].all() and not found.robust[count:].any()
    assert not np.isnan(found.margins).any()
    others = np.arange(CLASSES) != np.asarray(found.predicted)[count:, None]
    assert (np.where(others, found.margins[count:], -1) <= -1).all()
    assert (found.probability.lower[count:] == 0).all()
    assert (found.probability.upper[count:] >= 1).all()


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("method", METHODS)
def test_decisions_and_bounds_by_every_method(method, rounding):
    @jax.jit
    def run(region, x):
        def one(region, x):
            box = bc.bound(mlp, in_few_steps(method, 2), rounding=rounding)(PARAMS, region)
            found = certify.decision(mlp, SAMPLES, region, x=x, method=method, rounding=rounding)
            return box, found

        return jax.vmap(one)(region, x)

    region, x, count = sets(jnp.inf)
    box, found = run(region, x)
    assert_unchanged((box, found), run(*valid_alone((region, x), count)), count)
    assert_unbounded(box, slice(count, -2))  # the last two are valid sets
    assert_nothing_proved(found, count)


@cache
def certificates():
    kinds: dict[str, Any] = {"method": "crown-ibp", "rounding": "nearest"}
    draws: dict[str, Any] = {"num_samples": 200, "num_pilot": 2, "batch_size": 200}

    def one(region, x):
        proves = certify.proves_class(mlp, region, 0, **kinds)
        within = certify.proves_outputs(mlp, region, Box(-1e6, 1e6), **kinds)
        decisions = {
            "decision": certify.decision(mlp, SAMPLES, region, x=x, **kinds),
            "joint": certify.joint_decision(mlp, SAMPLES, region, x=x),
            "statistical": certify.statistical(
                KEY, mlp, POSTERIOR, region, x=x, method="ibp", rounding="nearest", **draws
            ),
        }
        others = {
            "predictive": certify.predictive(mlp, SAMPLES, region, **kinds),
            "uncertainty": certify.uncertainty(mlp, SAMPLES, region, **kinds),
            "moments": certify.mean_and_variance(mlp, SAMPLES, region, **kinds),
            "expectation": certify.expectation(mlp, POSTERIOR, region),
            "linear": bc.linear_bounds(mlp)(PARAMS, region),
            "mean": mean_bound(mlp)(SAMPLES, region),
            "constant": bc.ibp(lambda x: (x, jnp.ones(2), 3))(region)[1:],
            "class": proves(PARAMS),
            "outputs": within(PARAMS),
        }
        return decisions, others

    return jax.jit(jax.vmap(one))


@pytest.mark.parametrize("p", [1, 2, jnp.inf])
def test_every_certificate(p):
    region, x, count = sets(p)
    decisions, others = certificates()(region, x)
    assert_unchanged((decisions, others), certificates()(*valid_alone((region, x), count)), count)
    for found in decisions.values():
        assert_nothing_proved(found, count)
    empty = slice(count, -2)
    for name in ("predictive",):
        assert (others[name].lower[empty] == 0).all() and (others[name].upper[empty] >= 1).all()
    assert (others["uncertainty"].confidence.upper[empty] >= 1).all()
    assert (others["uncertainty"].entropy.lower[empty] == 0).all()
    assert_unbounded(others["moments"].mean, empty)
    assert (others["moments"].variance.lower[empty] == 0).all()
    assert (others["moments"].variance.upper[empty] == np.inf).all()
    assert_unbounded(others["expectation"].outputs, empty)
    assert (others["expectation"].deviation[empty] == np.inf).all()
    assert (others["expectation"].probabilities.upper[empty] == 1).all()
    assert (others["expectation"].probabilities.lower[empty] == 0).all()
    linear = others["linear"]
    assert_unbounded(Box(linear.lower.b, linear.upper.b), empty)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(linear))
    assert_unbounded(others["mean"], empty)
    assert_unbounded(others["constant"][0], empty)
    for name in ("class", "outputs"):
        assert others[name][:count].all() and not others[name][empty].any()


CENTERS = jnp.stack([X, X, X + 1.0, X.at[0].set(-0.1), X.at[1].set(NAN), X.at[1].set(INF), X, X])
RADII = jnp.array([0.01, 0.0, 0.01, 0.01, 0.01, 0.01, -0.01, NAN])
NUM_VALID = 2
IN_RANGE = 6  # of the rows: those whose radius is one


@cache
def around():
    usual: dict[str, Any] = {"clip": CLIP}
    few: dict[str, Any] = {"steps": 2, **usual}
    reach: dict[str, Any] = {"largest": 0.1, "steps": 2, **usual}
    draws: dict[str, Any] = {"num_samples": 200, "num_pilot": 2, "batch_size": 200}
    draws |= {"method": "ibp", "rounding": "nearest"}
    one_step = partial(attack.pgd, steps=1)

    def one(x, eps):
        target = mlp, SAMPLES, x, 0
        attacks = {
            "pgd2": attack.pgd(KEY, *target, eps, p=2, **few),
            "fgsm": attack.fgsm(*target, eps, **usual),
            **attack.battery(KEY, *target, eps, queries=3, num_targets=1, surrogate=SAMPLES, **few),
        }
        radii = {
            "radius": certify.radius(mlp, SAMPLES, x, method="ibp", **reach),
            "statistical": certify.statistical_radius(KEY, mlp, POSTERIOR, x, **draws, **reach),
            "attacked": certify.attacked_radius(KEY, *target, attack=one_step, **reach),
        }
        return attacks, radii

    return jax.jit(jax.vmap(one))


def test_attacks_and_radii():
    attacks, radii = around()(CENTERS, RADII)
    alone = around()(*valid_alone((CENTERS, RADII), NUM_VALID))
    assert_unchanged((attacks, radii), alone, NUM_VALID)
    empty = slice(NUM_VALID, None)
    for name, found in attacks.items():
        assert not found.broken[:NUM_VALID].any(), name
        assert found.broken[empty].all() and (found.margin[empty] == -np.inf).all(), name
        assert (found.predicted[empty] != 0).all(), name
    bad = slice(NUM_VALID, IN_RANGE)
    for name in ("radius", "statistical"):
        assert (radii[name].radius[:NUM_VALID] > 0).all() and radii[name].robust[:NUM_VALID].all()
        assert (radii[name].radius[bad] == 0).all() and not radii[name].robust[bad].any()
    assert radii["attacked"].broken[bad].all() and (radii["attacked"].radius[bad] == 0).all()


LIKELIHOODS = {
    "robust": likelihood.robust_categorical(mlp, clip=CLIP),
    "crown-ibp": likelihood.robust_categorical(mlp, clip=CLIP, method="crown-ibp"),
    "attacked": likelihood.attacked_categorical(mlp, partial(attack.pgd, steps=1, clip=CLIP)),
    "gaussian": likelihood.robust_gaussian(mlp, noise_scale=1.0, clip=CLIP),
}


@pytest.mark.parametrize("name", [*LIKELIHOODS, "certified"])
def test_likelihoods_of_an_empty_set_are_no_better_and_leave_the_others_alone(name):
    mixed = name != "certified"
    loglik = LIKELIHOODS[name] if mixed else likelihood.certified_categorical(mlp, clip=CLIP)
    y = jnp.zeros(CLASSES) if name == "gaussian" else jnp.asarray(0)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None, None))
    def run(x, eps, lam, power):
        threat = bc.Threat(eps, lam, power)
        plain = bc.Threat(jnp.zeros(()), jnp.ones(()), power)
        each = loglik(KEY, PARAMS, x, y, threat)
        clean = loglik(KEY, PARAMS, X, y, plain) if mixed else each

        def kept(params):  # what a mask over the batch makes of it
            return jnp.where(each > -jnp.inf, loglik(KEY, params, x, y, threat), 0.0)

        return each, clean, jax.grad(kept)(PARAMS)

    finite = jnp.isfinite(CENTERS).all(1)
    centers, radii = CENTERS[finite], RADII[finite]
    for lam in (0.0, 0.5, 1.0) if mixed else (0.0,):
        for power in (0.0, 0.5, 1.0) if mixed else (0.0,):
            found = run(centers, radii, jnp.float32(lam), jnp.float32(power))
            alone = run(*valid_alone((centers, radii), NUM_VALID), lam, power)
            assert_unchanged(found, alone, NUM_VALID)
            each, clean, slopes = found
            assert not np.isnan(each).any()
            same_input = each[-2:]  # their radii alone are bad
            if lam == 1:
                np.testing.assert_allclose(same_input, clean[-2:], rtol=1e-5, atol=1e-6)
                assert np.isfinite(each).all()
            elif lam == 0 or power == 0:
                assert (each[NUM_VALID:] == -np.inf).all()
            else:  # the worst case counts as 0
                at_most = clean[-2:] + np.log(lam) / power
                np.testing.assert_allclose(same_input, at_most, rtol=1e-5, atol=1e-6)
            assert all(np.isfinite(slope).all() for slope in jax.tree.leaves(slopes)), (lam, power)


def box_errors():
    return {
        "swapped": Box(X + 0.005, X - 0.005),
        "nan": Box(X.at[0].set(NAN), X + 0.1),
        "infinite": Box(X, X.at[1].set(INF)),
        "negative": LpBall(X, -0.1, 2),
        "nan radius": LpBall(X, NAN, 1),
        "nan center": LpBall(X.at[0].set(NAN), 0.1, 2),
    }


def batched(region):
    return jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), region)


OF_SETS = {
    "bound": lambda s: bc.bound(mlp)(PARAMS, s),
    "linear_bounds": lambda s: bc.linear_bounds(mlp)(PARAMS, s),
    "mean_bound": lambda s: mean_bound(mlp)(SAMPLES, s),
    "decision": lambda s: certify.decision(mlp, SAMPLES, s),
    "decision at x": lambda s: certify.decision(mlp, SAMPLES, s, x=X),
    "joint_decision": lambda s: certify.joint_decision(mlp, SAMPLES, s),
    "predictive": lambda s: certify.predictive(mlp, SAMPLES, s),
    "uncertainty": lambda s: certify.uncertainty(mlp, SAMPLES, s),
    "mean_and_variance": lambda s: certify.mean_and_variance(mlp, SAMPLES, s),
    "expectation": lambda s: certify.expectation(mlp, POSTERIOR, s),
    "statistical": lambda s: certify.statistical(KEY, mlp, POSTERIOR, s, num_samples=2),
    "cascade": lambda s: certify.cascade(mlp, SAMPLES, batched(s), methods=("ibp",)),
    "safety": lambda s: certify.safety(KEY, mlp, POSTERIOR, s, certify.class_stays(0, CLASSES)),
    "safety by boxes": lambda s: certify.safety(
        KEY, mlp, POSTERIOR, s, certify.class_stays(0, CLASSES), method="ibp"
    ),
    "gaussian margins": lambda s: bc.gaussian.margins(
        mlp, POSTERIOR, s, *certify.class_stays(0, CLASSES)
    ),
    "sampled_safety": lambda s: certify.sampled_safety(
        KEY, POSTERIOR, num_samples=2, proved=certify.proves_class(mlp, s, 0)
    ),
}


@pytest.mark.parametrize("name", OF_SETS)
def test_a_set_that_is_known_to_be_empty_is_an_error(name):
    for region in box_errors().values():
        with pytest.raises(ValueError, match=r"lower > upper|NaN|infinite|radius|empty"):
            OF_SETS[name](region)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, x: certify.decision(mlp, SAMPLES, s, x=x),
        lambda s, x: certify.joint_decision(mlp, SAMPLES, s, x=x),
        lambda s, x: certify.statistical(KEY, mlp, POSTERIOR, s, x=x, num_samples=2),
        lambda s, x: certify.cascade(mlp, SAMPLES, batched(s), x=batched(x), methods=("ibp",)),
    ],
)
def test_a_nominal_input_that_is_known_to_lie_outside_is_an_error(call):
    for region in (Box(X - 0.1, X + 0.1), LpBall(X, 0.1, 1), LpBall(X, 0.1, 2)):
        for x in (X + 0.2, X.at[0].set(NAN)):
            with pytest.raises(ValueError, match=r"outside|does not hold"):
                call(region, x)


AROUND = {
    "ball": lambda x, clip: ball(x, 0.1, clip=clip),
    "radius": lambda x, clip: certify.radius(mlp, SAMPLES, x, largest=0.1, clip=clip),
    "statistical_radius": lambda x, clip: certify.statistical_radius(
        KEY, mlp, POSTERIOR, x, largest=0.1, num_samples=2, clip=clip
    ),
    "attacked_radius": lambda x, clip: certify.attacked_radius(
        KEY, mlp, SAMPLES, x, 0, largest=0.1, clip=clip
    ),
    "pgd": lambda x, clip: attack.pgd(KEY, mlp, SAMPLES, x, 0, 0.1, clip=clip),
    "pgd2": lambda x, clip: attack.pgd(KEY, mlp, SAMPLES, x, 0, 0.1, clip=clip, p=2),
    "fgsm": lambda x, clip: attack.fgsm(mlp, SAMPLES, x, 0, 0.1, clip=clip),
    "apgd": lambda x, clip: attack.apgd(KEY, mlp, SAMPLES, x, 0, 0.1, clip=clip),
    "targeted": lambda x, clip: attack.targeted_apgd(KEY, mlp, SAMPLES, x, 0, 0.1, clip=clip),
    "square": lambda x, clip: attack.square(KEY, mlp, SAMPLES, x, 0, 0.1, clip=clip),
    "strongest": lambda x, clip: attack.strongest(KEY, mlp, SAMPLES, x, 0, 0.1, clip=clip),
    "likelihood": lambda x, clip: likelihood.robust_categorical(mlp, clip=clip)(
        KEY, PARAMS, x, jnp.asarray(0), bc.Threat(jnp.asarray(0.1), jnp.asarray(0.5), jnp.zeros(()))
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_center_that_is_known_to_lie_outside_the_range_is_an_error(name):
    with pytest.raises(ValueError, match=r"x holds 6\.4.*255"):
        AROUND[name](X * 16, CLIP)
    for clip in (None, CLIP):
        if name != "likelihood":
            with pytest.raises(ValueError, match="x holds NaN"):
                AROUND[name](X.at[0].set(NAN), clip)


def test_numbers_may_be_known_in_part():
    decide = jax.jit(lambda upper: certify.decision(mlp, SAMPLES, Box(X - 0.01, upper)).robust)
    assert decide(X + 0.01) and not decide(X - 0.02)
    decide = jax.jit(lambda eps: certify.decision(mlp, SAMPLES, LpBall(X, eps, 2)).robust)
    assert decide(0.01) and not decide(-0.01)
    at = jax.jit(lambda x: certify.decision(mlp, SAMPLES, Box(X - 0.01, X + 0.01), x=x).robust)
    assert at(X) and not at(X + 0.02)
    known = X * NAN
    with pytest.raises(ValueError, match="NaN"):
        jax.jit(lambda upper: bc.ibp(mlp)(PARAMS, Box(known, upper)))(X)
