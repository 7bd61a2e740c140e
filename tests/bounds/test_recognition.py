"""Functions of jax.nn are found in what they were traced to, and nothing else is."""

import jax
import jax.numpy as jnp
import pytest

from bnncert.bounds import bound
from bnncert.bounds.tracing import trace
from bnncert.bounds.tracing.recognition import find_runs
from bnncert.sets import Box

X = jnp.ones((2, 3))
BOX = Box(-X, X)
NAMED = (
    "softplus",
    "log_sigmoid",
    "selu",
    "silu",
    "mish",
    "hard_tanh",
    "hard_silu",
    "soft_sign",
    "leaky_relu",
    "elu",
    "celu",
    "squareplus",
)


def operations(f):
    return [node.op for node in trace(f, (BOX,), {}).nodes]


def runs(f):
    """Operation and parameters of the runs in a function, inside its calls too."""
    found = []

    def look(jaxpr):
        found.extend(
            (r.recognised.op, dict(r.recognised.params)) for r in find_runs(jaxpr).values()
        )
        for eqn in jaxpr.eqns:
            if "jaxpr" in eqn.params:
                look(eqn.params["jaxpr"].jaxpr)

    look(jax.make_jaxpr(f)(X).jaxpr)
    return found


@pytest.mark.parametrize("name", NAMED)
def test_named_functions_are_one_node(name):
    assert operations(getattr(jax.nn, name)) == ["input", name]


@pytest.mark.parametrize("value", [0.0, 0.5, 3.0])
def test_their_constants_are_found(value):
    for f in (lambda x: jax.nn.elu(x, value), lambda x: jax.nn.elu(x, jnp.full(3, value))):
        node = trace(f, (BOX,), {}).nodes[-1]
        assert node.op == "elu" and jnp.allclose(jnp.asarray(node.operands[1]), value)


def test_a_constant_without_a_rule_is_left_to_the_parts():
    assert "elu" not in operations(lambda x: jax.nn.elu(x, -1.0))
    assert "squareplus" not in operations(lambda x: jax.nn.squareplus(x, 0.0))


def test_a_name_proves_nothing():
    @jax.jit
    def silu(x):
        return x * jnp.tanh(x)

    assert "silu" not in operations(silu)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (jax.nn.gelu, ("gelu_tanh", {})),
        (lambda x: jax.nn.gelu(x, approximate=False), ("gelu", {})),
        (jax.nn.softmax, ("softmax", {"axes": (1,)})),
        (lambda x: jax.nn.softmax(2 * x, axis=0) + x, ("softmax", {"axes": (0,)})),
        (lambda x: jax.nn.softmax(x, axis=(0, 1)), ("softmax", {"axes": (0, 1)})),
        (jax.nn.log_softmax, ("log_softmax", {"axes": (1,)})),
        (jax.nn.logsumexp, ("logsumexp", {"axes": (0, 1), "keepdims": False})),
        (
            lambda x: jax.nn.logsumexp(x, axis=1, keepdims=True),
            ("logsumexp", {"axes": (1,), "keepdims": True}),
        ),
    ],
)
def test_runs_are_found(f, expected):
    assert runs(f) == [expected]


def test_two_runs_in_a_row():
    assert [op for op, _ in runs(lambda x: jax.nn.gelu(jax.nn.gelu(x)))] == ["gelu_tanh"] * 2


def test_an_almost_equal_run_is_not_trusted():
    def almost(x):
        return x * 0.5 * (1.0 + jnp.tanh(0.797 * (x + 0.044715 * x**3)))

    def unshifted(x):
        return jnp.exp(x) / jnp.sum(jnp.exp(x))

    assert runs(almost) == [] and runs(unshifted) == [] and runs(jnp.max) == []


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: jnp.clip(x, -0.5, 0.7), ["clip"]),
        (lambda x: jnp.maximum(jnp.minimum(0.7, x), -0.5), ["clip"]),
        (jax.nn.relu6, ["clip"]),
        (jax.nn.hard_sigmoid, ["add", "clip", "div"]),
        (lambda x: jax.nn.sigmoid(x) * x, ["silu"]),
        (lambda x: x * jnp.tanh(jax.nn.softplus(x)), ["mish"]),
        (lambda x: x * jnp.tanh(x), ["tanh", "mul"]),
        (lambda x: jnp.where(x > 0, x, 0.1 * x), ["leaky_relu"]),
        (lambda x: jnp.where(x >= 0, x, x * jnp.array([0.1, 3.0, -0.2])), ["leaky_relu"]),
        (lambda x: jnp.where(x < 0, -x, x), ["leaky_relu"]),
        (lambda x: jnp.where(0 <= x, x, 0.1 * x), ["leaky_relu"]),
        (lambda x: jnp.where(0 >= x, 0.1 * x, x), ["leaky_relu"]),
        (lambda x: x * jax.nn.sigmoid(2 * x), ["mul", "logistic", "mul"]),
        (lambda x: jnp.minimum(jnp.minimum(x, 1.0), 2.0), ["min", "min"]),
    ],
)
def test_nodes_that_are_one_function_are_one_node(f, expected):
    assert operations(f)[1:] == expected


@pytest.mark.parametrize("slope", [0.1, 0.0, 1.5, -0.6])
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_a_leaky_relu_by_hand_is_what_it_was_traced_from(slope, rounding):
    """Whichever way round, with a slope that nobody knows under jit, on either side of 0."""

    def one(x, a):
        return jnp.where(x > 0, x, a * x)

    def other(x, a):
        return jnp.where(0 > x, x * a, x)

    at = jnp.linspace(-1.5, 1.5, 13)
    for f in (one, other):
        run = jax.jit(lambda a, x, f=f: bound(lambda v: f(v, a), "crown", rounding=rounding)(x))
        found, value = run(slope, Box(at, at)), f(at, slope)
        assert bool(((found.lower <= value) & (value <= found.upper)).all())
        assert jnp.allclose(found.lower, found.upper, atol=1e-4)
        wide = run(slope, Box(at - 0.4, at + 0.2))
        named = bound(lambda x: jax.nn.leaky_relu(x, slope), "crown", rounding=rounding)
        expected = named(Box(at - 0.4, at + 0.2))
        assert jnp.allclose(wide.lower, expected.lower, atol=1e-6)
        assert jnp.allclose(wide.upper, expected.upper, atol=1e-6)


def test_what_a_fused_node_was_made_of_may_be_used_besides():
    def f(x):
        above = jnp.maximum(x, 0.0)
        return jnp.minimum(above, 1.0) + above

    assert operations(f)[1:] == ["max", "clip", "add"]


@pytest.mark.parametrize("low", [-1.0, 0.3, 2.0, -jnp.inf])
def test_a_clip_is_what_it_was_traced_from(low):
    """Also where the constants cross, which nobody knows under jit."""

    def one(x):
        return jnp.minimum(jnp.maximum(x, low), 0.5)

    def other(x):
        return jnp.maximum(jnp.minimum(x, 0.5), low)

    at = jnp.linspace(-1.5, 1.5, 13)
    for f in (one, other):
        found = jax.jit(bound(f, "crown"))(Box(at, at))
        assert jnp.array_equal(found.lower, f(at)) and jnp.array_equal(found.upper, f(at))
