"""Finished runs, and results that are added to them without touching what the run wrote.

A result is computed image by image in stages (attacks one after the other, bounds from cheap to
tight), each on the images that the earlier ones left open. It lives in three files of the run's
folder, all new:

    NAME.jsonl    while it grows: the settings, then a line for each batch of each stage
    NAME.npz      when it is finished: a row for each image
    NAME.json     and, last, its settings and its numbers

A computation that is stopped goes on from its .jsonl, whose last line may be cut off.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from bnncert.types import Apply

from ..setup import subject
from ..setup.command import program
from ..setup.config import RunConfig, from_dict
from ..setup.data import Split
from ..setup.logs import SHORT, compiling
from .deployment import deploy
from .evaluation import SoundnessError
from .posteriors import load as load_posterior
from .writing import naming, write_json, write_npz, write_text

Rows = dict[str, np.ndarray]
Stage = Callable[[np.ndarray, np.ndarray, np.ndarray], Mapping[str, Any]]
"""`(images, labels, positions) -> columns`, a batch of one shape; jitted inside."""


class Finished(NamedTuple):
    """What a finished run deploys, and the images it is tested on."""

    folder: Path
    config: RunConfig
    apply: Apply
    samples: PyTree
    posterior: Any
    test: Split


def open_run(folder: Path, data_dir: Path | None = None, images: int | None = None) -> Finished:
    """Reads a run back: the same samples as it deployed, drawn with the same key.

    Args:
        folder: of a run that was finished.
        data_dir: the TFDS data folder; the run's own by default.
        images: how many test images, the first ones; all by default.

    Raises:
        FileNotFoundError: the folder, or a file in it, or the data are not there.
        ValueError: images that the test set does not have.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the folder of a finished run")
    for name in ("config.json", "posterior.npz", "results.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not the folder of a finished run: it has no {name}. Finish the run "
                f"first ({program('run')} ... --resume)"
            )
    config = from_dict(json.loads((folder / "config.json").read_text()))
    dataset = subject.read(config, data_dir)
    subject.check(folder, config, dataset)
    num = len(dataset.test.y)
    if images is not None and not 1 <= images <= num:
        raise ValueError(f"--images {images}: the test set has {num}")
    posterior = load_posterior(folder / "posterior.npz")
    apply = subject.build(config, dataset).apply
    samples = deploy(posterior, config.eval.num_samples, config.seed)
    test = Split(dataset.test.x[:images], dataset.test.y[:images])
    return Finished(folder, config, apply, samples, posterior, test)


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of all results added to a run, by name: certificates first, then attacks."""
    paths = [*sorted(folder.glob("certify-*.json")), *sorted(folder.glob("attack-*.json"))]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def in_stages(
    run: Finished,
    name: str,
    settings: Mapping[str, Any],
    stages: Mapping[str, Stage],
    still_open: Callable[[Rows], np.ndarray],
    merge: Mapping[str, Callable[[Any, Any], Any]],
    batch_size: int,
) -> Rows:
    """Computes a result's rows, stage by stage; what is in its .jsonl already is read from there.

    Args:
        run: on whose test images.
        name: of the result.
        settings: what decides the numbers; a .jsonl with others is refused.
        stages: in their order.
        still_open: `rows -> (N,) bools`, the images that the next stage has to look at.
        merge: for a column, `(earlier, new) -> value` where a later stage comes to an image; a
            column that is not named is replaced.
        batch_size: images at once.

    Returns:
        Columns of N rows, and "stage", for each image the place of the last stage that saw it.

    Raises:
        ValueError: the .jsonl is of other settings.
    """
    path, num = run.folder / f"{name}.jsonl", len(run.test.y)
    kept = _kept(path, settings)
    rows: Rows = {}
    with naming(path), path.open("a") as file:
        if not file.tell():
            _append(file, {"settings": settings})
        for place, (stage, compute) in enumerate(stages.items()):
            todo = np.ones(num, bool) if not rows else np.array(still_open(rows))
            for line in kept:
                if line["stage"] == stage:
                    _put(rows, num, place, line, merge)
                    todo[line["index"]] = False
            left = np.flatnonzero(todo)
            with tqdm(total=len(left), desc=stage, unit="image", delay=SHORT) as bar:
                for start in range(0, len(left), batch_size):
                    index = left[start : start + batch_size]
                    # One shape for one compile: the last batch repeats its last image.
                    padded = index[np.minimum(np.arange(batch_size), len(index) - 1)]
                    what = compiling(f"{stage} and running its first batch", bar, len(index))
                    with what if not start else nullcontext():
                        found = compute(run.test.x[padded], run.test.y[padded], padded)
                    columns = {
                        column: np.asarray(values)[: len(index)].tolist()
                        for column, values in found.items()
                    }
                    line = {"stage": stage, "index": index.tolist(), "columns": columns}
                    _append(file, line)
                    _put(rows, num, place, line, merge)
                    bar.update(len(index))
    return rows


def finish(folder: Path, name: str, record: Mapping[str, Any], rows: Rows) -> None:
    """Writes a result's files, the .json last, and removes its .jsonl.

    Raises:
        SoundnessError: with it a certified image would be broken; nothing is written then.
    """
    check_order(folder, {name: (dict(record), rows)})
    write_npz(folder / f"{name}.npz", rows)
    write_json(folder / f"{name}.json", record)
    (folder / f"{name}.jsonl").unlink(missing_ok=True)


def already(folder: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a finished result of these settings; None if there is none.

    Raises:
        ValueError: there is one, of other settings.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    _same(path, record, settings)
    return record


def check_order(folder: Path, new: Mapping[str, tuple[dict[str, Any], Rows]] | None = None) -> None:
    """Raises SoundnessError if an attack broke an image that a certificate of this run covers.

    A certificate covers the attacks of its own norm with a radius up to its own, and those of the
    l2 norm as well if it is of l_inf, whose ball of the same radius holds the l2 ball.
    """
    known = {name: (record, _rows(folder, name)) for name, record in results_of(folder).items()}
    known |= dict(new or {})
    certified = {n: pair for n, pair in known.items() if pair[0]["kind"] == "certify"}
    if (folder / "certificates.npz").is_file():
        own = {"norm": "inf", "eps": json.loads((folder / "results.json").read_text())["eps"]}
        certified["certificates"] = own, _rows(folder, "certificates")
    for proof, (its, proved) in certified.items():
        for attack, (other, attacked) in known.items():
            covers = its["norm"] in (other["norm"], "inf") and other["eps"] <= its["eps"]
            if other["kind"] != "attack" or not covers:
                continue
            num = min(len(proved["certified"]), len(attacked["broken"]))
            wrong = np.flatnonzero(proved["certified"][:num] & attacked["broken"][:num])
            if len(wrong):
                raise SoundnessError(
                    f"test image {wrong[0]} is certified in {proof}, but {attack} changed its "
                    f"class ({len(wrong)} images so): a bound or an attack is wrong; please "
                    "report this with the run's config.json"
                )


def _kept(path: Path, settings: Mapping[str, Any]) -> Sequence[Any]:
    """The lines of a .jsonl; a last line without its end is cut off the file."""
    if not path.is_file():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines:
        _same(path, lines[0]["settings"], settings)
    return lines[1:]


def _same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{name}: {before.get(name)} -> {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path} is of other settings ({'; '.join(changed)}): repeat its options, or remove it"
        )


def _put(
    rows: Rows,
    num: int,
    place: int,
    line: Mapping[str, Any],
    merge: Mapping[str, Callable[[Any, Any], Any]],
) -> None:
    index = line["index"]
    for column, values in {**line["columns"], "stage": [place] * len(index)}.items():
        # Python's numbers to the dtypes that certificates and attacks have.
        array = np.asarray(values)
        kind = np.float32 if array.dtype.kind == "f" else array.dtype
        known = rows.setdefault(column, np.zeros(num, kind))
        known[index] = merge[column](known[index], array) if place and column in merge else array


def _append(file: Any, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _rows(folder: Path, name: str) -> Rows:
    with np.load(folder / f"{name}.npz") as arrays:
        return dict(arrays)
