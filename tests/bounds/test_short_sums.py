"""Outward rounding of sums of few terms, whose terms cancel: every length from 1 up."""

from fractions import Fraction
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound
from bnncert.bounds.margins import margin_bounds
from bnncert.certify import decision
from bnncert.sets import Box

pytestmark = pytest.mark.slow

METHODS = ("ibp", "forward", "crown-ibp", "crown")


def exact_dot(w, x):
    """In exact arithmetic, rounded once to float64."""
    return float(sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(w, x, strict=True)))


def orders(w, x):
    """What float32 makes of the sum of products, in the orders there are."""
    products = np.asarray(w, np.float32) * np.asarray(x, np.float32)
    found = []
    for order in list(permutations(range(len(w))))[:24]:
        total = np.float32(0)
        for i in order:
            total = np.float32(total + products[i])
        found.append(float(total))
    return found


def cancelling(rng, length):
    """Weights of which the last undoes the others at x, and x itself."""
    x = rng.uniform(0.5, 1.5, length).astype(np.float32)
    w = (10 ** rng.uniform(-3, 5, length) * rng.choice([-1, 1], length)).astype(np.float32)
    if length > 1:
        w[-1] = -np.float32(exact_dot(w[:-1], x[:-1]) / x[-1])
    return w, x


SUMS = {
    "dense": lambda w, x: w[None] @ x,
    "dense_reversed": lambda w, x: (x @ w)[None],
    "sum": lambda w, x: (w * x).sum(keepdims=True),
    "mean": lambda w, x: len(w) * (w * x).mean(keepdims=True),
    "cumsum": lambda w, x: jnp.cumsum(w * x)[-1:],
    "pooled": lambda w, x: jax.lax.reduce_window(w * x, 0.0, jax.lax.add, w.shape, (1,), ((0, 0),)),
    "convolution": lambda w, x: jnp.convolve(x, w[::-1], "valid", precision="highest"),
    "pointwise_convolution": lambda w, x: jax.lax.conv(
        x.reshape(1, -1, 1), w.reshape(1, -1, 1), (1,), "VALID", precision="highest"
    ).reshape(1),
    "scattered": lambda w, x: jnp.zeros(1).at[jnp.zeros(len(w), int)].add(w * x),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_any_length_encloses_every_order_and_the_exact_value(name):
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 4):
        w, x = zip(*(cancelling(rng, length) for _ in range(200)), strict=True)
        w, x = np.stack(w), np.stack(x)
        found = jax.jit(
            jax.vmap(
                lambda w, x: [
                    bound(lambda v: SUMS[name](w, v), m, rounding="outward")(Box(x, x))
                    for m in METHODS
                ]
            )
        )(w, x)
        for method, box in zip(METHODS, found, strict=True):
            for one_w, one_x, lower, upper in zip(w, x, box.lower, box.upper, strict=True):
                values = [exact_dot(one_w, one_x), *orders(one_w, one_x)]
                assert float(lower[0]) <= min(values), (name, method, length)
                assert max(values) <= float(upper[0]), (name, method, length)


@pytest.mark.parametrize("method", METHODS)
def test_two_terms_that_cancel(method):
    x = jnp.float32([1.1, 1.1000001])
    box = bound(lambda x: jnp.float32([[1e4, -1e4]]) @ x, method, rounding="outward")(Box(x, x))
    exact = exact_dot([1e4, -1e4], np.asarray(x))
    assert float(box.lower[0]) <= exact <= float(box.upper[0])


@pytest.mark.parametrize("method", METHODS)
def test_three_terms_that_cancel_certify_no_class_that_the_network_does_not_choose(method):
    w = jnp.float32([11242.833, 16706.244, -54603.406])
    x = jnp.float32([0.94956785, 1.1340308, 0.5424795])
    zero = jnp.zeros(())

    def apply(w, x):
        return jnp.stack([w @ x, zero])

    found = decision(apply, w[None], Box(x, x), method=method)
    assert not bool(found.robust)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", (2, 3))
def test_margins_of_few_classes_are_sums_too(classes, method):
    """Differences of two numbers in [l, u], exact in float64, where centre and radius are not."""
    rng = np.random.default_rng(1)
    ends = np.float32(
        rng.uniform(1e3, 1e4, (500, 1)) * (1 + 1e-7 * rng.normal(size=(500, classes)))
    )
    wide = np.float32(10.0 ** rng.uniform(-4, 4, ends.shape))
    first = np.arange(classes) == 0  # its upper end is near the lower ends of the others
    lower, upper = np.where(first, ends - wide, ends), np.where(first, ends, ends + wide)
    bounded = margin_bounds(lambda params, x: x, method, rounding="outward")
    box = jax.jit(jax.vmap(lambda l, u: bounded(jnp.ones(classes), Box(l, u), jnp.int32(0))))(
        lower, upper
    )
    l, u = (np.asarray(end, np.float64) for end in (lower, upper))
    assert (np.asarray(box.lower)[:, 1:] <= (l[:, 1:] - u[:, :1])).all()
    assert (np.asarray(box.upper)[:, 1:] >= (u[:, 1:] - l[:, :1])).all()


def test_products_of_two_bounded_vectors_of_any_length():
    rng = np.random.default_rng(2)
    for length in (1, 2, 3):
        pairs = [cancelling(rng, length) for _ in range(200)]
        w, x = (np.stack(side) for side in zip(*pairs, strict=True))
        for method in ("ibp", "crown-ibp"):
            product = bound(lambda w, x: w @ x, method, rounding="outward")
            box = jax.jit(jax.vmap(lambda w, x, g=product: g(Box(w, w), Box(x, x))))(w, x)
            for i in range(len(pairs)):
                values = [exact_dot(w[i], x[i]), *orders(w[i], x[i])]
                assert float(box.lower[i]) <= min(values), (method, length)
                assert max(values) <= float(box.upper[i]), (method, length)
