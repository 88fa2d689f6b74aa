"""Determine what mmdet's CocoDataset uses of an annotation file, and what it leaves out."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...wording import counted, listed, some
from ..errors import UserError
from .annotations import Annotations
from .findings import ClassCount, Findings
from .sampling import sample

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
    data_files: Sequence[str] = ()


def choose(number: int, indices: int | Sequence[int] | None) -> Sequence[int]:
    """Return the positions that mmengine's ``indices`` select of ``number`` images.

    Raises:
        UserError: If there are too few images.
    """
    places = range(number)
    if indices is None:
        return places
    if isinstance(indices, int):
        return places[:indices] if indices >= 0 else places[indices:]
    if beyond := [i for i in indices if not -number <= i < number]:
        there = counted(number, "image is")
        raise UserError(f"indices has {some(beyond)}, and {there} there; give indices below {number}")
    return [places[i] for i in indices]


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
            table.fail(
                f"none of the {len(table.images)} images is left; "
                f"{'; '.join(self._left_out) or 'indices choose none'}: "
                "change filter_cfg or indices, or add images with objects"
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
        ones, several = (
            "object is smaller than a pixel, or outside its image",
            "objects are smaller than a pixel, or outside their images",
        )
        for chosen, one, many in (
            (self._empty & self._chosen, ones, several),
            (table.ignored & self._chosen, "object is marked 'ignore'", "objects are marked 'ignore'"),
        ):
            if chosen.any():
                findings.warnings.append(f"{table.counted(chosen, one, many)}; left out")

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
        return ClassCount(
            name=name,
            count=len(objects),
            images=len(images),
            sizes=np.bincount(sizes, minlength=3).tolist(),
            examples=[os.path.join(self.use.folder, name) for name in names],
        )
