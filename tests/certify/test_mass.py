"""Masses of boxes: right to many digits, and never rounded up."""

import math
from decimal import Decimal, getcontext
from functools import cache

import numpy as np
import pytest
from scipy.special import ndtr

from bnncert.certify.formal import mass

getcontext().prec = 90
RANDOM = np.random.default_rng(0)


@cache
def tail(z: float) -> Decimal:
    """Q(z) to 40 digits and more, by the series of the cdf; z >= 0, up to 12."""
    x = Decimal(z)
    term = total = x
    n = 1
    while term > Decimal(10) ** -88 * total and term:
        term = term * x * x / (2 * n + 1)  # Phi - 1/2 = p(x) sum x^(2n+1) / (2n+1)!!
        total += term
        n += 1
    pi = Decimal(
        "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899"
    )
    return Decimal("0.5") - (-x * x / 2).exp() / (2 * pi).sqrt() * total


def exact(lower, upper, loc, scale) -> Decimal:
    """The mass by its definition, in decimals."""
    product = Decimal(1)
    for l, u, m, s in zip(*(np.ravel(v).tolist() for v in (lower, upper, loc, scale)), strict=True):
        below, above = ((Decimal(e) - Decimal(m)) / Decimal(s) for e in (l, u))
        cdf = [1 - tail(z) if z >= 0 else tail(-z) for z in (below, above)]
        product *= cdf[1] - cdf[0]
    return product


def test_the_reference_is_right():
    assert abs(tail(1.0) - Decimal("0.15865525393145705141476745436796")) < Decimal(10) ** -30
    assert abs(tail(10.0) / Decimal("7.6198530241605260659733432515e-24") - 1) < Decimal(10) ** -26


def test_scipys_tails_are_far_within_the_error_that_is_allowed():
    for z in np.linspace(0.01, 12, 60).tolist():
        relative = abs(float(Decimal(float(ndtr(-z))) / tail(z) - 1))
        assert relative < 0.5 * float(mass._error(np.asarray(z))), z


KINDS = {
    "around": lambda n: (-RANDOM.uniform(0, 8, n), RANDOM.uniform(0, 8, n)),
    "aside": lambda n: (lambda a: (a, a + RANDOM.uniform(0.01, 4, n)))(RANDOM.uniform(0, 6, n)),
    "left": lambda n: (lambda a: (-a - RANDOM.uniform(0.01, 4, n), -a))(RANDOM.uniform(0, 6, n)),
    "narrow": lambda n: (-RANDOM.uniform(1e-7, 1e-6, n), RANDOM.uniform(1e-7, 1e-6, n)),
    "sliver": lambda n: (lambda a: (a, a + 1e-7))(RANDOM.uniform(0.1, 2, n)),
    "wide": lambda n: (-RANDOM.uniform(6, 9, n), RANDOM.uniform(6, 9, n)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 7])
def test_never_rounded_up_and_right_to_five_digits(kind, count):
    for _ in range(10):
        loc = RANDOM.normal(size=count).astype(np.float32)
        scale = np.exp(RANDOM.normal(size=count)).astype(np.float32)
        ends = [loc + z * scale.astype(np.float64) for z in KINDS[kind](count)]
        if kind in ("around", "wide"):
            ends = [np.float32(e) for e in ends]
        found, true = mass.mass(*ends, loc, scale), exact(*ends, loc, scale)
        assert Decimal(found) <= true
        assert float(1 - Decimal(found) / true) < (1e-5 if kind in ("sliver", "narrow") else 1e-7)


def test_never_rounded_up_near_one():
    """Where sums of float32 cdfs err upwards: 100,000 weights at 5 to 7 deviations."""
    for reach in (5.0, 6.0, 7.0):
        z = np.full(100_000, np.float32(reach))
        found = mass.mass(-z, z, np.zeros_like(z), np.ones_like(z))
        true = (1 - 2 * tail(reach)) ** 100_000
        assert Decimal(found) <= true and float(true - Decimal(found)) < 1e-12
    assert Decimal(mass.log_mass(-z, z, np.zeros_like(z), np.ones_like(z))) <= true.ln()


def test_masses_agree_with_a_million_draws():
    lower, upper = np.array([-1.0, 0.2, -3.0]), np.array([0.5, 2.0, 0.1])
    loc, scale = np.array([0.1, 0.0, -0.5]), np.array([1.0, 2.0, 0.5])
    draws = loc + scale * np.random.default_rng(1).normal(size=(1_000_000, 3))
    hits = ((draws >= lower) & (draws <= upper)).all(1).mean()
    found = mass.mass(lower, upper, loc, scale)
    assert abs(found - hits) < 4 * math.sqrt(found * (1 - found) / 1e6)


def test_unbounded_and_empty_boxes():
    inf = np.inf
    assert 1 - 1e-14 < mass.mass(-inf, inf, 0.0, 1.0) <= 1
    assert Decimal(mass.mass(5.0, inf, 0.0, 1.0)) <= tail(5.0)
    assert mass.mass(60.0, 61.0, 0.0, 1.0) == 0.0
    assert mass.mass(-inf, 60.0, 100.0, 1.0) == 0.0
    assert mass.mass(1.0, 1.0, 0.0, 1.0) == 0.0


def test_sums_round_down_and_complements_up():
    parts = [0.1] * 10
    exactly = 10 * Decimal(parts[0])
    assert Decimal(mass.total(parts)) <= exactly <= 1 + Decimal(10) ** -15
    assert Decimal(mass.complement(parts)) >= 1 - exactly
    assert mass.total([]) == 0.0 and mass.complement([]) == 1.0
