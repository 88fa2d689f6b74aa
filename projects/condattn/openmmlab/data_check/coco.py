"""Check an annotation file in COCO's format, and its images, as mmdet's CocoDataset will use them."""

import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...wording import counted, listed, shown, some
from ..errors import UserError
from .annotations import Annotations
from .findings import ClassCount, Findings, write_cached
from .images import check_images
from .sampling import choose, sample
from .shapes import check_boxes, check_masks

SMALL, LARGE = 32**2, 96**2
"""Areas in pixels that separate small, medium and large objects in COCO."""

BARE = "there is no annotation in the file; it has images alone: annotate them"


@dataclass
class CocoUse:
    """How a data set uses an annotation file.

    Attributes:
        ann_file: The annotation file.
        folder: Folder of the images.
        classes: Names of the classes.
        with_masks: Whether masks are used for training or evaluation.
        training: Whether ``filter_cfg`` leaves out images, as it does in training.
        needs_objects: Whether objects are required, because the data are used for training or evaluated.
        filter_cfg: mmdet's setting of this name, which leaves out images.
        indices: mmengine's setting of this name, which selects images.
        read_all: Read every image instead of a sample.
        plain_images: Whether images are loaded as mmcv does by default; if not, only their existence is checked.
        replaceable: Whether ``ann_file`` is a setting of the configuration, so that a repaired copy can take its place.
        data_files: Annotation files of the evaluated data sets, if a metric reads ``ann_file`` in place of them.
    """

    ann_file: str
    folder: str
    classes: Sequence[str]
    with_masks: bool
    training: bool = False
    needs_objects: bool = True
    filter_cfg: dict[str, Any] | None = None
    indices: int | Sequence[int] | None = None
    read_all: bool = False
    plain_images: bool = True
    replaceable: bool = True
    data_files: Sequence[str] = ()


class Usage:
    """The part of an annotation file that a data set uses.

    Args:
        table: The content of the file.
        use: How the data set uses the file.

    Attributes:
        kept: Indices of the images that are used.
        loaded: Boolean array: which objects are loaded, crowds included.
        masked: Indices of the objects whose masks are read.

    Raises:
        UserError: If no image is left.
    """

    def __init__(self, table: Annotations, use: CocoUse) -> None:
        self.table, self.use = table, use
        there = table.image_of >= 0
        image_of = np.where(there, table.image_of, 0)
        x, y, w, h = table.boxes.T
        inside_w = np.minimum(x + w, table.widths[image_of]) - np.maximum(x, 0)
        inside_h = np.minimum(y + h, table.heights[image_of]) - np.maximum(y, 0)
        self._labels = np.array([table.labels.get(category, -1) for category in table.category_ids], dtype=int)
        self._empty = (inside_w <= 0) | (inside_h <= 0) | (table.areas <= 0) | (w < 1) | (h < 1)
        self._others = there & (self._labels < 0)
        of_class = there & (self._labels >= 0)
        self._left_out: list[str] = []
        self.kept = self._kept_images(np.unique(table.image_of[of_class]))
        self._chosen = of_class & np.isin(table.image_of, self.kept)
        self.loaded = self._chosen & ~table.ignored & ~self._empty
        # In evaluation pycocotools draws the masks of all objects; in training mmdet draws those of loaded objects.
        self.masked = np.flatnonzero(self.loaded if use.training else self._chosen)

    def _kept_images(self, with_objects: np.ndarray) -> list[int]:
        """Return the indices of the used images; those in ``with_objects`` have an annotation of one of the classes."""
        table, use = self.table, self.use
        filters = (use.filter_cfg or {}) if use.training else {}
        small = np.minimum(table.widths, table.heights) < filters.get("min_size", 0)
        bare = ~np.isin(np.arange(len(table.images)), with_objects) & ~small & bool(filters.get("filter_empty_gt"))
        places = np.flatnonzero(~small & ~bare)
        try:
            kept = [int(places[i]) for i in choose(len(places), use.indices)]
        except UserError as error:
            table.fail(str(error))
        for number, why in (
            (small.sum(), f"smaller than {filters.get('min_size')} pixels left out"),
            (bare.sum(), "without objects left out"),
            (len(places) - len(kept), "left out by 'indices'"),
        ):
            if number > 0:
                self._left_out.append(f"{counted(number, 'image')} {why}")
        if not kept and use.needs_objects and not table.objects:
            table.fail(BARE)
        if not kept:
            why = "; ".join(self._left_out) or "indices choose none"
            table.fail(
                f"none of the {len(table.images)} images is left; {why}: change filter_cfg or indices, or add images "
                "with objects"
            )
        return kept

    def summarize(self, findings: Findings) -> None:
        """Write into ``findings`` what is used, and what is left out."""
        table, use = self.table, self.use
        left = self.loaded & ~table.crowd
        for label, name in enumerate(use.classes):
            findings.classes.append(self._count(name, np.flatnonzero(left & (self._labels == label))))
        counts = [(entry.name, entry.count) for entry in findings.classes]
        crowds = (self.loaded & table.crowd).sum()
        if use.needs_objects and not left.any():
            findings.barren = self._explain_no_objects(crowds)
        elif use.needs_objects and (none := [name for name, count in counts if not count]):
            findings.warnings.append(f"no object of class {listed(none)}")
        self._warn_of_unused_objects(findings)
        if crowds:
            self._left_out.append(f"{counted(crowds, 'crowd')} (iscrowd) neither trained nor counted")
        images, objects = counted(len(table.images), "image"), counted(len(table.objects), "object")
        classes = some((f"{name} {count}" for name, count in counts), 10)
        used = f"{len(self.kept)} of {images}, {left.sum()} of {objects} ({classes})"
        findings.summary = "; ".join([used, *self._left_out])

    def _warn_of_unused_objects(self, findings: Findings) -> None:
        table = self.table
        if self._others.any():
            names = {category["id"]: category["name"] for category in table.categories}
            categories = Counter(names[table.category_ids[i]] for i in np.flatnonzero(self._others)).most_common()
            one, many = "object is of a category that is", "objects are of categories that are"
            objects = counted(self._others.sum(), one, many)
            findings.warnings.append(
                f"{objects} not among classes: {some((f'{name} {count}' for name, count in categories), 10)}; left out"
            )
        then = "left out"
        if not self.use.training and self.use.needs_objects:
            then += " here, but pycocotools counts them as misses: take them out, or mark them iscrowd"
        for chosen, one, many in (
            (
                self._empty & self._chosen,
                "object is smaller than a pixel, or outside its image",
                "objects are smaller than a pixel, or outside their images",
            ),
            (table.ignored & self._chosen, "object is marked 'ignore'", "objects are marked 'ignore'"),
        ):
            if chosen.any():
                findings.warnings.append(f"{table.counted(chosen, one, many)}; {then}")

    def _explain_no_objects(self, crowds: int) -> str:
        table = self.table
        if not table.objects:
            return f"{table.path}: {BARE}"
        reasons = {
            "crowds (iscrowd)": crowds,
            "marked 'ignore'": (table.ignored & self._chosen).sum(),
            "smaller than a pixel, or outside their images": (self._empty & self._chosen & ~table.ignored).sum(),
            "of other categories": self._others.sum(),
            "of images that are not in the file": (table.image_of < 0).sum(),
            "images left out": len(table.images) - len(self.kept),
        }
        why = ", ".join(f"{number} {reason}" for reason, number in reasons.items() if number > 0)
        return (
            f"{table.path}: no object of the classes {listed(self.use.classes)} is left of "
            f"{counted(len(table.objects), 'object')}: {why}; annotate some, or choose other classes"
        )

    def _count(self, name: str, objects: np.ndarray) -> ClassCount:
        sizes = np.digitize(self.table.areas[objects], [SMALL, LARGE])
        images = np.unique(self.table.image_of[objects])
        names = [self.table.images[i]["file_name"] for i in sample(images, read_all=False, number=4)]
        examples = [os.path.join(self.use.folder, name) for name in names]
        return ClassCount(name, len(objects), len(images), np.bincount(sizes, minlength=3).tolist(), examples)


def check_coco(use: CocoUse) -> tuple[Findings, list[str]]:
    """Check annotations and images.

    The garbage collector is disabled meanwhile: it takes a third of the time for a large file, whose objects form no
    cycles.

    Returns:
        The findings, and the files and folders that were read.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _check_coco(use)
    finally:
        if enabled:
            gc.enable()


def _check_coco(use: CocoUse) -> tuple[Findings, list[str]]:
    findings = Findings(with_masks=use.with_masks)
    read = [use.ann_file, *use.data_files]
    try:
        content, repairs = read_annotations(use.ann_file, needs_objects=use.needs_objects)
        table = Annotations(content, use.ann_file, use.classes)
        findings.warnings += [*table.warnings, *check_boxes(table)]
        usage = Usage(table, use)
        if use.with_masks:
            findings.warnings += check_masks(table, usage.masked, evaluated=not use.training)
        if use.data_files:
            _compare_images(table, use)
        else:
            usage.summarize(findings)
    except UserError as error:
        findings.errors.append(str(error))
        return findings, read
    if not use.data_files:
        paths = [os.path.join(use.folder, table.images[i]["file_name"]) for i in usage.kept]
        sizes = list(zip(table.widths[usage.kept].tolist(), table.heights[usage.kept].tolist(), strict=True))
        read += check_images(findings, paths, sizes, use.read_all, look=use.plain_images)
    if not findings.errors:
        read += repair(findings, use, content, [*repairs, *table.repairs])
    return findings, read


def _compare_images(table: Annotations, use: CocoUse) -> None:
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
        table.fail(
            f"{counted(len(more), 'image is')} not in the data that are evaluated, and {len(fewer)} of theirs not "
            f"here, such as image {shown(next(iter(more or fewer)))}; the evaluator expects the images of "
            f"{Path(use.data_files[0])}: set its ann_file to that"
        )


def read_annotations(path: str, needs_objects: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Read an annotation file.

    Args:
        path: Path of the file.
        needs_objects: Whether the file must have a list of annotations.

    Returns:
        The content of the file, and descriptions of what was repaired to read it.

    Raises:
        UserError: If the file is not JSON, or lacks one of COCO's three lists.
    """
    try:
        data = Path(path).read_bytes()
        encoding = json.detect_encoding(data)
        content = json.loads(data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected an annotation file in COCO's format"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file: {error}; expected COCO's format: export it anew") from error
    if isinstance(content, dict) and not needs_objects:
        content.setdefault("annotations", [])
    for name in ("images", "annotations", "categories"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: expected COCO's format, with a list of objects named {name!r}; export it anew")
    plain = encoding == "utf-8"
    return content, [] if plain else [f"its encoding {encoding.removesuffix('-sig').upper()} was made plain UTF-8"]


def repair(findings: Findings, use: CocoUse, content: dict[str, Any], repairs: list[str]) -> list[str]:
    """Write a repaired copy of an annotation file and report it in ``findings``; as an error if it cannot be read.

    Returns:
        A list with the path of the copy; empty if there is none.
    """
    if not repairs:
        return []
    path = use.ann_file
    try:
        text = json.dumps(content)  # one file may need several copies, such as one for each order of classes
        name = f"annotations/{Path(path).stem[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
        copied = str(write_cached(name, lambda partial: partial.write_text(text)))
    except OSError as error:
        findings.errors.append(
            f"{path}: {'; '.join(repairs)}, but the copy cannot be written ({error.strerror or error}); set "
            "XDG_CACHE_HOME to a folder that can be written, or repair the file"
        )
        return []
    if not use.replaceable:
        findings.errors.append(
            f"{path}: {'; '.join(repairs)}, in the copy {copied}, which cannot be read in its place, because the class "
            "of the data set names the file; repair it, or replace it by the copy"
        )
        return []
    findings.ann_file = copied
    findings.warnings.append(f"{path}: {'; '.join(repairs)}, in a copy that is read in its place: {copied}")
    return [copied]
