"""Rows side by side bound what rows one by one do; the cones of a colour are apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import rows
from bnncert.bounds.arithmetic import Float, Real
from bnncert.bounds.coloring import colored_bounds, coloring
from bnncert.bounds.methods.crown import CROWN, intermediate_bounds, swept
from bnncert.bounds.methods.ibp import interval_bounds
from bnncert.bounds.methods.steps import steps_of, steps_of_both, view_of
from bnncert.bounds.plan import Options, make_plan
from bnncert.bounds.tracing import trace
from bnncert.sets import Box, LpBall, ball

KEY = jax.random.key(0)
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def kernel(seed, *shape):
    values = np.random.default_rng(seed).normal(size=shape) / np.prod(shape[:-1]) ** 0.5
    return jnp.asarray(values, jnp.float32)


def conv(x, w, stride=1, padding="SAME", numbers=NHWC, **options):
    return jax.lax.conv_general_dilated(
        x[None], w, (stride, stride), padding, dimension_numbers=numbers, **options
    )[0]


def strided(p, x):
    h = jax.nn.relu(conv(x, p(1, 3, 3, 2, 3), 2) + p(2, 3))
    return conv(h, p(3, 3, 3, 3, 4), 1)


def channels_first(p, x):
    h = jax.nn.relu(conv(x.transpose(2, 0, 1), p(1, 3, 2, 3, 3), 1, "VALID", NCHW))
    return conv(h, p(2, 4, 3, 2, 2), 2, "VALID", NCHW)


def residual(p, x):
    h = jax.nn.relu(conv(x, p(1, 3, 3, 2, 4)))
    return h * p(5, 4) + conv(jnp.tanh(h), p(2, 3, 3, 4, 4)) - 0.5


def pooled(p, x):
    h = jax.nn.relu(conv(x, p(1, 3, 3, 2, 4)))
    mean = jax.lax.reduce_window(h, 0.0, jax.lax.add, (2, 2, 1), (2, 2, 1), "VALID") / 4
    return conv(mean, p(2, 2, 2, 4, 3))


def grouped(p, x):
    h = jax.nn.relu(conv(x, p(1, 3, 3, 2, 4)))
    return conv(h, p(2, 3, 3, 1, 4), feature_group_count=4, rhs_dilation=(2, 2))


NETWORKS = {f.__name__: f for f in (strided, channels_first, residual, pooled, grouped)}


def prepared(f, x_set, arithmetic, both):
    """A plan of what is relu'd last, that node, and how rows pass what lies before."""
    graph = trace(lambda x: jnp.sum(jax.nn.relu(f(kernel, x))), (x_set,), {}, arithmetic.tracking())
    plan = make_plan(graph, Options(8, arithmetic))
    index = max(i for i in plan.acted_on if len(graph.nodes[i].shape) == 3)
    method, wider = CROWN(), view_of(plan, interval_bounds(plan))
    boxes, known = intermediate_bounds(plan, wider.boxes, method, wider)
    steps = steps_of_both(plan, known, wider, swept(plan)) if both else steps_of(plan, known)
    return plan, index, boxes, steps


@pytest.mark.parametrize("both", [False, True], ids=["one way", "both views"])
@pytest.mark.parametrize("arithmetic", [Real(), Float()], ids=["real", "float"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_rows_one_by_one(name, arithmetic, both):
    x = jax.random.uniform(KEY, (12, 12, 2))
    plan, index, _, steps = prepared(NETWORKS[name], ball(x, 0.03), arithmetic, both)
    found = colored_bounds(plan, index, steps)
    assert found is not None
    each = rows.row_bounds(plan.graph, index, steps, plan.regions, 8, at_once=True)
    size = jnp.abs(each.lower) + jnp.abs(each.upper)
    assert (jnp.abs(found.lower - each.lower) <= 1e-5 * (1 + size)).all()
    assert (jnp.abs(found.upper - each.upper) <= 1e-5 * (1 + size)).all()
    points = 0.03 * jax.random.uniform(KEY, (50, *x.shape), minval=-1.0)
    values = jax.vmap(lambda z: NETWORKS[name](kernel, x + z))(points)
    slack = 1e-5 if isinstance(arithmetic, Real) else 0.0
    assert (values >= found.lower - slack).all() and (values <= found.upper + slack).all()


def test_a_ball_is_swept_row_by_row():
    x = jax.random.uniform(KEY, (12, 12, 2))
    region = LpBall(x, jnp.float32(0.1), 2)
    plan, index, _, steps = prepared(strided, region, Real(), False)
    assert colored_bounds(plan, index, steps) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_cones_of_a_colour_hold_all_that_their_places_depend_on(name):
    """Against derivatives: where one is not 0, the coordinate is in the cone of that place."""
    x = jax.random.uniform(KEY, (12, 12, 2))
    plan, index, _, _ = prepared(NETWORKS[name], ball(x, 0.03), Real(), False)
    colors = coloring(plan, index)
    assert colors is not None
    shape = plan.graph.nodes[index].shape
    slopes = jax.jacrev(lambda x: NETWORKS[name](kernel, x).reshape(shape))(x)
    slopes = jnp.moveaxis(slopes, colors.axis, 0).reshape(shape[colors.axis], -1, x.size)
    depends = np.asarray((slopes != 0).any(0))  # (places, coordinates of x)
    seen = []
    for color, members in enumerate(colors.places):
        for number, place in enumerate(members[members < depends.shape[0]]):
            assert (colors.cones[0][color][depends[place]] == number).all()
            seen.append(place)
    assert sorted(seen) == list(range(depends.shape[0]))
    assert len(colors.places) * shape[colors.axis] <= np.prod(shape) // 2


def test_where_all_depends_on_all_there_are_no_colours():
    def dense(p, x):
        return conv(jnp.roll(x, 1, 0), p(1, 3, 3, 2, 4)) + x.sum()

    x = jax.random.uniform(KEY, (8, 8, 2))
    plan, index, _, steps = prepared(dense, ball(x, 0.03), Real(), False)
    assert coloring(plan, index) is None and colored_bounds(plan, index, steps) is None


def test_crown_is_mapped_differentiated_and_as_tight_by_either(monkeypatch):
    """Of a network large enough: crown itself takes them, with the same bounds and gradients."""
    import bnncert as bc
    from bnncert.bounds.methods import crown

    def f(w, x):
        return strided(lambda seed, *shape: w[seed], x)

    w = {1: kernel(1, 3, 3, 2, 3), 2: kernel(2, 3), 3: kernel(3, 3, 3, 3, 4)}
    xs = jax.random.uniform(KEY, (2, 12, 12, 2))

    def width(w):
        def one(x):
            box = bc.bound(lambda w, x: jax.nn.relu(f(w, x)).sum(), "crown")(w, bc.ball(x, 0.05))
            return box.upper - box.lower

        return jax.vmap(one)(xs).sum()

    monkeypatch.setattr(crown, "_FEW", 0)
    taken = []
    original = crown.colored_bounds

    def counted(*args):
        taken.append(original(*args))
        return taken[-1]

    monkeypatch.setattr(crown, "colored_bounds", counted)
    value, slopes = jax.jit(jax.value_and_grad(width))(w)
    assert taken and isinstance(taken[0], Box)
    monkeypatch.setattr(crown, "colored_bounds", lambda *_: None)
    plain, expected = jax.jit(jax.value_and_grad(width))(w)
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (slopes, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
