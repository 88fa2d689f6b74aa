"""Classes by their qualified names, so that a library need not be imported to be known."""

from collections.abc import Mapping
from typing import Any


def qualified_name(cls: type) -> str:
    """The name of a class as rules give it: its module and its name there."""
    return f"{cls.__module__}.{cls.__qualname__}"


def look_up(table: Mapping[str, Any], cls: type) -> Any:
    """What ``table`` has for the class or, if nothing, for the nearest of its bases; None if it knows none of them."""
    for base in cls.__mro__:  # as torch.compile can trace
        if qualified_name(base) in table:
            return table[qualified_name(base)]
    return None
