"""Check that the data of a configuration is there before anything else happens."""

import json
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from .errors import UserError
from .processes import local_rank

SOURCES = {
    "coco": "COCO 2017: unpack train2017.zip, val2017.zip and annotations_trainval2017.zip from "
    "https://cocodataset.org/#download into data/coco/ (train2017/, val2017/, annotations/)",
    "ade": "ADE20K: unpack http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip into "
    "data/ade/ (ADEChallengeData2016/images/ and annotations/, each with training/ and validation/)",
}
"""Folder below data/ -> where the data set comes from and the layout that is expected."""


def check_data(cfg: Config, *loaders: str) -> None:
    """Check the files and folders that the data loaders ``loaders`` ('train', 'val', 'test') of ``cfg`` read.

    Checked is what the configuration names. Data sets that know their own files, as the built-in ones do, and
    remote data are left alone.

    Raises:
        UserError: If a file or folder is missing (the message says how to get it), or if a COCO annotation
            file lacks a class that the configuration names or has them in another order, which would leave images out
            or exchange labels without a word.
    """
    for loader in loaders:
        dataloader = cfg.get(f"{loader}_dataloader")
        if not dataloader:
            continue
        datasets = list(_leaves(dataloader["dataset"]))
        paths = [path for dataset in datasets for path in _paths(dataset)]
        for path in paths:
            _check_path(path, f"{loader}_dataloader", cfg)
        if local_rank(cfg.launcher) == 0:
            for dataset in datasets:
                _check_classes(dataset)
        if paths:
            for evaluator in _as_list(cfg.get(f"{loader}_evaluator")):
                if evaluator.get("ann_file"):
                    _check_path(evaluator["ann_file"], f"{loader}_evaluator", cfg)


def _leaves(dataset: dict) -> Iterator[dict]:
    """The data sets in ``dataset`` that read files, below wrappers such as RepeatDataset."""
    inner = [dataset[key] for key in ("dataset", "datasets") if key in dataset]
    if not inner:
        yield dataset
    for child in inner:
        for item in _as_list(child):
            yield from _leaves(item)


def _paths(dataset: dict) -> Iterator[str]:
    """What a data set reads, joined to its data_root as mmengine joins it."""
    if (dataset.get("backend_args") or {}).get("backend", "local") != "local":
        return
    root = dataset.get("data_root") or ""
    for path in (dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()):
        if isinstance(path, str) and path:
            yield path if "://" in path else str(Path(root, path))


def _check_path(path: str, where: str, cfg: Config) -> None:
    if "://" in path or Path(path).exists():
        return
    folders = Path(path).parts
    source = next((text for folder, text in SOURCES.items() if folder in folders), None)
    advice = source or "put the data there, or set data_root, ann_file and data_prefix to where it is"
    raise UserError(
        f"no data at {path} ({where} of {cfg.filename}); {advice}; the configurations in configs/demo/ run "
        "without any download"
    )


def _check_classes(dataset: dict) -> None:
    classes = (dataset.get("metainfo") or {}).get("classes")
    path = next(_paths(dataset), "")
    if not isinstance(classes, list | tuple) or not path.endswith(".json") or "://" in path:
        return
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict) or "categories" not in content:
        return
    names = [category["name"] for category in content["categories"]]
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise UserError(
            f"{path} has no category {', '.join(map(repr, unknown))}; its categories are "
            f"{', '.join(map(repr, names))}; name classes as there"
        )
    in_file = [name for name in names if name in classes]
    if in_file != list(classes):
        raise UserError(
            f"the classes are in another order in {path}, and labels follow the file; set classes = {in_file}"
        )


def _as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []
