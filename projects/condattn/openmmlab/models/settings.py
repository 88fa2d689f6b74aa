"""Find and read the conditioned parts in the settings of a model."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import ConfigDict


def class_name(settings: dict) -> str:
    """The type in ``settings``, without its scope."""
    return str(settings.get("type")).rpartition(".")[2]


def conditioned_parts(node: Any) -> Iterator[ConfigDict]:
    """Yield the settings below ``node`` that have a ``conditioning``, outer ones first."""
    if isinstance(node, dict):
        if class_name(node).startswith("Conditioned"):
            yield node
        children = node.values()
    else:
        children = node if isinstance(node, list | tuple) else ()
    for child in children:
        yield from conditioned_parts(child)


def module_settings(part: ConfigDict) -> ConfigDict:
    """The settings of the module that ``part``, settings of :func:`.factory.Conditioned`, builds and conditions."""
    inherited = {key: part[key] for key in ("data_preprocessor",) if part.get(key) is not None}
    return ConfigDict({**inherited, **part.module})
