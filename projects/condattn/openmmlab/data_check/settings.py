"""Find mistakes in the settings of data sets that the toolboxes answer with a traceback, or do not notice."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...wording import listed, shown

WRAPPED = ("dataset", "datasets")
"""Keys under which a wrapper holds its data sets."""


def misshapen(dataset: Any, where: str) -> Iterator[str]:
    """Yield structural mistakes in the settings of a data set and those nested in it; ``where`` is its key."""
    if isinstance(dataset, list | tuple):
        yield f"{where} is a list; expected one data set: put several into dict(type='ConcatDataset', datasets=[...])"
    elif not isinstance(dataset, dict):
        yield f"{where}: expected the settings of a data set, dict(type=...), found {shown(dataset)}; write them"
    elif not dataset.get("type"):
        yield f"{where} has no type; name its class, such as type='CocoDataset' or type='BaseSegDataset'"
    else:
        for key in WRAPPED:
            children = dataset.get(key) if key in dataset else []
            several = isinstance(children, list | tuple)
            if key in dataset and several and not children:
                yield f"{where}.{key} is empty; name the data sets there"
            for i, child in enumerate(children if several else [children]):
                yield from misshapen(child, f"{where}.{key}" + (f"[{i}]" if several else ""))


def slips(leaf: dict[str, Any]) -> Iterator[str]:
    """Yield mistakes in the settings of a data set that reads files."""
    for key, is_valid, expected, advice in EXPECTED:
        holder, _, name = key.rpartition(".")
        settings = leaf.get(holder) if holder else leaf
        if isinstance(settings, dict) and name in settings and not is_valid(settings[name]):
            yield f"{key}: expected {expected}, found {shown(settings[name])}{advice}"
    if isinstance(leaf.get("metainfo"), dict):
        yield from _slips_in_classes(leaf["metainfo"].get("classes"))


def _is_dict_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_prefix(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(path, str | None) for path in value.values())


def _is_indices(value: Any) -> bool:
    several = isinstance(value, list | tuple | range) and all(type(i) is int for i in value)
    return several or value is None or type(value) is int


EXPECTED = (
    ("data_root", lambda v: isinstance(v or "", str), "the path of a folder", "; name the folder of the data"),
    ("ann_file", lambda v: isinstance(v or "", str), "the path of a file", "; name the annotation file"),
    ("data_prefix", _is_prefix, "dict(img='folder') or dict(img_path='folder', ...)", ""),
    ("metainfo", _is_dict_or_none, "dict(classes=('name', ...))", "; write it so"),
    ("backend_args", lambda v: isinstance(v or {}, dict), "dict(backend='local')", "; write it so"),
    ("filter_cfg", _is_dict_or_none, "dict(filter_empty_gt=..., min_size=...)", "; write it so"),
    ("filter_cfg.min_size", lambda v: type(v) in (int, float), "a number of pixels", "; write a number"),
    ("indices", _is_indices, "a whole number or a list of them", "; write it so"),
)
"""Settings of a data set: the key, whether a value is valid, what is expected, and what to do."""


def _slips_in_classes(classes: Any) -> Iterator[str]:
    if isinstance(classes, str):
        if not Path(classes).is_file():  # mmengine reads the names from a file
            yield (
                f"classes is the text {classes!r}, each letter of which would be a class; write classes = "
                f"({classes!r},)"
            )
    elif classes is not None and not (isinstance(classes, list | tuple) and all(isinstance(n, str) for n in classes)):
        yield f"classes: expected names, ('cat', 'dog'), found {shown(classes)}; write them so"
    elif classes is not None and not classes:
        yield "classes is empty; name the classes, such as classes = ('cat', 'dog')"
    elif twice := [name for name, number in Counter(classes).items() if number > 1]:
        yield f"classes has {listed(twice)} {classes.count(twice[0])} times; name each class once"
