"""Statements from independent draws: as often wrong as they say, and true of what is known."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from bnncert.certify import decision, statistical
from bnncert.certify.sampled import inequalities as confidence
from bnncert.certify.sampled.decision import stated
from bnncert.certify.sampled.draws import over_draws
from bnncert.posterior import MeanField, Mixture, Samples
from bnncert.posterior.leaves import draw_keys
from bnncert.sets import Box, ball

KEY = jax.random.key(0)
DELTA, REPETITIONS, CROWD, DRAWS = 0.05, 1000, 30, 32


# What is tested here is what draws say; `test_predictive.py` has the bounds.
QUICK: dict[str, Any] = {"method": "ibp", "rounding": "nearest"}


def two_classes(params, x):
    """Logits (w x, -w x): pi_0 - pi_1 = E tanh(w x)."""
    return params["w"] * x * jnp.array([1.0, -1.0])


def normal(loc, scale):
    return MeanField({"w": jnp.asarray(loc, jnp.float32)}, {"w": jnp.asarray(scale, jnp.float32)})


def extremes(loc, scale, low, high):
    """Least and greatest E tanh(w x) over x in [low, high], by brute force and quadrature."""
    z = np.linspace(-10, 10, 4001)
    mass = stats.norm.pdf(z) * (z[1] - z[0])
    values = np.tanh(np.linspace(low, high, 41)[:, None] * (loc + scale * z)) @ mass
    return values.min(), values.max()


def repeated(points: int, draws: int, **options) -> Any:
    """`statistical` at each of many points, each with a key of its own, again and again."""
    options = {"num_pilot": 1, "delta": DELTA, **QUICK, **options}

    def one(key, q, low, high):
        return statistical(
            key, two_classes, q, Box(low[None], high[None]), num_samples=draws, **options
        )

    each = jax.vmap(jax.vmap(one, in_axes=(0, None, None, None)), in_axes=(0, None, None, None))
    return partial(jax.jit(each), jax.random.split(KEY, (REPETITIONS, points)))


def wrong(run, loc, scale, low, high):
    """In which repetition something untrue is said of any point; and how often robustness is."""
    found = run(normal(loc, scale), jnp.float32(low), jnp.float32(high))
    least, most = extremes(loc, scale, low, high)
    zero = np.array(found.predicted) == 0
    gap = np.where(zero, least, -most)
    claimed = np.take_along_axis(np.array(found.margins), (zero * 1)[..., None], axis=-1)[..., 0]
    untrue = (claimed > gap) | (np.array(found.robust) & (gap <= 0))
    untrue |= np.array(found.probability.lower) > (1 + gap) / 2
    untrue |= np.array(found.probability.upper) < np.where(zero, 1 + most, 1 - least) / 2
    return untrue.any(axis=1), float(found.robust.mean())


def at_most(rate: float, untrue) -> bool:
    """Whether repetitions leave it possible that errors are no more frequent than this."""
    count = int(untrue.sum())
    return bool(stats.binomtest(count, untrue.size, rate, alternative="greater").pvalue > 0.01)


# --- confidence -----------------------------------------------------------------------------------

# A fair coin's draws; one that is decided but uncertain; a set on which each draw has its own worst
# point; and nearly certain draws, whose rare exception is what a variance may not have seen.
CASES = [
    (0.0, 50.0, 1.0, 1.0),
    (0.3, 0.5, 1.0, 1.0),
    (0.0, 1.0, 0.3, 2.0),
    (2.0, 1.0, 50.0, 50.0),
]


@pytest.mark.parametrize("inequality", confidence.INEQUALITIES)
def test_what_is_said_of_one_point_is_untrue_at_most_as_often_as_delta(inequality):
    run = repeated(1, DRAWS, inequality=inequality)
    for case in CASES:
        untrue, _ = wrong(run, *case)
        assert untrue.mean() <= DELTA and at_most(DELTA, untrue), case


def test_what_is_said_of_many_points_at_once_is_untrue_of_any_at_most_as_often_as_delta():
    together = repeated(CROWD, DRAWS, num_points=CROWD, inequality="hoeffding")
    untrue, _ = wrong(together, *CASES[0])
    assert untrue.mean() <= DELTA and at_most(DELTA, untrue)
    # The same statements, each made as if it were the only one, are not all true together.
    untrue, _ = wrong(repeated(CROWD, DRAWS, inequality="hoeffding"), *CASES[0])
    assert not at_most(DELTA, untrue)


def test_24_draws_without_their_slack_certify_what_is_not_robust(monkeypatch):
    """At a tie nothing is robust; the mean of a few draws says so every second time."""
    untrue, robust = wrong(repeated(1, 24), *CASES[0])
    assert at_most(DELTA, untrue) and robust < 0.01
    monkeypatch.setattr(confidence, "slack", lambda draws, *_: jnp.zeros(draws.shape[1:]))
    untrue, robust = wrong(repeated(1, 24), *CASES[0])
    assert not at_most(DELTA, untrue) and robust > 0.4


def test_32_draws_say_nothing_of_ten_thousand_points_and_1000_say_something():
    q = normal(1.5, 0.3)

    @partial(jax.jit, static_argnums=0)
    def margin(draws):
        box = Box(jnp.ones(1), jnp.ones(1))
        found = statistical(KEY, two_classes, q, box, num_samples=draws, num_points=10_000, **QUICK)
        return found.margins[1], found.robust

    truth = extremes(1.5, 0.3, 1.0, 1.0)[0]
    few, robust = margin(32)
    assert truth - few > 0.85 and not robust
    many, robust = margin(1000)
    assert 0 < truth - many < 0.15 and robust


def test_slack_of_differences_is_twice_that_of_probabilities():
    draws = jax.random.uniform(KEY, (50, 3))
    for inequality in confidence.INEQUALITIES:
        of_unit = confidence.slack(draws, DELTA, 1.0, inequality)
        of_differences = confidence.slack(2 * draws - 1, DELTA, 2.0, inequality)
        np.testing.assert_allclose(of_differences, 2 * of_unit, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 30, 1000])
def test_closed_forms(count):
    draws = np.random.default_rng(count).uniform(size=(count, 2)).astype(np.float32)
    hoeffding = np.sqrt(np.log(1 / DELTA) / (2 * count))
    variance = draws.astype(np.float64).var(axis=0, ddof=1)
    log = np.log(2 / DELTA)
    bernstein = np.sqrt(2 * variance * log / count) + 7 * log / (3 * (count - 1))
    for inequality, exact in {"hoeffding": np.full(2, hoeffding), "bernstein": bernstein}.items():
        found = np.array(confidence.slack(jnp.asarray(draws), DELTA, 1.0, inequality), np.float64)
        np.testing.assert_allclose(found, exact, rtol=3e-4)
        assert (found >= exact).all()  # rounded up
    best = confidence.slack(jnp.asarray(draws), DELTA, 1.0)
    each = [
        confidence.slack(jnp.asarray(draws), DELTA / 2, 1.0, name)
        for name in ("hoeffding", "bernstein")
    ]
    np.testing.assert_array_equal(best, np.minimum(each[0], each[1]))


def test_variance_is_never_rounded_down():
    rng = np.random.default_rng(0)
    for scale in (1e-4, 1.0):
        draws = (0.9 + scale * rng.normal(size=(5000, 20))).astype(np.float32)
        exact = draws.astype(np.float64).var(axis=0, ddof=1)
        found = np.array(confidence.sample_variance(jnp.asarray(draws)), np.float64)
        assert (found >= exact).all() and (found <= exact * 1.01).all()


# --- truth ----------------------------------------------------------------------------------------


def three_classes(params, x):
    return jnp.stack([params["w"][0] * x[0], params["w"][1] * jax.nn.relu(1 - x[0]), 0.3 * x[0]])


def exact_differences(loc, scale, c, low, high):
    """min over x of pi_c - pi_j, for two normal weights: a grid, and Gauss and Hermite's rule."""
    nodes, weights = special.roots_hermitenorm(60)
    first, second = np.meshgrid(loc[0] + scale[0] * nodes, loc[1] + scale[1] * nodes)
    mass = np.outer(weights, weights) / weights.sum() ** 2
    rows = []
    for x in np.linspace(low, high, 201):
        logits = np.stack(
            [first * x, second * max(1 - x, 0.0), np.full_like(first, np.float32(0.3) * x)]
        )
        rows.append((special.softmax(logits, axis=0) * mass).sum(axis=(1, 2)))
    pi = np.array(rows)
    return (pi[:, [c]] - pi).min(axis=0), pi[:, c].min(), pi[:, c].max()


def test_exact_decision_bounds_of_two_uncertain_weights_lie_inside():
    loc, scale = np.array([2.0, 1.0]), np.array([0.7, 0.5])
    q = normal(loc, scale)

    @jax.jit
    def certify(low, high):
        box = Box(low[None], high[None])
        every = jax.tree.map(lambda leaf: leaf, q.sample(KEY, 2000))
        return (
            statistical(KEY, three_classes, q, box, num_samples=2000, method="ibp"),
            decision(three_classes, every, box, method="ibp"),
        )

    seen = []
    for low, high in [(1.4, 1.5), (1.0, 2.0), (0.1, 0.2), (0.2, 1.0)]:
        found, of_draws = certify(jnp.float32(low), jnp.float32(high))
        c = int(found.predicted)
        exact, least, most = exact_differences(loc, scale, c, low, high)
        assert (np.array(found.margins) <= exact + 1e-9).all()
        assert found.probability.lower <= least and most <= found.probability.upper
        # Another batch of draws, certified as they are, lies above by about the slack.
        assert (np.array(of_draws.margins) >= np.array(found.margins) - 1e-6).all()
        seen.append((bool(found.robust), (exact - np.array(found.margins)).max()))
    assert {robust for robust, _ in seen} == {True, False}
    assert min(gap for _, gap in seen) < 0.12


# --- draws ----------------------------------------------------------------------------------------


def test_draws_of_a_mixture_are_independent_though_its_own_sample_is_stratified():
    q = Mixture(normal([-1.0, 1.0], [0.1, 0.1]))
    keys = jax.random.split(KEY, 200)
    positive = jax.jit(
        jax.vmap(lambda k: over_draws(lambda p: p["w"] > 0, q, draw_keys(k, 64), 64).sum())
    )(keys)
    assert 12 < positive.var() < 21  # 16 of a binomial, 0 of a stratified one
    assert abs(float(positive.mean()) - 32) < 1.2


def test_pilot_and_main_draws_are_different():
    """At a tie, a class chosen by the draws themselves would win them more often than not."""

    @jax.jit
    @jax.vmap
    def margin(key):
        box = Box(jnp.ones(1), jnp.ones(1))
        found = statistical(
            key, two_classes, normal(0.0, 50.0), box, num_samples=16, num_pilot=16, **QUICK
        )
        return found.margins.min()

    found = margin(jax.random.split(KEY, 2000))
    slack = float(confidence.hoeffding(16, DELTA / 6, 2.0))
    assert abs(float(found.mean()) + slack) < 4 * 0.25 / np.sqrt(2000)


def test_members_are_refused():
    members = Samples(normal(0.0, 1.0).sample(KEY, 5))
    stacked: Any = members.params
    box = ball(jnp.ones(1), 0.1)
    for q in (members, Mixture(jax.tree.map(lambda leaf: leaf[None], members))):
        with pytest.raises(TypeError, match=r"bnncert\.certify\.decision"):
            statistical(KEY, two_classes, q, box, num_samples=100)
    with pytest.raises(TypeError, match="posterior"):
        statistical(KEY, two_classes, stacked, box, num_samples=100)


def test_errors_name_the_fault():
    box, q = ball(jnp.ones(1), 0.1), normal(0.0, 1.0)
    cases: list[tuple[str, dict]] = [
        ("1 draws", {"num_samples": 1}),
        ("delta = 0", {"delta": 0.0}),
        ("delta = 5", {"delta": 5.0}),
        ("num_points = 0", {"num_points": 0}),
        ("num_pilot = 0", {"num_pilot": 0}),
        ("inequality", {"inequality": "chernoff"}),
        ("outside", {"x": jnp.zeros(1)}),
    ]
    for message, options in cases:
        with pytest.raises(ValueError, match=message):
            statistical(KEY, two_classes, q, box, **{"num_samples": 50, **options})
    no_set: Any = jnp.ones(1)
    with pytest.raises(TypeError, match="x_set"):
        statistical(KEY, two_classes, q, no_set, num_samples=50)


def test_confidence_is_never_rounded_up():
    for delta in (0.05, 0.1, 0.01, 1e-9):
        assert 0 <= (1 - delta) - float(stated(delta)) < 1e-7
