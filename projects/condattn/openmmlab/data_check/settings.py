"""Read the settings of data sets and metrics, and find the mistakes that the toolboxes answer with a traceback."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import METRICS, Registry

from ...wording import listed, shown
from ..errors import UserError

WRAPPED = ("dataset", "datasets")
"""Keys under which a wrapper holds its data sets."""
SOURCES = {
    "data/coco": "COCO 2017: unpack train2017.zip, val2017.zip and annotations_trainval2017.zip from "
    "https://cocodataset.org/#download into data/coco/ (train2017/, val2017/, annotations/)",
    "data/ade": "ADE20K: unpack http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip into "
    "data/ade/ (ADEChallengeData2016/images/ and annotations/, each with training/ and validation/)",
}
"""Folder -> where the data set comes from and the layout that is expected."""
VARIABLE = re.compile(r"""\{\{['"]?\s*\$(\w+)\s*:\s*(\S*?)\s*['"]?\}\}""")
"""How the text of a configuration refers to an environment variable: its name, and the value if it is not set."""


def as_list(value: Any) -> list:
    """Return ``value`` as a list; empty if it is None or empty."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def leaves(dataset: dict) -> Iterator[dict]:
    """Yield the data sets that read files: those inside wrappers such as RepeatDataset, or ``dataset`` itself."""
    if not any(key in dataset for key in WRAPPED):
        yield dataset
    for key in WRAPPED:
        for child in as_list(dataset.get(key)):
            yield from leaves(child)


def is_local(dataset: dict) -> bool:
    """Whether a data set reads local files."""
    backend = dataset.get("backend_args")
    is_remote = isinstance(backend, dict) and backend.get("backend", "local") != "local"
    return not is_remote and not any("://" in path for path in (str(dataset.get("data_root")), *named_paths(dataset)))


def named_paths(dataset: dict) -> Iterator[str]:
    """Yield the paths that a data set reads, joined to its data_root as mmengine does."""
    root = str(dataset.get("data_root") or "")
    prefix = dataset.get("data_prefix")
    for path in (dataset.get("ann_file"), *(prefix.values() if isinstance(prefix, dict) else ())):
        if isinstance(path, str) and path:
            if "://" in path:
                yield path
            else:
                remote = "://" in root and not path.startswith("/")
                yield f"{root.rstrip('/')}/{path}" if remote else str(Path(root, path))


def class_of(settings: dict[str, Any], registry: Registry) -> Any:
    """The class that ``type`` of ``settings`` names, in their scope, or is; None if none is registered."""
    with registry.switch_scope_and_registry(settings.get("_scope_")) as scope:
        kind = settings.get("type")
        return scope.get(kind) if isinstance(kind, str) else kind


def metrics(cfg: Config, loader: str) -> list[dict]:
    """The settings of the metrics of ``loader``, including those in an evaluator of several data sets."""
    return list(_metrics(cfg.get(f"{loader}_evaluator"))) if loader != "train" else []


def _metrics(node: Any) -> Iterator[dict]:
    for entry in as_list(node):
        if isinstance(entry, dict):
            yield from _metrics(entry["metrics"]) if "metrics" in entry else [entry]


def reads_coco(metric: dict[str, Any]) -> bool:
    """Whether a metric is mmdet's ``CocoMetric`` or a subclass of it."""
    kind = class_of(metric, METRICS)
    return isinstance(kind, type) and any(base.__name__ == "CocoMetric" for base in kind.__mro__)


def variable_of(cfg: Config, path: str | Path) -> str:
    """The end of a message about a missing path: the environment variable by which ``cfg`` finds it; '' if none is."""
    for name, default in VARIABLE.findall(cfg.text or ""):
        folder = os.environ.get(name, default)
        if folder and Path(path).is_relative_to(folder):
            return f"; the configuration takes the folder from the environment variable {name}"
    return ""


def check_paths(cfg: Config, loader: str) -> None:
    """Check that the files and folders that a data loader and its metrics name exist.

    Remote data, and data sets whose class defines its own files, as the built-in ones do, are not checked.

    Args:
        cfg: The configuration.
        loader: 'train', 'val' or 'test'.

    Raises:
        UserError: If a file or folder is missing; the message says how to get it.
    """
    datasets = leaves(cfg[f"{loader}_dataloader"]["dataset"])
    named = [path for leaf in datasets if is_local(leaf) and not any(slips(leaf)) for path in named_paths(leaf)]
    evaluated = [str(metric["ann_file"]) for metric in metrics(cfg, loader) if named and metric.get("ann_file")]
    for kind, paths in (("dataloader", named), ("evaluator", evaluated)):
        for path in paths:
            if "://" not in path and not os.path.exists(path):
                source = next((text for folder, text in SOURCES.items() if Path(path).is_relative_to(folder)), None)
                advice = source or "put the data there, or set data_root, ann_file and data_prefix to where it is"
                if path.startswith("~"):
                    advice = "write the full path of the home folder in place of ~"
                raise UserError(
                    f"no data at {path} ({loader}_{kind} of {cfg.filename}); {advice}{variable_of(cfg, path)}; the "
                    "configurations in configs/demo/ run without any download"
                )


def misshapen(dataset: Any, where: str) -> Iterator[str]:
    """Yield structural mistakes in the settings of a data set and those nested in it; ``where`` is its key."""
    if isinstance(dataset, list | tuple):
        yield f"{where} is a list; expected one data set: put several into dict(type='ConcatDataset', datasets=[...])"
    elif not isinstance(dataset, dict):
        yield f"{where}: expected the settings of a data set, dict(type=...), found {shown(dataset)}; write them"
    elif not dataset.get("type"):
        yield f"{where} has no type; name its class, such as type='CocoDataset' or type='BaseSegDataset'"
    elif not isinstance(dataset["type"], str | type):
        yield f"{where}.type: expected the name of a class, found {shown(dataset['type'])}; name that of the data set"
    elif not isinstance(dataset.get("pipeline") or [], list | tuple):
        yield f"{where}.pipeline: expected a list of transforms, found {shown(dataset['pipeline'])}; write a list"
    elif wrong := [step for step in dataset.get("pipeline") or [] if not (isinstance(step, dict) or callable(step))]:
        yield f"{where}.pipeline: expected transforms, dict(type=...), found {shown(wrong[0])}; write it so"
    else:
        for key in (key for key in WRAPPED if key in dataset):
            children, place = dataset[key], f"{where}.{key}"
            if not isinstance(children, list | tuple):
                yield from misshapen(children, place)
            elif not children:
                yield f"{place} is empty; name the data sets there"
            else:
                for i, child in enumerate(children):
                    yield from misshapen(child, f"{place}[{i}]")


def slips(leaf: dict[str, Any]) -> Iterator[str]:
    """Yield mistakes in the settings of a data set that reads files."""
    yield from mistyped(leaf, EXPECTED)
    if isinstance(leaf.get("metainfo"), dict):
        yield from _slips_in_classes(leaf["metainfo"].get("classes"))


def mistyped(settings: dict[str, Any], table: Iterable[tuple[str, Callable[[Any], bool], str, str]]) -> Iterator[str]:
    """Yield which of ``settings`` do not have the values that ``table``, such as ``EXPECTED``, says."""
    for key, is_valid, expected, advice in table:
        *outer, name = key.split(".")
        holder: Any = settings
        for part in outer:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and name in holder and not is_valid(holder[name]):
            yield f"{key}: expected {expected}, found {shown(holder[name])}{advice}"


def is_dict_or_none(value: Any) -> bool:
    """Whether ``value`` is a dictionary or None."""
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
    ("metainfo", is_dict_or_none, "dict(classes=('name', ...))", "; write it so"),
    ("backend_args", lambda v: isinstance(v or {}, dict), "dict(backend='local')", "; write it so"),
    ("filter_cfg", is_dict_or_none, "dict(filter_empty_gt=..., min_size=...)", "; write it so"),
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
