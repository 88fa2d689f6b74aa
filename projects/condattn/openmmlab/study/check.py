"""Checks of a study before its first run: options, data, metric, and that no image serves two purposes."""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, DefaultScope
from mmengine.utils import import_modules_from_strings

from ..data_check.check import find
from ..data_check.settings import class_of
from ..errors import UserError
from ..models.settings import class_name
from ..runner.launch import build_model, load_config
from .plan import TUNING, RunId, Study, short_hash
from .run import LOADERS, code_file, start_of, training_config

NAMES = ("img_path", "sample_id", "img_id")
"""What identifies a sample in the information that a data set has about it; the first that is there."""
PURPOSES = {"train_dataloader": "training", "val_dataloader": "tuning", "test_dataloader": "the final evaluation"}


def check_study(study: Study, code: Path, root: Path) -> str:
    """Check that the variants of a study can be built, that their metric is reported, and that their data are sound.

    Args:
        study: The study.
        code: Folder with the code whose configuration file is read.
        root: Folder of the repository that contains the study's file.

    Returns:
        What :func:`data_hash` returns.

    Raises:
        UserError: If a check fails.
    """
    configs = _configs(study, code, root)
    for variant, cfg in configs.items():
        try:
            build_model(cfg)
        except UserError as error:
            raise UserError(f"{study.path}: variant {variant}: {error}") from error
        check_metric(study, cfg)
    different = _with_different_data(configs)
    data = _hash_of_samples(study, different)
    for cfg in different:
        for entry in find(cfg, "train", "val", "test"):
            if entry.findings.errors:
                raise UserError(f"{study.path}: {entry.label}: {entry.findings.errors[0]}")
    return data


def data_hash(study: Study, code: Path, root: Path) -> str:
    """Hash of the data of a study, which does not depend on the folder.

    Its first half is of the names and sizes of the samples, and of what each serves; early results have it alone. The
    second half is of what the data set says about each sample, such as its labels, and of the content of label maps.

    Args:
        study: The study.
        code: As for :func:`check_study`.
        root: As for :func:`check_study`.

    Raises:
        UserError: If data are missing, or a sample serves two purposes.
    """
    return _hash_of_samples(study, _with_different_data(_configs(study, code, root)))


def _hash_of_samples(study: Study, configs: list[Config]) -> str:
    names, contents = [], []
    for cfg in configs:
        for purpose, samples in check_images(study, cfg).items():
            files = [Path(str(sample)) for sample in samples]
            names += sorted(f"{purpose} {one.name} {one.stat().st_size if one.is_file() else ''}" for one in files)
            contents += sorted(f"{purpose} {content}" for content in samples.values())
    return short_hash("\n".join(names).encode()) + short_hash("\n".join(contents).encode())


def _content(info: Mapping[str, Any]) -> str:
    """Hash of what a data set says about a sample, with the names in place of the paths of files."""
    found = hashlib.sha256()
    for key, value in sorted(info.items()):
        found.update(key.encode())
        if isinstance(value, np.ndarray):
            found.update(np.ascontiguousarray(value).tobytes())
        elif not key.endswith("path"):
            found.update(repr(value).encode())
        elif value is not None:
            path = Path(value)
            found.update(path.name.encode())
            if key == "seg_map_path" and path.is_file():
                found.update(path.read_bytes())
    return found.hexdigest()


def _configs(study: Study, code: Path, root: Path) -> dict[str, Config]:
    """Variant -> the configuration of a training; enters the default scope and imports what the configuration names."""
    load_config(str(code_file(study, code, root)))
    runs = [RunId(TUNING, variant, 0, study.grid[0]) for variant in study.variants]
    configs = {run.variant: training_config(study, run, code, root) for run in runs}
    for cfg in configs.values():
        import_modules_from_strings(**cfg.get("custom_imports", {"imports": []}))
    return configs


def _with_different_data(configs: dict[str, Config]) -> list[Config]:
    """The configurations of a study's trainings, one for each different setting of the data."""
    return list({str([cfg[name] for name in LOADERS]): cfg for cfg in configs.values()}.values())


def check_checkpoints(study: Study, seeds: Iterable[int], root: Path) -> None:
    """Check that the checkpoints which the trainings with these seeds start from are there.

    Raises:
        UserError: If one is not; the message names the command that makes it.
    """
    missing = [seed for seed in seeds if study.start and not start_of(study, seed, root).is_file()]
    if missing:
        others = f" ({len(missing)} seeds have none)" if missing[1:] else ""
        command = study.start["command"].format(seed=missing[0])
        raise UserError(
            f"{study.path}: no checkpoint {start_of(study, missing[0], root)} to start from{others}; make each, this "
            f"one by: {command}"
        )


def check_metric(study: Study, cfg: Config) -> None:
    """Check that the evaluators report the study's metric, on the tuning data and in the final evaluation."""
    for evaluators in (cfg.val_evaluator, cfg.test_evaluator):
        names = [metric_names(one) for one in (evaluators if isinstance(evaluators, list) else [evaluators])]
        known = list(chain(*names))
        if all(names) and study.metric not in known:  # the names of some are not known here
            raise UserError(f"{study.path}: no metric {study.metric!r}; the evaluators report {', '.join(known)}")


def metric_names(evaluator: dict[str, Any]) -> list[str]:
    """Names of the metrics that an evaluator reports; empty if neither they nor its type are known here.

    The type may name them in its attribute ``metric_names``, without the prefix.
    """
    kind = class_name(evaluator)
    if kind == "CocoMetric":
        metrics = evaluator.get("metric", "bbox")
        metrics = [metrics] if isinstance(metrics, str) else metrics
        return [f"coco/{metric}_mAP{end}" for metric in metrics for end in ("", "_50", "_75", "_s", "_m", "_l")]
    if kind == "IoUMetric":
        return ["mIoU", "mAcc", "aAcc"]
    if kind == "Accuracy":
        topk = evaluator.get("topk", (1,))
        return [f"accuracy/top{k}" for k in (topk if isinstance(topk, Iterable) else [topk])]
    metric = class_of(evaluator, METRICS)
    prefix = evaluator.get("prefix") or getattr(metric, "default_prefix", None)
    return [f"{prefix}/{name}" if prefix else name for name in getattr(metric, "metric_names", ())]


def check_images(study: Study, cfg: Config) -> dict[str, dict[str | int, str]]:
    """Check that the annotations exist, and that training, tuning and final evaluation share no image.

    Returns:
        Purpose -> its samples: their paths or names, each with a hash of its labels.
    """
    images: dict[str, dict[str | int, str]] = {}
    for loader, purpose in PURPOSES.items():
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            try:
                dataset = DATASETS.build(cfg[loader].dataset)
            except (OSError, ValueError, LookupError) as error:  # LookupError: fewer than the ``indices`` ask for
                source = f"; {study.data['source']}" if study.data else ""
                reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
                raise UserError(f"{study.path}: no data for {purpose}, or too few: {reason}{source}") from error
        infos = (dataset.get_data_info(i) for i in range(len(dataset)))
        images[purpose] = {next(info[key] for key in NAMES if key in info): _content(info) for info in infos}
        if not images[purpose]:
            raise UserError(f"{study.path}: no image for {purpose}")
    for one, other in combinations(images, 2):
        if common := images[one].keys() & images[other].keys():
            raise UserError(
                f"{study.path}: {len(common)} images serve {one} and {other}, such as {min(common)}; give each its own"
            )
    return images
