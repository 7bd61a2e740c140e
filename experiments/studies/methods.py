"""Inference methods side by side: a table and a picture of finished runs.

    python -m experiments.studies.methods RUN [RUN ...] --out FILE

reads each run's results.json and prints one Markdown row a run, in the order given. `--out` keeps
the same rows as JSON, with the command that repeats each run, and draws FILE with suffix .png. Runs
of different data sets, radii or test images are refused: their accuracies do not compare.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..report.figures import radius_text, standard_error
from ..report.fineprint import command
from ..report.palette import LIGHT

SHARED = ("dataset", "model", "eps", "num_test", "epochs", "certify_method", "attack")
"""What runs of one table have in common."""

KEPT = (
    *SHARED,
    "inference",
    "likelihood",
    "random_layers",
    "seed",
    "num_samples",
    "clean_accuracy",
    "attacked_accuracy",
    "certified_accuracy",
    "nll",
    "ece",
    "posterior_scale",
    "kl_weight",
    "seconds_per_epoch",
    "train_seconds",
    "refinement_seconds",
    "arithmetic",
    "versions",
)

CHAINS = (
    "mcmc_images",
    "acceptance",
    "leapfrog_steps",
    "divergences",
    "median_r_hat",
    "effective_sample_size",
)
"""What hmc and nuts report besides."""

COLOURS = {"clean": LIGHT["ink"], "attacked": LIGHT["broken"], "certified": LIGHT["certified"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, print their table, and write it and its picture if asked to."""
    options = _parse(arguments)
    rows = [read(folder) for folder in options.runs]
    check_comparable(rows)
    print(table(rows))
    if options.out is None:
        return
    with options.out.open("x") as file:
        json.dump(rows, file, indent=1)
        file.write("\n")
    picture(rows).savefig(options.out.with_suffix(".png"), dpi=150)


def read(folder: Path) -> dict[str, Any]:
    """What the table needs of one finished run.

    Raises:
        FileNotFoundError: the folder has no results.json: no run, or an unfinished one.
    """
    path = folder / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no finished run: there is no {path.name} in it")
    found = json.loads(path.read_text())
    config = json.loads((folder / "config.json").read_text())
    kept = {name: found.get(name) for name in KEPT}
    kept |= {name: found[name] for name in CHAINS if name in found}
    return {**kept, "command": command(config)}


def check_comparable(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError that names the first quantity in which two runs must not differ."""
    for name in SHARED:
        values = {row[name] for row in rows}
        if len(values) > 1:
            raise ValueError(
                f"the runs differ in {name} ({', '.join(map(str, sorted(values)))}): their numbers "
                "do not compare; give the ones that agree"
            )


def label(row: Mapping[str, Any]) -> str:
    """The method, with the error model where that is not the certified one."""
    text = row["inference"]
    if row["likelihood"] != "certified":
        text += f", {row['likelihood']} likelihood"
    return text + (", last layer" if row["random_layers"] == "last" else "")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| method | clean | attacked | certified | NLL | ECE | spread | KL weight | s/epoch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracies = " | ".join(f"{row[f'{name}_accuracy']:.1%}" for name in COLOURS)
        lines.append(
            f"| {label(row)} | {accuracies} | {row['nll']:.3f} | {row['ece']:.3f} "
            f"| {row['posterior_scale']:.2g} | {row['kl_weight']:g} "
            f"| {row['seconds_per_epoch']:.1f} |"
        )
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracies, NLL and ECE, a line a method, from the best certified down."""
    rows = sorted(rows, key=lambda row: row["certified_accuracy"])
    figure = Figure((9.2, 1.0 + 0.3 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    places = np.arange(len(rows))
    for name, colour in COLOURS.items():
        values = np.array([row[f"{name}_accuracy"] for row in rows])
        error = 2 * standard_error(values, [row["num_test"] for row in rows])
        panels[0].errorbar(
            values, places, xerr=error, fmt="o", ms=4, lw=1, color=colour, label=name
        )
    panels[0].set_xlim(0, 1)
    panels[0].set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    panels[0].set_yticks(places, [label(row) for row in rows])
    panels[0].set_xlabel(f"accuracy at eps {radius_text(rows[0]['eps'])}, with two standard errors")
    for axes, name, text in ((panels[1], "nll", "NLL, nats"), (panels[2], "ece", "ECE")):
        axes.plot([row[name] for row in rows], places, "o", ms=4, color=LIGHT["soft"])
        axes.set_xlim(0, 1.1 * max(row[name] for row in rows))
        axes.set_xlabel(text)
    for axes in panels:
        _axes(axes)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False, fontsize=8.5)
    return figure


def _axes(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["line"])
    axes.tick_params(colors=LIGHT["soft"], labelsize=8, length=0)
    axes.grid(color=LIGHT["line"], lw=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=LIGHT["soft"], fontsize=8.5)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.methods",
        description="Finished runs side by side, as a table and a picture.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="write the rows to this new JSON file, and a .png")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists: name a new file, or remove it")
    return options


if __name__ == "__main__":
    main()
