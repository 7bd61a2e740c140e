"""A zoo of random networks: together they use every operation, nonlinearity and set there is.

    KINDS["mlp"] = Kind(init, apply)     init(rng) -> (params, args), args with sets as leaves
                                         apply(params, *args) -> outputs, for one example

`sample` stacks several networks of one kind, so that a test compiles once a kind, and `boxes` is
that compiled function, shared by all tests. `starts` and `attacks` make the points a bound must
hold at.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from bnncert.bounds import AlphaCROWN, bound
from bnncert.sets import Box, LpBall, is_set
from tests.bounds import nonlinear

METHODS = ("ibp", "forward", "crown-ibp", "crown")


def in_few_steps(method, steps):
    """A method by its name, alpha-crown of so many steps: one of its own takes fifty."""
    return AlphaCROWN(steps) if method == "alpha-crown" else method


"""All but alpha-crown, which takes long to compile: its tests are in test_alpha.py."""

NETWORKS = 2
"""Networks of each kind."""


class Kind(NamedTuple):
    """How to draw a network with its sets, and how to run it."""

    init: Callable[[np.random.Generator], tuple[Any, tuple]]
    apply: Callable[..., Any]


def boxes(
    name: str, methods: tuple[str, ...] = METHODS, rounding: str = "nearest"
) -> Callable[[Any, tuple], dict[str, Any]]:
    """`(params, args) -> {method: boxes}` over the stacked networks of a kind, compiled once."""
    return _boxes(name, methods, rounding)


@cache
def _boxes(
    name: str, methods: tuple[str, ...], rounding: str
) -> Callable[[Any, tuple], dict[str, Any]]:
    apply = KINDS[name].apply

    def all_methods(params: Any, args: tuple) -> dict[str, Any]:
        found = {m: bound(partial(apply, params), m, rounding=rounding) for m in methods}
        return {method: g(*args) for method, g in found.items()}

    return jax.jit(jax.vmap(all_methods))


def sample(name: str, dtype: Any, count: int = NETWORKS) -> tuple[Any, tuple]:
    """The stacked parameters and sets of `count` networks of a kind.

    They are the same ones at each call, and the same numbers in float32 and in float64.
    """
    seeds = [[*name.encode(), i] for i in range(count)]
    drawn = [KINDS[name].init(np.random.default_rng(seed)) for seed in seeds]

    def stacked(*leaves: np.ndarray) -> jax.Array:
        return jnp.asarray(np.stack(leaves).astype(np.float32), dtype)

    return jax.tree.map(stacked, *drawn)


def member(tree: Any, index: int) -> Any:
    """One of the stacked."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def scaled(args: tuple, factor: float) -> tuple:
    """The sets with their radii times `factor`, around the same centers."""

    def one(region: Any) -> Any:
        if isinstance(region, LpBall):
            return LpBall(region.center, region.eps * factor, region.p)
        reach = region.radius * factor
        return Box(region.center - reach, region.center + reach)

    return jax.tree.map(one, args, is_leaf=is_set)


def centers(args: tuple) -> tuple:
    """The centers of the sets."""
    return jax.tree.map(lambda region: region.center, args, is_leaf=is_set)


def flat(outputs: Any) -> jax.Array:
    """All leaves of the outputs of one network as one vector."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(outputs)])


def ends(outputs: Any, networks: int = NETWORKS) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper ends of stacked boxes, each (networks, outputs)."""
    found = jax.tree.leaves(outputs, is_leaf=is_set)
    lower, upper = (
        np.concatenate([np.asarray(getattr(b, side)).reshape(networks, -1) for b in found], axis=1)
        for side in ("lower", "upper")
    )
    return lower, upper


# --- points ---------------------------------------------------------------------------------------


def starts(rng: np.random.Generator, args: tuple, count: int) -> tuple:
    """Points of the sets, a third each inside, on the boundary, and at corners or vertices."""

    def one(region: Any) -> np.ndarray:
        if isinstance(region, LpBall):
            return _ball_points(rng, region, count)
        lower, upper = np.asarray(region.lower), np.asarray(region.upper)
        t = rng.uniform(size=(count, *lower.shape))
        corner = rng.uniform(size=t.shape) < np.repeat([0.0, 0.5, 1.0], _thirds(count)).reshape(
            -1, *[1] * lower.ndim
        )
        t = np.where(corner, t < 0.5, t)
        return (lower * (1 - t) + upper * t).astype(lower.dtype)

    return jax.tree.map(one, args, is_leaf=is_set)


def _thirds(count: int) -> list[int]:
    return [count // 3, count // 3, count - 2 * (count // 3)]


def _ball_points(rng: np.random.Generator, region: LpBall, count: int) -> np.ndarray:
    center = np.asarray(region.center)
    size = center.size
    inside, surface, vertices = _thirds(count)
    direction = rng.normal(size=(count, size)) if region.p == 2 else rng.laplace(size=(count, size))
    direction /= np.linalg.norm(direction, ord=region.p, axis=1, keepdims=True)
    shrink = np.concatenate([rng.uniform(size=inside) ** (1 / size), np.ones(surface + vertices)])
    direction *= shrink[:, None]
    where = rng.integers(size, size=vertices)
    direction[inside + surface :] = 0.0
    direction[inside + surface + np.arange(vertices), where] = rng.choice([-1.0, 1.0], vertices)
    step = float(region.eps) * direction.reshape(count, *center.shape)
    return (center + step).astype(center.dtype)


def attacks(
    apply: Callable[..., Any], args: tuple, start: tuple, direction: jax.Array, steps: int
) -> Any:
    """Values of the network at `start` and after each step of an attack: (steps + 1, outputs).

    A step goes to the point of the sets that is the best for the linear approximation of
    `<direction, outputs>`: a corner of a box, the far point of an L2 ball, a vertex of an L1 ball.
    """

    def objective(points: tuple) -> tuple[jax.Array, jax.Array]:
        values = flat(apply(*points))
        return jnp.vdot(direction, values), values

    def climb(points: tuple, _: None) -> tuple[tuple, jax.Array]:
        (_, values), slopes = jax.value_and_grad(objective, has_aux=True)(points)
        return jax.tree.map(_best, args, slopes, is_leaf=is_set), values

    return jax.lax.scan(climb, start, length=steps + 1)[1]


def _best(region: Any, slope: jax.Array) -> jax.Array:
    if isinstance(region, Box):
        return jnp.where(slope > 0, region.upper, region.lower)
    if region.p == 2:
        length = jnp.sqrt(jnp.sum(slope * slope))
        return region.center + region.eps * slope / jnp.where(length > 0, length, 1.0)
    steepest = jnp.arange(slope.size).reshape(slope.shape) == jnp.argmax(jnp.abs(slope))
    return region.center + region.eps * jnp.sign(slope) * steepest


# --- the kinds ------------------------------------------------------------------------------------


def _matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape) * (1.5 / np.sqrt(np.prod(shape[1:])))


def _layers(rng: np.random.Generator, *sizes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = zip(sizes[1:], sizes[:-1], strict=True)
    return [(_matrix(rng, m, n), 0.3 * rng.normal(size=m)) for m, n in pairs]


def _box(rng: np.random.Generator, *shape: int, radius: float = 0.4) -> Box:
    """Half-widths differ, and one coordinate in six is a single point."""
    center = rng.normal(size=shape)
    reach = radius * rng.uniform(size=shape) * (rng.uniform(size=shape) > 1 / 6)
    return Box(center - reach, center + reach)


def _ball(rng: np.random.Generator, p: int, eps: float, *shape: int) -> LpBall:
    return LpBall(rng.normal(size=shape), np.float64(eps), p)


def _dense(activation: Callable, layers: Any, x: jax.Array) -> jax.Array:
    for i, (w, b) in enumerate(layers):
        x = w @ x + b
        x = activation(x) if i < len(layers) - 1 else x
    return x


def _mlp(activation: Callable) -> Kind:
    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        return _layers(rng, 4, 7, 6, 3), (_box(rng, 4),)

    return Kind(init, partial(_dense, activation))


def _each(*activations: Callable) -> Kind:
    """Every activation in turn, after a dense layer."""

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        return _layers(rng, 4, *[5 for _ in activations], 3), (_box(rng, 4),)

    def apply(layers: Any, x: jax.Array) -> jax.Array:
        for (w, b), activation in zip(layers, (*activations, lambda v: v), strict=True):
            x = activation(w @ x + b)
        return x

    return Kind(init, apply)


def _together(functions: Mapping[str, nonlinear.Function]) -> Kind:
    """All functions of one hidden layer; for each an output, the function's and an affine part."""

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        heads = rng.normal(size=(2, len(functions), 4))
        return (_layers(rng, 4, 4, 4), heads), (_box(rng, 4),)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        layers, (head, affine) = params
        y = _dense(jax.nn.relu, layers, x)
        p = jax.nn.softplus(y) + 0.3
        found = (jnp.broadcast_to(f(y, p), y.shape) for f in functions.values())
        return jnp.stack([h @ (f + a * y) for h, f, a in zip(head, found, affine, strict=True)])

    return Kind(init, apply)


def _margins() -> Kind:
    mlp = _mlp(jax.nn.relu)

    def apply(layers: Any, x: jax.Array) -> jax.Array:
        logits = mlp.apply(layers, x)
        return logits - logits[1]

    return Kind(mlp.init, apply)


def _conv(
    image: tuple[int, ...], kernel: tuple[int, ...], numbers: tuple[str, str, str], **options: Any
) -> Kind:
    """A convolution, batch-norm at fixed statistics (its scale may be negative), ReLU, dense."""
    convolve = partial(
        jax.lax.conv_general_dilated,
        dimension_numbers=numbers,
        **{"window_strides": (1,) * (len(image) - 2), "padding": "SAME", **options},
    )
    features = kernel[numbers[1].index("O")]
    channel = numbers[2].index("C")
    shape = [features if i == channel else 1 for i in range(len(image))]
    size = int(np.prod(jax.eval_shape(convolve, np.zeros(image), np.zeros(kernel)).shape))

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        norm = {"mean": rng.normal(size=shape), "var": rng.uniform(0.5, 2.0, size=shape)}
        norm |= {"scale": rng.normal(size=shape), "bias": rng.normal(size=shape)}
        head = _layers(rng, size, 2)[0]
        return (rng.normal(size=kernel) / 2, norm, head), (_box(rng, *image, radius=0.2),)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        weights, norm, (w, b) = params
        x = convolve(x, weights)
        x = (x - norm["mean"]) / jnp.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
        return w @ jax.nn.relu(x).reshape(-1) + b

    return Kind(init, apply)


class _Cnn(linen.Module):
    """A small model as users write it, with Flax's own batch-norm, pooling and convolution."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(3, (3, 3))((x - 0.2) / 0.5)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        x = linen.avg_pool(x, (2, 2), strides=(2, 2))
        x = linen.leaky_relu(linen.Conv(4, (2, 2), strides=2)(x), 0.1)
        x = linen.Dense(4)(x.mean(axis=(0, 1)))
        return linen.Dense(3)(linen.sigmoid(x))


def _flax() -> Kind:
    model = _Cnn()
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((6, 6, 2), np.float32))

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        params = jax.tree.map(lambda s: 0.6 * rng.normal(size=s.shape), shapes)
        params["batch_stats"] = jax.tree.map(np.abs, params["batch_stats"])
        return params, (_box(rng, 6, 6, 2, radius=0.2),)

    return Kind(init, model.apply)


def _pooling() -> Kind:
    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        return _matrix(rng, 3, 8), (_box(rng, 5, 5, 2),)

    def apply(w: Any, x: jax.Array) -> jax.Array:
        y = linen.avg_pool(jax.nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
        y = y - y.mean(axis=(0, 1))
        z = linen.avg_pool(jax.nn.relu(y), (2, 2), count_include_pad=False)
        return w @ jnp.concatenate([z.reshape(-1), z.reshape(-1)])[:8]

    return Kind(init, apply)


def _residual() -> Kind:
    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        return [_matrix(rng, 5, 5) for _ in range(4)], (_box(rng, 5),)

    def apply(weights: Any, x: jax.Array) -> jax.Array:
        for w in weights[:-1]:
            x = x + 0.5 * jax.nn.relu(w @ x)
        return weights[-1] @ x - jnp.tanh(x) + x

    return Kind(init, apply)


def _shapes() -> Kind:
    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        params = (rng.normal(size=(3, 4)), _matrix(rng, 4, 9), _matrix(rng, 2, 4))
        return params, (_box(rng, 3, 4),)

    def apply(params: Any, x: jax.Array) -> Any:
        a, w, v = params
        left, right = jnp.split(x.T.reshape(2, 6), 2, axis=1)
        y = jnp.concatenate([left[::-1], a[:2, :3], jax.nn.relu(right)], axis=0)
        y = jax.lax.pad(y, jnp.asarray(0.5, y.dtype), ((0, 1, 0), (1, -1, 0)))
        y = jnp.where(a[:1, :3] > 0, y, jnp.broadcast_to(x[0, :3], y.shape))
        y = jnp.cumsum(y, axis=0)[jnp.array([0, 3, 3, 6])] - jnp.flip(y, 1)[:4]
        y = jax.lax.dynamic_slice(y, (1, 0), (3, 3)) + y[0, None]
        y = jnp.stack([y, jnp.roll(y, 1, axis=0)]).sum(axis=0).squeeze()
        filled = y.reshape(-1).at[jnp.array([2, 99])].get(mode="fill", fill_value=1.5)
        z = jax.nn.relu(w @ y.reshape(-1))
        return {"head": v @ z, "filled": filled - z[:2], "matrix": jnp.outer(a[0], z)[:2, :2]}

    return Kind(init, apply)


def _constants() -> Kind:
    """Products and quotients by constants of either sign, subtraction, negation, scalars."""

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        return (rng.normal(size=4), _matrix(rng, 3, 4)), (_box(rng, 4), _box(rng))

    def apply(params: Any, x: jax.Array, scalar: jax.Array) -> jax.Array:
        a, w = params
        x = a - x * a / -0.7 + (-x) + scalar * a
        x = jnp.maximum(scalar, jax.nn.relu(x)) + jnp.maximum(a, scalar)
        x = x - jnp.minimum(x, 0.9 - scalar)
        return w @ x + scalar - w @ (x / a) / 4

    return Kind(init, apply)


def _ball_net(p: int, image: bool = False) -> Kind:
    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        shape = (4, 4, 1) if image else (6,)
        kernel = rng.normal(size=(3, 3, 1, 2)) / 2
        layers = _layers(rng, 8 if image else 6, 6, 3)
        return (kernel, layers) if image else layers, (_ball(rng, p, 0.7, *shape),)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        layers = params
        if image:
            kernel, layers = params
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x[None], kernel, (2, 2), "SAME", dimension_numbers=numbers
            )
            x = jax.nn.relu(x).reshape(-1)
        logits = _dense(jax.nn.relu, layers, x)
        return logits - logits[0]

    return Kind(init, apply)


def _weight_boxes(bounded_input: bool) -> Kind:
    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        layers = _layers(rng, 4, 6, 5, 3)
        widened = [(Box(w - 0.1, w + 0.1), Box(b - 0.05, b + 0.02)) for w, b in layers]
        x = rng.normal(size=4)
        return x, (widened, _box(rng, 4)) if bounded_input else (widened,)

    def apply(fixed: Any, layers: Any, x: Any = None) -> jax.Array:
        activations = iter((jax.nn.relu, jnp.tanh))
        y = _dense(lambda v: next(activations)(v), layers, fixed if x is None else x)
        return y - y[0]

    return Kind(init, apply)


def _kernel_boxes() -> Kind:
    """The kernel of a convolution is bounded; its image is not."""

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        params = (rng.normal(size=(1, 5, 5, 2)), _matrix(rng, 3, 12))
        return params, (_box(rng, 3, 3, 2, 3), _box(rng, 3))

    def apply(params: Any, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        image, w = params
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(image, kernel, (2, 2), "VALID", dimension_numbers=numbers)
        return w @ jax.nn.relu(y + bias).reshape(-1)

    return Kind(init, apply)


def _products() -> Kind:
    """Products of two bounded values in every arrangement: batched, transposed, vector, shared."""

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        return _matrix(rng, 3, 3), (_box(rng, 2, 3, 4), _box(rng, 2, 4), _box(rng, 3, radius=0.2))

    def apply(w: Any, a: jax.Array, b: jax.Array, c: jax.Array) -> Any:
        rows = jnp.einsum("bij,bj->bi", a, jax.nn.relu(b))
        left = c @ rows.T
        gram = jnp.einsum("bij,kj->ibk", a, b)
        return {"left": left, "gram": w @ jax.nn.relu(gram.reshape(3, -1)), "same": jnp.dot(c, c)}

    return Kind(init, apply)


def _several_sets() -> Kind:
    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        sets = {"l2": _ball(rng, 2, 0.5, 4), "l1": _ball(rng, 1, 0.8, 4), "box": _box(rng, 4)}
        return [_matrix(rng, 4, 4) for _ in range(4)], (sets,)

    def apply(weights: Any, x: Any) -> jax.Array:
        y = weights[0] @ x["l2"] + weights[1] @ x["l1"] - x["box"]
        z = jax.nn.relu(y) + weights[2] @ x["l2"] - jax.nn.softplus(x["l1"])
        return weights[3] @ z - z[::-1]

    return Kind(init, apply)


def _pairs() -> Kind:
    """Maxima and minima of two bounded values, and the log of the sum of their exponentials."""

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        return _layers(rng, 4, 4, 4, 3), (_box(rng, 4),)

    def apply(layers: Any, x: jax.Array) -> jax.Array:
        (w, b), (v, c), (u, d) = layers
        y, z = w @ x + b, v @ x + c
        extrema = jnp.maximum(y, z) - jnp.minimum(y, jax.nn.relu(z))
        return u @ (extrema + jnp.logaddexp(2.0 * z, y - x)) + d

    return Kind(init, apply)


def _affine() -> Kind:
    """No nonlinearity at all."""

    def init(rng: np.random.Generator) -> tuple[Any, tuple]:
        return _layers(rng, 4, 6, 3), (_box(rng, 4),)

    return Kind(init, lambda layers, x: _dense(lambda v: v - v.mean(), layers, x))


def _spelled(x: jax.Array) -> jax.Array:
    """ReLU in every spelling."""
    x = jnp.maximum(x, 0) - jnp.maximum(0.25, x) + jax.nn.relu(x[::-1])
    return x + jnp.minimum(jnp.arange(5.0, dtype=x.dtype) / 4, x)


def _clipped(x: jax.Array) -> jax.Array:
    low, high = jnp.asarray(-1.0, x.dtype), jnp.asarray(0.4, x.dtype)
    return jnp.clip(x, -0.5, 1.5) - jax.lax.clamp(low, x[::-1], high) + x.clip(max=0.8)


KINDS: dict[str, Kind] = {
    "mlp": _mlp(jax.nn.relu),
    "margins": _margins(),
    "spelled": _each(_spelled),
    "clipped": _each(_clipped),
    "leaky": _each(
        *[partial(jax.nn.leaky_relu, negative_slope=slope) for slope in (0.01, 0.2, 0.0, 1.5, -0.6)]
    ),
    "sigmoid": _mlp(jax.nn.sigmoid),
    "tanh": _mlp(lambda x: 2 * jnp.tanh(x)),
    "convex": _each(jax.nn.softplus, lambda x: jnp.exp(x / 2), jax.nn.softplus),
    "increasing": _each(
        lambda x: jnp.sqrt(jax.nn.sigmoid(x)) + jnp.log1p(jnp.exp(x)) + jnp.cbrt(x),
        lambda x: (
            jax.lax.erf(x) + jax.lax.erfc(2 * x) + jnp.arctan(x) + jnp.arcsinh(x) + jnp.sinh(x / 3)
        ),
        lambda x: jnp.log(1 + jax.nn.relu(x)) + jnp.expm1(-jax.nn.relu(x)) + jnp.exp2(x / 4),
        lambda x: (jnp.floor(x) + jnp.ceil(2 * x) + jnp.sign(x) + jnp.round(x)) / 4,
    ),
    "one-set-of-lines": _together(nonlinear.ONE_SET_OF_LINES),
    "two-sets-of-lines": _together(nonlinear.TWO_SETS_OF_LINES),
    "of-an-axis": _together(nonlinear.OF_AN_AXIS),
    "conv-strided": _conv(
        (1, 5, 6, 2), (3, 2, 2, 3), ("NHWC", "HWIO", "NHWC"), window_strides=(2, 1)
    ),
    "conv-grouped": _conv(
        (1, 4, 6, 5),
        (4, 2, 3, 2),
        ("NCHW", "OIHW", "NCHW"),
        padding=((2, 1), (0, 3)),
        rhs_dilation=(1, 2),
        feature_group_count=2,
    ),
    "conv-transposed": _conv(
        (1, 3, 3, 2),
        (3, 3, 2, 2),
        ("NHWC", "HWOI", "NCHW"),
        padding=((1, 2), (2, 0)),
        lhs_dilation=(2, 1),
    ),
    "conv-line": _conv((1, 2, 9), (3, 2, 3), ("NCH", "OIH", "NCH"), window_strides=(2,)),
    "flax": _flax(),
    "pooling": _pooling(),
    "residual": _residual(),
    "shapes": _shapes(),
    "constants": _constants(),
    "affine": _affine(),
    "pairs": _pairs(),
    "l1": _ball_net(1),
    "l2": _ball_net(2),
    "l2-image": _ball_net(2, image=True),
    "weights": _weight_boxes(bounded_input=False),
    "weights-and-input": _weight_boxes(bounded_input=True),
    "kernel": _kernel_boxes(),
    "products": _products(),
    "several": _several_sets(),
}
