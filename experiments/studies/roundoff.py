"""How far functions are off in float32, against what `rounding="outward"` allows them.

    python -m experiments.studies.roundoff --out FILE           every float32: hours
    python -m experiments.studies.roundoff --stride 64          every 64th: minutes
    python -m experiments.studies.roundoff --functions exp tanh

`bnncert.bounds.ops.operation.Rounding` takes |fl h(x) - h(x)| <= (R |h(x)| + A + X |x|) u + 2 t
for each function h and for its slope, in place of a proof: that is as good as the backend that
computes them. Run this on the backend at hand; the exit status is 1 if a function needs more.

Each function is computed in float32 and again in float64 at the same points. Printed is the largest
share of what it is allowed, where that is, and the largest relative error in units of u. Left out
are subnormal x, and x where the value overflows in either; sin and cos beyond 2000, where their
bound is [-1, 1].
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from tqdm import tqdm

from bnncert.bounds.ops import ELEMENTWISE
from bnncert.bounds.rounding.functions import FUNCTION_ERRORS, OPERAND_ERRORS, SLOPE_ERRORS

UNIT = 2.0**-24
TINY = 2.0**-126
CHUNK = 2**22
FAR = 2000.0

_PARAMETERS = {"elu": (1.0,), "celu": (1.0,), "squareplus": (4.0,), "logaddexp": (-1.5,)}


class Case(NamedTuple):
    """A function, what it is allowed (R, A, X), and how far from 0 it is tried."""

    function: Callable[[Array], Array]
    relative: float
    absolute: float
    operand: float = 0.0
    most: float = float("inf")


class Row(NamedTuple):
    """What one function was found to need.

    Attributes:
        function: its name; its slope's ends in a prime.
        share: the largest error as a share of the allowed one.
        at: where that is.
        relative: the largest relative error of normal values, in units of u.
        points: how many were tried.
        seconds: of the sweep.
    """

    function: str
    share: float
    at: float
    relative: float
    points: int
    seconds: float


def cases() -> dict[str, Case]:
    """All functions of one value with constants of their own, and slopes."""
    values: dict[str, Callable[[Array], Array]] = {
        name: getattr(jnp, name) for name in ("exp", "exp2", "expm1", "log", "log1p", "sqrt")
    }
    values |= {
        name: getattr(jnp, name)
        for name in ("tanh", "sin", "cos", "sinh", "cosh", "square", "cbrt")
    }
    values |= {name: getattr(jax.lax, name) for name in ("rsqrt", "logistic", "erf", "asinh")}
    values |= {
        name: getattr(jax.nn, name)
        for name in ("softplus", "log_sigmoid", "selu", "silu", "mish", "soft_sign", "hard_silu")
    }
    values |= {
        "atan": jnp.arctan,
        "reciprocal": lambda x: 1 / x,
        "lgamma": lambda x: jax.lax.lgamma(jnp.abs(x)),  # bounded where x > 0
        "erfc": jax.lax.erfc,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "elu": jax.nn.elu,
        "celu": jax.nn.celu,
        "squareplus": jax.nn.squareplus,
        "leaky_relu": jax.nn.leaky_relu,
        "logaddexp": lambda x: jnp.logaddexp(x, *_PARAMETERS["logaddexp"]),
    }
    curves = {operation.name: operation.curve for operation in ELEMENTWISE if operation.curve}
    slopes = {name: build(*_PARAMETERS.get(name, ())).slope for name, build in curves.items()}
    slopes.pop("cbrt")  # infinite at 0: bounded by its interval
    slopes["lgamma"] = lambda x: jax.lax.digamma(jnp.abs(x))
    found = {name: Case(f, *_allowed(name), _reach(name)) for name, f in values.items()}
    return found | {
        f"{name}'": Case(f, *SLOPE_ERRORS[name], 0.0, _reach(name)) for name, f in slopes.items()
    }


def sweep(name: str, case: Case, stride: int = 1, progress: bool = False) -> Row:
    """Tries every `stride`-th float32.

    Args:
        name: of the function.
        case: the function.
        stride: odd, or a power of 2 for the sake of speed alone.
        progress: whether to show a bar.
    """
    started = time.monotonic()

    @jax.jit
    def chunk(start: Array) -> tuple[Array, Array, Array]:
        bits = (start + stride * jnp.arange(CHUNK, dtype=jnp.uint64)).astype(jnp.uint32)
        x = jax.lax.bitcast_convert_type(bits, jnp.float32)
        usual = jnp.isfinite(x) & (jnp.abs(x) <= case.most) & ((jnp.abs(x) >= TINY) | (x == 0))
        x = jnp.where(usual, x, 1)
        found, exact = case.function(x), case.function(x.astype(jnp.float64))
        usual = jnp.isfinite(exact) & (jnp.abs(exact) < 2.0**127) & ~jnp.isinf(found)
        size = jnp.where(usual, jnp.abs(exact), 1)
        off = jnp.where(usual, jnp.abs(found - exact), 0)
        off = jnp.where(jnp.isnan(off), jnp.inf, off)
        allowed = case.relative * size + case.absolute + case.operand * jnp.abs(x)
        share = off / (allowed * UNIT + 2 * TINY)
        most = jnp.argmax(share)
        return share[most], x[most], jnp.max(jnp.where(size >= TINY, off / size, 0)) / UNIT

    count = 2**32 // stride
    starts = range(0, count, CHUNK)
    worst, at, relative = 0.0, 0.0, 0.0
    for i in tqdm(starts, desc=name, unit="chunk", disable=not progress, leave=False):
        share, x, own = map(float, chunk(jnp.uint64(i * stride)))
        relative = max(relative, own)
        if not share <= worst:
            worst, at = share, x
    seconds = time.monotonic() - started
    return Row(name, worst, at, relative, count, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    every = cases()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.roundoff",
        description="Sweeps float32 for the rounding errors of functions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--functions", nargs="+", default=list(every), choices=list(every))
    parser.add_argument("--stride", type=int, default=1, help="try every n-th float32")
    parser.add_argument("--out", type=Path, help="also write the table to this new JSON file")
    options = parser.parse_args(arguments)
    if options.stride < 1:
        parser.error(f"--stride {options.stride}: at least 1")
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists: name a new file, or remove it")
    rows: list[Row] = []
    with jax.enable_x64(True):
        for row in _table({name: every[name] for name in options.functions}, options.stride):
            rows.append(row)
            if options.out is not None:  # as far as it has come: a whole sweep takes hours
                _save(rows, options.stride, options.out)
    broken = [row.function for row in rows if not row.share <= 1]
    if broken:
        sys.exit(f"these need more than bnncert.bounds.ops allows: {', '.join(broken)}")


def _save(rows: Sequence[Row], stride: int, path: Path) -> None:
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "stride": stride,
        "rows": [row._asdict() for row in rows],
    }
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1))
    unfinished.replace(path)


def _table(chosen: Mapping[str, Case], stride: int) -> Iterator[Row]:
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, every {stride}-th float32")
    print(f"{'function':14}{'share':>8}{'at':>14}{'relative':>12}{'s':>8}", flush=True)
    for name, case in chosen.items():
        row = sweep(name, case, stride, progress=True)
        print(
            f"{name:14}{row.share:8.3f}{row.at:14.5g}{row.relative:12.4g}{row.seconds:8.1f}",
            flush=True,
        )
        yield row


def _allowed(name: str) -> tuple[float, float, float]:
    return (*FUNCTION_ERRORS[name], OPERAND_ERRORS.get(name, 0.0))


def _reach(name: str) -> float:
    return FAR if name in ("sin", "cos") else float("inf")


if __name__ == "__main__":
    main()
