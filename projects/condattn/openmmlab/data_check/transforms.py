"""Look up the classes of transforms, which a configuration gives as a name, with or without scope, or as a class."""

from collections.abc import Iterator
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmengine.registry import TRANSFORMS

from .orientation import LoadImageAsAnnotated

PLAIN = (LoadImageFromFile, LoadImageAsAnnotated)
"""The image loaders that the data check supports."""


def transform_class(transform: Any) -> type | None:
    """The class of a transform of a pipeline; None if nothing is registered under its name."""
    kind = transform.get("type") if isinstance(transform, dict) else type(transform)
    if not isinstance(kind, str):
        return kind if isinstance(kind, type) else None
    with TRANSFORMS.switch_scope_and_registry(transform.get("_scope_")) as registry:
        found = registry.get(kind)
    return found if isinstance(found, type) else None


def image_loader(pipeline: Any) -> Any:
    """The first transform of ``pipeline`` that loads images; None if it has none."""
    return next((entry for entry in pipeline or [] if _loads_images(entry)), None)


def reads_plain_images(pipeline: Any) -> bool:
    """Whether ``pipeline`` loads images as mmcv does by default: eight bits, three channels, rotated by EXIF."""
    loaders = [entry for entry in pipeline or [] if _loads_images(entry)]
    return not pipeline or (
        bool(loaders)
        and all(isinstance(entry, dict) and transform_class(entry) in PLAIN for entry in loaders)
        and all(entry.get("color_type", "color") == "color" for entry in loaders)
        and all(entry.get("imdecode_backend", "cv2") == "cv2" for entry in loaders)
    )


def reads_plain_annotations(pipeline: Any, own: type, backend: str) -> bool:
    """Whether ``pipeline`` loads annotations only by ``own``, the toolbox's class, with its default ``backend``."""
    loaders = [entry for entry in pipeline or [] if _name(entry).startswith("Load") and not _loads_images(entry)]
    return all(
        isinstance(entry, dict) and transform_class(entry) is own and entry.get("imdecode_backend", backend) == backend
        for entry in loaders
    )


def loads_annotations(pipeline: Any) -> bool:
    """Whether a transform of ``pipeline`` loads annotations."""
    return any("LoadAnnotations" in _name(entry) for entry in pipeline or [])


def options(pipelines: list[Any], name: str) -> Iterator[Any]:
    """Values of the option ``name`` in the transforms of ``pipelines``."""
    for pipeline in pipelines:
        for entry in pipeline or []:
            if isinstance(entry, dict) and name in entry:
                yield entry[name]


def _loads_images(transform: Any) -> bool:
    name = _name(transform)
    return name.startswith("Load") and "Image" in name


def _name(transform: Any) -> str:
    kind = transform_class(transform)
    if kind is None:
        return str(transform.get("type", "")).rpartition(".")[2] if isinstance(transform, dict) else ""
    return kind.__name__
