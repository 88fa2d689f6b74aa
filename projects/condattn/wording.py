"""Helpers for the wording of messages: counted nouns, shortened lists and shortened values."""

import re
from collections.abc import Iterable
from reprlib import Repr
from typing import Any

_VALUES = Repr()
_VALUES.maxstring = _VALUES.maxlong = _VALUES.maxother = 80
_VALUES.maxlevel = 3
_PLURALS = {"category": "categories", "class": "classes", " is": " are", " has": " have", "": ""}


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return ``number`` with the words that agree with it: '1 box reaches', '2 boxes reach'.

    Without ``many``, ``one`` is a noun alone, or a noun with 'is' or 'has', and the plural is derived from it.
    """
    if number == 1:
        return f"{number} {one}"
    noun, verb = re.fullmatch("(.*?)( is| has|)", one).groups()
    return f"{number} {many or _PLURALS.get(noun, noun + 's') + _PLURALS[verb]}"


def some(names: Iterable[Any], number: int = 3) -> str:
    """Return the first of ``names`` as text, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(map(str, names[:number])) + rest


def shown(value: Any) -> str:
    """Return the ``repr`` of ``value``, shortened if it is long."""
    return _VALUES.repr(value)


def listed(names: Iterable[Any], number: int = 10) -> str:
    """Return the first of ``names`` in quotation marks as text, and how many more there are."""
    return some(map(shown, names), number)


def one_line(text: str) -> str:
    """Return ``text`` without line breaks, which file names may contain."""
    return " ".join(text.split())
