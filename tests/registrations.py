"""Clean-up of the rules and methods that tests register."""

import contextlib
from collections.abc import Iterator

from condattn.attention import rules, tokens
from condattn.methods import base


@contextlib.contextmanager
def registrations_undone() -> Iterator[None]:
    """Remove rules, exceptions and methods that are registered inside this context, when it ends."""
    tables = (rules._RULES, rules._EXCEPTIONS, rules._ATTENDING, tokens._RULES, base._METHODS, base._ALIASES)
    before = [table.copy() for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
