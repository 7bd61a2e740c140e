"""How far is each method's predictive from that of long NUTS, on two moons?

    python -m experiments.studies.two_moons --out experiments/results/two-moons.json

The network is small enough (2-16-16-2, tanh) for NUTS with several chains to serve as reference.
With pi(x) the average over samples of softmax f(w, x), the distance of a method is

    TV = mean over a grid of x of  (1/2) sum_c |pi_c(x) - pi_c^NUTS(x)|

in [0, 1]. NUTS from another seed gives the Monte Carlo floor: no difference below it is seen. How
far the floor can be trusted, R-hat and the effective sample size of the predictions say. All
methods have the same prior N(0, 1) and likelihood, and kl_weight 1; all but SWAG see all the data
at each step (its spread is the noise of minibatches).

Writes the table as JSON: TV, the largest distance on the grid, the mean entropy there (nats), the
accuracy on the training data, and seconds with compiling. Beside it a picture (.png): decision
surfaces, faded where the entropy of pi is large, each with its TV.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from sklearn.datasets import make_moons

from bnncert import likelihood, prior
from bnncert.infer import (
    diagnostics,
    ensemble,
    ivon,
    laplace,
    mcmc,
    noisy_adam,
    sgmcmc,
    svi,
    swag,
    vogn,
)
from bnncert.infer import map as maximum
from bnncert.posterior import Samples
from bnncert.types import Algorithm, Batch, Key, Threat

from ..report.palette import LIGHT

WIDTHS = (2, 16, 16, 2)
RANGE = ((-2.0, 3.0), (-1.75, 2.25))  # of the grid
MEMBERS = 10  # of the deep ensemble
MINIBATCH = 10  # points, of SWAG
PLAIN = Threat(jnp.zeros(()), jnp.ones(()), jnp.zeros(()))


def apply(params: Any, x: Array) -> Array:
    """Logits of the network at one point."""
    for layer in params[:-1]:
        x = jnp.tanh(layer["w"] @ x + layer["b"])
    return params[-1]["w"] @ x + params[-1]["b"]


def initial(key: Key) -> Any:
    """Weights of variance 1 / fan-in, biases zero."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) / n**0.5, "b": jnp.zeros(m)}
        for k, n, m in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]


LIKELIHOOD = likelihood.clean_categorical(apply)
PRIOR = prior.normal(initial(jax.random.key(0)), 1.0)


def nuts(key: Key, data: Batch, options: argparse.Namespace) -> Any:
    """Chains from independent draws of the prior, one after the other in the samples."""
    sampler = mcmc.build(
        LIKELIHOOD,
        PRIOR,
        num_warmup=options.warmup,
        num_samples=options.draws,
        num_chains=options.chains,
        max_tree_depth=options.depth,
    )
    start, key = jax.random.split(key)
    template = initial(start)
    keys = jax.random.split(start, options.chains)
    starts = jax.vmap(lambda k: prior.sample(k, PRIOR, template))(keys)
    samples, info = sampler.sample(key, starts, data, PLAIN)
    print(f"NUTS: {int(info.divergences.sum())} divergences, step sizes {info.step_size}")
    return samples.params


def minibatched(
    build: Callable[[argparse.Namespace, dict[str, Any]], Algorithm],
    key: Key,
    data: Batch,
    options: argparse.Namespace,
    batch_size: int | None = None,
) -> Any:
    """Any `Algorithm`: at most `members` draws of its posterior."""
    start, steps, draw = jax.random.split(key, 3)
    posterior = _trained(build, start, steps, data, options, batch_size)
    if isinstance(posterior, Samples) and posterior.num_samples <= options.members:
        return posterior.params
    return posterior.sample(draw, options.members)


def fitted(key: Key, data: Batch, options: argparse.Namespace) -> Any:
    """Laplace at the MAP: the full covariance, by the Hessian where that is positive."""
    start, steps, draw = jax.random.split(key, 3)
    mean = jax.tree.map(
        lambda leaf: leaf[0], _trained(ALGORITHMS["map"], start, steps, data, options).params
    )
    method = laplace.build(LIKELIHOOD, PRIOR, num_data=len(data.x))
    return method.fit(key, mean, data, PLAIN)[0].sample(draw, options.members)


def _trained(
    build: Callable[[argparse.Namespace, dict[str, Any]], Algorithm],
    start: Key,
    steps: Key,
    data: Batch,
    options: argparse.Namespace,
    batch_size: int | None = None,
) -> Any:
    """The posterior after all steps, each on all the data or on a minibatch."""
    algorithm = build(options, {"num_data": len(data.x)})

    @jax.jit
    def train(state: Any) -> Any:
        def step(state: Any, key: Key) -> tuple[Any, None]:
            here = data
            if batch_size is not None:
                shape = (min(batch_size, len(data.x)),)
                rows = jax.random.choice(jax.random.fold_in(key, 1), len(data.x), shape, False)
                here = jax.tree.map(lambda leaf: leaf[rows], data)
            return algorithm.update(key, state, here, PLAIN)[0], None

        return jax.lax.scan(step, state, jax.random.split(steps, options.steps))[0]

    return algorithm.posterior(train(algorithm.init(start, initial(start))))


def _optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(0.02, options.steps))


def _natural_gradient(
    module: Any, options: argparse.Namespace, settings: dict[str, Any]
) -> Algorithm:
    rate = optax.cosine_decay_schedule(0.1, options.steps)
    optimizer = optax.chain(optax.clip(1.0), optax.scale_by_learning_rate(rate))
    return module.build(LIKELIHOOD, PRIOR, optimizer=optimizer, **settings)


def _swag(options: argparse.Namespace, settings: dict[str, Any]) -> Algorithm:
    start = options.steps // 2
    every = max(1, (options.steps - start) // options.members)
    return swag.build(
        LIKELIHOOD, PRIOR, optimizer=optax.adam(0.01), start=start, every=every, **settings
    )


def _ensemble(options: argparse.Namespace, settings: dict[str, Any]) -> Algorithm:
    members = ensemble.build(ALGORITHMS["map"](options, settings), MEMBERS)
    return members._replace(init=lambda key, params: members.init(key, initial))


def _sgmcmc(
    options: argparse.Namespace, settings: dict[str, Any], cycles: int | None = None, **others: Any
) -> Algorithm:
    length = options.steps // cycles if cycles else None
    burn_in = 0 if cycles else options.steps // 4
    sampled = options.steps // 5 if cycles else options.steps - burn_in
    every = max(1, sampled // options.members)
    settings = settings | {"every": every, "cycle_length": length, "burn_in": burn_in}
    return sgmcmc.build(LIKELIHOOD, PRIOR, num_samples=options.members, **settings, **others)


# One line a method: (options, {"num_data": N}) -> Algorithm.
ALGORITHMS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], Algorithm]] = {
    "map": lambda o, s: maximum.build(LIKELIHOOD, PRIOR, optimizer=_optimizer(o), **s),
    "ensemble": _ensemble,
    "swag": _swag,
    "svi": lambda o, s: svi.build(LIKELIHOOD, PRIOR, optimizer=_optimizer(o), **s),
    "svi, low rank": lambda o, s: svi.build(
        LIKELIHOOD, PRIOR, optimizer=_optimizer(o), guide="low-rank", rank=20, **s
    ),
    "vogn": partial(_natural_gradient, vogn),
    "noisy-adam": partial(_natural_gradient, noisy_adam),
    "ivon": partial(_natural_gradient, ivon),
    "sgld": partial(_sgmcmc, step_size=4e-3),
    "sghmc": partial(_sgmcmc, step_size=4e-3, friction=0.1),
    "cyclical": partial(_sgmcmc, step_size=1e-2, friction=0.1, cycles=8),
}
# (key, data, options) -> stacked params.
METHODS: dict[str, Callable[[Key, Batch, argparse.Namespace], Any]] = {
    "nuts": nuts,
    **{name: partial(minibatched, build) for name, build in ALGORITHMS.items()},
    "swag": partial(minibatched, _swag, batch_size=MINIBATCH),
    "laplace": fitted,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the methods that the command line names, print the table and write it."""
    options = _parse(arguments)
    x, y = map(np.asarray, make_moons(options.data, noise=0.2, random_state=options.seed))
    data = Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y), jnp.ones(len(x)))
    sides = [np.linspace(*ends, options.grid) for ends in RANGE]
    points = jnp.asarray(np.stack(np.meshgrid(*sides), -1).reshape(-1, 2), jnp.float32)
    reference_key, key = jax.random.split(jax.random.key(options.seed))
    reference = nuts(reference_key, data, options)
    found = {"reference": predictive(reference, points)}
    some = points[:: max(1, len(points) // 200)]
    checked = diagnostics.of_predictions(apply, reference, options.chains, some)
    rows = []
    for name in options.methods:
        started = time.perf_counter()
        samples = jax.block_until_ready(METHODS[name](key, data, options))
        seconds = time.perf_counter() - started
        label = "nuts, another seed" if name == "nuts" else name
        found[label] = pi = predictive(samples, points)
        distance = 0.5 * np.abs(pi - found["reference"]).sum(-1)
        right = (predictive(samples, data.x).argmax(-1) == y).mean()
        spread = float(entropy(pi).mean())
        tv, worst = float(distance.mean()), float(distance.max())
        row = {"method": label, "tv": tv, "worst": worst, "entropy": spread}
        rows.append(row | {"accuracy": float(right), "seconds": seconds})
        print(f"{label:20}TV {tv:.4f} (worst {worst:.3f})  {seconds:.1f} s")
    if options.out is None:
        return
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    sure = {"max_r_hat": float(checked.r_hat.max()), "min_ess": float(checked.ess.min())}
    sure["entropy"] = float(entropy(found["reference"]).mean())
    record = {"settings": settings, "reference": sure, "rows": rows}
    with options.out.open("x") as file:
        json.dump(record, file, indent=1)
    titled = {f"{row['method']}: {row['tv']:.3f}": found[row["method"]] for row in rows}
    shown = {"NUTS, the reference": found["reference"], **titled}
    picture(shown, sides, x, y).savefig(options.out.with_suffix(".png"), dpi=150)


def predictive(samples: Any, points: Array) -> np.ndarray:
    """The average of softmax f(w, x) over samples: shape (points, 2)."""
    at = lambda w: jax.vmap(lambda x: jax.nn.softmax(apply(w, x)))(points)  # noqa: E731
    return np.asarray(jax.lax.map(at, samples, batch_size=64).mean(0))


def entropy(pi: np.ndarray) -> np.ndarray:
    """Of distributions along the last axis, nats."""
    return -(pi * np.log(np.maximum(pi, 1e-30))).sum(-1)


def picture(
    found: dict[str, np.ndarray], sides: list[np.ndarray], x: np.ndarray, y: np.ndarray
) -> Figure:
    """One panel a method: the probability of class 1, faded where the predictive is uncertain."""
    columns = min(5, len(found))
    rows = -(-len(found) // columns)
    figure = Figure((2.6 * columns, 2.4 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    colours = (LIGHT["broken"], LIGHT["certified"])
    shades = LinearSegmentedColormap.from_list("classes", [colours[0], LIGHT["card"], colours[1]])
    ends = (sides[0][0], sides[0][-1], sides[1][0], sides[1][-1])
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, pi) in zip(grid, found.items(), strict=False):
        p, h = (v.reshape(len(sides[1]), len(sides[0])) for v in (pi[:, 1], entropy(pi)))
        signed = np.sign(p - 0.5) * (1 - h / np.log(2))
        smooth: Any = {"origin": "lower", "extent": ends, "interpolation": "bilinear"}
        axes.imshow(signed, cmap=shades, vmin=-1, vmax=1, alpha=0.7, aspect="auto", **smooth)
        axes.contour(*sides, p - 0.5, levels=[0.0], colors=[LIGHT["ink"]], linewidths=1)
        axes.scatter(*x.T, c=[colours[label] for label in y], s=6, lw=0.3, edgecolors=LIGHT["card"])
        axes.set_title(name, fontsize=9, color=LIGHT["ink"])
    return figure


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.two_moons",
        description="Distances of approximate predictives from that of long NUTS, on two moons.",
    )
    for name, default, text in (
        ("data", 100, "points"),
        ("grid", 60, "points of a side of the grid"),
        ("chains", 4, "of NUTS"),
        ("warmup", 500, "draws of each chain of NUTS that are discarded"),
        ("draws", 1000, "draws of each chain of NUTS that are kept, at least 4"),
        ("depth", 8, "greatest depth of NUTS's trees"),
        ("steps", 20_000, "of every other method"),
        ("members", 500, "samples of every other method"),
    ):
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of data and methods (default: 0)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, help="write the table to this new JSON file")
    options = parser.parse_args(arguments)
    least = {"draws": 4, "steps": 40}
    for name in ("data", "grid", "chains", "warmup", "draws", "depth", "steps", "members"):
        if getattr(options, name) < least.get(name, 1):
            parser.error(f"--{name} {getattr(options, name)}: at least {least.get(name, 1)}")
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists: name a new file, or remove it")
    return options


if __name__ == "__main__":
    main()
