"""Docstrings as the site shows them: what is laid out by columns stays so.

In the source a docstring is read in one typeface, and its mathematics stand in indented blocks of
plain text. Markdown would run them together, or take `<a, x>` for a tag. So, outside of Google's
sections (Args, Returns, ...),

    indented blocks, and lists of words in columns    become blocks of code
    `<` and a lone `*` in prose                       are escaped
    Cost, Source                                      are set in bold
    Example:                                          becomes Examples:, the name that Griffe knows
"""

import re
from textwrap import dedent
from typing import Any

import griffe

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Examples?):$")
_LABEL = re.compile(r"(Cost|Memory|Sources?|Arithmetic|Rounding)(:|\.)(?= )")
_COLUMNS = re.compile(r"[^\s|*].*\S {2,}\S")
_STARS = re.compile(r"(?P<pair>(?<![\w*])(\*\*?)\w[^*]*(?<=\w)\2(?![\w*]))|\*")
_NUMBER = re.compile(r"(\d+)\. ")
# What methods and arithmetics answer to the library, and nobody else calls.
_OBJECTS = ("bnncert.bounds.methods.", "bnncert.bounds.arithmetic.")
_INTERNAL = frozenset(
    "__post_init__ boxes relaxed_on tracking interval region errors planes allow".split()
)


class Docstrings(griffe.Extension):
    """Rewrites every docstring for Markdown, and leaves out what is internal."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that Griffe finds."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called when Griffe has found all members of a class."""
        internal = _INTERNAL if cls.path.startswith(_OBJECTS) else frozenset({"__post_init__"})
        for name in internal & cls.members.keys():
            cls.del_member(name)


def markdown(text: str) -> str:
    """The docstring in Markdown, its sections in Google's form."""
    found, section = [], False
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if not lines[0].startswith(" "):
            section = bool(_SECTION.match(lines[0]))
        if section:
            found.append(re.sub(r"^Example:$", "Examples:", block, flags=re.MULTILINE))
        else:
            found += _parts(lines)
    return "\n\n".join(found)


def _parts(lines: list[str]) -> list[str]:
    """The prose and the code of one block, in order."""
    if len(lines) > 1 and sum(bool(_COLUMNS.match(line)) for line in lines) > len(lines) / 2:
        return [_code(lines)]
    hanging = 3 if _NUMBER.match(lines[0]) else 0
    parts: list[tuple[bool, list[str]]] = []
    for line in lines:
        code = line.startswith(" " * (hanging + 4)) or (not parts and line.startswith("    "))
        if not parts or parts[-1][0] != code:
            parts.append((code, []))
        parts[-1][1].append(line)
    return [_code(some) if code else _prose(some) for code, some in parts]


def _code(lines: list[str]) -> str:
    return "```text\n" + dedent("\n".join(lines)) + "\n```"


def _prose(lines: list[str]) -> str:
    text = "\n".join(line.strip() for line in lines)
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [_escaped(piece) for piece in pieces[::2]]
    text = "".join(pieces)
    for pattern, bold in ((_NUMBER, r"**\1.** "), (_LABEL, r"**\1**\2")):
        if pattern.match(text):
            return pattern.sub(bold, text, count=1)
    return text


def _escaped(prose: str) -> str:
    """Without tags, and with no star that is not one of a pair around words."""
    prose = prose.replace("<", "&lt;")
    return _STARS.sub(lambda match: match[0] if match["pair"] else r"\*", prose)
