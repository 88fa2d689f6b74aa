"""Check the data of each loader of a configuration, report what is used, and adapt the configuration if needed."""

import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from inspect import signature
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from ...wording import counted, one_line
from ..errors import UserError
from ..processes import local_rank
from . import transforms
from .coco import CocoUse, check_coco
from .findings import Findings, remember
from .heads import check_heads
from .label_maps import MapUse, check_label_maps
from .sampling import choose
from .settings import (
    as_list,
    check_paths,
    class_of,
    is_local,
    leaves,
    metrics,
    misshapen,
    named_paths,
    reads_coco,
    slips,
    variable_of,
)

AS_ANNOTATED = "condattn.openmmlab.data_check.orientation.LoadImageAsAnnotated"
LOADED = ("mmpretrain", "mmengine")
"""Scopes of data sets that are loaded to see whether they can be, because nothing else is known of them."""
KINDS = (
    ("coco", "mmdet.datasets", "CocoDataset", ("load_data_list", "parse_data_info", "filter_data")),
    ("maps", "mmseg.datasets", "BaseSegDataset", ("load_data_list",)),
)
"""Kind of a data set, module and name of its class, and the methods by which it reads its files."""
PATIENCE = 60
"""Seconds for which the other processes wait for the first one to report the errors and end the run."""


@dataclass
class Checked:
    """The check of one data set, or of the annotation file of one metric.

    Attributes:
        label: Name of the loader, with a number if it has several data sets.
        loader: 'train', 'val' or 'test'.
        settings: The settings of the data set or metric: the dictionary in the configuration itself, not a copy.
        findings: The findings of the check.
    """

    label: str
    loader: str
    settings: dict[str, Any]
    findings: Findings


def check_data(cfg: Config, *loaders: str, read_all: bool = False) -> None:
    """Check the data of ``loaders``, print what is used and what is left out, and adapt ``cfg`` in place.

    Two settings are adapted, and both changes are printed: an annotation file is replaced by its repaired copy, and
    images are loaded without the rotation in their header if their annotations do not have it. In a distributed run
    only the first process of each machine prints; if there are errors, the others wait until it has ended the run.

    Args:
        cfg: The configuration; its default scope must have been entered.
        loaders: Any of 'train', 'val' and 'test'.
        read_all: Read every image and label map instead of a sample of some thousands.

    Raises:
        UserError: If the data cannot be used. With several errors, the last one is raised after the others are printed.
    """
    is_secondary = bool(cfg.get("launcher")) and local_rank(cfg.launcher) > 0
    try:
        checked = find(cfg, *loaders, read_all=read_all)
        if not is_secondary:
            report(checked)
        elif any(entry.findings.errors for entry in checked):
            _wait_for_the_end()
    except UserError:
        if is_secondary:
            _wait_for_the_end()
        raise
    for entry in checked:
        adapt(cfg, entry)


def _wait_for_the_end() -> None:
    """Wait until the launcher ends this process, after the first one has reported the errors and exited."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(0.1)
    raise SystemExit(2)


def find(cfg: Config, *loaders: str, read_all: bool = False) -> list[Checked]:
    """Check the data of ``loaders`` without printing or changing anything.

    Raises:
        UserError: If a file or folder is missing, or the settings of a loader have no valid data set.
    """
    there = [loader for loader in loaders if cfg.get(f"{loader}_dataloader")]
    for loader in there:
        settings = cfg[f"{loader}_dataloader"]
        dataset = settings.get("dataset") if isinstance(settings, dict) else None
        for problem in misshapen(dataset, f"{loader}_dataloader.dataset"):
            raise UserError(problem)
        check_paths(cfg, loader)
    checked, heads = [], set()
    for loader in there:
        entries = [
            Checked(loader, loader, leaf, _check(cfg, loader, leaf, read_all, heads))
            for leaf in leaves(cfg[f"{loader}_dataloader"]["dataset"])
        ]
        for i, entry in enumerate(entries if len(entries) > 1 else (), 1):
            entry.label = f"{loader} ({i} of {len(entries)})"
        _check_barren(entries)
        _warn_of_training_data(cfg, loader, entries)
        checked += entries + list(_check_metrics(cfg, loader, entries))
    for entry in checked:
        entry.findings.summary = one_line(entry.findings.summary)
        entry.findings.warnings[:] = map(one_line, entry.findings.warnings)
        entry.findings.errors[:] = map(one_line, entry.findings.errors)
    return checked


def _check_barren(entries: list[Checked]) -> None:
    """Report the ``barren`` findings of a loader as errors if all data sets have one and together show < 2 classes.

    Data sets whose pipeline gives images empty annotations do not count.
    """
    entries = [each for each in entries if not transforms.gives_no_annotations(each.settings.get("pipeline"))]
    shown = {each.name for entry in entries for each in entry.findings.classes if each.count}
    if all(entry.findings.barren for entry in entries) and len(shown) < 2:
        for entry in entries:
            entry.findings.errors.append(entry.findings.barren)


def _warn_of_training_data(cfg: Config, loader: str, entries: list[Checked]) -> None:
    """Warn if the files of an evaluation are those of the training."""
    trained = cfg.get("train_dataloader") if loader != "train" else None
    trained = trained.get("dataset") if isinstance(trained, dict) else None
    known = [] if any(misshapen(trained, "")) else [_files(leaf) for leaf in leaves(trained)]
    for entry in entries:
        if (files := _files(entry.settings)) and files in known:
            entry.findings.warnings.append(
                "these are the training data; the evaluation says nothing about other images: give it data of its own"
            )


def _files(leaf: dict[str, Any]) -> tuple | None:
    """What a data set reads: its paths and the part of them; None if its class defines its own files."""
    paths = tuple(str(Path(path).resolve()) for path in named_paths(leaf))
    return (*paths, str(leaf.get("indices"))) if paths else None


def report(checked: list[Checked]) -> None:
    """Print the findings: a line for each data set on standard output, warnings and errors on standard error.

    Raises:
        UserError: If there are errors: the last one; the others are printed.
    """
    for entry in checked:
        if entry.findings.summary:
            print(f"{entry.label}: {entry.findings.summary}")
        for warning in entry.findings.warnings:
            print(f"warning: {entry.label}: {warning}", file=sys.stderr)
    places: dict[str, list[str]] = {}
    for entry in checked:
        for error in entry.findings.errors:
            places.setdefault(error, []).append(entry.label)
    errors = [f"{', '.join(labels)}: {error}" for error, labels in places.items()]
    for error in errors[:-1]:
        print("error:", error, file=sys.stderr)
    if errors:
        raise UserError(errors[-1])


def _check(cfg: Config, loader: str, leaf: dict[str, Any], read_all: bool, heads: set[str]) -> Findings:
    """Check one data set; ``heads`` collects the messages about the model's heads, so that each is reported once."""
    name = leaf["type"] if isinstance(leaf["type"], str) else leaf["type"].__name__
    if class_of(leaf, DATASETS) is None:
        return Findings(errors=[f"no data set {name} is registered; import its module with custom_imports"])
    kind = _kind(leaf)
    if kind is None and is_local(leaf) and cfg.get("default_scope") in LOADED:
        return _load(cfg, leaf, name)
    if not is_local(leaf):
        return Findings(summary=f"{name}, not checked, because its files are in a remote storage")
    if kind is None:
        return Findings(summary=f"{name}, not checked, because it reads its files by methods of its own")
    if problems := list(slips(leaf)):
        return Findings(errors=problems)
    if _writes_itself(leaf) and not any(named_paths(leaf)) and not _data_root(leaf).is_dir():
        return Findings(summary=f"{name}, which writes its data to {_data_root(leaf)} when the run begins")
    try:
        dataset = build_dataset(leaf, pipeline=[], lazy_init=True)
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, OSError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        text = f"the data set {name} cannot be built: {reason}; correct its settings, or the files that it reads"
        return Findings(errors=[text])
    classes = dataset.metainfo.get("classes") or ()
    classes = [classes] if isinstance(classes, str) else list(classes)
    wrong, doubtful = ([text for text in texts if text not in heads] for texts in check_heads(cfg, classes))
    heads.update(wrong, doubtful)
    if wrong:
        return Findings(errors=wrong, warnings=doubtful)
    evaluators = metrics(cfg, loader)
    evaluated = loader == "train" or not evaluators or any(not entry.get("format_only") for entry in evaluators)
    check = _check_coco if kind == "coco" else _check_maps
    try:
        findings = check(dataset, leaf, cfg, loader, evaluated, read_all)
    except UserError as error:
        findings = Findings(errors=[str(error)])
    findings.warnings = doubtful + findings.warnings
    return findings


def build_dataset(leaf: dict[str, Any], **arguments: Any) -> Any:
    """Build a data set with those of ``arguments`` that its class accepts, whose own settings they replace.

    A class that does not accept ``lazy_init`` reads its files.
    """
    try:
        with redirect_stdout(StringIO()):  # pycocotools prints its progress
            return DATASETS.build({**leaf, **arguments})
    except TypeError as error:
        accepted = {name: value for name, value in arguments.items() if f"'{name}'" not in str(error)}
        if accepted == arguments:
            raise
    return build_dataset(leaf, **accepted)


def _load(cfg: Config, leaf: dict[str, Any], name: str) -> Findings:
    """Load a data set without its transforms, and report how many samples it has.

    Raises:
        UserError: As the class of the data set does, whose message says all but where ``cfg`` has the folder from.
    """
    try:
        samples = len(DATASETS.build({**leaf, "pipeline": []} if "pipeline" in leaf else leaf))
    except Exception as error:  # whatever the class raises of its settings and files
        is_missing = isinstance(error, OSError)
        variable = variable_of(cfg, _data_root(leaf)) if is_missing else ""
        if isinstance(error, UserError):
            raise UserError(f"{error}{variable}") from error
        reason = str(error) or type(error).__name__
        advice = "put the data there, or set data_root to where it is" if is_missing else "correct it"
        return Findings(errors=[f"the data set {name} cannot be loaded: {reason}; {advice}{variable}"])
    return Findings(summary=f"{name}, {counted(samples, 'sample', 'samples')}")


def _check_coco(dataset: Any, leaf: dict, cfg: Config, loader: str, evaluated: bool, read_all: bool) -> Findings:
    if not dataset.ann_file:
        raise UserError("the data set has no ann_file; name its annotation file in COCO's format")
    if Path(dataset.ann_file).is_dir():
        raise UserError(f"ann_file {dataset.ann_file} is a folder; name the annotation file in it")
    from mmdet.datasets.transforms import LoadAnnotations

    pipeline = leaf.get("pipeline")
    is_plain = transforms.reads_plain_annotations(pipeline, LoadAnnotations, "cv2")
    loads_masks = is_plain and any(transforms.options(pipeline, "with_mask"))
    use = CocoUse(
        ann_file=dataset.ann_file,
        folder=dataset.data_prefix.get("img") or "",
        classes=list(dataset.metainfo["classes"]),
        with_masks=loads_masks if loader == "train" else any(map(_evaluates_masks, metrics(cfg, loader))),
        training=not dataset.test_mode,
        needs_objects=evaluated and not (loader == "train" and transforms.gives_no_annotations(pipeline)),
        filter_cfg=dataset.filter_cfg,
        indices=dataset._indices,
        read_all=read_all,
        plain_images=transforms.reads_plain_images(pipeline),
        replaceable=_names_its_file(leaf, dataset),
    )
    return remember(check_coco, use)


def _names_its_file(leaf: dict[str, Any], dataset: Any) -> bool:
    """Whether ``ann_file`` of the settings ``leaf`` is the file that ``dataset``, built of them, reads."""
    return Path(dataset.data_root or "", leaf.get("ann_file") or "") == Path(dataset.ann_file)


def _evaluates_masks(metric: dict[str, Any]) -> bool:
    return "segm" in as_list(metric.get("metric", "bbox")) and not metric.get("format_only")


def _check_metrics(cfg: Config, loader: str, entries: list[Checked]) -> Iterator[Checked]:
    """Check the annotation files that the metrics of ``loader`` read but its data sets do not."""
    sound = [entry.settings for entry in entries if not entry.findings.errors]
    data = [leaf for leaf in sound if _kind(leaf) == "coco" and is_local(leaf) and leaf.get("ann_file")]
    files = [str(Path(leaf.get("data_root") or "", leaf["ann_file"])) for leaf in data]
    known = {Path(path).resolve() for path in files}
    for metric in metrics(cfg, loader) if files else ():
        path = metric.get("ann_file")
        is_other = isinstance(path, str) and "://" not in path and Path(path).resolve() not in known
        if is_other and reads_coco(metric):
            dataset = build_dataset(data[0], pipeline=[], lazy_init=True)
            use = CocoUse(path, "", list(dataset.metainfo["classes"]), _evaluates_masks(metric), data_files=files)
            yield Checked(f"{loader}_evaluator", loader, metric, remember(check_coco, use))


def _data_root(leaf: dict[str, Any]) -> Path:
    """The folder of a data set whose class defines its own files, as the built-in ones do."""
    parameter = signature(class_of(leaf, DATASETS)).parameters.get("data_root")
    return Path(leaf.get("data_root") or (parameter and parameter.default) or ".")


def _writes_itself(leaf: dict[str, Any]) -> bool:
    """Whether the class of a data set prepares its files before it reads them, as the built-in ones do."""
    return not any(class_of(leaf, DATASETS).full_init is getattr(base, "full_init", None) for base in _readers())


def _readers() -> list[type]:
    """The classes of ``KINDS`` whose toolbox is in use."""
    found = (getattr(sys.modules.get(module), name, None) for _, module, name, _ in KINDS)
    return [base for base in found if base]


def _kind(leaf: dict[str, Any]) -> str | None:
    """'coco' or 'maps' if a data set reads files by CocoDataset's or BaseSegDataset's own methods; else None."""
    cls = class_of(leaf, DATASETS)
    for kind, module, name, methods in KINDS:
        base = getattr(sys.modules.get(module), name, None)
        if base and isinstance(cls, type) and issubclass(cls, base):
            return kind if all(getattr(cls, method) is getattr(base, method) for method in methods) else None
    return None


def _check_maps(dataset: Any, leaf: dict, cfg: Config, loader: str, evaluated: bool, read_all: bool) -> Findings:
    from mmseg.datasets.transforms import LoadAnnotations

    prefix, pipeline = dataset.data_prefix, leaf.get("pipeline")
    if prefix.get("img_path") is None:
        raise UserError("data_prefix has no img_path; name the folder of the images there, below data_root")
    if prefix.get("seg_map_path") is None and (evaluated or transforms.loads_annotations(pipeline)):
        reader = "training" if loader == "train" else "the evaluation" if evaluated else "LoadAnnotations"
        raise UserError(
            f"no label maps: data_prefix has no seg_map_path, which {reader} needs; name their folder there, or "
            "predict the images with tools/predict.py"
        )
    try:
        samples = dataset.load_data_list()
    except (OSError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"the images cannot be listed: {error}; correct ann_file, data_prefix and img_suffix"
        ) from error
    total = len(samples)
    samples = [samples[i] for i in choose(total, dataset._indices)]
    if prefix.get("seg_map_path") is None:
        return Findings(summary=f"{len(samples)} of {counted(total, 'image')}, without label maps")
    listed = bool(dataset.ann_file) and Path(dataset.ann_file).is_file()
    use = MapUse(
        images=[entry["img_path"] for entry in samples],
        maps=[entry["seg_map_path"] for entry in samples],
        total=total,
        folder="" if listed else str(prefix["img_path"]),
        suffix=dataset.img_suffix,
        map_suffix=dataset.seg_map_suffix,
        map_folder=str(prefix["seg_map_path"]),
        classes=list(dataset.metainfo.get("classes") or ()),
        ignore_index=dataset.ignore_index,
        reduce_zero_label=dataset.reduce_zero_label,
        label_map=dataset.label_map,
        training=loader == "train",
        list_file=str(dataset.ann_file) if listed else "",
        read_all=read_all,
        plain_images=transforms.reads_plain_images(pipeline),
        plain_maps=transforms.reads_plain_annotations(pipeline, LoadAnnotations, "pillow"),
    )
    return remember(check_label_maps, use)


def adapt(cfg: Config, entry: Checked) -> None:
    """Apply the findings to ``cfg``: read the repaired annotation file, and load images as they were annotated."""
    leaf, findings = entry.settings, entry.findings
    if findings.ann_file:
        old = Path(leaf.get("data_root") or "", leaf["ann_file"])
        leaf["ann_file"] = findings.ann_file
        for metric in metrics(cfg, entry.loader):
            if metric.get("ann_file") and Path(metric["ann_file"]).resolve() == old.resolve():
                metric["ann_file"] = findings.ann_file
    if findings.as_annotated:
        pipelines = [leaf.get("pipeline") or []]
        if entry.loader == "test":
            pipelines.append(cfg.get("tta_pipeline") or [])
        for transform in chain.from_iterable(pipelines):
            if isinstance(transform, dict) and transforms.transform_class(transform) is transforms.PLAIN[0]:
                transform["type"] = AS_ANNOTATED
