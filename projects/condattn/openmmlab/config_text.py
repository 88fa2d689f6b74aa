"""Read settings from the text of a configuration without executing it."""

import ast
from collections.abc import Iterator
from typing import Any


def settings_of(text: str, *names: str) -> dict[str, Any]:
    """Parse the settings ``names`` of a configuration, in the form in which mmengine writes it into a checkpoint.

    Args:
        text: Assignments of literals, in which ``dict(key=value)`` may stand for ``{"key": value}``.
        names: Names on the left of the assignments.

    Returns:
        One entry per single value, such as ``{"param_scheduler.0.end": 1}``; empty if the text has another form.
    """
    found = {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names:
                value = ast.literal_eval(_Dictionaries().visit(node.value))
                found.update(_flat(node.targets[0].id, value))
    except (SyntaxError, ValueError):
        return {}
    return found


class _Dictionaries(ast.NodeTransformer):
    """Replace ``dict(key=value)`` and ``dict({...})`` by dictionary literals."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if getattr(node.func, "id", None) != "dict":
            return node
        if node.args:
            return node.args[0]
        return ast.Dict([ast.Constant(word.arg) for word in node.keywords], [word.value for word in node.keywords])


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the single values nested in ``value``, each with its dotted name."""
    if isinstance(value, dict | list | tuple) and value:
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}.{key}", child)
    else:
        yield name, value
