"""Parse conditionings: names, texts such as 'sc(strength=3.0)+pc', and the long form of a config."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Method, known_methods, method_class

DEFAULT = "pc"
"""The conditioning that is used if none is given."""

Conditioning = str | Method | Mapping[str, Any] | Sequence[Any] | None


def parse(conditioning: Conditioning) -> list[Method]:
    """Build the methods that a ``conditioning`` setting names.

    Args:
        conditioning: ``'none'`` or None; an alias (``'pc'``, ``'sc'``), perhaps with settings
            (``'sc(strength=3.0, relative=True)'``), or several joined by ``+``; the long form
            ``dict(type='SpectralCorrection', strength=1.0)``; a :class:`Method`; or a list of these.

    Returns:
        The methods in the order given; empty for ``'none'``.

    Raises:
        ValueError: For an unknown name, an invalid setting, or the same method twice.
    """
    methods = _build(conditioning)
    names = [type(method).__name__ for method in methods]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"conditioning names {', '.join(sorted(repeated))} more than once; give each method once")
    return methods


def _build(conditioning: Conditioning) -> list[Method]:
    if conditioning is None or conditioning == "none":
        return []
    if isinstance(conditioning, Method):
        return [conditioning]
    if isinstance(conditioning, str):
        return [_instance(name, settings) for name, settings in _read(conditioning)]
    if isinstance(conditioning, Mapping):
        settings = dict(conditioning)
        return [_instance(settings.pop("type", None), settings)]
    if isinstance(conditioning, Sequence):
        return [method for item in conditioning for method in _build(item)]
    raise ValueError(
        f"conditioning is {conditioning!r}; expected a name, a dict(type=...), or a list of these. {known_methods()}"
    )


def split_names(text: str) -> list[str]:
    """Split a list such as 'none,sc(strength=3.0,relative=True)' at its commas, but not at those of settings."""
    names, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names]


def _read(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and settings in a text such as 'sc(strength=3.0, relative=True)+pc'."""
    try:
        node, terms = ast.parse(text.strip(), mode="eval").body, list[ast.expr]()
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            terms.insert(0, node.right)
            node = node.left
        return [_read_term(term) for term in [node, *terms]]
    except (SyntaxError, ValueError) as error:
        message = (
            f"cannot read the conditioning {text!r}; expected a text such as 'sc(strength=3.0)+pc'. {known_methods()}"
        )
        raise ValueError(message) from error


def _read_term(node: ast.expr) -> tuple[str, dict[str, Any]]:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    settings = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    if not isinstance(call.func, ast.Name) or call.args or len(settings) < len(call.keywords):
        raise ValueError("expected a name, or a name with settings")
    return call.func.id, {name: _read_value(value) for name, value in settings.items()}


def _read_value(node: ast.expr) -> Any:
    """Return a literal; ``dict(q=1.0)`` counts as one."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "dict"):
        return ast.literal_eval(node)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("expected dict(name=value)")
    return {keyword.arg: _read_value(keyword.value) for keyword in node.keywords}


def _instance(name: Any, settings: dict[str, Any]) -> Method:
    """Build the method called ``name``; an alias implies its own default settings."""
    cls = method_class(name)
    try:
        return cls(**({**cls.alias_settings, **settings} if name == cls.alias else settings))
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(cls))
        raise ValueError(f"{cls.__name__}: {error}; its settings are {fields}") from None
