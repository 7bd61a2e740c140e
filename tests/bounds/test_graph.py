"""Tracing lists what a set reaches, sees through calls, and refuses what has no rule."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from bnncert.bounds import UnsupportedPrimitiveError, bound, linear_bounds
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.methods import METHODS as KINDS
from bnncert.bounds.tracing import trace
from bnncert.sets import Box

METHODS = tuple(KINDS)

W = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.8, -1.0], [-0.7, 0.4, 2.0]])
BOX = Box(jnp.array([-1.0, -0.5, 0.2]), jnp.array([1.0, 0.5, 0.2]))


def operations(f, *args):
    return [node.op for node in trace(f, args, {}).nodes]


def same_bounds(f, g, box=BOX):
    for method in METHODS:
        a, b = bound(f, method)(box), bound(g, method)(box)
        np.testing.assert_allclose(a.lower, b.lower, rtol=1e-6, err_msg=method)
        np.testing.assert_allclose(a.upper, b.upper, rtol=1e-6, err_msg=method)


def test_constants_are_evaluated_and_calls_are_inlined():
    @jax.jit
    def layer(w, x):
        return jax.nn.relu(jnp.tanh(w) @ x)

    graph = trace(lambda x: (layer(W, layer(W, x)), jnp.sin(W)), (BOX,), {})
    expected = ["input", "dot_general", "max", "dot_general", "max"]
    assert [node.op for node in graph.nodes] == expected
    assert graph.outputs[0] == Ref(4) and not isinstance(graph.outputs[1], Ref)
    np.testing.assert_allclose(graph.outputs[1], jnp.sin(W))


def test_a_jitted_function_called_twice_has_two_environments():
    half = jax.jit(lambda x, c: jax.nn.relu(x) - c)
    same_bounds(
        lambda x: half(half(x, 1.0), 2.0) + half(x, 3.0),
        lambda x: jax.nn.relu(jax.nn.relu(x) - 1.0) - 2.0 + jax.nn.relu(x) - 3.0,
    )


def test_stop_gradient_does_not_stop_bounds():
    """Its transpose is zero, and so would be the bound."""
    same_bounds(lambda x: jax.lax.stop_gradient(W @ x), lambda x: W @ x)
    same_bounds(lambda x: W @ jax.lax.stop_gradient(jax.nn.relu(x)), lambda x: W @ jax.nn.relu(x))


def test_derivatives_of_the_users_own_do_not_matter():
    @jax.custom_vjp
    def reverse(x):
        return W @ x

    reverse.defvjp(lambda x: (reverse(x), None), lambda _, g: (-7.0 * g,))

    @jax.custom_jvp
    def jump(x):
        return 2.0 * x

    jump.defjvp(lambda primals, tangents: (jump(*primals), 0.0 * tangents[0]))
    same_bounds(lambda x: jax.nn.relu(reverse(x)), lambda x: jax.nn.relu(W @ x))
    same_bounds(lambda x: W @ jump(x), lambda x: W @ (2.0 * x))


def test_identities_are_passed():
    def wrapped(x):
        h = jax.checkpoint(lambda v: jax.nn.relu(W @ v))(x)
        h = checkpoint_name(jax.lax.optimization_barrier(h), "hidden")
        return W @ h

    same_bounds(wrapped, lambda x: W @ jax.nn.relu(W @ x))


def test_clamp_with_any_operand_bounded():
    low, high = jnp.array([-0.5, 0.0, 0.1]), jnp.array([0.5, 0.1, 3.0])
    same_bounds(lambda x: jax.lax.clamp(low, x, high), lambda x: jnp.clip(x, low, high))
    same_bounds(lambda x: jax.lax.clamp(x, low, high), lambda x: jnp.clip(low, x, high))
    same_bounds(lambda x: jax.lax.clamp(low, high, x), lambda x: jnp.minimum(high, x))


def test_scalars_that_jax_leaves_to_broadcast():
    """Each reaches several coordinates, and its row is their sum."""
    box = Box(jnp.float32(-1.0), jnp.float32(2.0))
    c = jnp.array([1.0, -1.0, 0.5])
    for f, g in (
        (lambda s: jnp.sum(s * c), lambda s: 0.5 * s),
        (lambda s: c + s, lambda s: c + jnp.full(3, 1.0) * s),
        (lambda s: W @ jnp.maximum(s, c), lambda s: W @ jnp.maximum(jnp.ones(3) * s, c)),
    ):
        same_bounds(f, g, box)
    exact = bound(lambda s: jnp.sum(s * c), "ibp")(box)
    np.testing.assert_allclose([exact.lower, exact.upper], [-0.5, 1.0], rtol=1e-6)


def test_an_index_outside():
    """Filled with a constant, or clamped: what the function does, its bounds do."""

    def filled(x):
        return x.at[jnp.array([1, 9])].get(mode="fill", fill_value=7.0) + jax.nn.relu(x[:2])

    def clamped(x):
        return x.at[jnp.array([0, 9])].get() * jnp.array([1.0, 3.0])

    moving = Box(jnp.array([-1.0, -0.5, 0.2]), jnp.array([1.0, 0.5, 0.4]))
    for method in METHODS:
        box = bound(filled, method)(moving)
        np.testing.assert_allclose(box.lower[1], 7.0)
        np.testing.assert_allclose(box.upper[1], 7.5)
        box = bound(clamped, method)(moving)
        np.testing.assert_allclose([box.lower[1], box.upper[1]], [0.6, 1.2], rtol=1e-6)


# --- functions recognised by name -----------------------------------------------------------------


def test_recognised_functions_are_one_node():
    assert operations(jax.nn.softplus, BOX) == ["input", "softplus"]
    assert operations(jax.nn.leaky_relu, BOX) == ["input", "leaky_relu"]
    slope = lambda x: jax.nn.leaky_relu(x, jnp.array([0.1, 0.2, 0.3]))  # noqa: E731
    assert operations(slope, BOX) == ["input", "leaky_relu"]
    assert operations(lambda x: -jax.nn.log_sigmoid(-x), BOX)[1:] == ["neg", "log_sigmoid", "neg"]


def test_operations_with_bounds_of_their_own():
    assert operations(lambda x: x * x, BOX) == ["input", "square"]
    assert operations(lambda x: x**2, BOX) == ["input", "square"]
    assert operations(lambda x: x**3, BOX) == ["input", "integer_pow"]
    assert operations(lambda x: 1.0 / x, BOX)[1:] == ["reciprocal", "mul"]
    assert operations(lambda x: jnp.clip(x, 0.0, 1.0), BOX)[1:] == ["clip"]
    assert operations(jax.nn.softmax, BOX)[1:] == ["softmax"]
    assert operations(jax.nn.log_softmax, BOX)[1:] == ["log_softmax"]
    assert operations(jax.nn.logsumexp, BOX)[1:] == ["logsumexp"]
    pool = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (1,), "VALID")  # noqa: E731
    assert operations(pool, BOX)[1:] == ["windows", "reduce_max"]


def test_a_name_proves_nothing():
    @jax.jit
    def softplus(x):
        return 3.0 * x

    @jax.jit
    def leaky_relu(x, negative_slope):
        return jnp.maximum(x, 0.0) - negative_slope

    same_bounds(lambda x: softplus(x), lambda x: 3.0 * x)
    same_bounds(lambda x: leaky_relu(x, 0.5), lambda x: jnp.maximum(x, 0.0) - 0.5)


@pytest.mark.parametrize("c", [0.7, jnp.array([0.0, -1.0, 2.0])])
def test_logaddexp_is_recognised_and_its_name_proves_nothing(c):
    @jax.custom_jvp
    def logaddexp(a, b):
        return a - b

    logaddexp.defjvp(lambda primals, tangents: (logaddexp(*primals), tangents[0] - tangents[1]))
    assert operations(lambda x: jnp.logaddexp(x, W @ x), BOX)[2:] == ["sub", "logaddexp"]
    assert operations(lambda x: jnp.logaddexp(x[0], x), BOX)[-2:] == ["sub", "logaddexp"]
    assert operations(lambda x: jnp.logaddexp(c, x), BOX)[1:] == ["logaddexp"]
    assert operations(lambda x: logaddexp(x, W @ x), BOX)[2:] == ["sub"]


def test_an_almost_equal_body_is_not_trusted():
    @jax.jit
    def leaky_relu(x, negative_slope):
        return jnp.where(x > 0.1, x, negative_slope * x)

    @jax.jit
    def softplus(x):
        return jnp.logaddexp(x, 1.0)

    with pytest.raises(UnsupportedPrimitiveError):
        bound(lambda x: leaky_relu(x, 0.1), "ibp")(BOX)
    assert operations(softplus, BOX)[1:] == ["logaddexp"]


# --- what has no rule -----------------------------------------------------------------------------


def _line_of(f, text):
    lines, first = inspect.getsourcelines(f)
    return first + next(i for i, line in enumerate(lines) if text in line)


def without_a_rule(x):
    y = W @ x
    return jax.lax.digamma(y)  # no rule


def hidden_in_calls(x):
    helper = jax.jit(lambda v: 2.0 ** jax.nn.relu(v))  # no rule
    return helper(W @ x)


def loop(x):
    y = x + 1.0
    return jax.lax.fori_loop(0, 9999, lambda i, v: W @ v, y)  # no rule


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("f", "primitive"),
    [(without_a_rule, "'digamma'"), (hidden_in_calls, "'pow'"), (loop, "'scan'|'while'")],
)
def test_the_error_names_the_primitive_and_the_line(f, primitive, method):
    with pytest.raises(UnsupportedPrimitiveError, match=primitive) as caught:
        bound(f, method)(BOX)
    assert f"{__file__.rsplit('/', 1)[-1]}:{_line_of(f, '# no rule')}" in str(caught.value)


@pytest.mark.parametrize(
    ("f", "primitive"),
    [
        (lambda x: jnp.where(x > 0.5, x, -x), "gt"),
        (lambda x: jnp.where(x > x[0], x, -x), "gt"),
        (lambda x: jnp.where(x > 0, 0.1 * x, x), "gt"),
        (lambda x: jnp.where(x > 0, x, 0.1 * x + 1.0), "gt"),
        (lambda x: jnp.where(x > 0, x, 0.1 * x[::-1]), "gt"),
        (lambda x: jnp.where(x[::-1] > 0, x, 0.1 * x), "gt"),
        (lambda x: jnp.where(x[0] > 0, x, 0.1 * x), "gt"),
        (lambda x: jnp.where(x == 0, x, 0.1 * x), "eq"),
        (lambda x: x == 0.0, "eq"),
        (lambda x: x.astype(int), "convert_element_type"),
        (lambda x: W[0][jnp.floor(x[0]).astype(int)], "convert_element_type"),
        (lambda x: W[0][jnp.argsort(x)], "sort"),
        (lambda x: W[0][jax.lax.top_k(x, 1)[1]], "top_k"),
        (lambda x: jnp.argmax(x) + 0.0, "argmax"),
        (lambda x: jnp.arctan2(x, x + 5.0), "atan2"),
        (lambda x: x % 2.0, "rem"),
        (lambda x: jax.lax.cond(x[0] > 0, jnp.negative, lambda v: v, x), "cond"),
        (lambda x: jax.lax.scan(lambda c, _: (W @ c, None), x, length=2000)[0], "scan"),
        (lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: c + 1, x), "while"),
        (lambda x: jax.lax.pad(W, x[0], ((1, 1, 0), (0, 0, 0))), "pad"),
    ],
)
def test_unsupported_operations(f, primitive):
    with pytest.raises(UnsupportedPrimitiveError, match=f"'[a-z_]*({primitive})[a-z_]*'"):
        bound(f, "crown")(BOX)


def test_a_comparison_s_error_says_what_to_write():
    with pytest.raises(UnsupportedPrimitiveError, match=r"jax\.nn\.leaky_relu"):
        bound(lambda x: jnp.where(x > 0.5, x, -x))(BOX)


# --- precision ------------------------------------------------------------------------------------


def precisions(jaxpr):
    """The precision of every matrix product, inside calls and loops too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn.params["precision"]
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from precisions(inner)


@pytest.mark.parametrize("method", METHODS)
def test_matrix_products_run_at_the_highest_precision(method):
    """Whatever the model asks for, and in constants too: bounds in TF32 could cut the truth."""
    low = jax.lax.Precision.DEFAULT
    kernel = jnp.ones((2, 1, 1, 2))

    @jax.jit
    def low_rank(u, v):
        return jnp.matmul(u, v, precision=low)

    def f(w, x):
        h = jnp.dot(low_rank(W, W), x, precision=low)
        h = jax.nn.relu(jnp.einsum("ij,j->i", w, h))
        y = jax.lax.conv_general_dilated(
            h[None, :, None, None],
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(y)

    for w in (W, Box(W, W + 0.1)):
        jaxpr = jax.make_jaxpr(bound(f, method, batch_size=2))(w, BOX).jaxpr
        found = list(precisions(jaxpr))
        assert len(found) > 3
        highest = jax.lax.Precision.HIGHEST
        assert all(p in (highest, (highest, highest)) for p in found), found


def test_what_no_output_needs_needs_no_rule() -> None:
    weight = jnp.array([[1.0, -2.0]])
    box = bound(lambda x: (jnp.sin(x), weight @ x)[1], "crown")(Box(jnp.zeros(2), jnp.ones(2)))
    assert box.lower.tolist() == [-2.0] and box.upper.tolist() == [1.0]


def test_a_single_output_layer_keeps_its_input() -> None:
    """Of W (1, n) and x (n,), as large as each other, the weight is eliminated."""
    weight, x = Box(jnp.full((1, 2), 0.9), jnp.ones((1, 2))), Box(jnp.zeros(2), jnp.ones(2))
    found = linear_bounds(lambda w, x: w @ x)(weight, x)
    assert jnp.allclose(found.lower.A[1], 0.9) and jnp.allclose(found.upper.A[1], 1.0)
