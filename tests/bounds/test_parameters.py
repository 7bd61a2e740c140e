"""Every primitive, with every value of its parameters: bounded soundly, or refused."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bnncert.bounds import UnsupportedPrimitiveError, bound
from bnncert.bounds.ops import SUPPORTED
from bnncert.bounds.tracing.equations import CALLS
from bnncert.bounds.tracing.parameters import PARAMETERS
from bnncert.bounds.tracing.rewriting import REWRITES
from bnncert.bounds.tracing.walk import _IDENTITIES
from bnncert.sets import Box

pytestmark = pytest.mark.slow

BOX = Box(
    np.array([-1.0, 0.5, -0.3, 0.2, 0.1, 1.0]),
    np.array([1.0, 0.6, 0.7, 0.9, 0.5, 1.5]),
)
C: Any = np.random.default_rng(0).normal(size=(2, 4, 2, 4))
MODES = ("clip", "fill", "drop", "promise_in_bounds")
INDICES = ([0, 3], [2, 9], [-1, -9], [4, 4])


def varied(**choices):
    """The first choice of each, one other choice at a time, and the last of each."""
    first = {name: values[0] for name, values in choices.items()}
    yield first
    for name, values in choices.items():
        yield from ({**first, name: value} for value in values[1:])
    yield {name: values[-1] for name, values in choices.items()}


def indexed(act):
    """One operation of `x.at[...]`, by mode and index, promises broken and kept."""
    for mode, index, promise in itertools.product(MODES, INDICES, (False, True)):
        options = {"unique_indices": promise, "indices_are_sorted": promise, "mode": mode}
        options["wrap_negative_indices"] = False
        yield lambda x, i=index, o=options: act(x.at[np.array(i)], x, o)


def windows(reduction, start):
    for choice in varied(
        window_strides=((1, 1), (1, 2)),
        padding=(((0, 0), (0, 0)), ((0, 0), (1, 1)), ((1, 0), (-1, 1))),
        window_dilation=((1, 1), (1, 2)),
        base_dilation=((1, 1), (2, 1)),
    ):
        yield lambda x, o=choice: lax.reduce_window(
            2 * x.reshape(2, 3), start, reduction, (2, 2), **o
        )


def convolutions(make):
    """`make(x, groups of features)` gives an image (2, 2, 2, 4) and a kernel."""
    for choice in varied(
        window_strides=((1, 1), (2, 1)),
        padding=(((0, 0), (1, 0)), ((1, 2), (0, 1)), ((-1, 1), (1, 1))),
        rhs_dilation=((1, 1), (2, 1)),
        lhs_dilation=((1, 1), (1, 2), (2, 2)),
        feature_group_count=(1, 2),
        batch_group_count=(1, 2),
    ):
        if choice["feature_group_count"] * choice["batch_group_count"] == 4:
            choice["feature_group_count"] = 1  # not both
        yield lambda x, o=choice: lax.conv_general_dilated(
            *make(x, o["feature_group_count"]),
            dimension_numbers=("HWNC", "OIHW", "NHWC"),
            **o,
        )


def image(x):
    return jnp.concatenate([x, x[:2], np.ones(24)]).reshape(2, 2, 2, 4)


def kernel(f):
    return C[:, : 4 // f, :2, :2]


def along(function):
    for axis, reverse in itertools.product((0, 1), (False, True)):
        yield lambda x, a=axis, r=reverse: function(x.reshape(2, 3), axis=a, reverse=r)


CASES = {
    "scatter": [*indexed(lambda at, x, o: at.set(x[1:3] + 1.0, **o))],
    "scatter-add": [*indexed(lambda at, x, o: at.add(x[1:3] + 1.0, **o))],
    "gather": [
        *indexed(
            lambda at, x, o: at.get(
                **{**o, "fill_value": 7.0 if o["mode"] in ("fill", "drop") else None}
            )
        )
    ],
    "cumulative": [
        f
        for function in (lax.cumsum, lax.cummax, lax.cummin, lax.cumlogsumexp)
        for f in along(function)
    ],
    "reduce_window_max": [*windows(lax.max, -jnp.inf)],
    "reduce_window_min": [*windows(lax.min, jnp.inf)],
    "reduce_window_sum": [*windows(lax.add, 0.0)],
    "conv of a constant kernel": [*convolutions(lambda x, f: (image(x), kernel(f)))],
    "conv of a bounded kernel": [
        *convolutions(lambda x, f: (C.reshape(2, 2, 2, 8)[..., :4], kernel(f) * x[0]))
    ],
    "dot_general": [
        lambda x, d=dims, p=kind: lax.dot_general(
            x.reshape(1, 2, 3), np.arange(12.0).reshape(2, 2, 3) - 5, d, preferred_element_type=p
        )
        for dims in (
            (((2,), (2,)), ((), ())),
            (((1,), (0,)), ((), ())),
            (((1, 2), (1, 2)), ((), ())),
        )
        for kind in (None, jnp.float64)
    ]
    + [lambda x: lax.dot_general(x.reshape(2, 3), C[:, :, 0, :3], (((1,), (2,)), ((0,), (0,))))],
    "pad": [
        lambda x, c=config: lax.pad(x, 0.5, [c])
        for config in ((1, 0, 0), (-1, 2, 0), (2, -1, 2), (-2, -1, 1), (0, 0, 3))
    ],
    "select_n": [
        lambda x, w=which, r=rest: lax.select_n(w, x, *r(x))
        for which, rest in (
            (np.array([0, 2, 1, 1, 0, 2]), lambda x: (2 * x, -x)),
            (np.array([True, False] * 3), lambda x: (x[::-1],)),
            (np.array(1), lambda x: (np.ones(6), x + 1)),
        )
    ],
    "powers": [lambda x, y=y: lax.integer_pow(x, y) for y in (0, 1, 2, 3, 4)]
    + [lambda x, y=y: lax.integer_pow(x[1:2], y) for y in (-1, -2, -3)]
    + [
        lambda x, y=y: lax.pow(x[3:] + 0.1, y)
        for y in (np.array([0.5, 2.0, -1.5]), np.arange(3) - 1)
    ]
    + [lambda x: jnp.power(x[5:], np.array([0.0, 1.0, -2.0, 2.5]))],
    "clamp": [
        lambda x: lax.clamp(0.1, x, 0.6),
        lambda x: lax.clamp(np.full(6, 0.1), x, x + 0.3),
        lambda x: lax.clamp(x[0], x, 0.6),
        lambda x: lax.clamp(0.7, x, 0.2),
    ],
    "round": [
        lambda x, m=method: lax.round(3 * x, m)
        for method in (lax.RoundingMethod.AWAY_FROM_ZERO, lax.RoundingMethod.TO_NEAREST_EVEN)
    ],
    "moves": [
        lambda x: lax.slice(x, (1,), (6,), (2,)),
        lambda x: lax.rev(x.reshape(2, 3), (0, 1)),
        lambda x: lax.dynamic_slice(x, (9,), (3,)),
        lambda x: lax.dynamic_slice(x, (-2,), (3,)),
        lambda x: lax.dynamic_update_slice(x, 2 * x[:3], (9,)),
        lambda x: lax.broadcast_in_dim(x.reshape(1, 6), (2, 6), (0, 1)),
        lambda x: lax.broadcast_in_dim(x, (6, 2), (0,)),
        lambda x: lax.squeeze(x.reshape(1, 6, 1), (2,)),
        lambda x: jnp.tile(x.reshape(2, 3), (2, 1)),
        lambda x: jnp.stack([x, x[::-1]], 1),
        lambda x: jnp.split(x.reshape(2, 3), [1], 1)[1],
        lambda x: jnp.unstack(x.reshape(2, 3), axis=1)[2],
        lambda x: lax.transpose(x.reshape(1, 2, 3), (2, 0, 1)),
        lambda x: lax.reduce_max(x.reshape(1, 2, 3), (0, 2)),
        lambda x: lax.reduce_min(x.reshape(1, 2, 3), (1,)),
        lambda x: lax.reduce_sum(x.reshape(1, 2, 3), (2, 0)),
    ],
    "accuracy": [
        lambda x, f=f: f(x + 1.5, accuracy=lax.AccuracyMode.HIGHEST)
        for f in (lax.exp, lax.exp2, lax.expm1, lax.log, lax.log1p, lax.tanh, lax.logistic)
    ]
    + [
        lambda x, f=f: f(x + 1.5, accuracy=lax.AccuracyMode.DEFAULT)
        for f in (lax.sin, lax.cos, lax.sqrt, lax.rsqrt, lax.cbrt)
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_all_parameters_are_bounded_soundly(name, float64):
    """Of the operation on a rectifier, beside what JAX computes at points."""
    box = jax.tree.map(jnp.asarray, BOX)

    def every(x):
        bent = jnp.maximum(x, 0.2)  # planes are passed, and the interval of a box is exact
        return [f(bent) for f in CASES[name]]

    share = np.random.default_rng(1).uniform(-0.5, 1.5, (200, 6)).clip(0, 1)
    points = box.lower + share * (box.upper - box.lower)
    values = jax.tree.leaves(jax.jit(jax.vmap(every))(points))
    for method in ("ibp", "crown-ibp"):
        run = jax.jit(bound(every, method))
        wide, point = (
            jax.tree.leaves(run(b), is_leaf=lambda b: isinstance(b, Box))
            for b in (box, Box(points[0], points[0]))
        )
        for i, (found, exact, value) in enumerate(zip(wide, point, values, strict=True)):
            assert (found.lower <= value + 1e-9).all() and (value - 1e-9 <= found.upper).all(), i
            np.testing.assert_allclose(exact.lower, value[0], atol=1e-9, err_msg=str(i))
            np.testing.assert_allclose(exact.upper, value[0], atol=1e-9, err_msg=str(i))


def test_every_primitive_that_has_a_rule_lists_its_parameters():
    assert {*SUPPORTED, *_IDENTITIES, *REWRITES, *CALLS} <= set(PARAMETERS)


EMPTY = {"reduce_window_max": (lax.max, -jnp.inf), "reduce_window_min": (lax.min, jnp.inf)}
PRODUCT = (((0,), (0,)), ((), ()))


@pytest.mark.parametrize(
    ("f", "primitive", "reason"),
    [
        (lambda x: x.at[0].apply(jnp.square), "scatter", r"update_jaxpr.*\.set\(f"),
        (lambda x: x.at[0].multiply(2.0), "scatter-mul", r"\.set\(v \* x\[i\]\)"),
        (lambda x: x.at[0].max(2.0), "scatter-max", r"jnp\.maximum"),
        (lambda x: lax.exp(x, accuracy=lax.Tolerance(1e-2, 0.0, 0)), "exp", "accuracy"),
        (lambda x: x.astype(jnp.float8_e4m3fn), "convert_element_type", "float16, bfloat16"),
        (lambda x: jnp.real(x.astype(jnp.complex64)), "convert_element_type", "complex64"),
        (lambda x: x.astype(jnp.int32), "convert_element_type", "linear"),
        (
            lambda x: lax.dot_general(x, x, PRODUCT, preferred_element_type=jnp.int32),
            "dot_general",
            "int32.*astype",
        ),
        (
            lambda x: lax.dot_general(
                x, np.ones(6, "f4"), PRODUCT, preferred_element_type="float16"
            ),
            "dot_general",
            "float16.*astype",
        ),
    ]
    + [
        (
            lambda x, r=r: lax.reduce_window(x, r[1], r[0], (2,), (1,), ((2, 0),)),
            name,
            r"padding = \(\(2, 0\),\).*window",
        )
        for name, r in EMPTY.items()
    ],
)
def test_what_is_not_known_is_refused(f, primitive, reason):
    box = Box(jnp.full(6, -1.0), jnp.ones(6))
    with pytest.raises(UnsupportedPrimitiveError, match=f"'{primitive}'.*test_parameters.py"):
        bound(f, "ibp")(box)
    with pytest.raises(UnsupportedPrimitiveError, match=reason):
        bound(f, "crown")(box)


@pytest.mark.parametrize(
    ("f", "hint"),
    [
        (lambda x: x[lax.top_k(x, 2)[1]], "jnp.max"),
        (lambda x: x[jnp.argsort(x)], "change places"),
        (lambda x: x[jnp.argmax(x)], "jnp.max"),
        (lambda x: lax.fori_loop(0, 3000, lambda i, v: 2 * v, x), "unroll="),
        (lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), r"jnp\.where"),
        (lambda x: jnp.linalg.inv(x.reshape(2, 3)[:, :2]), "Factorisations"),
        (lambda x: 2.0**x, r"jnp\.exp"),
    ],
)
def test_the_way_out_fits_the_primitive(f, hint):
    with pytest.raises(UnsupportedPrimitiveError) as caught:
        bound(f, "ibp")(Box(jnp.full(6, -1.0), jnp.ones(6)))
    assert ("unroll" in str(caught.value)) == (hint == "unroll=")
    assert re.search(hint, str(caught.value))
