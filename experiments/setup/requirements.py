"""What a setting has to be, written beside its field, and checked in one place.

    epochs: AtLeast1 = 25
    likelihood: Annotated[str, *one_of("likelihood", LIKELIHOODS)] = "certified"

The requirement is metadata of the field's type: the command line shows it, `check` enforces it.
Every comparison is written so that NaN fails it.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import tyro


class Requirement(NamedTuple):
    """What a value has to be, in words that follow "must be", and whether one is."""

    text: str
    holds: Callable[[Any], bool]


class OneOf(NamedTuple):
    """A name out of some, with what it names; or one that is no name of ours, but a place."""

    what: str
    names: Sequence[str]
    is_place: Callable[[str], bool] = lambda name: False


AtLeast0 = Annotated[int, Requirement("at least 0", lambda v: v >= 0)]
AtLeast1 = Annotated[int, Requirement("at least 1", lambda v: v >= 1)]
AtLeast2 = Annotated[int, Requirement("at least 2", lambda v: v >= 2)]
Positive = Annotated[float, Requirement("a finite number > 0", lambda v: 0 < v < math.inf)]
NotNegative = Annotated[float, Requirement("a finite number >= 0", lambda v: 0 <= v < math.inf)]
Share = Annotated[float, Requirement("a number in [0, 1]", lambda v: 0 <= v <= 1)]


def number(text: str) -> float:
    """A number as people write one: 0.1, 1e-3, or a fraction.

    >>> number("8/255"), number("0.5")
    (0.03137254901960784, 0.5)
    """
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(text)


def _number(words: list[str]) -> float:
    try:
        return number(words[0])
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{words[0]} is no number, and no fraction such as 8/255") from None


FRACTION = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="FLOAT|A/B",
    instance_from_str=_number,
    is_instance=lambda value: isinstance(value, int | float),
    str_from_instance=lambda value: [f"{value:g}"],
)
"""Of a number that may be written as a fraction."""

Fraction = Annotated[float, FRACTION]

PixelRadius = Annotated[
    float,
    Requirement("a radius in [0, 1], the range of a pixel (8/255, not 8)", lambda v: 0 <= v <= 1),
    FRACTION,
]
Seed = Annotated[int, Requirement("an integer in 0 .. 2**32 - 1", lambda v: 0 <= v < 2**32)]


def one_of(
    what: str,
    names: Sequence[str],
    help: str | None = None,
    *,
    place: tuple[str, Callable[[str], bool]] | None = None,
) -> tuple[Any, OneOf]:
    """The metadata of a field that is one of some names: for the help, and for `check`.

    Args:
        what: they name.
        names: that are known.
        help: of the option.
        place: what else it may be, in the words of the help, and whether a value is that.
    """
    written = "{" + ",".join(names) + "}"
    if place is None:
        return tyro.conf.arg(metavar=written, help=help), OneOf(what, names)
    words, is_place = place
    metavar = f"{written}|{words}"
    return tyro.conf.arg(metavar=metavar, help=help), OneOf(what, (*names, words), is_place)


def check(settings: Any, prefix: str = "") -> None:
    """Raise a ValueError that names an option and its value, if one is not what it has to be.

    Args:
        settings: a dataclass; the dataclasses in it are checked as well.
        prefix: of the options' names.

    >>> @dataclasses.dataclass
    ... class Settings:
    ...     batch_size: AtLeast1 = 128
    >>> check(Settings(0))
    Traceback (most recent call last):
    ValueError: --batch-size must be at least 1, got 0
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        option, value = prefix + field.name, getattr(settings, field.name)
        for told in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(told, OneOf) and not told.is_place(value):
                check_name(value, told.names, told.what)
            if isinstance(told, Requirement) and not told.holds(value):
                raise ValueError(f"{flag(option)} must be {told.text}, got {value}")
        if dataclasses.is_dataclass(value):
            check(value, f"{option}.")


def check_name(name: str, known: Sequence[str], what: str) -> None:
    """Raise a ValueError that suggests the nearest known name, if `name` is not one of them.

    >>> check_name("minst", ("digits", "mnist"), "data set")
    Traceback (most recent call last):
    ValueError: unknown data set 'minst': did you mean 'mnist'? Known: digits, mnist.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f": did you mean '{near[0]}'?" if near else "."
    raise ValueError(f"unknown {what} '{name}'{hint} Known: {', '.join(known)}.")


def flag(option: str) -> str:
    """An option as it is written on the command line.

    >>> flag("train.batch_size")
    '--train.batch-size'
    """
    return "--" + option.replace("_", "-")
