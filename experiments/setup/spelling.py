"""Bound methods as they are written on a command line: a name, or a name with options.

    crown
    crown(lower_slope=zero)
    alpha-crown(steps=100)

The options are those of the method's object: `bnncert.CROWN`, `bnncert.AlphaCROWN`.
"""

import re
from dataclasses import fields
from typing import Any

from bnncert.bounds.methods import METHODS, Method


def method_of(text: str) -> Method:
    """The method that a text stands for.

    Raises:
        ValueError: an unknown method, or an option or value that it does not have.

    Example:
        >>> method_of("alpha-crown(steps=100)")
        AlphaCROWN(steps=100, lower_slope='adaptive')
    """
    found = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    if found is None or found[1] not in METHODS:
        raise ValueError(f"invalid choice: {text!r} (choose from {', '.join(METHODS)})")
    kind = METHODS[found[1]]
    options = {field.name: field.type for field in fields(kind)}
    given: dict[str, Any] = {}
    for part in filter(None, map(str.strip, (found[2] or "").split(","))):
        name, equal, value = (piece.strip() for piece in part.partition("="))
        if name not in options or not equal:
            ways = ", ".join(f"{o}=" for o in options) or "none"
            raise ValueError(f"invalid choice: {text!r} ({found[1]} has the options: {ways})")
        given[name] = _value(value)
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"invalid choice: {text!r} ({error})") from error


def slug(text: str) -> str:
    """The text in a file's name.

    Example:
        >>> slug("alpha-crown(steps=100)")
        'alpha-crown-steps=100'
    """
    return re.sub(r"[^\w.=-]+", "-", text).strip("-")


def _value(text: str) -> Any:
    """A number, a truth value, or the text itself."""
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return int(text)
    except ValueError:
        return text
