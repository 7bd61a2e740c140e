"""Everything that reads files, saves, prints, plots or parses arguments: commands over four wings.

    run  certify  attack  report  regression      the commands: python -m experiments.NAME, or
                                                  bnncert NAME (a wheel has them in bnncert)
    setup     what a run is                       pipeline  what it does
    report    what is shown of it                 tasks     images, regressions: what is learned

Imports go from a wing to those before it. `studies` and `benchmarks` stand on all of them.
"""

import sys
from importlib.util import find_spec

NEEDED = {
    "flax": "flax",
    "matplotlib": "matplotlib",
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "tyro": "tyro",
}
"""Modules that every command imports, and the packages of the extra `experiments` they are in."""

_missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
if _missing:
    _message = (
        f"experiments need packages that are not installed ({', '.join(_missing)}): in a clone of "
        'bnncert, run   pip install -e ".[experiments]"'
    )
    # While Python looks for the module that -m names, sys.argv[0] is "-m".
    if sys.argv[:1] == ["-m"]:
        raise SystemExit(f"error: {_message}")
    raise ImportError(_message)
