"""Find and read the settings of classes in a configuration, above all those of conditioned modules."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import ConfigDict

CONDITIONED = ("type", "module", "conditioning", "include", "exclude", "data_preprocessor")
"""Settings of :func:`.factory.Conditioned` that are not those of its module."""

COPIES = ("student", "teacher")
"""Names of the models that mmdet's semi-supervised ones build of their setting ``detector``."""


def class_name(settings: dict) -> str:
    """The name of the type in ``settings``, which is a string or a class, without its scope; empty if there is none."""
    kind = settings.get("type")
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")


def parts(node: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the settings in ``node`` with a type, outer ones first, and their paths, which begin with ``path``."""
    if isinstance(node, dict) and "type" in node:
        yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, child in children:
        yield from parts(child, f"{path}.{key}")


def conditioned_parts(node: Any) -> list[ConfigDict]:
    """The settings of conditioned modules in ``node``, outer ones first; methods in a ``conditioning`` are none."""
    found = [part for path, part in parts(node) if "conditioning" not in path.split(".")]
    return [part for part in found if class_name(part).startswith("Conditioned")]


def module_settings(part: dict) -> ConfigDict:
    """The settings of the module that ``part``, settings of :func:`.factory.Conditioned`, builds and conditions."""
    module, inherited = part["module"], part.get("data_preprocessor")
    module = module if isinstance(module, dict) else dict(type=module)
    own = {key: value for key, value in part.items() if key not in CONDITIONED}
    return ConfigDict({**({} if inherited is None else dict(data_preprocessor=inherited)), **module, **own})


def inner_settings(settings: dict) -> dict:
    """The settings of a model: those inside :func:`.factory.Conditioned`, or ``settings``."""
    return inner_settings(module_settings(settings)) if class_name(settings) == "Conditioned" else settings


def setting_path(settings: dict, module: str, path: str = "model") -> str:
    """The path in a configuration to the settings of ``module``, a name in the model of ``settings`` at ``path``."""
    if class_name(settings) == "Conditioned" and isinstance(settings["module"], dict):
        return setting_path(settings["module"], module, f"{path}.module")
    if not module:
        return path
    name, _, rest = module.partition(".")
    if name in COPIES and name not in settings and "detector" in settings:
        name = "detector"
    child = settings.get(name)
    return setting_path(child if isinstance(child, dict) else {}, rest, f"{path}.{name}")
