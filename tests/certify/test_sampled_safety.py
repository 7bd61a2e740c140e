"""P_safe from draws: as often wrong as it says, and around what is known of one weight."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bnncert import attack
from bnncert.certify import proves_class, proves_outputs, sampled_safety
from bnncert.certify.sampled import inequalities as confidence
from bnncert.certify.sampled.safety import _bounds
from bnncert.posterior import MeanField, Samples
from bnncert.sets import Box, ball

KEY = jax.random.key(0)
DELTA = 0.05
X, EPS = jnp.array([1.0]), 0.5
Q = MeanField({"w": jnp.float32(0.8)}, {"w": jnp.float32(1.0)})
# Logits (w x, .4) on [.5, 1.5]: class 0 wins everywhere where w > .8.
P_SAFE = stats.norm.sf(0.8, 0.8, 1.0)

bounds = cache(_bounds)


def apply(params, x):
    return jnp.stack([params["w"] * x[0], jnp.float32(0.4)])


def broken(params):
    one = jax.tree.map(lambda leaf: leaf[None], params)
    return attack.pgd(KEY, apply, one, X, 0, EPS, steps=3).broken


def at_most(rate: float, errors: int, repetitions: int) -> bool:
    found = stats.binomtest(errors, repetitions, rate, alternative="greater")
    return bool(found.pvalue > 0.01)


def test_bounds_enclose_p_safe_of_one_weight():
    proved = proves_class(apply, ball(X, EPS), 0, method="ibp")
    found = sampled_safety(
        KEY, Q, num_samples=2000, proved=proved, broken=broken, delta=DELTA, batch_size=50
    )
    assert found.lower <= P_SAFE <= found.upper
    # One weight: the bound is exact, and each draw is proved safe or broken.
    assert found.proved + found.broken == found.num_samples == 2000
    assert found.upper - found.lower < 0.05 and found.confidence == 0.95
    exact = stats.binomtest(found.proved, 2000).proportion_ci(0.95)
    np.testing.assert_allclose([found.lower, found.upper], [exact.low, exact.high], rtol=1e-6)


def test_one_side_alone_has_all_of_delta():
    proved = proves_outputs(lambda p, x: p["w"] * x, ball(X, EPS), Box(-jnp.ones(1), jnp.ones(1)))
    found = sampled_safety(KEY, Q, num_samples=500, proved=proved, delta=DELTA, batch_size=50)
    exact = np.diff(stats.norm.cdf([-2 / 3, 2 / 3], 0.8, 1.0))[0]
    assert found.lower <= exact and found.upper == 1.0 and found.broken == 0
    assert found.lower == confidence.clopper_pearson(found.proved, 500, DELTA)
    assert exact - found.lower < 0.1


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("gap", [0.0, 0.05])
def test_is_wrong_at_most_as_often_as_delta(p, gap):
    """`gap`: the mass of networks that are neither proved nor broken; half of it is safe."""
    repetitions, n = 4000, 200
    parts = [p * (1 - gap), gap, (1 - p) * (1 - gap)]
    counts = np.random.default_rng(0).multinomial(n, parts, size=repetitions)[:, ::2].tolist()
    truth = parts[0] + gap / 2

    def errors(lower, upper) -> int:
        return sum(lower(k, m) > truth or upper(k, m) < truth for k, m in counts)

    wrong = errors(lambda k, m: bounds(k, m, n, DELTA)[0], lambda k, m: bounds(k, m, n, DELTA)[1])
    assert at_most(DELTA, wrong, repetitions)
    if gap == 0 and p == 0.5:
        # Frequencies themselves are no bounds, nor are two that each take all of delta.
        naive = errors(lambda k, m: k / n, lambda k, m: 1 - m / n)
        assert not at_most(DELTA, naive, repetitions)
        greedy = errors(
            lambda k, m: bounds(k, None, n, DELTA)[0], lambda k, m: bounds(None, m, n, DELTA)[1]
        )
        assert not at_most(DELTA, greedy, repetitions)


def test_clopper_pearson_solves_its_equation_from_below():
    for n in (1, 10, 1000, 100_000):
        for k in {0, 1, n // 3, n - 1, n}:
            p = confidence.clopper_pearson(k, n, DELTA)
            if k == 0:
                assert p == 0
                continue
            tail = stats.binom.sf(k - 1, n, p)
            assert DELTA * (1 - 1e-6 - 2e-9 * n) < tail <= DELTA, (k, n)
    assert confidence.clopper_pearson(7, 7, DELTA) <= DELTA ** (1 / 7)


def test_a_draw_that_is_proved_and_broken_stops_everything():
    """Proof and attack that speak of different radii are no two sides of one number."""
    proved = proves_class(apply, ball(X, 0.1), 0, method="ibp")
    with pytest.raises(RuntimeError, match="proved safe and broken"):
        sampled_safety(KEY, Q, num_samples=200, proved=proved, broken=broken, batch_size=50)


def test_errors_name_the_fault():
    always: Any = lambda _: True  # noqa: E731
    members = Samples(Q.sample(KEY, 5))
    with pytest.raises(TypeError, match="Markov chain"):
        sampled_safety(KEY, members, num_samples=10, proved=always)
    cases = [
        ("proved", partial(sampled_safety, KEY, Q, num_samples=10)),
        ("0 draws", partial(sampled_safety, KEY, Q, num_samples=0, proved=always)),
        ("delta", partial(sampled_safety, KEY, Q, num_samples=10, proved=always, delta=1.0)),
        ("one boolean", partial(sampled_safety, KEY, Q, num_samples=3, proved=lambda _: X > 0)),
        ("successes = 3", partial(confidence.clopper_pearson, 3, 2, DELTA)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    no_set: Any = X
    with pytest.raises(TypeError, match="x_set"):
        proves_class(apply, no_set, 0)
