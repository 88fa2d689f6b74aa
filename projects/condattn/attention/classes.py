"""Look up classes by their qualified names, so that recognising a class does not import its library."""

from collections.abc import Mapping
from typing import Any


def qualified_name(cls: type) -> str:
    """Return the qualified name of a class, as used in rules: the module, and the name in it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def look_up(table: Mapping[str, Any], cls: type) -> Any:
    """Return the entry of ``table`` for the class or else for its nearest base class; None if there is no entry."""
    for base in cls.__mro__:  # a plain loop, which torch.compile can trace
        if qualified_name(base) in table:
            return table[qualified_name(base)]
    return None


def check_qualified(class_name: object) -> None:
    """Raise a ``ValueError`` unless ``class_name`` is a text with the module and the name of a class."""
    if not isinstance(class_name, str) or "." not in class_name:
        raise ValueError(
            f"expected the module and name of a class as text, 'my_package.models.Attention', got {class_name!r}"
        )
