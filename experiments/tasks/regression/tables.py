"""A regression of somebody's own, from a table: a CSV file with a header, numbers below it.

One column is the target, all others are features. A fifth of the rows is for the test, another for
validation, always the same ones.
"""

import csv
import hashlib
import math
from pathlib import Path

import numpy as np

from .data import SPLIT_SEED, Regression, standardised

_FEW = 10
"""Rows, at least: of fewer no three splits are made."""


def read(path: Path, target: str) -> Regression:
    """Reads a table.

    Args:
        path: of a CSV file, its first line the names of its columns.
        target: the column that is to be predicted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table of numbers, or lacks the column; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: there is no such file; give a .csv with a header")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no .csv file: {error}") from None
    names = [name.strip() for name in rows[0]] if rows else []
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: the columns {', '.join(repeated)} come more than once")
    if target not in names:
        raise ValueError(f"--target {target}: {path} has the columns {', '.join(names) or 'none'}")
    if len(names) < 2:
        raise ValueError(f"{path}: no column besides {target} to predict it from")
    values = np.array([_numbers(path, place, row, names) for place, row in enumerate(rows[1:], 2)])
    if len(values) < _FEW:
        raise ValueError(f"{path}: {len(values)} rows; give {_FEW} at least")
    place = names.index(target)
    features = [i for i in range(len(names)) if i != place]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(values))
    held = len(order) // 5
    parts = order[2 * held :], order[held : 2 * held], order[:held]
    constant = [names[i] for i in range(len(names)) if np.ptp(values[parts[0], i]) == 0]
    if constant:
        raise ValueError(
            f"{path}: {', '.join(constant)} has one value in all training rows: remove it, for it "
            "has no standard deviation that a radius could be in"
        )
    return standardised(
        path.stem,
        [(values[part][:, features], values[part, place]) for part in parts],
        tuple(names[i] for i in features),
        target,
    )


def digest(path: Path) -> str:
    """What tells one table from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _numbers(path: Path, line: int, row: list[str], names: list[str]) -> list[float]:
    if len(row) != len(names):
        raise ValueError(
            f"{path}, row {line}: {len(row)} values, where the header has {len(names)} columns"
        )
    found = []
    for name, cell in zip(names, row, strict=True):
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            what = f"{cell.strip()!r} is no finite number" if cell.strip() else "there is no value"
            raise ValueError(
                f"{path}, row {line}, column {name}: {what}. Features are numbers; code classes "
                "as numbers, and leave out rows with gaps"
            )
        found.append(number)
    return found
