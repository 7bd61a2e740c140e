"""A certificate as a file: what was claimed, of which networks, in which arithmetic.

One .npz of plain arrays with a header in JSON: nothing is pickled, NumPy alone reads it. It is
evidence of what a program said, and no proof by itself: whoever doubts it runs the certificate
again, on samples whose digest is that of the file.
"""

import datetime
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnncert import prior as priors
from bnncert.sets import Box, LpBall, Set, check_set

_FORMAT = 1
"""Of the file: a reader refuses a later one."""


class Certificate(NamedTuple):
    """What was proved, with what tells it from other claims.

    Attributes:
        claim: in words.
        arrays: by name: those of the set ("set.lower", "set.upper", or "set.center", "set.eps"),
            "x" where it is given, and what was found ("found.margins", ...).
        samples: the digest of the weights (`digest`).
        arithmetic: that it holds in.
        method: of the bounds.
        versions: of bnncert, jax and jaxlib.
        made: when, in UTC, ISO 8601.

    Example:
        >>> made = certificate("y > 0", {"lower": np.ones(1)}, {"w": np.ones(2)}, Box(0.0, 1.0))
        >>> made.is_of({"w": np.ones(2)}), made.is_of({"w": np.zeros(2)})
        (True, False)
    """

    claim: str
    arrays: Mapping[str, np.ndarray]
    samples: str
    arithmetic: str
    method: str
    versions: Mapping[str, str]
    made: str

    def is_of(self, samples: Any) -> bool:
        """Says whether it is about these weights.

        Args:
            samples: params, stacked or not: names, shapes, dtypes and all numbers have to agree.

        Example:
            >>> digest({"w": np.ones(2)}) == digest({"v": np.ones(2)})
            False
        """
        return digest(samples) == self.samples


def digest(samples: Any) -> str:
    """Computes what tells weights from others: SHA-256 of names, shapes, dtypes and numbers.

        sha256( name | dtype | shape | numbers, leaf by leaf in the order of their names )

    Args:
        samples: a pytree of arrays.

    Returns:
        64 hexadecimal digits.

    Cost: one pass over the weights, on the host.

    Source: FIPS 180-4.

    Example:
        >>> digest({"w": np.ones(2)})[:8] == digest({"w": np.ones(2)})[:8]
        True
    """
    found = hashlib.sha256()
    for name, leaf in sorted(priors.named(samples).items()):
        array = np.ascontiguousarray(np.asarray(leaf))
        found.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def certificate(
    claim: str,
    found: Any,
    samples: Any,
    region: Set,
    *,
    x: Any = None,
    arithmetic: str = "",
    method: str = "",
) -> Certificate:
    """Gathers what a certificate says, to be saved.

    Args:
        claim: in words, e.g. "the class stays 3 over the set".
        found: what was proved: a `bnncert.certify.Decision`, a `Box`, or a dict of arrays.
        samples: the weights that it is about; their digest is kept.
        region: the set that it holds over.
        x: the nominal input, if there is one.
        arithmetic: that it holds in; by default what `found` says, else "real".
        method: of the bounds.

    Returns:
        A `Certificate`.

    Raises:
        TypeError, ValueError: region is no set, or an empty one.

    Cost: `digest`.

    Source: the format is this library's.

    Example:
        >>> made = certificate("y < 2", {"upper": np.ones(1)}, {"w": np.ones(2)}, Box(0.0, 1.0))
        >>> made.claim, sorted(made.arrays)
        ('y < 2', ['found.upper', 'set.lower', 'set.upper'])
    """
    check_set(region, "region")
    fields = region.__dict__ if isinstance(region, Box | LpBall) else {}
    arrays = {f"set.{name}": np.asarray(value) for name, value in fields.items()}
    if x is not None:
        arrays["x"] = np.asarray(x)
    for name, value in priors.named(_plain(found)).items():
        arrays[f"found.{name}"] = np.asarray(value)
    return Certificate(
        claim,
        arrays,
        digest(samples),
        arithmetic or getattr(found, "arithmetic", "real"),
        method,
        {name: version(name) for name in ("bnncert", "jax", "jaxlib")},
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def save(path: str | Path, made: Certificate, *, overwrite: bool = False) -> Path:
    """Writes a certificate: whole, or not at all.

    Args:
        path: of the file; ".npz" is appended where it has no ending.
        made: by `certificate`.
        overwrite: whether a file that is there is replaced.

    Returns:
        The file's path.

    Raises:
        FileExistsError: there is one, and it is not to be replaced.
        OSError: it cannot be written.

    Cost: the size of the arrays.

    Source: the format is this library's.

    Example:
        >>> made = certificate("y < 2", {"upper": np.ones(1)}, {"w": np.ones(2)}, Box(0.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(save(Path(folder) / "proof", made)).claim
        'y < 2'
    """
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".npz")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there: name another file, or say overwrite=True")
    header = {**made._asdict(), "format": _FORMAT}
    del header["arrays"]
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            arrays: dict[str, Any] = dict(made.arrays)
            np.savez(file, header=np.array(json.dumps(header)), **arrays)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return path


def load(path: str | Path) -> Certificate:
    """Reads a certificate back.

    Args:
        path: of a file that `save` wrote.

    Returns:
        The `Certificate`, with the same arrays.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, or of a later format.

    Cost: the size of the arrays.

    Source: the format is this library's.

    Example:
        >>> made = certificate("y < 2", {"upper": np.ones(1)}, {"w": np.ones(2)}, Box(0.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(save(Path(folder) / "proof.npz", made)).is_of({"w": np.ones(2)})
        True
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        form = header.pop("format")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is no certificate that bnncert saved: {error}") from None
    if form > _FORMAT:
        raise ValueError(
            f"{path} is of format {form}, and this version of bnncert reads {_FORMAT}: install a "
            f"later one (it was made by {header.get('versions', {}).get('bnncert')})"
        )
    return Certificate(arrays=arrays, **header)


def _plain(found: Any) -> Any:
    """A dict of what was found, where it is an object with fields."""
    if isinstance(found, Mapping):
        return found
    fields = found._asdict() if hasattr(found, "_asdict") else vars(found)
    return {
        name: _plain(value) if isinstance(value, Box) else np.asarray(value)
        for name, value in fields.items()
        if name != "arithmetic"
    }
