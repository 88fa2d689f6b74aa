"""Find the metrics of a configuration, and check the annotation files that they read besides the data set's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import METRICS

from ...wording import counted, shown
from ..errors import UserError
from .annotations import Annotations
from .boxes import check_boxes
from .coco import no_collection, read_annotations, repair
from .findings import Findings
from .masks import check_masks
from .paths import as_list
from .usage import CocoUse, Usage


@dataclass
class MetricUse:
    """How a metric uses an annotation file.

    Attributes:
        ann_file: Path of the annotation file.
        data_files: Paths of the annotation files of the evaluated data sets.
        classes: Names of the classes.
        with_masks: Whether masks are evaluated.
    """

    ann_file: str
    data_files: list[str] = field(default_factory=list)
    classes: Sequence[str] = ()
    with_masks: bool = False


def metrics(cfg: Config, loader: str) -> list[dict]:
    """The settings of the metrics of ``loader``, including those in an evaluator of several data sets."""
    return list(_metrics(cfg.get(f"{loader}_evaluator"))) if loader != "train" else []


def _metrics(node: Any) -> Iterator[dict]:
    for entry in as_list(node):
        if isinstance(entry, dict):
            yield from _metrics(entry["metrics"]) if "metrics" in entry else [entry]


def reads_coco(metric: dict[str, Any]) -> bool:
    """Whether a metric is mmdet's ``CocoMetric`` or a subclass of it."""
    kind = metric.get("type")
    if isinstance(kind, str):
        with METRICS.switch_scope_and_registry(metric.get("_scope_")) as registry:
            kind = registry.get(kind)
    return isinstance(kind, type) and any(base.__name__ == "CocoMetric" for base in kind.__mro__)


def check_metric(use: MetricUse) -> tuple[Findings, list[str]]:
    """Check the annotation file of a metric that does not read the data set's own file.

    Returns:
        The findings, and the files that were read.
    """
    findings, read = Findings(with_masks=use.with_masks), [use.ann_file, *use.data_files]
    try:
        with no_collection():
            content, repairs = read_annotations(use.ann_file)
            table = Annotations(content, use.ann_file, use.classes)
            findings.warnings += check_boxes(table)
            usage = Usage(table, CocoUse(use.ann_file, "", use.classes, use.with_masks, False, True, None, None))
            if use.with_masks:
                findings.warnings += check_masks(table, usage.masked)
            _compare_images(table, use)
    except UserError as error:
        findings.errors.append(str(error))
        return findings, read
    return findings, read + repair(findings, use.ann_file, content, [*repairs, *table.repairs])


def _compare_images(table: Annotations, use: MetricUse) -> None:
    """Raise a UserError unless the images are those of one data set or those of all data sets together."""
    every = set()
    for path in use.data_files:
        content, _ = read_annotations(path, needs_objects=False)
        ids = set(Annotations({**content, "annotations": []}, path, use.classes).places)
        if ids == set(table.places):
            return
        every |= ids
    more, fewer = set(table.places) - every, every - set(table.places)
    if more or fewer:
        example = f"such as image {shown(next(iter(more or fewer)))}"
        table.fail(
            f"{counted(len(more), 'image is', 'images are')} not in the data that are evaluated, and {len(fewer)} of "
            "theirs "
            f"not here, {example}; the evaluator expects the images of {Path(use.data_files[0])}: set its ann_file to "
            "that"
        )
