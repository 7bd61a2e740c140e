"""The command `bnncert`, also `python -m bnncert`: runs from data to report.

The commands themselves read files, print and plot. They are no part of the library: they are the
package `experiments`, which a wheel carries inside this one, and which stands beside it in a clone.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from bnncert import __version__

COMMANDS = {
    "run": "trains a posterior, certifies and attacks it, and writes a report",
    "certify": "certifies a finished run again: other bounds, radii, norms",
    "attack": "attacks a finished run again: stronger, at other radii",
    "report": "rebuilds the report of a finished run",
    "regression": "a robust regression beside a plain one",
}

_EXTRA = 'pip install "bnncert[experiments]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Hands a command line to the command it begins with; returns the exit status.

    Args:
        arguments: those after the program's name; None takes `sys.argv`.
    """
    name, *options = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("", "-h", "--help"):
        print(_overview())
        return 0 if name else 2
    if name == "--version":
        print(f"bnncert {__version__}")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command '{name}'. Known: {known}.", file=sys.stderr)
        return 2
    try:
        command = import_module(f"{_home()}.{name}{'.__main__' if name == 'report' else ''}")
    except ImportError as error:
        if error.name and error.name.split(".")[0] in ("bnncert", "experiments"):
            raise
        why = f" ({error})" if error.name else ""
        print(
            f"error: 'bnncert {name}' needs the packages of an extra{why}: {_EXTRA}",
            file=sys.stderr,
        )
        return 1
    return command.main(options)


def _home() -> str:
    """The package that holds the commands."""
    if find_spec("bnncert.experiments") is not None:
        return "bnncert.experiments"
    clone = Path(__file__).resolve().parents[1]
    if str(clone) != sys.path[0]:
        sys.path.insert(0, str(clone))  # before whatever else is called `experiments`
    return "experiments"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: bnncert COMMAND [OPTIONS]\n\n"
        "Bayesian neural networks, robust by construction, with proofs of how robust they are.\n\n"
        f"commands:\n{rows}\n\n"
        "bnncert COMMAND --help lists its options, bnncert --version says which version this is.\n"
        f"'bnncert run digits' is the one to start with. The commands need {_EXTRA}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
