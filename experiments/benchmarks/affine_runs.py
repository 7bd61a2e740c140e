"""What intervals cost on networks with several affine operations in a row, in forward passes.

    python -m experiments.benchmarks.affine_runs
    python -m experiments.benchmarks.affine_runs --networks convolutions --repeats 50
    python -m experiments.benchmarks.affine_runs --step

Bounded as one map, such a run takes a backward row for each coordinate it ends on: thousands of
forward passes. It is bounded so only within a budget (`bnncert.bounds.merging`), and else operation
by operation. Every network has such a run before its first nonlinearity, or before its outputs.

Two counts: floating-point operations as XLA counts them in what it compiled, the same on every run;
and time, the best of the repeats, which take turns with the forward pass. With `--step`, the
gradient of the robust log-likelihood of a batch stands beside that of the clean one.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert import ball, bound
from bnncert.bounds.arithmetic import ROUNDINGS
from bnncert.likelihood import clean_categorical, robust_categorical
from bnncert.types import Threat

from ..pipeline.allocator import keep_freed_pages
from .training_step import interleaved

EPS = 0.01
CLASSES = 10
METHODS = ("ibp", "crown-ibp")


class Network(NamedTuple):
    """A network of one example.

    Attributes:
        shape: of the example.
        weights: shapes of the weights.
        apply: `(weights, x) -> logits`.
    """

    shape: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    apply: Callable[[Sequence[Array], Array], Array]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.affine_runs",
        description="Counts and times intervals where affine operations follow one another.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--method", default="ibp", choices=METHODS)
    parser.add_argument("--rounding", default="nearest", choices=ROUNDINGS)
    parser.add_argument("--batch-size", type=int, default=32, help="examples at once, beside one")
    parser.add_argument("--repeats", type=int, default=20, help="timings of each")
    parser.add_argument("--step", action="store_true", help="also the gradient of a training step")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    keep_freed_pages()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; in forward passes")
    print(f"{'network':16}{'examples':>9}{'flops':>9}{'time':>9}{'forward us':>12}", flush=True)
    for name in options.networks:
        for batch_size in sorted({1, options.batch_size}):
            pair = bounds_and_forward(name, batch_size, options.method, options.rounding)
            print(_line(name, batch_size, pair, options.repeats), flush=True)
        if options.step:
            pair = robust_and_clean(name, options.batch_size)
            print(_line(f"{name} step", options.batch_size, pair, options.repeats), flush=True)


class Compiled(NamedTuple):
    """Something and what it is measured by, compiled, with what they take."""

    dear: Any
    plain: Any
    arguments: tuple

    def flops(self) -> float:
        """How many times as many floating-point operations the one has."""
        return _flops(self.dear) / _flops(self.plain)


def bounds_and_forward(
    name: str, batch_size: int, method: str = "ibp", rounding: str = "nearest"
) -> Compiled:
    """Bounds of a network's outputs over boxes, and its forward pass; of one example unbatched."""
    net = NETWORKS[name]
    weights, x = _example(net, batch_size)
    boxed = bound(net.apply, method, rounding=rounding)

    def bounds(weights: Sequence[Array], x: Array) -> Any:
        return boxed(weights, ball(x, EPS))

    if batch_size == 1:
        return _compiled(bounds, net.apply, weights, x[0])
    return _compiled(*(jax.vmap(f, (None, 0)) for f in (bounds, net.apply)), weights, x)


def robust_and_clean(name: str, batch_size: int) -> Compiled:
    """Gradients of the robust and of the clean log-likelihood of a batch."""
    net = NETWORKS[name]
    weights, x = _example(net, batch_size)
    labels = jnp.arange(batch_size) % CLASSES
    threat = Threat(jnp.float32(EPS), jnp.float32(0.25), jnp.float32(0.0))

    def gradient(likelihood: Any) -> Callable[..., Any]:
        def loss(weights: Sequence[Array], x: Array) -> Array:
            one = partial(likelihood, jax.random.key(0), weights)
            return jax.vmap(one, (0, 0, None))(x, labels, threat).sum()

        return jax.value_and_grad(loss)

    robust, clean = robust_categorical(net.apply), clean_categorical(net.apply)
    return _compiled(gradient(robust), gradient(clean), weights, x)


def _compiled(dear: Any, plain: Any, *arguments: Any) -> Compiled:
    first, second = (jax.jit(f).lower(*arguments).compile() for f in (dear, plain))
    return Compiled(first, second, arguments)


def _flops(program: Any) -> float:
    found = program.cost_analysis()
    return float((found[0] if isinstance(found, list) else found)["flops"])


def _line(label: str, batch_size: int, pair: Compiled, repeats: int) -> str:
    calls: dict[str, Callable[[], object]] = {
        name: partial(getattr(pair, name), *pair.arguments) for name in ("dear", "plain")
    }
    best = interleaved(calls, repeats)
    ratio = best["dear"] / best["plain"]
    return f"{label:16}{batch_size:9}{pair.flops():9.1f}{ratio:9.1f}{1e6 * best['plain']:12.1f}"


def _example(net: Network, batch_size: int) -> tuple[list[Array], Array]:
    rng = np.random.default_rng(0)

    def drawn(shape: tuple[int, ...], scale: float) -> Array:
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    weights = [drawn(shape, np.prod(shape[:-1]) ** -0.5) for shape in net.weights]
    return weights, drawn((batch_size, *net.shape), 1.0)


def convolve(x: Array, kernel: Array, groups: int = 1) -> Array:
    """Of one image (height, width, channels), to its own size."""
    return jax.lax.conv_general_dilated(
        x[None],
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )[0]


def _head(x: Array, last: Array) -> Array:
    return jax.nn.relu(x).reshape(-1) @ last


def _separable(weights: Sequence[Array], x: Array) -> Array:
    depthwise, pointwise, last = weights
    return _head(convolve(convolve(x, depthwise, x.shape[-1]), pointwise), last)


def _convolutions(weights: Sequence[Array], x: Array) -> Array:
    first, second, last = weights
    return _head(convolve(convolve(x, first), second), last)


def _residual(weights: Sequence[Array], x: Array) -> Array:
    kernel, last = weights
    return _head(x + convolve(x, kernel), last)


def _pooled(weights: Sequence[Array], x: Array) -> Array:
    kernel, last = weights
    y = convolve(x, kernel)
    pooled = jax.lax.reduce_window(y, 0.0, jax.lax.add, (2, 2, 1), (2, 2, 1), "VALID") / 4
    return _head(pooled, last)


def _centered(weights: Sequence[Array], x: Array) -> Array:
    return _head(x - x.mean(), weights[0])


def _normalized(weights: Sequence[Array], x: Array) -> Array:
    dense, last = weights
    moved = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(moved).mean(-1, keepdims=True) + 1e-5)
    return _head((moved * scale) @ dense, last)


def _two_dense(weights: Sequence[Array], x: Array) -> Array:
    first, second, last = weights
    return _head((x @ first) @ second, last)


NETWORKS = {
    "separable": Network((16, 16, 8), ((3, 3, 1, 8), (1, 1, 8, 16), (4096, 10)), _separable),
    "convolutions": Network((16, 16, 3), ((3, 3, 3, 8), (3, 3, 8, 8), (2048, 10)), _convolutions),
    "residual": Network((16, 16, 8), ((3, 3, 8, 8), (2048, 10)), _residual),
    "pooled": Network((28, 28, 1), ((3, 3, 1, 8), (1568, 10)), _pooled),
    "centered": Network((784,), ((784, 10),), _centered),
    "layer norm": Network((17, 256), ((256, 32), (544, 10)), _normalized),
    "two dense": Network((784,), ((784, 256), (256, 256), (256, 10)), _two_dense),
}
"""By the run that each has; rectified and a dense layer after it."""


if __name__ == "__main__":
    main()
