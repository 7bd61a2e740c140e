"""The files of a report: read from a finished run's folder, and written into it.

The page is one file without outside resources: plots are inline SVG, images inline PNG.
"""

import json
from pathlib import Path

import numpy as np

from ..pipeline.finished import check_order, results_of
from ..pipeline.writing import whole, write_text
from ..setup.command import program
from . import figures, gallery
from .page import Run, page

FILES = ("config.json", "metrics.jsonl", "results.json", "certificates.npz", "gallery.npz")


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run's folder, whole or not at all, and returns its path.

    Args:
        run_dir: the folder of a finished run, with the files named in `FILES`.

    Raises:
        FileNotFoundError: the folder, or a file that a finished run has, is missing.
        ValueError: the files contradict one another.
        WriteError: the page cannot be written.
    """
    run_dir = Path(run_dir)
    text = page(load(run_dir))
    path = run_dir / "report.html"
    write_text(path, text)
    return path


def summary_picture(run_dir: Path, path: Path) -> Path:
    """Draws some test images beside accuracy over eps; PNG or SVG, as the path's ending says."""
    run, path = load(Path(run_dir)), Path(path)
    pictures = gallery.strip(run.gallery, run.certificates, run.class_names)
    figure = figures.summary(run.results, pictures, columns=4)
    kind = path.suffix.lstrip(".") or "png"
    with whole(path) as unfinished:
        figure.savefig(unfinished, format=kind, dpi=200)
    return path


def load(run_dir: Path) -> Run:
    """Reads a run's files.

    Raises:
        FileNotFoundError: naming what is missing.
        SoundnessError: an attack broke an image that is certified.
        ValueError: results.json and certificates.npz are not of the same evaluation.
    """
    check_files(run_dir)
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    certificates = _arrays(run_dir / "certificates.npz")
    images = _arrays(run_dir / "gallery.npz")
    for rate, name in (("certified", "certified"), ("attacked", "attacked_correct")):
        said, found = results[f"{rate}_accuracy"], float(np.mean(certificates[name]))
        if abs(said - found) > 1e-4:
            raise ValueError(
                f"results.json says {rate}_accuracy = {said}, certificates.npz says {found}: "
                "they are not of the same evaluation. Evaluate the run again."
            )
    check_order(run_dir)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # A resumed run may have written an epoch twice; the later line is the one that counts.
    epochs = {line["epoch"]: line for line in map(json.loads, filter(str.strip, lines))}
    return Run(
        json.loads((run_dir / "config.json").read_text(encoding="utf-8")),
        [epochs[number] for number in sorted(epochs)],
        results,
        certificates,
        gallery.Gallery(images["index"], images["image"], images.get("attacked")),
        results.get("class_names") or [str(c) for c in range(certificates["probs"].shape[1])],
        results_of(run_dir),
    )


def check_files(run_dir: Path) -> None:
    """Raises FileNotFoundError, naming what is missing, unless the folder is of a finished run."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {run_dir}: give the folder of a finished run")
    if any(run_dir.glob("predictions-*.npz")):
        raise FileNotFoundError(
            f"{run_dir} is of a regression, which writes its report.html itself: its command with "
            f"--resume ({program('regression')} ... --resume) writes it again"
        )
    missing = [name for name in FILES if not (run_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{run_dir} is not the folder of a finished run: it has no {', '.join(missing)}. "
            f"Finish the run first ({program('run')} ... --resume)."
        )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)
