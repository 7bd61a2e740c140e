"""The command lines: every option is a field of a frozen dataclass, whose docstring is its help.

A mistake exits with status 2 and says what is wrong; what fails later, with 1; Ctrl-C, with 130.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from .logs import lines_in_files
from .methods import about
from .requirements import check, check_name

Settings = TypeVar("Settings")

RESUME = "add --resume to the same command to go on from the last checkpoint"
"""What is said of a run that was stopped."""


def program(name: str) -> str:
    """What is typed to start a command: as this process was started, wherever that can be told.

    Args:
        name: of the command, such as "run".

    >>> program("run")
    'python -m experiments.run'
    """
    started = Path(sys.argv[0])
    if started.stem.lower() == "bnncert":  # the console script
        return f"bnncert {name}"
    if started.parts[-2:] == ("bnncert", "__main__.py"):
        return f"python -m bnncert {name}"
    package = __name__.removesuffix(".setup.command")
    return f"python -m {package}.{name}"


def read(
    kind: type[Settings],
    typed: str,
    arguments: Sequence[str] | None,
    *,
    default: Settings | None = None,
    validate: Callable[[Settings], None] = check,
    description: str | None = None,
) -> Settings:
    """Settings from a command line, checked.

    Args:
        kind: a dataclass.
        typed: what is typed before the arguments (`program`).
        arguments: those after the program's name; None takes `sys.argv`.
        default: where it starts from.
        validate: raises a ValueError that says what is wrong.
        description: heads the help; the dataclass's docstring by default.
    """
    start: dict[str, Any] = {} if default is None else {"default": default}
    settings = tyro.cli(kind, prog=typed, args=arguments, description=description, **start)
    try:
        validate(settings)
    except ValueError as error:
        refuse(str(error))
    return settings


def first(
    arguments: Sequence[str] | None, known: Sequence[str], what: str, overview: Callable[[], str]
) -> tuple[str, list[str]]:
    """The name that has to come first on a command line, and the options after it.

    Without a name, or with `--help` in its place, an overview is printed.

    Args:
        arguments: those after the program's name; None takes `sys.argv`.
        known: the names.
        what: they are names of, such as "preset".
        overview: its text.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if arguments else 2)
    name, *options = arguments
    if name.startswith("-"):
        refuse(f"the {what} comes first, got '{name}'. {what.capitalize()}s: {', '.join(known)}.")
    _refuse_unknown(name, known, what)
    return name, options


def inference(options: Sequence[str], known: Sequence[str]) -> tuple[str | None, list[str]]:
    """The method that `--inference NAME` asks for, and the other options, which depend on it.

    Args:
        options: of the command line.
        known: the methods there are.

    >>> inference(["--inference", "ensemble", "--inference.members", "3"], ["map", "ensemble"])
    ('ensemble', ['--inference.members', '3'])
    """
    named, rest, left = None, [], iter(options)
    for option in left:
        head, equals, value = option.partition("=")
        if head != "--inference":
            rest.append(option)
            continue
        named = value if equals else next(left, "")
        _refuse_unknown(named, known, "inference method")
    return named, rest


def rows(described: Mapping[str, str]) -> str:
    """Names and what they are, as lines of an overview."""
    width = max(map(len, described))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in described.items())


def methods(known: Sequence[str]) -> str:
    """The inference methods as lines of an overview."""
    return rows({name: about(name) for name in known})


def description(kind: type[Any], method: str, known: Sequence[str]) -> str:
    """What the help begins with, where a method's options are among those that follow.

    Args:
        kind: the dataclass of the settings.
        method: whose options follow.
        known: the methods there are.
    """
    return (
        f"{kind.__doc__}\n\nAll is written to one new folder (--out), whose report.html is the "
        "place to begin. A run that was stopped goes on with --resume.\n\n"
        "--inference NAME chooses the inference method, one of "
        f"{', '.join(known)}. Below are the options of {method}; add --inference NAME to see "
        "those of another."
    )


def attempt(work: Callable[[], None], errors: tuple[type[BaseException], ...], again: str) -> int:
    """The exit status of some work: a failure that is expected is printed, and no more.

    Args:
        work: to be done.
        errors: that it may raise.
        again: how to go on after Ctrl-C.
    """
    try:
        with lines_in_files():
            work()
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; {again}", file=sys.stderr)
        return 130
    return 0


def refuse(message: str) -> NoReturn:
    """Exits with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _refuse_unknown(name: str, known: Sequence[str], what: str) -> None:
    try:
        check_name(name, known, what)
    except ValueError as error:
        refuse(str(error))
