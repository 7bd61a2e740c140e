"""How far the spread of a Gaussian posterior goes while it stays certified as a whole.

    python -m experiments.studies.frontier RUN [RUN ...] --data-dir DIR --out FOLDER

Of a finished run the means m are kept and all standard deviations s multiplied by a factor c,

    q_c(w) = prod_i N(w_i; m_i, c^2 s_i^2)

and for each c, at the radius of the run's tests and on the first N test images,

    safe          the share of images that the network of the means has right and whose class
                  stays in the whole ball with probability P_safe >= .99 over q_c, proved by bounds
                  linear in the weights (`bnncert.gaussian.margins`, rounded outward)
    certified     certified accuracy of 16 networks drawn from q_c, by IBP
    information   the mutual information of label and weights, of 32 draws, the mean over images

and accuracy, NLL and ECE of the 32. Draws of all factors have the same noise, so that a curve shows
what the spread does; the draws that are certified at c = 1 are the first that the run deploys.

Where one of the two shares falls far between neighbours, their geometric mean is tried as well.

Sources: `bnncert.gaussian.margins`; Wicker et al., UAI 2020 (P_safe); Depeweg et al., ICML 2018
(mutual information).
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnncert import metrics
from bnncert.gaussian import Margins
from bnncert.posterior import MeanField, spread

from ..pipeline.allocator import keep_freed_pages
from ..pipeline.deployment import deploy
from ..pipeline.evaluation import certified_accuracy, predict
from ..pipeline.finished import Finished, open_run
from ..setup.data import Split
from .frontier_figures import picture, table
from .proved_and_drawn import (
    SAFE,
    Row,
    Subject,
    add_bound_options,
    of_run,
    right_of,
    stays,
)

FACTORS = (0.1, 0.316, 1.0, 3.16, 10.0, 31.6, 100.0)
OPEN = 0.05
"""A smaller area, share times log factor, that a falling curve may be in is not refined."""

DRAWS, CERTIFIED_DRAWS = 32, 16
"""Networks that are scored, and the first of them that are certified."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser, options = _parse(arguments)
    keep_freed_pages()
    try:
        runs = [_open(folder, options) for folder in options.runs]
        curves = [curve(run, options) for run in runs]
    except (OSError, ValueError, TypeError) as error:
        parser.exit(1, f"error: {error}\n")
    record = {
        **{name: getattr(options, name) for name in ("images", "rounding", "delta")},
        "draws": DRAWS,
        "certified_draws": CERTIFIED_DRAWS,
        "curves": curves,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "frontier.json"
    with path.open("x") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    text = table(curves)
    path.with_suffix(".md").write_text(text + "\n")
    picture(curves).savefig(path.with_suffix(".png"), dpi=200)
    print(f"\n{text}\n\nfrontier.json, frontier.md and frontier.png in {options.out}")
    return 0


def curve(run: Finished, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one run's posterior at every factor.

    Raises:
        ValueError: the network of its means has no image right.
    """
    subject = of_run(run, options.method)
    right = right_of(subject)
    bounds = _bounds(subject, right, options)
    by_ibp = dataclasses.replace(run.config.eval, certify_method="ibp")
    accuracies = certified_accuracy(by_ibp, run.apply)

    def measured(factor: float) -> Row:
        posterior = widened(run.posterior, factor)
        safe = bounds(posterior).probability()[: len(right)] >= SAFE
        row = {"factor": factor, "safe": int(safe.sum()) / len(run.test.y)}
        row |= scored(run, posterior, accuracies)
        print(f"{subject.name:16} x {factor:<8.3g}P_safe >= {SAFE:g} {row['safe']:6.1%}  certified "
              f"{row['certified']:6.1%}  {row['information']:.3g} nats", flush=True)  # fmt: skip
        return row

    train, eps = run.config.train, subject.eps
    return {
        "name": subject.name,
        "preset": run.config.preset,
        "likelihood": train.likelihood,
        "kl_weight": train.kl_weight,
        "random_layers": train.random_layers,
        "eps": eps,
        "method": subject.method,
        "digest": subject.digest,
        "correct": len(right) / len(run.test.y),
        "spread": float(spread(run.posterior)),
        "rows": measure(measured, options.factors, options.refine),
        "jax": jax.__version__,
    }


def widened(posterior: MeanField, factor: float) -> MeanField:
    """The posterior with its standard deviations multiplied.

    >>> print(widened(MeanField({"w": jnp.zeros(2)}, {"w": jnp.full(2, 0.5)}), 4.0).scale["w"])
    [2. 2.]
    """
    return MeanField(posterior.loc, jax.tree.map(lambda s: factor * s, posterior.scale))


def scored(
    run: Finished,
    posterior: MeanField,
    accuracies: Callable[[Any, Split], tuple[float, float]],
) -> Row:
    """Scores draws, and certifies the first of them.

    Args:
        run: whose network, test images and seed.
        posterior: that is drawn from.
        accuracies: clean and certified, of drawn networks on images.
    """
    draws = deploy(posterior, DRAWS, run.config.seed)
    few = jax.tree.map(lambda w: w[:CERTIFIED_DRAWS], draws)
    _, certified = accuracies(few, run.test)
    probs = jnp.asarray(predict(run.apply, draws, run.test, min(256, len(run.test.y))))
    outcome = probs.mean(0), jnp.asarray(run.test.y)
    return {
        "certified": certified,
        "accuracy": float(metrics.accuracy(*outcome)),
        "nll": float(metrics.nll(*outcome)),
        "ece": float(metrics.ece(*outcome)),
        "information": float(metrics.mutual_information(probs).mean()),
    }


def measure(measured: Callable[[float], Row], factors: Sequence[float], more: int) -> list[Row]:
    """Measures at the factors, and at up to so many more, each where a curve is least known.

    Args:
        measured: a factor to its row.
        factors: > 0.
        more: how many may be added.

    Returns:
        Rows in the order of their factors.

    Example:
        >>> step = lambda c: {"factor": c, "safe": float(c < 2), "certified": 1.0}
        >>> [row["factor"] for row in measure(step, [1.0, 16.0], 2)]
        [1.0, 2.0, 4.0, 16.0]
    """
    rows = [measured(factor) for factor in sorted(set(factors))]
    for _ in range(more if len(rows) > 1 else 0):
        areas = [_area(*pair) for pair in pairwise(rows)]
        place = int(np.argmax(areas))
        if areas[place] <= OPEN:
            break
        between = math.sqrt(rows[place]["factor"] * rows[place + 1]["factor"])
        rows.insert(place + 1, measured(between))
    return rows


def _area(row: Row, after: Row) -> float:
    """The rectangle that a falling curve is in between two rows, of the curve that falls more."""
    fall = max(abs(row[name] - after[name]) for name in ("safe", "certified"))
    return fall * math.log(after["factor"] / row["factor"])


def _bounds(
    subject: Subject, right: np.ndarray, options: argparse.Namespace
) -> Callable[[MeanField], Margins]:
    """Margins of the images over their balls, as a function of the posterior; compiled once.

    The last image is repeated to a whole number of batches: a rest would be compiled by itself.
    """
    size = min(options.batch_size, len(right))
    rows = right[np.minimum(np.arange(-(-len(right) // size) * size), len(right) - 1)]
    images = tuple(jnp.asarray(part[rows]) for part in subject.images)

    @jax.jit
    def bounds(posterior: MeanField, images: Any) -> Margins:
        given = subject._replace(posterior=posterior)
        one: Any = partial(stays, given, options)
        return jax.lax.map(lambda image: one(*image), images, batch_size=size)

    return lambda posterior: bounds(posterior, images)


def _open(folder: Path, options: argparse.Namespace) -> Finished:
    run = open_run(folder, options.data_dir, options.images)
    if not isinstance(run.posterior, MeanField):
        raise TypeError(
            f"{folder}: its posterior is a {type(run.posterior).__name__}, and only the standard "
            "deviations of independent Gaussian weights (a MeanField) are multiplied here. Train "
            "the run by --inference bbb or ivon, or see how safe it is as it is: python -m "
            "experiments.studies.safety for other Gaussians, experiments.certify for the rest"
        )
    return run


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.frontier",
        description="Multiplies the standard deviations of finished runs' Gaussian posteriors, and "
        "says for each factor of how many images it is proved that their class stays in the l_inf "
        "ball with a probability of .99, how many the drawn networks certify by IBP, and what "
        "their mutual information is. Writes frontier.json, frontier.md and frontier.png.",
        epilog="A minute for a run of 500 images and 15 factors, on one core of a CPU.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help="folders of finished runs with factorised Gaussian posteriors, at the "
                        "radii of their tests; curves are named after them")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
                        help="TFDS data folder (default: each run's own)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"), metavar="FOLDER",
                        help="where the files go, new ones (default: runs/frontier)")  # fmt: skip
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS), metavar="C",
                        help="of the standard deviations; 1, the run's own posterior, is always "
                        f"among them (default: {' '.join(f'{c:g}' for c in FACTORS)})")  # fmt: skip
    parser.add_argument("--refine", type=int, default=8, metavar="N",
                        help="factors added, at most, where a curve falls far between two; "
                        "0: none (default: 8)")  # fmt: skip
    parser.add_argument("--images", type=int, default=500, metavar="N",
                        help="the first N test images (default: 500)")  # fmt: skip
    add_bound_options(parser)
    options = parser.parse_args(arguments)
    for name, least in (("images", 1), ("batch_size", 1), ("refine", 0)):
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {least}")
    if not all(0 < factor < math.inf for factor in options.factors):
        parser.error(f"--factors {' '.join(map(str, options.factors))}: finite numbers above 0")
    if not 0 < options.delta < options.delta + SAFE < 1:
        parser.error(f"--delta {options.delta:g}: in (0, {1 - SAFE:g}), e.g. 0.001; no P_safe "
                     f"above 1 - delta is proved, and {SAFE:g} is asked for")  # fmt: skip
    names = [folder.resolve().name for folder in options.runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        parser.error(f"two runs are called {', '.join(twice)}, and curves are named after their "
                     "folders: rename one")  # fmt: skip
    for suffix in ("json", "md", "png"):
        if (path := options.out / f"frontier.{suffix}").exists():
            parser.error(f"{path} exists: name another folder with --out, or remove it")
    options.factors = [*options.factors, 1.0]
    return parser, options


if __name__ == "__main__":
    raise SystemExit(main())
