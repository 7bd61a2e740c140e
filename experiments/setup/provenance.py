"""What a run's numbers come from besides its settings: the commit, the versions, the device."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

import bnncert

CLONE = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """Entries for results.json: `versions`, `device` and `commit`."""
    return {
        "versions": {
            "bnncert": bnncert.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
        "commit": commit(CLONE),
    }


def commit(clone: Path) -> str | None:
    """The commit that is checked out, with "+changes" where files differ from it.

    Args:
        clone: a folder; where it is none of Git's the commit is None.
    """
    if not (clone / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=clone, capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changed else head
