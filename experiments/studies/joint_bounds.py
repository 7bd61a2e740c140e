"""How much tighter are joint bounds than separate ones, on a deep ensemble?

    python -m experiments.studies.joint_bounds --data-dir DIR --out FILE

Members 784-512-10 are trained with the certified likelihood (IBP), from different seeds. Their
averaged softmax pi is certified where pi_c - pi_j stays above 0, c the predicted class, for all j:

    separately  mean_i  min_x  of a bound on member i's p_c - p_j; "decision" is the library's
                certificate, exact over the box of margins m_k = f_k - f_c
    jointly     min_x of the mean of linear bounds (`bnncert.bounds.mean_bound`)

A joint bound is only as good as its linear bound on p_c - p_j. The forms that are bounded:

    logits   softmax of the logits, then differences
    margins  softmax of the margins, merged with the last layer: p_c sees its exact box
    pairs    1 / sum_k exp(f_k - f_i) of all pairs, merged likewise: each p_i sees its exact box
    log      exp of log_softmax of the margins
    corner   sums of exp m_k fitted to the box of margins (`bnncert.certify.joint`)
    corner-0 the same with the slope 0 under every ReLU that crosses; separately, the exact
             minimum over the box of margins found so

With slope 0 under a ReLU, one hidden layer's linear bounds lie inside its intervals, and then joint
corner-0 is by crown never under separate corner-0. With adaptive slopes they need not: "decision"
takes the better of both for each margin, a mean of linear bounds cannot. By crown-ibp the
nonlinearity after the margins sees their IBP box, where "decision" sees their linear bounds.

Attacks say how far both could go: on pi, and on each member by itself, whose mean is an upper
bound of what any separate bound can prove. An attack's numbers are estimates, not proofs.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from bnncert import attack, ball, bound, certify
from bnncert.bounds import mean_bound
from bnncert.bounds.methods import LinearMethod, linear_method_of
from bnncert.certify.exact.joint import ANCHORS, corner_terms, difference_below, margins_of
from bnncert.posterior import stack
from bnncert.sets import Box
from bnncert.types import Apply

from ..pipeline.allocator import keep_freed_pages
from ..pipeline.inference import Problem
from ..pipeline.training import train
from ..setup.config import RunConfig
from ..setup.data import Dataset, load
from ..setup.methods import MAP
from ..setup.models import Model, build
from ..setup.presets import PRESETS
from ..setup.settings import PIXELS
from ..tasks.images import error_model

FORMS = ("decision", "logits", "margins", "pairs", "log", "corner", "corner-0")
PRESET_OF = {"mnist": "mnist-mlp", "digits": "digits"}
METHODS = ("crown-ibp", "crown")
Certifier = Callable[[Any, Any, Array, Array], Array]
"""`(samples, region, x, c) -> (C,)`: lower bounds on pi_c - pi_j, for one image."""


class Row(NamedTuple):
    """One certificate on all images.

    Attributes:
        eps: the radius.
        method: of the bounds.
        how: "separate" or "joint".
        form: what was bounded.
        robust: fraction of images whose predicted class is proved.
        certified: that, and the prediction right.
        gap: mean over images of the bound on min_j pi_c - pi_j.
        seconds: for an image, warm.
        compile_seconds: from tracing to the executable.
        temporary_bytes: peak memory besides arguments and results, at a batch.
    """

    eps: float
    method: str
    how: str
    form: str
    robust: float
    certified: float
    gap: float
    seconds: float | None
    compile_seconds: float | None
    temporary_bytes: int | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    keep_freed_pages()
    dataset = load(options.dataset, options.data_dir)
    preset = PRESETS[PRESET_OF[options.dataset]]
    model = build("mlp", dataset)
    radii = options.eps or [preset.eval.eps]
    train_eps = preset.eval.eps if options.train_eps is None else options.train_eps
    config = dataclasses.replace(
        preset,
        inference=MAP(),
        train=dataclasses.replace(preset.train, epochs=options.epochs, eps=train_eps, validation=0),
    )
    samples = train_members(config, model, dataset, options.members)
    x, y = (jnp.asarray(a[: options.images]) for a in dataset.test)
    probabilities = jax.jit(jax.vmap(partial(_average, model.apply, samples)))(x)
    c = probabilities.argmax(-1)
    print(f"{len(y)} images, {options.members} members, clean accuracy {(c == y).mean():.1%}")
    print(_HEADER, flush=True)
    rows: list[Row] = []
    for eps in radii:
        for how, found in attacked(model.apply, samples, x, c, eps, options.batch_size).items():
            rows.append(_row(eps, "attack", how, "pgd", found, (c, y), (None, None, None)))
            print(_line(rows[-1]), flush=True)
        for method in options.methods:
            for (how, form), certifier in certifiers(model.apply, method).items():
                if form not in options.forms:
                    continue
                one = partial(_certify, certifier, eps)
                found, cost = _batched(one, samples, x, c, options.batch_size, f"{how} {form}")
                rows.append(_row(eps, method, how, form, found, (c, y), cost))
                print(_line(rows[-1]), flush=True)
    if options.out is not None:
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "options": {
                k: str(v) if isinstance(v, Path) else v
                for k, v in vars(options).items()
                if k not in ("out", "data_dir")
            },
            "train_eps": train_eps,
            "clean_accuracy": float((c == y).mean()),
            "rows": [row._asdict() for row in rows],
        }
        with options.out.open("x") as file:
            json.dump(record, file, indent=1)


def train_members(config: RunConfig, model: Model, dataset: Dataset, count: int) -> Any:
    """Members from seeds 0 to count - 1, stacked."""
    likelihood = error_model(config.train, model.apply)
    problem, members = Problem(model, dataset.train, likelihood), []
    for seed in range(count):
        with tempfile.TemporaryDirectory() as folder:
            found = train(config.inference, config.train, problem, seed, Path(folder)).posterior
        members.append(jax.tree.map(lambda leaf: leaf[0], found.params))
    return stack(members)


def forms(apply: Apply) -> dict[str, Callable[[Any, Array, Array], Array]]:
    """Ways to write `(params, x, c) -> p_c - p_j`: the same function, relaxed differently."""
    margins = margins_of(apply)

    def of_pairs(params: Any, x: Array, c: Array) -> Array:
        logits = apply(params, x)
        n = logits.size
        unit = np.eye(n)
        pairs = jnp.asarray((unit[None] - unit[:, None]).reshape(n * n, n), logits.dtype) @ logits
        p = 1 / jnp.exp(pairs).reshape(n, n).sum(-1)
        return p[c] - p

    def of(probabilities: Callable[[Array], Array], inner: Callable[..., Array]) -> Any:
        def difference(params: Any, x: Array, c: Array) -> Array:
            p = probabilities(inner(params, x, c))
            return p[c] - p

        return difference

    return {
        "logits": of(jax.nn.softmax, lambda params, x, c: apply(params, x)),
        "margins": of(jax.nn.softmax, margins),
        "pairs": of_pairs,
        "log": of(lambda m: jnp.exp(jax.nn.log_softmax(m)), margins),
    }


def certifiers(apply: Apply, method: str) -> dict[tuple[str, str], Certifier]:
    """Every (how, form) that is compared."""

    def decision(samples: Any, region: Any, x: Array, c: Array) -> Array:
        return certify.decision(apply, samples, region, x=x, method=method).margins

    def separate(f: Callable, samples: Any, region: Any, x: Array, c: Array) -> Array:
        bounds = bound(f, method)
        return jax.lax.map(lambda params: bounds(params, region, c).lower, samples).mean(0)

    def joint(f: Callable, samples: Any, region: Any, x: Array, c: Array) -> Array:
        return mean_bound(f, method)(samples, region, c).lower

    def sloped(slope: str) -> LinearMethod:
        return dataclasses.replace(linear_method_of(method), lower_slope=slope)

    def margin_boxes(slope: str, samples: Any, region: Any, c: Array) -> Box:
        bounds = bound(margins_of(apply), sloped(slope))
        return jax.lax.map(lambda params: bounds(params, region, c), samples)

    def corner_alone(slope: str, samples: Any, region: Any, x: Array, c: Array) -> Array:
        return jax.vmap(corner_minimum)(margin_boxes(slope, samples, region, c)).mean(0)

    def corner(slope: str, samples: Any, region: Any, x: Array, c: Array) -> Array:
        boxes = margin_boxes(slope, samples, region, c)
        mean = mean_bound(partial(difference_below, apply), sloped(slope))
        found = []
        for anchor in ANCHORS:
            terms = jax.vmap(partial(corner_terms, anchor=anchor))(boxes)
            found.append(mean((samples, terms), region, c).lower)
        return jnp.stack(found).max(0)

    found: dict[tuple[str, str], Certifier] = {("separate", "decision"): decision}
    for name, f in forms(apply).items():
        found["separate", name] = partial(separate, f)
        found["joint", name] = partial(joint, f)
    found["joint", "corner"] = partial(corner, "adaptive")
    found["separate", "corner-0"] = partial(corner_alone, "zero")
    found["joint", "corner-0"] = partial(corner, "zero")
    return found


def corner_minimum(box: Box) -> Array:
    """The least p_c - p_j over a box of margins, for each j: as `certify.decision`."""
    low, high = jnp.exp(box.lower), jnp.exp(box.upper)
    h = 1 - high
    return jnp.where(h > 0, h / high.sum(), h / (high + low.sum() - low))


def attacked(
    apply: Apply, samples: Any, x: Array, c: Array, eps: float, batch_size: int
) -> dict[str, Array]:
    """Differences pi_c - pi_j that PGD reaches, on pi and on each member by itself."""
    key = jax.random.key(0)

    def worst(members: Any, x: Array, c: Array) -> Array:
        at = attack.pgd(key, apply, members, x, c, eps, steps=40, clip=PIXELS, batch_size=8).x
        p = _average(apply, members, at)
        return p[c] - p

    def separate(samples: Any, x: Array, c: Array) -> Array:
        singly = jax.tree.map(lambda leaf: leaf[:, None], samples)
        return jax.lax.map(lambda member: worst(member, x, c), singly).mean(0)

    pairs = {"separate": separate, "joint": worst}
    return {
        how: _batched(f, samples, x, c, batch_size, f"attack {how}")[0] for how, f in pairs.items()
    }


def _certify(certifier: Certifier, eps: float, samples: Any, x: Array, c: Array) -> Array:
    return certifier(samples, ball(x, eps, clip=PIXELS), x, c)


def _average(apply: Apply, samples: Any, x: Array) -> Array:
    return jax.vmap(lambda params: jax.nn.softmax(apply(params, x)))(samples).mean(0)


def _batched(
    one: Callable[[Any, Array, Array], Array],
    samples: Any,
    x: Array,
    c: Array,
    batch_size: int,
    label: str,
) -> tuple[Array, tuple[float, float, int | None]]:
    """`one` on every image, with its seconds an image, seconds of compiling and memory."""
    size = min(batch_size, len(x))
    started = time.perf_counter()
    many = jax.jit(jax.vmap(one, (None, 0, 0)))
    compiled = many.lower(samples, x[:size], c[:size]).compile()
    compile_seconds = time.perf_counter() - started
    analysis = compiled.memory_analysis()  # None where the backend has none
    memory = None if analysis is None else int(analysis.temp_size_in_bytes)
    jax.block_until_ready(compiled(samples, x[:size], c[:size]))
    found = []
    started = time.perf_counter()
    for start in tqdm(range(0, len(x), size), desc=label, unit="batch", leave=False):
        rows = np.arange(start, start + size) % len(x)  # the last batch begins again
        found.append(jax.block_until_ready(compiled(samples, x[rows], c[rows])))
    seconds = (time.perf_counter() - started) / (len(found) * size)
    return jnp.concatenate(found)[: len(x)], (seconds, compile_seconds, memory)


def _row(
    eps: float,
    method: str,
    how: str,
    form: str,
    found: Array,
    labels: tuple[Array, Array],
    cost: tuple[float | None, float | None, int | None],
) -> Row:
    c, y = labels
    gaps = jnp.where(jnp.arange(found.shape[-1]) == c[:, None], jnp.inf, found).min(-1)
    robust = gaps > 0
    proved, certified = float(robust.mean()), float((robust & (c == y)).mean())
    return Row(eps, method, how, form, proved, certified, float(gaps.mean()), *cost)


_HEADER = (
    f"{'eps':>6} {'method':10}{'how':10}{'form':10}{'robust':>8}{'certified':>11}{'gap':>9}"
    f"{'ms/image':>10}{'compile s':>11}{'memory MB':>11}"
)


def _line(row: Row) -> str:
    start = (
        f"{row.eps:6.3g} {row.method:10}{row.how:10}{row.form:10}{row.robust:8.1%}"
        f"{row.certified:11.1%}{row.gap:9.4f}"
    )
    if row.seconds is None:
        return start
    memory = "-" if row.temporary_bytes is None else f"{row.temporary_bytes / 1e6:.1f}"
    return f"{start}{1e3 * row.seconds:10.2f}{row.compile_seconds:11.1f}{memory:>11}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.joint_bounds",
        description="Trains an ensemble robustly, and certifies it by separate and joint bounds.",
    )
    parser.add_argument(
        "--dataset", default="mnist", choices=PRESET_OF, help="digits needs no download"
    )
    parser.add_argument("--data-dir", type=Path, help="TFDS data folder (default: TFDS's own)")
    parser.add_argument("--members", type=int, default=5, help="of the ensemble (default: 5)")
    parser.add_argument("--epochs", type=int, default=5, help="of each member (default: 5)")
    parser.add_argument(
        "--train-eps",
        type=float,
        help="training radius, l_inf, pixels in [0, 1] (default: 0.1 for mnist, 0.05 for digits)",
    )
    parser.add_argument(
        "--eps", type=float, nargs="+", help="radii certified (default: the same radius)"
    )
    parser.add_argument("--images", type=int, default=200, help="first test images (default: 200)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--batch-size", type=int, default=50, help="images at once (default: 50)")
    parser.add_argument("--out", type=Path, help="also write the table to this new JSON file")
    options = parser.parse_args(arguments)
    for name in ("members", "epochs", "images", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    for eps in [*(options.eps or []), *([] if options.train_eps is None else [options.train_eps])]:
        if not 0 <= eps <= 1:
            parser.error(f"radius {eps}: in [0, 1], the range of a pixel")
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists: name a new file, or remove it")
    return options


if __name__ == "__main__":
    main()
