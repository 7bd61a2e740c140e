"""Certificate against spread: a trained posterior, its standard deviations multiplied.

    python -m experiments.studies.spread RUN [RUN ...] --data-dir DIR --out FILE

For each factor, the deviations of a run's Gaussian posterior are multiplied by it, its means are
kept, and what would be deployed then is certified anew: at factor 0 the network of the means, at 1
the posterior as it was trained. The bounds of a sampled network widen with the noise of its
weights, so certified accuracy falls; the largest factor that still certifies within two points of
the trained posterior says how much spread a certificate leaves room for. `--out` keeps the curves
as JSON and draws FILE with suffix .png.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bnncert.posterior import Gaussian, LowRank, MeanField, spread

from ..pipeline.deployment import deploy
from ..pipeline.evaluation import certified_accuracy
from ..pipeline.posteriors import load as load_posterior
from ..report.palette import LIGHT
from ..setup import subject
from ..setup.config import from_dict
from ..setup.data import Split
from ..setup.methods import name_of

FACTORS = (0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
TOLERANCE = 0.02


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every run at every factor, print the curves, and write them if asked to."""
    options = _parse(arguments)
    curves = [curve(folder, options) for folder in options.runs]
    if options.out is None:
        return
    with options.out.open("x") as file:
        json.dump({"images": options.images, "curves": curves}, file, indent=1)
        file.write("\n")
    picture(curves).savefig(options.out.with_suffix(".png"), dpi=150)


def curve(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of one run's posterior at every factor.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        TypeError: its posterior is not a Gaussian.
    """
    config = from_dict(json.loads((folder / "config.json").read_text()))
    posterior = load_posterior(folder / "posterior.npz")
    if not isinstance(posterior, MeanField | LowRank | Gaussian):
        raise TypeError(f"{folder}: a {type(posterior).__name__} is no Gaussian to widen")
    dataset = subject.read(config, options.data_dir)
    test = Split(dataset.test.x[: options.images], dataset.test.y[: options.images])
    apply = subject.build(config, dataset).apply
    accuracies = certified_accuracy(config.eval, apply)
    inference = name_of(config.inference)
    mean, draws = posterior.moments()[0], deploy(posterior, config.eval.num_samples, config.seed)
    rows = []
    for factor in options.factors:
        wider = widened(draws, mean, factor)
        clean, certified = accuracies(wider, test)
        rows.append({"factor": factor, "clean": clean, "certified": certified})
        print(f"{inference:12}x {factor:<5g}clean {clean:.1%}  certified {certified:.1%}")
    widest = largest_factor(rows)
    found = float(spread(posterior))
    print(f"{inference:12}spread {found:.3g}; within 2 points up to x {widest:g}")
    return {
        "inference": inference,
        "preset": config.preset,
        "epochs": config.train.epochs,
        "eps": config.eval.eps,
        "certify_method": config.eval.certify_method,
        "spread": found,
        "largest_factor": widest,
        "rows": rows,
    }


def widened(draws: PyTree, mean: PyTree, factor: float) -> PyTree:
    """Draws of a Gaussian turned into draws of one `factor` times as wide, with the same noise.

    >>> widened({"w": np.array([1.5, 0.0])}, {"w": np.array(1.0)}, 2.0)
    {'w': array([ 2., -1.])}
    """
    return jax.tree.map(lambda w, loc: loc + factor * (w - loc), draws, mean)


def largest_factor(rows: Sequence[dict[str, float]]) -> float:
    """Up to which every measured factor certifies within two points of the trained posterior.

    >>> rows = [(0.0, 0.96), (1.0, 0.95), (2.0, 0.94), (3.0, 0.80), (4.0, 0.94)]
    >>> largest_factor([{"factor": factor, "certified": rate} for factor, rate in rows])
    2.0
    """
    trained = next(row["certified"] for row in rows if row["factor"] == 1)
    widest = 0.0
    for row in sorted(rows, key=lambda row: row["factor"]):
        if row["certified"] < trained - TOLERANCE:
            break
        widest = row["factor"]
    return widest


def picture(curves: Sequence[dict[str, Any]]) -> Figure:
    """Certified accuracy of every run over the factor; clean accuracy is dotted."""
    figure = Figure((5.6, 3.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = [LIGHT[name] for name in ("certified", "broken", "undecided", "ink")]
    for found, colour in zip(curves, colours * len(curves), strict=False):
        factors = [row["factor"] for row in found["rows"]]
        for name, style in (("certified", "-o"), ("clean", ":")):
            values = [row[name] for row in found["rows"]]
            text = f"{found['inference']}, {name}"
            axes.plot(factors, values, style, ms=3, lw=1.6, color=colour, label=text)
    axes.axvline(1.0, color=LIGHT["line"], lw=1, zorder=0)
    axes.set_ylim(0, 1)
    axes.set_yticks(np.linspace(0, 1, 5), ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("posterior standard deviations, times those of training")
    axes.set_ylabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LIGHT["line"], lw=0.7)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.spread",
        description="Certified accuracy of a trained posterior as its deviations grow.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--data-dir", type=Path, help="TFDS data folder")
    parser.add_argument(
        "--images", type=int, default=2000, help="test images, the first (default: %(default)s)"
    )
    parser.add_argument(
        "--factors", type=float, nargs="+", default=list(FACTORS), help="1 has to be among them"
    )
    parser.add_argument("--out", type=Path, help="write the curves to this new JSON file")
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error(f"--images {options.images}: at least 1")
    if 1.0 not in options.factors or not all(0 <= f < np.inf for f in options.factors):
        parser.error(f"--factors {options.factors}: finite numbers >= 0, 1 among them")
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists: name a new file, or remove it")
    return options


if __name__ == "__main__":
    main()
