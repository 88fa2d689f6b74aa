"""Find and read the settings of classes in a configuration, above all those of conditioned modules."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import ConfigDict


def class_name(settings: dict) -> str:
    """The type in ``settings``, without its scope."""
    return str(settings.get("type")).rpartition(".")[2]


def parts(node: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the settings in ``node`` with a type, outer ones first, and their paths, which begin with ``path``."""
    if isinstance(node, dict) and "type" in node:
        yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, child in children:
        yield from parts(child, f"{path}.{key}")


def conditioned_parts(node: Any) -> list[ConfigDict]:
    """The settings in ``node`` that have a ``conditioning``, outer ones first."""
    return [part for _, part in parts(node) if class_name(part).startswith("Conditioned")]


def module_settings(part: ConfigDict) -> ConfigDict:
    """The settings of the module that ``part``, settings of :func:`.factory.Conditioned`, builds and conditions."""
    inherited = {key: part[key] for key in ("data_preprocessor",) if part.get(key) is not None}
    return ConfigDict({**inherited, **part.module})
