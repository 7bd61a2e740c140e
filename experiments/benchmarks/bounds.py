"""What each bound method costs, in plain forward passes of the same batch.

    python -m experiments.benchmarks.bounds
    python -m experiments.benchmarks.bounds --models cnn --methods ibp crown-ibp --samples 4
    python -m experiments.benchmarks.bounds --methods ibp crown --roundings nearest outward

Bounded are the nine margins against the label of each image, each network's last layer merged in;
both ends of each margin, or with `--ends lower` the one that a certificate or a likelihood needs
(XLA drops the rows of the other). Data and weights are random: the cost depends on shapes alone.
Times are warm, of jitted calls; a method, its sweeps over samples and the plain forward pass take
turns, and the best of the repeats is compared, so that other work on the machine slows all alike.

The floor is what the multiplications alone cost if all ran as fast as those of a forward pass. Let
layer i of n (dense or convolution) have size s_i and m_i multiply-adds, F = sum_i m_i. A row is
shared by its two sides until it meets a relaxation: r rows from the output of layer i cost
B(i, r) = r (m_i + 2 sum_{j < i} m_j). With C margins and inputs of d coordinates the floors are

    ibp          2 F                                          centre and radius
    forward      2 F + 2 d sum_{i > 1} m_i                    the same, for every input coordinate
    crown-ibp    2 F + B(n, C)
    crown        2 F + B(n, C) + sum_{1 < i < n} B(i, s_i)    layer 1 is exact by intervals
    alpha-crown  2 F + 3 steps (the rest of crown)            each step, and its gradient's two

with one term m_j in place of two in B(n, C) where one end is asked for,

and so a floor says nothing of memory traffic and elementwise work. What is skipped as too large has
a floor beyond `--most`. Peers (auto_LiRPA, jax_verify) are not timed here: that code could not be
run where this was written.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnncert import ball, bound
from bnncert.bounds.arithmetic import ROUNDINGS
from bnncert.bounds.methods import METHODS, AlphaCROWN

from ..pipeline.allocator import keep_freed_pages
from ..setup.data import Dataset, Split
from ..setup.models import build, ibp_normal

CLASSES = 10
EPS = 0.01
STEPS = 50  # of alpha-crown, where nothing else is asked for
BATCH_SIZES = {"mlp": 256, "cnn": 64, "cnn7": 8}


class Network(NamedTuple):
    """A network with parameters: a function of one image of MNIST's shape."""

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any


class Layer(NamedTuple):
    """One matrix product of a forward pass: size of its output, and multiply-adds."""

    size: int
    products: int


class Timing(NamedTuple):
    """One row of the table.

    Attributes:
        model: name of the network.
        method: of `bnncert.bound`, or "plain" for the forward pass.
        rounding: of `bnncert.bound`.
        sweep: "one" set of weights, or samples "by vmap" or "by map".
        seconds: of one call, for all samples; None where it is too large.
        passes: seconds in forward passes of the batch, for one sample.
        floor: of `passes`, by arithmetic.
        compile_seconds: from tracing to the executable.
        temporary_bytes: peak memory besides arguments and results.
    """

    model: str
    method: str
    rounding: str
    sweep: str
    seconds: float | None
    passes: float | None
    floor: float
    compile_seconds: float | None
    temporary_bytes: int | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.bounds",
        description="Times the bound methods in plain forward passes of the same batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=list(BATCH_SIZES), choices=BATCH_SIZES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--batch-size", type=int, help=f"images at once; where not given, {BATCH_SIZES}"
    )
    parser.add_argument("--ends", default="both", choices=("both", "lower"), help="of each margin")
    parser.add_argument(
        "--roundings", nargs="+", default=["nearest"], choices=ROUNDINGS, help="each in turn"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timings of each")
    parser.add_argument("--samples", type=int, default=16, help="posterior samples; 0: no sweeps")
    parser.add_argument("--steps", type=int, default=STEPS, help="of alpha-crown")
    parser.add_argument("--width", type=int, default=32, help="channels of cnn7's first layers")
    parser.add_argument(
        "--most",
        type=float,
        default=4000.0,
        help="skip what costs more forward passes by its floor",
    )
    parser.add_argument("--out", type=Path, help="also write the table to this new JSON file")
    options = parser.parse_args(arguments)
    for name in ("repeats", "width", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    if options.samples < 0:
        parser.error(f"--samples {options.samples}: 0 or more")
    if options.batch_size is not None and options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size}: at least 1")
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists: name a new file, or remove it")
    keep_freed_pages()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; passes and floor: per sample")
    print(_HEADER, flush=True)
    rows = [row for model in options.models for row in _time_model(model, options)]
    if options.out is not None:
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "options": {k: v for k, v in vars(options).items() if k != "out"},
            "timings": [row._asdict() for row in rows],
        }
        with options.out.open("x") as file:
            json.dump(record, file, indent=1)


def network(name: str, width: int) -> Network:
    """The networks "mlp" (784-512-10), "cnn" (16-32-100-10) and "cnn7", with random weights.

    "cnn7" is that of Shi et al. (NeurIPS 2021) with `width` for its 64 channels: five 3x3
    convolutions, the third of stride 2, a dense layer, each with batch-norm at fixed statistics
    and ReLU, and the output.
    """
    key = jax.random.key(0)
    if name == "cnn7":
        return Network(_apply_cnn7, _init_cnn7(key, width))
    images = np.zeros((1, 28, 28, 1), np.float32)
    split = Split(images, np.zeros(1, np.int32))
    classes = tuple(str(i) for i in range(CLASSES))
    model = build(name, Dataset("mnist", split, split, classes, (0.1307,), (0.3081,)))
    return Network(model.apply, model.init(key))


def layers(net: Network, x: jax.Array) -> list[Layer]:
    """The matrix products of a forward pass of one image, in their order."""
    return list(_layers(jax.make_jaxpr(net.apply)(net.params, x).jaxpr))


def floors(
    found: Sequence[Layer], inputs: int, margins: int, steps: int, ends: int = 2
) -> dict[str, float]:
    """For each method the floor in forward passes, as the module's docstring counts it.

    Args:
        found: the layers, in their order.
        inputs: coordinates of an image.
        margins: outputs that are bounded.
        steps: of alpha-crown.
        ends: of each margin, 1 or 2.

    Example:
        >>> floors([Layer(100, 300), Layer(10, 100)], inputs=3, margins=9, steps=1)["crown-ibp"]
        17.75
    """
    products = [layer.products for layer in found]
    forward = sum(products)

    def rows(i: int, count: int, ends: int = 2) -> float:
        return count * (products[i] + ends * sum(products[:i])) / forward

    last = len(found) - 1
    output = rows(last, margins, ends)
    hidden = sum(rows(i, found[i].size) for i in range(1, last))
    return {
        "ibp": 2.0,
        "forward": 2.0 + 2 * inputs * sum(products[1:]) / forward,
        "crown-ibp": 2.0 + output,
        "crown": 2.0 + output + hidden,
        "alpha-crown": 2.0 + 3 * steps * (output + hidden),
    }


def margins_of(apply: Callable[[Any, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """`(params, x, c) -> (CLASSES - 1,)`: the margins f_k - f_c against one class."""

    def margins(params: Any, x: jax.Array, c: jax.Array) -> jax.Array:
        others = jnp.arange(CLASSES - 1)
        unit = jnp.eye(CLASSES, dtype=x.dtype)
        return (unit[others + (others >= c)] - unit[c]) @ apply(params, x)

    return margins


def _time_model(name: str, options: argparse.Namespace) -> list[Timing]:
    """All rows of one network, printed as they come."""
    net = network(name, options.width)
    batch_size = options.batch_size or BATCH_SIZES[name]
    key = jax.random.key(1)
    x = jax.random.uniform(key, (batch_size, 28, 28, 1))
    labels = jnp.arange(batch_size) % CLASSES
    samples = _perturbed(net.params, key, options.samples)
    ends = 2 if options.ends == "both" else 1
    floor = floors(layers(net, x[0]), x[0].size, CLASSES - 1, options.steps, ends)
    plain = jax.jit(jax.vmap(net.apply, (None, 0)))
    compiled, seconds = _compile(plain, net.params, x)
    forward = partial(compiled, net.params, x)
    (best,) = _interleaved([forward], options.repeats)
    memory = _temporary(compiled)
    label = f"{name} x {batch_size}"
    rows = [Timing(label, "plain", "", "one", best, 1.0, 1.0, seconds, memory)]
    print(_line(rows[0]), flush=True)
    regions = ball(x, EPS, clip=(0.0, 1.0))
    for method in options.methods:
        for sweep in ("one", "by vmap", "by map") if options.samples else ("one",):
            count = 1 if sweep == "one" else options.samples
            least = floor.get(method, math.nan)
            kinds = options.roundings
            if least * count > options.most:
                found = [Timing(label, method, r, sweep, *_NONE, least, *_NONE) for r in kinds]
            else:
                print(f"{label}: {method}, {sweep}", file=sys.stderr, flush=True)
                weights = net.params if sweep == "one" else samples
                compiled = [
                    _compile(
                        _sweep(_bounds(net, method, rounding, options), sweep),
                        *(weights, regions, labels),
                    )
                    for rounding in kinds
                ]
                calls = [partial(swept, weights, regions, labels) for swept, _ in compiled]
                *times, reference = _interleaved([*calls, forward], options.repeats)
                found = [
                    Timing(
                        *(label, method, rounding, sweep, best, best / (count * reference)),
                        *(least, seconds, _temporary(swept)),
                    )
                    for rounding, best, (swept, seconds) in zip(kinds, times, compiled, strict=True)
                ]
            rows.extend(found)
            for row in found:
                print(_line(row), flush=True)
    return rows


def _bounds(
    net: Network, method: str, rounding: str, options: argparse.Namespace
) -> Callable[..., Any]:
    chosen = AlphaCROWN(options.steps) if method == "alpha-crown" else method
    bounds = bound(margins_of(net.apply), chosen, rounding=rounding)
    return bounds if options.ends == "both" else partial(_lower, bounds)


def _lower(bounds: Callable[..., Any], *args: Any) -> jax.Array:
    return bounds(*args).lower


def _sweep(bounds: Callable[..., Any], sweep: str) -> Callable[..., Any]:
    """Bounds of a batch of images for one set of weights, or for each of several."""
    batch = jax.vmap(bounds, (None, 0, 0))
    if sweep == "by vmap":
        return jax.jit(jax.vmap(batch, (0, None, None)))
    if sweep == "by map":
        return jax.jit(lambda params, x, c: jax.lax.map(lambda one: batch(one, x, c), params))
    return jax.jit(batch)


def _compile(f: Any, *args: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return f.lower(*args).compile(), time.perf_counter() - started


def _temporary(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()  # None where the backend has none
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def _interleaved(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The best time of each call, in seconds; the calls take turns, each once before to warm up."""
    best = [math.inf] * len(calls)
    for repeat in range(repeats + 1):
        for i, call in enumerate(calls):
            started = time.perf_counter()
            jax.block_until_ready(call())
            if repeat > 0:
                best[i] = min(best[i], time.perf_counter() - started)
    return best


def _perturbed(params: Any, key: jax.Array, count: int) -> Any:
    """Samples around the weights, stacked."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            leaf + 0.01 * jax.random.normal(k, (count, *leaf.shape))
            for leaf, k in zip(leaves, keys, strict=True)
        ],
    )


def _layers(jaxpr: Any) -> Iterator[Layer]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            size = math.prod(eqn.outvars[0].aval.shape)
            left, right = (var.aval.shape for var in eqn.invars)
            if name == "dot_general":
                summed = math.prod(left[i] for i in eqn.params["dimension_numbers"][0][0])
            else:
                features = right[eqn.params["dimension_numbers"].rhs_spec[0]]
                summed = math.prod(right) // features
            yield Layer(size, size * summed)
        for value in eqn.params.values():
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns"):
                yield from _layers(body)


def _init_cnn7(key: jax.Array, width: int) -> list[dict[str, jax.Array]]:
    wide = 2 * width
    shapes = [
        (3, 3, 1, width),
        (3, 3, width, width),
        (3, 3, width, wide),
        (3, 3, wide, wide),
        (3, 3, wide, wide),
        (14 * 14 * wide, 8 * width),
        (8 * width, CLASSES),
    ]
    names = ("bias", "mean", "variance", "scale")
    return [
        {"kernel": ibp_normal(k, shape)}
        | {n: jnp.full(shape[-1], float(n in ("variance", "scale"))) for n in names}
        for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def _apply_cnn7(params: Sequence[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for i, layer in enumerate(params[:-1]):
        if layer["kernel"].ndim == 4:
            numbers = ("NHWC", "HWIO", "NHWC")
            stride = (2, 2) if i == 2 else (1, 1)
            x = jax.lax.conv_general_dilated(
                x[None], layer["kernel"], stride, "SAME", dimension_numbers=numbers
            )[0]
        else:
            x = x.reshape(-1) @ layer["kernel"]
        # The variance is positive in use; a sample of a benchmark may perturb it below zero.
        spread = jnp.sqrt(jnp.abs(layer["variance"]) + 1e-5)
        x = jax.nn.relu((x - layer["mean"]) * (layer["scale"] / spread) + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


_NONE = (None, None)
_HEADER = (
    f"{'model':12}{'method':13}{'rounding':10}{'samples':9}{'ms':>10}{'passes':>9}{'floor':>9}"
    f"{'compile s':>11}{'memory MB':>11}"
)


def _line(row: Timing) -> str:
    start = f"{row.model:12}{row.method:13}{row.rounding:10}{row.sweep:9}"
    if row.seconds is None:
        return f"{start}{'too large':>19}{row.floor:9.0f}"
    memory = "-" if row.temporary_bytes is None else f"{row.temporary_bytes / 1e6:.1f}"
    return (
        f"{start}{1e3 * row.seconds:10.2f}{row.passes:9.1f}{row.floor:9.1f}"
        f"{row.compile_seconds:11.1f}{memory:>11}"
    )


if __name__ == "__main__":
    main()
