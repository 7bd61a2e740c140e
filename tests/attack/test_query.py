"""Square: works where gradients do not, in windows, inside its ball."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert import attack
from bnncert.attack.square_search import _window
from bnncert.sets import ball
from tests.attack.networks import BATCH, SIZE, chosen, clean_margins, linear, mlp, mlp_samples

XS = jax.random.uniform(jax.random.key(1), (BATCH, SIZE))


@cache  # compiling is what costs: cases with the same options share it
def batched(apply, attacker=attack.square, **options):
    @jax.jit
    def run(key, samples, xs, ys, eps):
        keys = jax.random.split(key, len(xs))
        one = partial(attacker, **options)
        return jax.vmap(lambda k, x, y: one(k, apply, samples, x, y, eps))(keys, xs, ys)

    return partial(run, jax.random.key(0))


def test_stays_in_the_set_repeats_by_key_and_reports_what_is_there():
    samples, eps, clip = mlp_samples(), 0.3, (0.0, 1.0)
    ys = chosen(mlp, samples, XS)
    found = batched(mlp, clip=clip, queries=40)(samples, XS, ys, eps)
    box: Any = jax.vmap(lambda x: ball(x, jnp.float32(eps), clip=clip))(XS)
    assert (found.x >= box.lower).all() and (found.x <= box.upper).all()
    clean = clean_margins(mlp, samples, XS, ys)
    assert (found.margin <= clean + 1e-5).all() and (found.margin < clean - 0.05).mean() > 0.9
    np.testing.assert_allclose(found.margin, clean_margins(mlp, samples, found.x, ys), atol=1e-5)
    again = batched(mlp, clip=clip, queries=40)(samples, XS, ys, eps)
    np.testing.assert_array_equal(found.x, again.x)
    more = batched(mlp, clip=clip, queries=40, restarts=2)(samples, XS, ys, eps)
    assert (more.margin <= found.margin + 1e-6).all() and (more.margin < found.margin - 1e-3).any()


def test_reaches_the_corner_that_is_worst_for_a_linear_network():
    w = jax.random.normal(jax.random.key(4), (1, 2, SIZE))
    samples, a, eps = {"w": w, "b": jnp.array([[3.0, 0.0]])}, w[0, 0] - w[0, 1], 0.2
    found = batched(linear, queries=300)(samples, XS, jnp.zeros(BATCH, int), eps)
    expected = XS @ a + 3.0 - eps * jnp.abs(a).sum()
    np.testing.assert_allclose(found.margin, expected, rtol=1e-5, atol=2e-5)


def test_a_staircase_hides_its_gradient_from_pgd_and_not_its_values():
    """Inputs rounded to eighths: the gradient is zero almost everywhere."""

    def stairs(params, x):
        return linear(params, jnp.round(8 * x) / 8)

    w = jax.random.normal(jax.random.key(4), (1, 2, SIZE))
    samples, ys = {"w": w, "b": jnp.zeros((1, 2))}, jnp.zeros(BATCH, int)
    found = batched(stairs, queries=100)(samples, XS, ys, 0.5)
    by_gradients = batched(stairs, attack.pgd, steps=5)(samples, XS, ys, 0.5)
    clean = clean_margins(stairs, samples, XS, ys)
    np.testing.assert_allclose(by_gradients.margin, clean, atol=1e-5)
    assert (found.margin < clean - 1).all()


def test_asks_for_no_gradient():
    def apply(params, x):
        z, start = 1 - x.sum(), (0, jnp.ones(()))
        cube = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * z), start)[1]
        return params * jnp.array([cube, 0.0])

    @partial(jax.jit, static_argnums=0)
    def run(one):
        return one(jax.random.key(0), apply, jnp.ones((1, 2)), jnp.zeros(2), 0, 0.6)

    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        run(attack.pgd)
    np.testing.assert_allclose(run(partial(attack.square, queries=20)).margin, -(0.2**3), rtol=1e-4)
    # and a single query is the clean input
    np.testing.assert_array_equal(run(partial(attack.square, queries=1)).x, 0.0)


def test_windows_are_squares_anywhere_in_the_image():
    keys = jax.random.split(jax.random.key(0), (100, 2))
    found = jax.jit(jax.vmap(lambda k: _window(k[0], k[1], jnp.asarray(3), (5, 7, 2))))(keys)
    places = set()
    for inside, signs in zip(*map(np.asarray, found), strict=True):
        rows, columns, _ = np.nonzero(inside)
        assert inside.sum() == 9 and np.ptp(rows) == np.ptp(columns) == 2
        assert signs.shape == (1, 1, 2) and (np.abs(signs) == 1).all()
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) == 3 * 5  # each corner that is possible


def test_the_layout_of_an_image_does_not_matter():
    """Rows, columns, channels; channels first; and, of one channel, no axis for it."""
    w = jax.random.normal(jax.random.key(6), (2, 3, 4, 5, 1))
    x = jax.random.uniform(jax.random.key(7), (4, 5, 1))

    def apply(params, x):
        return jnp.einsum("crsk,rsk->c", params, x.reshape(4, 5, 1))

    @jax.jit
    def run(x):
        forms: list[tuple[Any, Any]] = [
            (x, {}),
            (x.reshape(1, 4, 5), {"channels": 0}),
            (x[..., 0], {}),
            (x, {"channels": None}),
        ]
        return [
            attack.square(jax.random.key(8), apply, w, image, 0, 0.1, queries=30, **options)
            for image, options in forms
        ]

    last, first, none, features = run(x)
    np.testing.assert_array_equal(last.x.ravel(), first.x.ravel())
    np.testing.assert_array_equal(last.x.ravel(), none.x.ravel())
    assert (jnp.abs(last.x - x) > 0.09).all()  # stripes first: every pixel is at an end
    assert not jnp.array_equal(features.x, last.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries = 0"),
        ({"fraction": 0.0}, r"fraction = 0\.0: it must be in \(0, 1\]"),
        ({"channels": 3}, r"channels = 3: an axis of x"),
    ],
)
def test_bad_arguments_are_named(options, message):
    w, x = jnp.ones((1, 2, 8)), jnp.zeros((2, 2, 2))
    with pytest.raises(ValueError, match=message):
        attack.square(jax.random.key(0), lambda w, x: w @ x.ravel(), w, x, 0, 0.1, **options)
