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
    if not isinstance(leaf.get("data_root") or "", str):
        yield f"data_root: expected the path of a folder, found {shown(leaf['data_root'])}; name the folder of the data"
    if not isinstance(leaf.get("ann_file") or "", str):
        yield f"ann_file: expected the path of a file, found {shown(leaf['ann_file'])}; name the annotation file"
    if "data_prefix" in leaf:
        prefix = leaf["data_prefix"]
        if not isinstance(prefix, dict) or not all(isinstance(path, str | None) for path in prefix.values()):
            yield f"data_prefix: expected dict(img='folder') or dict(img_path='folder', ...), found {shown(prefix)}"
    metainfo = leaf.get("metainfo")
    if metainfo is not None and not isinstance(metainfo, dict):
        yield f"metainfo: expected dict(classes=('name', ...)), found {shown(metainfo)}; write it so"
    else:
        yield from _slips_in_classes((metainfo or {}).get("classes"))
    if not isinstance(leaf.get("backend_args") or {}, dict):
        yield f"backend_args: expected dict(backend='local'), found {shown(leaf['backend_args'])}; write it so"
    filters = leaf.get("filter_cfg")
    if filters is not None and not isinstance(filters, dict):
        yield f"filter_cfg: expected dict(filter_empty_gt=..., min_size=...), found {shown(filters)}; write it so"
    elif filters and type(filters.get("min_size", 0)) not in (int, float):
        yield f"filter_cfg.min_size: expected a number of pixels, found {shown(filters['min_size'])}; write a number"
    indices = leaf.get("indices")
    is_integer_list = isinstance(indices, list | tuple | range) and all(type(i) is int for i in indices)
    if indices is not None and type(indices) is not int and not is_integer_list:
        yield f"indices: expected a whole number or a list of them, found {shown(indices)}; write it so"


def _slips_in_classes(classes: Any) -> Iterator[str]:
    if classes is None:
        return
    if isinstance(classes, str):
        if not Path(classes).is_file():  # mmengine reads the names from a file
            yield (
                f"classes is the text {classes!r}, each letter of which would be a class; write classes = "
                f"({classes!r},)"
            )
    elif not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        yield f"classes: expected names, ('cat', 'dog'), found {shown(classes)}; write them so"
    elif not classes:
        yield "classes is empty; name the classes, such as classes = ('cat', 'dog')"
    elif twice := [name for name, number in Counter(classes).items() if number > 1]:
        number = Counter(classes)[twice[0]]
        yield f"classes has {listed(twice)} {number} times; name each class once"
