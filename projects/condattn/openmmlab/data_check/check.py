"""Check the data of every loader of a configuration, say what is used, and adapt the configuration where that helps."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from ..errors import UserError
from ..processes import local_rank
from .coco import CocoUse, check_coco
from .findings import Findings, remember
from .label_maps import MapUse, check_label_maps
from .paths import as_list, check_paths, is_local, leaves, named_paths

AS_ANNOTATED = "condattn.openmmlab.data_check.orientation.LoadImageAsAnnotated"
OTHER_HEADS = ("backbone", "rpn_head", "semantic_head", "seg_head", "panoptic_head", "panoptic_fusion_head")
"""Parts of a model whose number of classes need not be that of the data."""


@dataclass
class Checked:
    """The check of one data set.

    Attributes:
        label: Name of the loader, with a number if it has several data sets.
        loader: 'train', 'val' or 'test'.
        settings: Of the data set, as they stand in the configuration.
        findings: What was found.
    """

    label: str
    loader: str
    settings: dict[str, Any]
    findings: Findings


def check_data(cfg: Config, *loaders: str, read_all: bool = False) -> None:
    """Check the data of ``loaders``, print what is used and what is lost, and adapt ``cfg``.

    Adapted are annotation files of which a repaired copy was made, and the loading of images whose annotations do not
    have the rotation of the image's header; both are printed.

    Args:
        cfg: The configuration; its default scope has been entered.
        loaders: Of 'train', 'val' and 'test'.
        read_all: Read every image and label map, not a sample of some thousands.

    Raises:
        UserError: If the data cannot be used; of several reasons the last one, after the others were printed.
    """
    checked = find(cfg, *loaders, read_all=read_all)
    if cfg.get("launcher") and local_rank(cfg.launcher) > 0:
        if any(entry.findings.errors for entry in checked):
            raise SystemExit(2)  # the first process says why
    else:
        report(checked)
    for entry in checked:
        adapt(cfg, entry)


def find(cfg: Config, *loaders: str, read_all: bool = False) -> list[Checked]:
    """Check the data of ``loaders``; nothing is printed or changed.

    Raises:
        UserError: If a file or folder is missing, or a data set cannot be built.
    """
    there = [loader for loader in loaders if cfg.get(f"{loader}_dataloader")]
    for loader in there:
        check_paths(cfg, loader)
    checked = []
    for loader in there:
        settings = list(leaves(cfg[f"{loader}_dataloader"]["dataset"]))
        for i, leaf in enumerate(settings, 1):
            label = loader if len(settings) == 1 else f"{loader} ({i} of {len(settings)})"
            checked.append(Checked(label, loader, leaf, _check(cfg, loader, leaf, read_all)))
    return checked


def report(checked: list[Checked]) -> None:
    """Print what was found: a line for each data set on standard output, warnings and errors on standard error.

    Raises:
        UserError: The last of the errors, if there are any.
    """
    for entry in checked:
        if entry.findings.summary:
            print(f"{entry.label}: {entry.findings.summary}")
        for warning in entry.findings.warnings:
            print(f"warning: {entry.label}: {warning}", file=sys.stderr)
    errors = [f"{entry.label}: {error}" for entry in checked for error in entry.findings.errors]
    for error in errors[:-1]:
        print("error:", error, file=sys.stderr)
    if errors:
        raise UserError(errors[-1])


def _check(cfg: Config, loader: str, leaf: dict[str, Any], read_all: bool) -> Findings:
    """Check one data set."""
    if _class(leaf) is None:
        return Findings(errors=[f"no data set {leaf['type']} is registered; import its module with custom_imports"])
    kind = _kind(leaf)
    if kind is None or not is_local(leaf):
        return Findings(
            summary=f"{leaf['type']}, not read by this check, which knows local files of CocoDataset and BaseSegDataset"
        )
    if not any(named_paths(leaf)) and not _data_root(leaf).is_dir():
        return Findings(summary=f"{leaf['type']}, which writes its data to {_data_root(leaf)} when the run begins")
    classes = (leaf.get("metainfo") or {}).get("classes")
    if isinstance(classes, str) and not Path(classes).is_file():
        error = (
            f"classes is the text {classes!r}, each letter of which would be a class; write classes = ({classes!r},)"
        )
        return Findings(errors=[error])
    try:
        dataset = DATASETS.build({**leaf, "pipeline": [], "lazy_init": True})
    except (TypeError, ValueError, KeyError) as error:
        return Findings(errors=[f"the data set {leaf['type']} cannot be built: {' '.join(map(str, error.args))}"])
    if wrong := _check_heads(cfg, dataset.metainfo.get("classes") or ()):
        return Findings(errors=wrong)
    evaluators = as_list(cfg.get(f"{loader}_evaluator")) if loader != "train" else []
    evaluated = loader == "train" or not evaluators or any(not entry.get("format_only") for entry in evaluators)
    if kind == "coco":
        metrics = [metric for entry in evaluators for metric in as_list(entry.get("metric", "bbox"))]
        use = CocoUse(
            ann_file=dataset.ann_file,
            folder=dataset.data_prefix.get("img", ""),
            classes=list(dataset.metainfo["classes"]),
            with_masks="segm" in metrics or (loader == "train" and any(_asks_for_masks(leaf, cfg, loader))),
            training=not dataset.test_mode,
            needs_objects=evaluated,
            filter_cfg=leaf.get("filter_cfg"),
            indices=leaf.get("indices"),
            read_all=read_all,
        )
        return remember(asdict(use), lambda: check_coco(use))
    return _check_maps(dataset, leaf, evaluated, loader, read_all)


def _class(leaf: dict[str, Any]) -> Any:
    """The class of a data set."""
    with DATASETS.switch_scope_and_registry(leaf.get("_scope_")) as registry:
        return registry.get(leaf["type"]) if isinstance(leaf["type"], str) else leaf["type"]


def _data_root(leaf: dict[str, Any]) -> Path:
    """The folder of a data set that knows its own files, as the built-in ones do."""
    parameter = signature(_class(leaf)).parameters.get("data_root")
    return Path(leaf.get("data_root") or (parameter and parameter.default) or ".")


def _kind(leaf: dict[str, Any]) -> str | None:
    """'coco' or 'maps', for data sets that read such files as mmdet's and mmseg's own classes do; else None."""
    cls = _class(leaf)
    for kind, module, name, methods in (
        ("coco", "mmdet.datasets", "CocoDataset", ("load_data_list", "parse_data_info", "filter_data")),
        ("maps", "mmseg.datasets", "BaseSegDataset", ("load_data_list",)),
    ):
        base = getattr(sys.modules.get(module), name, None)
        if base and isinstance(cls, type) and issubclass(cls, base):
            return kind if all(getattr(cls, method) is getattr(base, method) for method in methods) else None
    return None


def _asks_for_masks(leaf: dict[str, Any], cfg: Config, loader: str) -> Iterator[bool]:
    """Whether a transform loads masks, of those of the data set and of the wrappers around it."""
    pipelines = [leaf.get("pipeline") or []]
    dataset = cfg[f"{loader}_dataloader"]["dataset"]
    while "dataset" in dataset:
        pipelines.append(dataset.get("pipeline") or [])
        dataset = dataset["dataset"]
    for pipeline in pipelines:
        for transform in pipeline:
            yield bool(transform.get("with_mask"))


def _check_maps(dataset: Any, leaf: dict, evaluated: bool, loader: str, read_all: bool) -> Findings:
    prefix = dataset.data_prefix
    loads = any("LoadAnnotations" in transform["type"] for transform in leaf.get("pipeline") or [])
    if prefix.get("seg_map_path") is None and (evaluated or loads):
        reader = "the evaluation" if evaluated else "LoadAnnotations"
        error = (
            f"no label maps: data_prefix has no seg_map_path, which {reader} needs; name their folder there, or "
            "predict the images with tools/predict.py"
        )
        return Findings(errors=[error])
    samples = dataset.load_data_list()
    total = len(samples)
    if (indices := leaf.get("indices")) is not None:
        samples = samples[:indices] if isinstance(indices, int) else [samples[i] for i in indices]
    if prefix.get("seg_map_path") is None:
        return Findings(summary=f"{len(samples)} of {total} images, without label maps")
    listed = Path(dataset.ann_file).is_file() if dataset.ann_file else False
    use = MapUse(
        images=[entry["img_path"] for entry in samples],
        maps=[entry["seg_map_path"] for entry in samples],
        total=total,
        folder="" if listed else str(prefix["img_path"]),
        suffix=dataset.img_suffix,
        map_suffix=dataset.seg_map_suffix,
        classes=list(dataset.metainfo.get("classes") or ()),
        ignore_index=dataset.ignore_index,
        reduce_zero_label=dataset.reduce_zero_label,
        label_map=dataset.label_map,
        training=loader == "train",
        read_all=read_all,
    )
    return remember(asdict(use), lambda: check_label_maps(use))


def _check_heads(cfg: Config, classes: Any) -> list[str]:
    """Compare the number of classes of the model's heads with the data's, and refuse one class with a softmax."""
    if not classes:
        return []
    wrong = []
    for where, head in _heads(cfg.get("model") or {}, "model"):
        number = head["num_classes"]
        if number != len(classes):
            names = ", ".join(map(repr, classes[:5])) + (", ..." if len(classes) > 5 else "")
            wrong.append(
                f"{where}.num_classes is {number}, but the data have {len(classes)} classes ({names}); set it to that"
            )
        elif number == 1 and cfg.get("default_scope") == "mmseg" and _is_softmax(head):
            wrong.append(
                f"{where} has one class, {classes[0]!r}, and a softmax, whose loss is 0 for ever; add a class "
                "'background', or set num_classes=2, out_channels=1 and loss_decode.use_sigmoid=True"
            )
    return wrong


def _heads(node: Any, where: str) -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if isinstance(node.get("num_classes"), int):
            yield where, node
        for key, child in node.items():
            if key not in OTHER_HEADS:
                yield from _heads(child, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from _heads(child, f"{where}.{i}")


def _is_softmax(head: dict[str, Any]) -> bool:
    losses = as_list(head.get("loss_decode") or {"type": "CrossEntropyLoss"})
    return all(loss.get("type") == "CrossEntropyLoss" and not loss.get("use_sigmoid") for loss in losses)


def adapt(cfg: Config, entry: Checked) -> None:
    """Let the configuration read a repaired copy, and load images as they were annotated."""
    leaf, findings = entry.settings, entry.findings
    if findings.ann_file:
        old = Path(leaf.get("data_root") or "", leaf["ann_file"])
        leaf["ann_file"] = findings.ann_file
        for evaluator in as_list(cfg.get(f"{entry.loader}_evaluator")):
            if evaluator.get("ann_file") and Path(evaluator["ann_file"]).resolve() == old.resolve():
                evaluator["ann_file"] = findings.ann_file
    if findings.as_annotated:
        pipelines = [leaf.get("pipeline") or []]
        if entry.loader == "test":
            pipelines.append(cfg.get("tta_pipeline") or [])
        for pipeline in pipelines:
            for transform in pipeline:
                if transform["type"] in ("LoadImageFromFile", "mmcv.LoadImageFromFile"):
                    transform["type"] = AS_ANNOTATED
