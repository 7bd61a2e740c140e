"""Outward rounding: bounds hold for what is computed, in any arithmetic of the stated model."""

import itertools
from functools import partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound, linear_bounds
from bnncert.bounds.arithmetic import Float
from bnncert.bounds.graph import UnsupportedPrimitiveError
from bnncert.bounds.ops import AFFINE, LINES, SUPPORTED
from bnncert.bounds.rounding import EXACT, affine_errors
from bnncert.bounds.rounding.functions import CURVATURES, FUNCTION_ERRORS, curvature
from bnncert.bounds.rounding.model import Precision, gamma
from bnncert.bounds.tracing import trace
from bnncert.sets import Box, LpBall, ball
from experiments.studies import roundoff
from tests.bounds.networks import in_few_steps

METHODS = ("ibp", "forward", "crown-ibp", "crown")
every_method = pytest.mark.parametrize("method", METHODS)


def bounds_of(f, method, region, **options):
    """Lower and upper ends, of a compiled call."""
    box = jax.jit(bound(f, in_few_steps(method, 3), **options))(region)
    return np.asarray(box.lower), np.asarray(box.upper)


def outside(values, ends):
    """How far any of the values lies outside: negative where all are inside."""
    lower, upper = ends
    return max(max((lower - v).max(), (v - upper).max()) for v in map(np.asarray, values))


# --- the network's own float32 --------------------------------------------------------------------


def mlp(params, x):
    x = (x - 0.4) / 0.3
    for w, b in params[:-1]:
        x = jax.nn.relu(w @ x + b)
    w, b = params[-1]
    return w @ x + b


def mlp_params(rng, *sizes):
    return [
        (np.float32(rng.normal(size=(n, m)) / np.sqrt(m)), np.float32(0.1 * rng.normal(size=n)))
        for m, n in pairwise(sizes)
    ]


def evaluations(params, x, rng):
    """The network at a point: by itself, compiled, in a batch, in other orders of sums, exact."""
    found = [mlp(params, x), jax.jit(mlp)(params, x)]
    batch = jnp.concatenate([x[None], jnp.float32(rng.uniform(size=(63, len(x))))])
    found.append(jax.jit(jax.vmap(mlp, (None, 0)))(params, batch)[0])
    for _ in range(5):
        shuffled, order = [], rng.permutation(len(x))
        start = order
        for w, b in params:
            rows = rng.permutation(len(b)) if w is not params[-1][0] else np.arange(len(b))
            shuffled.append((w[rows][:, order], b[rows]))
            order = rows
        found.append(mlp(shuffled, x[start]))
    with jax.enable_x64(True):
        exact = jax.tree.map(partial(np.asarray, dtype=np.float64), (params, x))
        found.append(mlp(*jax.tree.map(jnp.asarray, exact)))
    return found


@every_method
def test_every_order_of_summation_in_float32_is_inside_and_only_outward(method):
    rng = np.random.default_rng(0)
    params = mlp_params(rng, 200, 64, 32, 5)
    x = jnp.float32(rng.uniform(size=200))
    values = evaluations(params, x, rng)
    assert len({np.asarray(v, np.float64).tobytes() for v in values}) > 3  # they do differ
    network = partial(mlp, params)
    assert outside(values, bounds_of(network, method, Box(x, x), rounding="outward")) < 0
    assert outside(values, bounds_of(network, method, Box(x, x))) > 0
    for eps in (1e-6, 1e-2):
        region = ball(x, eps, clip=(0.0, 1.0))
        assert outside(values, bounds_of(network, method, region, rounding="outward")) < 0


@every_method
def test_cancellation_is_bounded_as_it_is_executed_and_not_as_the_merged_map(method):
    """(x + c) - c in float32 moves in steps of 1/16; the merged map is x."""
    region = Box(jnp.float32([0.01, 0.3]), jnp.float32([0.02, 0.32]))

    def f(x):
        return ((x + 1e6) - 1e6) @ jnp.float32([[1.0, -1.0], [0.5, 2.0]])

    points = np.linspace(region.lower, region.upper, 50)
    values = [f(x) for x in jnp.float32(points)]
    assert outside(values, bounds_of(f, method, region)) > 0.003
    assert outside(values, bounds_of(f, method, region, rounding="outward")) < 0


@every_method
def test_underflow_is_bounded(method):
    """In float32 the product is 0; in real arithmetic it is x."""

    def f(x):
        return jnp.float32([1e25, 1e25]) * (1e20 * (1e-25 * (1e-20 * x)))

    region = Box(jnp.float32([0.5, 1.0]), jnp.float32([0.75, 1.5]))
    ends = bounds_of(f, method, region, rounding="outward")
    assert outside([np.zeros(2), np.asarray(region.lower), np.asarray(region.upper)], ends) < 0


# --- any arithmetic of the model ------------------------------------------------------------------

ROUGH = 2.0**-10
SIZES = (4, 6, 6, 2)


class Rough:
    """Arithmetic of unit roundoff `unit`: each operation is off as `signs`, in [-1, 1], say."""

    def __init__(self, unit, signs):
        self.unit, self.signs, self.used = unit, signs, 0

    def off(self, shape):
        size = int(np.prod(shape))
        self.used += size
        return self.unit * self.signs[self.used - size : self.used].reshape(shape)

    def rounded(self, v):
        return v * (1 + self.off(v.shape))

    def dot(self, w, x):
        products = self.rounded(w * x[None, :])
        total = products[:, 0]
        for j in range(1, len(x)):
            total = self.rounded(total + products[:, j])
        return total

    def tanh(self, v):
        relative, absolute = FUNCTION_ERRORS["tanh"]
        value = jnp.tanh(v)
        return value + (relative * jnp.abs(value) + absolute) * self.off(v.shape)


class Exact:
    """Real arithmetic, by the operations that a network is written in."""

    rounded = staticmethod(lambda v: v)
    dot = staticmethod(jnp.matmul)
    tanh = staticmethod(jnp.tanh)


def network(ops, params, x):
    x = ops.rounded(ops.rounded(x - 0.3) * 1.7)
    (w0, b0), (w1, b1), (w2, b2) = params
    h = ops.tanh(ops.rounded(ops.dot(w0, x) + b0))
    skip = h
    h = jax.nn.relu(ops.rounded(ops.dot(w1, h) + b1))
    return ops.rounded(ops.dot(w2, ops.rounded(h + skip)) + b2)


def roughest(params, points, unit):
    """Values at points, each operation off so as to move an output as far as a few steps can."""

    def value(signs, x):
        return network(Rough(unit, signs), params, x)

    count = Rough(unit, np.zeros(10_000))
    network(count, params, np.zeros(SIZES[0]))
    found = []

    @jax.jit
    def pushed(x, direction):
        signs = jnp.zeros(count.used)
        for _ in range(4):
            slope = jax.grad(lambda s: direction @ value(s, x))(signs)
            signs = jnp.where(slope >= 0, 1.0, -1.0)
        return value(signs, x)

    for x in points:
        for direction in np.concatenate([np.eye(2), -np.eye(2)]):
            found.append(np.asarray(pushed(x, direction)))
    return found


@pytest.mark.parametrize("method", (*METHODS, "alpha-crown"))
def test_the_worst_arithmetic_of_the_model_is_bounded(method, float64):
    """And the bounds are not idle: at a tenth of the unit roundoff they fail."""
    rng = np.random.default_rng(1)
    params = [(np.float64(w), np.float64(b)) for w, b in mlp_params(rng, *SIZES)]
    center = rng.uniform(size=SIZES[0])
    f = partial(network, Exact, params)
    reached = []
    for eps in (0.0, 0.003):
        region = Box(jnp.asarray(center - eps), jnp.asarray(center + eps))
        corners = center + eps * rng.choice([-1.0, 1.0], (6, SIZES[0]))
        values = roughest(params, corners, ROUGH)
        assert outside(values, bounds_of(f, method, region, rounding=Float(ROUGH))) < 0
        idle = bounds_of(f, method, region, rounding=Float(ROUGH / 10))
        reached.append(outside(values, idle))
    assert reached[0] > 0


@pytest.mark.parametrize("activation", (jax.nn.elu, jax.nn.celu))
@pytest.mark.parametrize("method", ("ibp", "crown"))
def test_what_is_multiplied_by_alpha_is_off_by_as_much(method, activation, float64):
    """alpha expm1(x): what expm1 is off by, absolutely, grows with alpha."""
    relative, absolute = FUNCTION_ERRORS["expm1"]
    x = -np.logspace(-4.0, 0.5, 30)
    for alpha in (50.0, 0.02):
        inner = x / alpha if activation is jax.nn.celu else x
        exact = np.expm1(inner)
        off = alpha * (relative * np.abs(exact) + absolute) * ROUGH
        f = partial(activation, alpha=alpha)
        options = {"rounding": Float(ROUGH)}
        ends = bounds_of(f, method, Box(jnp.asarray(x), jnp.asarray(x)), **options)
        assert outside([alpha * exact - off, alpha * exact + off], ends) < 0


@pytest.mark.parametrize("f", (partial(jax.nn.elu, alpha=2.5), jax.nn.selu))
def test_a_line_through_a_kink_is_above_what_float32_computes(f):
    """The line itself, and not the interval: in float64, and so at points next to either end."""
    rng = np.random.default_rng(8)
    scale = rng.choice([1e-6, 1e-3, 1.0, 30.0], (2, 500))
    reach = (rng.uniform(size=(2, 500)) * scale).astype(np.float32)
    l, u = -reach[0], reach[1]
    x = np.clip(np.float32(l + np.linspace(0, 1, 33)[:, None] * (u - l)), l, u)
    values = np.float64(f(x))

    def above(rounding):
        found = linear_bounds(f, "crown-ibp", rounding=rounding)
        upper = jax.jit(jax.vmap(lambda a, b: found(Box(a, b)).upper))(l, u)
        return (np.float64(upper.A[0]) * x + np.float64(upper.b) - values).min()

    assert above("outward") >= 0 > above("nearest")


@every_method
def test_what_logaddexp_is_off_by(method, float64):
    """Its last sum, log1p and exp, and a difference that is off itself; also where it cancels."""
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(2, 40)) * rng.choice([0.1, 3.0, 30.0], 40)
    a[:20] = b[:20] = -np.log(2.0)
    a[:20] += np.linspace(-0.5, 0.5, 20)
    found = []
    for s, t, v, w in itertools.product((-ROUGH, ROUGH), repeat=4):
        gap = np.abs(a - b) * (1 + s)
        tail = np.log1p(np.exp(-gap) * (1 + t)) * (1 + v)
        found.append((np.maximum(a, b) + tail) * (1 + w))
    sets = [Box(jnp.asarray(v), jnp.asarray(v)) for v in (a, b)]
    run = bound(jnp.logaddexp, method, rounding=Float(ROUGH))
    box = jax.jit(run)(*sets)
    assert outside(found, (np.asarray(box.lower), np.asarray(box.upper))) < 0


@every_method
def test_small_coefficients_have_a_euclidean_norm(method):
    """1e-25 squared is 0 in float32, the norm of (1e-25, 1e-25) is not."""
    center = jnp.float32([1.0, -1.0])
    region = LpBall(center, jnp.float32(0.5), 2)
    w = jnp.float32([[1e-25, 1e-25]])
    farthest = 0.5 * jnp.sqrt(jnp.float32(0.5)) * jnp.float32([1.0, 1.0])
    values = [w @ (center + sign * farthest) for sign in (-0.999, 0.999)]
    assert outside(values, bounds_of(lambda x: w @ x, method, region, rounding="outward")) < 0


def test_a_cast_s_transpose_rounds_in_the_dtype_it_comes_to(float64):
    """Coefficients of a float32 value that is cast to float64 are float32 again."""
    region = Box(jnp.float32([1.0, 2.0]), jnp.float32([1.0, 2.0]))
    graph = trace(lambda x: x.astype(jnp.float64) / 3, (region,), {})
    found = affine_errors(graph, [region, region], Precision(), EXACT)
    error = {**found.charged, **found.carried}[1]
    assert (error >= 2.0**-24 * region.upper).all()


@every_method
def test_a_network_in_bfloat16_is_bounded_by_its_unit_roundoff(method):
    rng = np.random.default_rng(2)
    params = mlp_params(rng, 12, 8, 8, 3)
    coarse = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), params)
    same = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), coarse)
    x = jnp.asarray(rng.uniform(size=12), jnp.bfloat16)

    def f(x):
        h = x
        for w, b in same[:-1]:
            h = jnp.tanh(w @ h + b)
        return same[-1][0] @ h + same[-1][1]

    def in_bfloat16(x):
        h = x
        for w, b in coarse[:-1]:
            h = jnp.tanh(w @ h + b)
        return coarse[-1][0] @ h + coarse[-1][1]

    values = [np.asarray(run(in_bfloat16)(x), np.float32) for run in (jax.jit, lambda g: g)]
    region = Box(x.astype(jnp.float32), x.astype(jnp.float32))
    assert outside(values, bounds_of(f, method, region)) > 0
    wide = bounds_of(f, method, region, rounding=Float(2.0**-8))
    assert outside(values, wide) < 0


# --- what the rules assume ------------------------------------------------------------------------


@pytest.mark.parametrize("name", roundoff.cases())
def test_functions_are_within_their_constants(name, float64):
    """Here some 200,000 of float32; all of them by `experiments.studies.roundoff`."""
    row = roundoff.sweep(name, roundoff.cases()[name], stride=20011)
    assert row.share <= 1, row


@pytest.mark.parametrize("name", sorted(CURVATURES))
def test_curvatures_are_the_largest(name, float64):
    """And not far above: half of it is reached."""
    function = roundoff.cases()[name].function
    x = jnp.linspace(-20.0, 20.0, 20001) + 1e-7
    found = float(jnp.abs(jax.vmap(jax.grad(jax.grad(function)))(x)).max())
    assert 0.5 * CURVATURES[name] <= found <= CURVATURES[name]


SINGULAR = {
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt,
    "reciprocal": lambda x: 1 / x,
    "elu": partial(jax.nn.elu, alpha=3.0),
    "celu": partial(jax.nn.celu, alpha=0.3),
    "squareplus": jax.nn.squareplus,
    **{f"power {n}": partial(jax.lax.integer_pow, y=n) for n in (-3, -2, 3, 4)},
}


@pytest.mark.parametrize("free", (True, False))
@pytest.mark.parametrize("name", SINGULAR)
def test_curvatures_on_a_box_are_the_largest(name, free, float64):
    """Where a tangent may touch: anywhere, or no nearer to a pole than the middle."""
    f, box = SINGULAR[name], Box(jnp.float64(0.2), jnp.float64(1.2))
    node = trace(f, (box,), {}).nodes[1]
    growing = node.op in ("exp", "exp2", "expm1")
    x = jnp.linspace(box.lower if free or growing else 0.7, box.upper, 101)
    found = float(jnp.abs(jax.vmap(jax.grad(jax.grad(f)))(x)).max())
    assert found <= (1 + 1e-9) * jnp.asarray(curvature(node, box, free))


def test_the_sweep_can_fail(float64):
    def poor_in_float32(x):
        return jnp.exp(x) * (1 + 4e-6 * (x.dtype == jnp.float32))

    off = roundoff.Case(poor_in_float32, *FUNCTION_ERRORS["exp"])
    assert roundoff.sweep("exp", off, stride=40009).share > 1


def test_every_function_with_lines_has_constants_or_is_refused():
    exact = {"max", "min", "abs", "clip", "hard_tanh"}
    swept = {name.removesuffix("'") for name in roundoff.cases()}
    assert set(LINES) - exact - {"integer_pow", "pow"} <= set(FUNCTION_ERRORS)
    assert set(FUNCTION_ERRORS) <= swept
    assert set(LINES) <= set(SUPPORTED) and set(AFFINE) <= set(SUPPORTED)


def test_error_bound_of_n_roundings():
    unit = 2.0**-24
    assert gamma(1000, unit) == pytest.approx(1000 * unit, rel=1e-4)
    assert gamma(0, unit) == 0
    # Every product of n factors 1 + d, |d| <= u, or of their reciprocals, is within.
    for n in (1, 10, 1000):
        assert (1 + unit) ** n - 1 <= gamma(n, unit)
        assert (1 - unit) ** -n - 1 <= gamma(n, unit)
    with pytest.raises(ValueError, match="a sum of 200 terms has no error bound"):
        gamma(200, 2.0**-8)


# --- as bounds ------------------------------------------------------------------------------------


def regions(x):
    eps = jnp.float32(0.02)
    return [Box(x - eps, x + eps), LpBall(x, eps, 1), LpBall(x, 5 * eps, 2)]


@every_method
def test_outward_contains_nearest_and_is_hardly_wider(method):
    rng = np.random.default_rng(3)
    network = partial(mlp, mlp_params(rng, 30, 20, 20, 4))
    for region in regions(jnp.float32(rng.uniform(size=30))):
        lower, upper = bounds_of(network, method, region)
        low, high = bounds_of(network, method, region, rounding="outward")
        assert (low < lower).all() and (upper < high).all()
        assert ((high - low) <= 1.1 * (upper - lower)).all()


def test_linear_bounds_enclose_what_is_computed():
    rng = np.random.default_rng(4)
    params = mlp_params(rng, 20, 16, 4)
    x = jnp.float32(rng.uniform(size=20))
    found = linear_bounds(partial(mlp, params), rounding="outward")(Box(x, x))
    exact = [
        np.asarray(side.A[0], np.float64) @ np.asarray(x, np.float64) + np.asarray(side.b)
        for side in (found.lower, found.upper)
    ]
    assert outside(evaluations(params, x, rng), exact) < 0


def test_gradients_are_finite():
    rng = np.random.default_rng(5)
    params = mlp_params(rng, 6, 5, 3)
    x = jnp.float32(rng.uniform(size=6))

    def total(params, eps):
        box = bound(partial(mlp, params), "crown-ibp", rounding="outward")(Box(x - eps, x + eps))
        return jnp.sum(box.upper - 0.5 * box.lower)

    for eps in (0.0, 0.1):
        for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(params, jnp.float32(eps))):
            assert np.isfinite(leaf).all()


def test_one_compilation_serves_all_values():
    rng = np.random.default_rng(6)
    params = mlp_params(rng, 6, 5, 3)

    def network(x):
        return mlp(params, x)

    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(bound(network, rounding="outward"), 1))
    for eps in (0.0, 0.1):
        x = jnp.float32(rng.uniform(size=6))
        run(Box(x - eps, x + eps))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (lambda: Float(1.0), r"unit_roundoff = 1\.0"),
        (lambda: "up", "rounding = 'up'.*'outward'"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        bound(jnp.sin, rounding=options())


@pytest.mark.parametrize("method", ("ibp", "crown"))
def test_what_nobody_knows_the_rounding_of_is_refused(method):
    run = bound(lambda x: x**1.7, method, rounding="outward")
    with pytest.raises(UnsupportedPrimitiveError, match="how 'pow' rounds"):
        run(Box(jnp.ones(2), 2 * jnp.ones(2)))


def test_sums_that_are_too_long_are_refused():
    run = bound(jnp.sum, "ibp", rounding=Float(2.0**-8))
    with pytest.raises(ValueError, match="no error bound at unit roundoff"):
        run(Box(jnp.zeros(200), jnp.ones(200)))
