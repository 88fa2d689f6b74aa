"""Check that the files and folders that a configuration names exist, and say where to get missing ones."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..errors import UserError
from .settings import slips

SOURCES = {
    "coco": "COCO 2017: unpack train2017.zip, val2017.zip and annotations_trainval2017.zip from "
    "https://cocodataset.org/#download into data/coco/ (train2017/, val2017/, annotations/)",
    "ade": "ADE20K: unpack http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip into "
    "data/ade/ (ADEChallengeData2016/images/ and annotations/, each with training/ and validation/)",
}
"""Folder below data/ -> where the data set comes from and the layout that is expected."""


def leaves(dataset: dict) -> Iterator[dict]:
    """Yield the data sets that read files: those inside wrappers such as RepeatDataset, or ``dataset`` itself."""
    inner = [dataset[key] for key in ("dataset", "datasets") if key in dataset]
    if not inner:
        yield dataset
    for child in inner:
        for item in as_list(child):
            yield from leaves(item)


def is_local(dataset: dict) -> bool:
    """Whether a data set reads local files."""
    backend = dataset.get("backend_args")
    if isinstance(backend, dict) and backend.get("backend", "local") != "local":
        return False
    return not any("://" in path for path in (str(dataset.get("data_root") or ""), *named_paths(dataset)))


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


def check_paths(cfg: Config, loader: str, metrics: Iterable[dict]) -> None:
    """Check that the files and folders that a data loader and its metrics name exist.

    Remote data, and data sets whose class defines its own files, as the built-in ones do, are not checked.

    Args:
        cfg: The configuration.
        loader: 'train', 'val' or 'test'.
        metrics: Settings of the loader's metrics.

    Raises:
        UserError: If a file or folder is missing; the message says how to get it.
    """
    found = False
    for dataset in leaves(cfg[f"{loader}_dataloader"]["dataset"]):
        if is_local(dataset) and not any(slips(dataset)):
            for path in named_paths(dataset):
                found = True
                _check_path(path, f"{loader}_dataloader", cfg)
    for metric in metrics:
        if found and metric.get("ann_file"):
            _check_path(str(metric["ann_file"]), f"{loader}_evaluator", cfg)


def _check_path(path: str, where: str, cfg: Config) -> None:
    if "://" in path or os.path.exists(path):
        return
    folders = Path(path).parts
    source = next((text for folder, text in SOURCES.items() if folder in folders), None)
    advice = source or "put the data there, or set data_root, ann_file and data_prefix to where it is"
    raise UserError(
        f"no data at {path} ({where} of {cfg.filename}); {advice}; the configurations in configs/demo/ run "
        "without any download"
    )


def as_list(value: Any) -> list:
    """Return ``value`` as a list; empty if it is None or empty."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []
