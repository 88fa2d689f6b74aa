"""Look up the transforms of a pipeline, which a configuration gives as names, with or without scope, or as classes."""

from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmengine.registry import TRANSFORMS

from .orientation import LoadImageAsAnnotated
from .settings import class_of

PLAIN = (LoadImageFromFile, LoadImageAsAnnotated)
"""The image loaders that the data check supports."""


def transform_class(transform: Any) -> type | None:
    """The class of a transform of a pipeline; None if nothing is registered under its name."""
    kind = class_of(transform, TRANSFORMS) if isinstance(transform, dict) else type(transform)
    return kind if isinstance(kind, type) else None


def image_loader(pipeline: Any) -> Any:
    """The first transform of ``pipeline`` that loads images; None if it has none."""
    return next((entry for entry in pipeline or [] if _loads_images(entry)), None)


def reads_plain_images(pipeline: Any) -> bool:
    """Whether ``pipeline`` loads images as mmcv does by default: eight bits, three channels, rotated by EXIF."""
    loaders = [entry for entry in pipeline or [] if _loads_images(entry)]
    return not pipeline or (
        bool(loaders)
        and all(isinstance(entry, dict) and transform_class(entry) in PLAIN for entry in loaders)
        and set(options(loaders, "color_type")) <= {"color"}
        and set(options(loaders, "imdecode_backend")) <= {"cv2"}
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


def gives_no_annotations(pipeline: Any) -> bool:
    """Whether ``pipeline`` gives images empty annotations, as mmdet's semi-supervised training does."""
    return any(_name(entry) == "LoadEmptyAnnotations" for entry in pipeline or [])


def options(pipeline: Any, name: str) -> list[Any]:
    """Values of the option ``name`` in the transforms of ``pipeline``."""
    return [entry[name] for entry in pipeline or [] if isinstance(entry, dict) and name in entry]


def _loads_images(transform: Any) -> bool:
    name = _name(transform)
    return name.startswith("Load") and "Image" in name


def _name(transform: Any) -> str:
    kind = transform_class(transform)
    if kind is None:
        return str(transform.get("type", "")).rpartition(".")[2] if isinstance(transform, dict) else ""
    return kind.__name__
