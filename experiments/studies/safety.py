"""P_safe of posteriors that others released, and of runs of ours: proved on both sides, and drawn.

    python -m experiments.studies.safety --posteriors DIR --runs RUN ... --data-dir DIR --out FOLDER

    P_safe = Prob_{w ~ q}( the class stays over the whole l_inf ball )

Of the images that the network of the posterior's means has right, by bounds linear in the weights
(`experiments.studies.proved_and_drawn`):

    safe     P_safe >= .99: of all margins over the ball, from below
    unsafe   P_safe <= .01: of one margin at the worst point that a battery of attacks finds
    open     neither is proved

Both are proofs, for the float32 network by `--rounding outward`. Then they are put to the test:
networks are drawn from q and attacked, image by image, and a count of draws that withstand whose
probability is below 1e-6 by what was proved ends the command with status 1.

Writes safety.json (a row as soon as it is done: the same command goes on with those that are
missing), safety.md and safety.png.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnncert.posterior import Gaussian, LowRank, MeanField

from ..pipeline.allocator import keep_freed_pages
from ..pipeline.finished import open_run
from ..setup.data import Split, load
from . import released
from .proved_and_drawn import (
    Row,
    Subject,
    add_bound_options,
    digest,
    of_run,
    proved_and_drawn,
    right_of,
)
from .safety_figures import contradiction, picture, summary, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser, options = _parse(arguments)
    keep_freed_pages()
    settings = {name: getattr(options, name) for name in ("rounding", "delta", "draws", "seed")}
    settings["steps"] = options.attack_steps
    path = options.out / "safety.json"
    rows: list[Row] = []
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            parser.error(
                f"{path} is of other settings, {record['settings']}: name a new folder with --out, "
                "or repeat them"
            )
        rows = record["rows"]
    try:
        given = list(subjects(options))
        for subject in given:
            right_of(subject)  # or an error, before anything long
    except (OSError, ValueError, TypeError) as error:
        parser.exit(1, f"error: {error}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    for subject in given:
        asked = subject.row()
        row = next((row for row in rows if asked.items() <= row.items()), None)
        if row is None:
            row = asked | proved_and_drawn(subject, options)
            rows.append(row)
            write(path, settings, rows)
        print(summary(row), flush=True)
        if row["contradicted"]:
            parser.exit(1, f"error: {contradiction(row)}\n")
    text = table(rows)
    path.with_suffix(".md").write_text(text + "\n")
    picture(rows, options.delta).savefig(path.with_suffix(".png"), dpi=200)
    tried = sum(row["pairs"] for row in rows)
    print(f"\n{text}\n\n{tried:,} attacked draws, none against a proof; files in {options.out}")
    return 0


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """Every posterior at every radius, one after the other.

    Raises:
        OSError, ValueError, TypeError: what is not there, cannot be read, or is no Gaussian.
    """
    files: list[Path] = []
    if options.posteriors is not None:
        if not options.posteriors.is_dir():
            raise FileNotFoundError(f"--posteriors {options.posteriors}: there is no such folder")
        files = sorted(options.posteriors.glob("*.npz"))
        if not files:
            raise FileNotFoundError(
                f"--posteriors {options.posteriors}: there is no .npz file in it. The module "
                "experiments.studies.released says what they hold"
            )
    posteriors = [released.read(file) for file in files]  # before anything is computed
    test = load("mnist", options.data_dir).test if files else None
    for file, posterior in zip(files, posteriors, strict=True):
        known = released.KNOWN.get(file.stem, released.Setting())
        images = _first(test, options.images or known.images)
        if known.against == "mean":
            mean = jax.vmap(partial(released.apply, posterior.loc))(images.x)
            images = Split(images.x, np.asarray(mean.argmax(-1), np.int32))
        for eps in options.eps or known.eps:
            yield Subject(file.stem, "released", released.apply, posterior, images, known.against,
                          eps, options.method or "crown", digest(file))  # fmt: skip
    for folder in options.runs:
        run = open_run(folder, options.data_dir, options.images or 1000)
        if not isinstance(run.posterior, MeanField | LowRank | Gaussian):
            raise TypeError(
                f"{folder}: its posterior is a {type(run.posterior).__name__}, and no Gaussian. "
                "What it deploys is certified by python -m experiments.certify"
            )
        found = of_run(run, options.method)
        for eps in options.eps or (found.eps,):
            yield found._replace(eps=eps)


def write(path: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes the settings and the rows, a line each."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"settings": {json.dumps(settings)}, "rows": [\n{lines}\n]}}\n')
    temporary.replace(path)


def _first(test: Any, images: int) -> Split:
    if images > len(test.y):
        raise ValueError(f"--images {images}: the test set has {len(test.y)}")
    return Split(test.x[:images], test.y[:images])


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    known = "; ".join(
        f"{name}: eps {', '.join(f'{eps:g}' for eps in setting.eps)}, {setting.images} images, "
        + ("the mean network's class" if setting.against == "mean" else "labels")
        for name, setting in {**released.KNOWN, "any other": released.Setting()}.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.safety",
        description="Bounds the probability, over a Gaussian posterior, that an image's class "
        "stays over a whole l_inf ball, from below and above, and tries the bounds against "
        "attacked draws. Writes safety.json, safety.md and safety.png; the same command goes on "
        "with rows that are missing. Ends with status 1 if a draw contradicts a proof.",
        epilog=f"Settings of released posteriors. {known}.",
    )
    parser.add_argument("--posteriors", type=Path, metavar="DIR",
                        help="folder of released posteriors: every .npz file in it, ReLU networks "
                        "of 784 pixels and 10 classes, arrays layer{i}/{kernel,bias}/{loc,scale}, "
                        "kernels (in, out)")  # fmt: skip
    parser.add_argument("--runs", type=Path, nargs="+", default=[], metavar="RUN",
                        help="folders of finished runs, at the radii of their tests")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="TFDS data folder")
    parser.add_argument("--out", type=Path, default=Path("runs/safety"), metavar="FOLDER",
                        help="where the files go (default: runs/safety)")  # fmt: skip
    parser.add_argument("--eps", type=float, nargs="+", default=[], metavar="E",
                        help="l_inf radii for all that is given, pixels in [0, 1] (default: those "
                        "below, and the runs' own)")  # fmt: skip
    parser.add_argument("--images", type=int, metavar="N",
                        help="the first N test images (default: below; 1000 of runs)")  # fmt: skip
    add_bound_options(parser)
    for name, default, text in (
        ("draws", 200_000, "attacked draws for each posterior and radius, divided among the images "
         "of which something is proved (the others get as many each); 0: none"),
        ("attack-steps", 20, "of each attack on the mean network"),
        ("seed", 0, "of attacks and draws"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=f"{text} (default: {default})")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.posteriors is None and not options.runs:
        parser.error("nothing to certify: give --posteriors DIR, --runs RUN, or both")
    for name, least in (("images", 1), ("draws", 0), ("attack_steps", 1), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {least}")
    if not 0 < options.delta < 1:
        parser.error(f"--delta {options.delta:g}: in (0, 1), e.g. 0.001")
    if not all(0 <= eps <= 1 for eps in options.eps):
        parser.error(f"--eps {' '.join(map(str, options.eps))}: in [0, 1], pixels are")
    return parser, options


if __name__ == "__main__":
    raise SystemExit(main())
