"""Classes by their qualified names, so that a library need not be imported to be known."""

from collections.abc import Mapping
from typing import Any


def qualified_name(cls: type) -> str:
    """The name of a class as rules give it: its module and its name there."""
    return f"{cls.__module__}.{cls.__qualname__}"


def look_up(table: Mapping[str, Any], cls: type) -> Any:
    """What ``table`` has for the class or, if nothing, for the nearest of its bases; None if it knows none of them."""
    return next((table[name] for base in cls.__mro__ if (name := qualified_name(base)) in table), None)
