"""Rules and methods that tests register do not outlive them."""

import contextlib
from collections.abc import Iterator

from condattn.attention import rules, tokens
from condattn.methods import base


@contextlib.contextmanager
def registrations_undone() -> Iterator[None]:
    """Rules, exceptions and methods that are registered meanwhile are forgotten in the end."""
    tables = (rules._RULES, rules._EXCEPTIONS, rules._ATTENDING, tokens._RULES, base._METHODS, base._ALIASES)
    before = [table.copy() for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
