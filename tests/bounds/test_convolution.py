"""`canonical` changes the form of convolutions, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert._compiler.convolution import canonical

CASES = {
    "NHWC": ((2, 5, 6, 4), (3, 2, 4, 6), ("NHWC", "HWIO", "NHWC"), {}),
    "NCHW": ((2, 4, 5, 6), (6, 4, 3, 2), ("NCHW", "OIHW", "NCHW"), {"window_strides": (2, 1)}),
    "mixed": ((5, 4, 2, 6), (4, 3, 6, 2), ("HCNW", "IHOW", "CWNH"), {"rhs_dilation": (1, 2)}),
    "grouped": ((2, 4, 5, 6), (6, 2, 3, 2), ("NCHW", "OIHW", "NCHW"), {"feature_group_count": 2}),
    "batch groups": (
        (2, 5, 6, 4),
        (3, 2, 4, 6),
        ("NHWC", "HWIO", "NHWC"),
        {"batch_group_count": 2},
    ),
    "dilated": (
        (2, 5, 6, 4),
        (3, 2, 4, 6),
        ("NHWC", "HWIO", "NHWC"),
        {"lhs_dilation": (2, 3), "padding": ((0, 2), (3, 1))},
    ),
    "line": ((2, 4, 7), (6, 4, 3), ("NCH", "OIH", "NCH"), {}),
    "volume": ((1, 3, 4, 3, 2), (2, 2, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), {}),
}


def problem(name):
    image, kernel, numbers, options = CASES[name]
    rng = np.random.default_rng(0)
    options = {"window_strides": (1,) * (len(image) - 2), "padding": "SAME", **options}

    def f(x, k):
        return jax.lax.conv_general_dilated(2 * x + 1, k, dimension_numbers=numbers, **options)

    return f, jnp.asarray(rng.normal(size=image)), jnp.asarray(rng.normal(size=kernel))


def layouts(f, *args):
    """The dimension numbers of all convolutions of a function."""

    def find(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                yield eqn.params["dimension_numbers"]

    return list(find(jax.make_jaxpr(f)(*args).jaxpr))


@pytest.mark.parametrize("name", CASES)
def test_equal_in_the_fast_layout(name, float64):
    f, x, k = problem(name)
    np.testing.assert_allclose(canonical(f)(x, k), f(x, k), rtol=1e-12, atol=1e-12)
    rank = x.ndim
    ((lhs, rhs, out),) = layouts(canonical(f), x, k)
    assert lhs == out == (0, rank - 1, *range(1, rank - 1))
    assert rhs == (rank - 1, rank - 2, *range(rank - 2))


@pytest.mark.parametrize("name", CASES)
def test_equal_under_vmap_and_of_gradients(name, float64):
    f, x, k = problem(name)

    def loss(x, k):
        return jnp.sum(jnp.sin(f(x, k)))

    batch = jnp.stack([x, 2 * x, -x])
    kernels = jnp.stack([k, k + 1, k - 1])
    plain, fast = jax.grad(loss, argnums=(0, 1)), canonical(jax.grad(loss, argnums=(0, 1)))
    expected = jax.jit(jax.vmap(plain))(batch, kernels)
    # Also swept by a loop, and differentiated from outside.
    swept = jax.jit(lambda *pair: jax.lax.map(lambda p: fast(*p), pair))(batch, kernels)
    outside = jax.grad(lambda x, k: jnp.sum(jnp.sin(canonical(f)(x, k))), argnums=(0, 1))
    for found in (
        jax.jit(jax.vmap(fast))(batch, kernels),
        swept,
        jax.vmap(outside)(batch, kernels),
    ):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


# Pixels, taps, lhs_dilation, padding of each axis; features in and out; other options.
TRANSPOSES = {
    "as many phases as taps": ((5, 4), (4, 4), (2, 2), ((2, 2), (1, 2)), 6, 5, {}),
    "taps left over": ((5, 4), (3, 5), (2, 3), ((1, 2), (0, 4)), 6, 5, {}),
    "fewer taps than phases": ((3, 4), (1, 2), (2, 3), ((0, 1), (1, 0)), 3, 5, {}),
    "cropped": ((5, 6), (3, 2), (3, 2), ((-2, 1), (-3, -1)), 3, 5, {}),
    "padded past the image": ((2, 1), (2, 3), (2, 2), ((7, -2), (-1, 6)), 3, 5, {}),
    "one axis dilated": (
        (5, 6),
        (3, 2),
        (1, 2),
        ((0, 1), (1, 1)),
        3,
        5,
        {"window_strides": (2, 1)},
    ),
    "rhs dilated": ((5, 6), (3, 2), (2, 2), ((1, 1), (1, 1)), 3, 5, {"rhs_dilation": (1, 2)}),
    "strided": ((5, 6), (3, 2), (2, 2), ((1, 1), (1, 1)), 3, 5, {"window_strides": (1, 2)}),
    "groups": ((4, 5), (3, 4), (2, 2), ((1, 2), (2, 2)), 6, 9, {"feature_group_count": 3}),
    "batch groups": ((4, 5), (3, 4), (2, 2), ((1, 2), (2, 2)), 4, 6, {"batch_group_count": 2}),
    "few outputs": ((5, 4), (4, 3), (2, 3), ((2, 2), (-1, 3)), 16, 1, {}),
    "few outputs, not dilated": ((5, 4), (3, 2), (1, 1), ((1, 1), (0, -1)), 16, 2, {}),
    "line": ((6,), (5,), (3,), ((2, 5),), 3, 2, {}),
    "volume": ((2, 3, 2), (2, 1, 3), (2, 2, 1), ((1, 0), (0, 1), (2, 1)), 3, 4, {}),
    "nothing left": ((2,), (5,), (2,), ((1, 1),), 3, 2, {}),
}


@pytest.mark.parametrize("name", TRANSPOSES)
def test_transposes_and_their_gradients_are_equal(name, float64):
    pixels, taps, dilation, padding, inputs, outputs, options = TRANSPOSES[name]
    rank = len(pixels)
    options = {"window_strides": (1,) * rank, **options}
    space = "DHW"[:rank]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    groups = options.get("feature_group_count", 1)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *pixels, inputs)))
    k = jnp.asarray(rng.normal(size=(*taps, inputs // groups, outputs)))

    def f(x, k):
        return jax.lax.conv_general_dilated(
            x, k, padding=padding, lhs_dilation=dilation, dimension_numbers=numbers, **options
        )

    fast = canonical(f)
    np.testing.assert_allclose(fast(x, k), f(x, k), rtol=1e-12, atol=1e-12)
    row = jnp.asarray(rng.normal(size=f(x, k).shape))
    for a, b in zip(jax.vjp(fast, x, k)[1](row), jax.vjp(f, x, k)[1](row), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_transposes_multiply_no_zeros(float64):
    """Of a strided convolution; where few features come out, there is no convolution at all."""

    def convolutions(features):
        k = jnp.ones((4, 4, features, 32))
        x = jnp.ones((1, 28, 28, features))
        f = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
            x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        transpose = canonical(jax.linear_transpose(f, x))
        jaxpr = jax.make_jaxpr(transpose)(jnp.ones((1, 14, 14, 32))).jaxpr
        return [e.params for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]

    (params,) = convolutions(16)
    assert params["lhs_dilation"] == (1, 1)
    assert convolutions(1) == []


def test_a_function_without_convolutions_is_left_alone():
    f = lambda tree: {"sum": tree["a"] + tree["b"], "n": 3}  # noqa: E731
    found = canonical(f)({"a": jnp.ones(2), "b": jnp.arange(2.0)})
    np.testing.assert_array_equal(found["sum"], [1, 2])
    assert found["n"] == 3


def test_convolutions_inside_jitted_calls_and_other_dtypes():
    """Python numbers in the code keep the dtype of the arrays they meet."""
    f, x, k = problem("NCHW")
    x, k = x.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    jitted = jax.jit(lambda x, k: 0.5 * jax.jit(f)(x, k))
    found = canonical(jitted)(x, k)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), jitted(x, k).astype(jnp.float32), rtol=0.02, atol=0.05
    )
