"""Check an annotation file in COCO's format as mmdet's CocoDataset will use it, and repair what can be."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as masks

from ...weights.atomic import write_whole
from ..errors import UserError
from .findings import ClassCount, Findings, cache_folder
from .images import check_images, sample, some

SMALL, LARGE = 32**2, 96**2
"""COCO's bounds between small, medium and large objects, in pixels."""


@dataclass
class CocoUse:
    """How a data set uses an annotation file.

    Attributes:
        ann_file: The annotation file.
        folder: Where the images are.
        classes: Names of the classes.
        with_masks: Whether masks are trained or evaluated.
        training: Whether images are left out by ``filter_cfg``.
        needs_objects: Whether a file without objects is an error.
        filter_cfg: mmdet's.
        indices: mmengine's: the part of the images that is used.
        read_all: Read every image, not a sample.
    """

    ann_file: str
    folder: str
    classes: Sequence[str]
    with_masks: bool
    training: bool
    needs_objects: bool
    filter_cfg: dict[str, Any] | None
    indices: int | Sequence[int] | None
    read_all: bool = False


def check_coco(use: CocoUse) -> tuple[Findings, list[str]]:
    """Check annotations and images.

    Returns:
        The findings, and the files and folders that they were taken from.
    """
    findings = Findings(with_masks=use.with_masks)
    read = [use.ann_file]
    try:
        content = read_annotations(use.ann_file)
        table = Annotations(content, use)
        repairs = table.repair(findings)
        table.check(findings)
        kept = table.summarize(findings)
    except UserError as error:
        findings.errors.append(str(error))
        return findings, read
    paths = [os.path.join(use.folder, table.images[i]["file_name"]) for i in kept]
    sizes = [(int(table.widths[i]), int(table.heights[i])) for i in kept]
    report = check_images(paths, sizes, use.read_all)
    findings.errors += report.errors
    findings.warnings += report.warnings
    findings.as_annotated = report.as_annotated
    read += report.read
    if repairs and not findings.errors:
        findings.ann_file = _write_copy(use.ann_file, content)
        findings.warnings.append(f"{'; '.join(repairs)}, in a copy that is read in its place: {findings.ann_file}")
        read.append(findings.ann_file)
    return findings, read


def read_annotations(path: str) -> dict[str, Any]:
    """The content of an annotation file.

    Raises:
        UserError: If it is no JSON file, or lacks one of COCO's three lists.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {error}") from error
    for name in ("images", "annotations", "categories"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: expected COCO's format, with a list of objects named {name!r}")
    return content


def _write_copy(path: str, content: dict[str, Any]) -> str:
    stat = os.stat(path)
    key = hashlib.sha256(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    copy = cache_folder() / "annotations" / f"{Path(path).stem}-{key}.json"
    write_whole(copy, lambda partial: partial.write_text(json.dumps(content)), overwrite=True)
    return str(copy)


class Annotations:
    """The content of an annotation file, in arrays.

    Args:
        content: Of the file; :meth:`repair` changes it.
        use: How it is used.

    Raises:
        UserError: If something is missing that nothing can take the place of.
    """

    def __init__(self, content: dict[str, Any], use: CocoUse) -> None:
        self.use = use
        self.images: list[dict] = content["images"]
        self.objects: list[dict] = content["annotations"]
        self.categories: list[dict] = content["categories"]
        self.converted = 0
        self._check_categories()
        self._check_image_entries()
        self._check_object_entries()

    def _fail(self, message: str) -> None:
        raise UserError(f"{self.use.ann_file}: {message}")

    def _require(self, entries: list[dict], key: str, kind: str) -> None:
        """Raise if an entry lacks ``key``."""
        lacking = [i for i, entry in enumerate(entries) if entry.get(key) is None]
        if lacking:
            names = some(f"{kind} {entries[i].get('id', f'number {i}')}" for i in lacking)
            self._fail(f"{len(lacking)} of {len(entries)} entries of {kind}s have no {key!r}: {names}")

    def _numbers(self, entries: list[dict], key: str, kind: str) -> np.ndarray:
        """Values of ``key``, with numbers that are written as text made numbers."""
        values = [entry.get(key) for entry in entries]
        for i, value in enumerate(values):
            if type(value) is str:
                values[i] = entries[i][key] = _number(value)
                self.converted += 1
        bad = [i for i, value in enumerate(values) if type(value) not in (int, float)]
        if bad:
            first = entries[bad[0]]
            self._fail(f"{kind} {first.get('id', bad[0])}: expected a number for {key!r}, found {first[key]!r}")
        return np.array(values)

    def _check_categories(self) -> None:
        use, categories = self.use, self.categories
        self._require(categories, "name", "category")
        names = [category["name"] for category in categories]
        unknown = [name for name in use.classes if name not in names]
        if unknown:
            self._fail(
                f"no category {', '.join(map(repr, unknown))}; its categories are {', '.join(map(repr, names))}; name "
                "classes as there"
            )
        in_file = [name for name in names if name in set(use.classes)]
        if twice := [name for name, count in Counter(in_file).items() if count > 1]:
            self._fail(f"the category {twice[0]!r} stands there {in_file.count(twice[0])} times; merge them into one")
        if in_file != list(use.classes):
            self._fail(f"the classes are in another order there, and labels follow the file; set classes = {in_file}")
        self._require(categories, "id", "category")
        ids = self._numbers(categories, "id", "category").tolist()
        if len(set(ids)) < len(ids):
            self._fail(f"two categories have the id {Counter(ids).most_common(1)[0][0]}; number them anew")
        labels = {name: label for label, name in enumerate(use.classes)}
        self.labels = {entry["id"]: labels[entry["name"]] for entry in categories if entry["name"] in labels}

    def _check_image_entries(self) -> None:
        for key in ("id", "file_name", "width", "height"):
            self._require(self.images, key, "image")
        if not self.images:
            self._fail("the list of images is empty")
        self.widths = self._numbers(self.images, "width", "image")
        self.heights = self._numbers(self.images, "height", "image")
        empty = np.flatnonzero((self.widths < 1) | (self.heights < 1))
        if len(empty):
            self._fail(f"image {self.images[empty[0]]['id']} has no size: width and height are below 1 pixel")
        ids = [image["id"] for image in self.images]
        if all(type(i) is str and _is_whole(i) for i in ids):  # objects may refer to them by numbers
            for image in self.images:
                image["id"] = int(image["id"])
            self.converted += len(ids)
        ids = [image["id"] for image in self.images]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            names = some(repr(image["file_name"]) for image in self.images if image["id"] == twice)
            self._fail(f"several images have the id {twice!r}: {names}; number them anew, and their objects with them")
        self.places = {image_id: i for i, image_id in enumerate(ids)}

    def _check_object_entries(self) -> None:
        objects = self.objects
        for key in ("image_id", "category_id", "bbox"):
            self._require(objects, key, "annotation")
        self.category_ids = self._numbers(objects, "category_id", "annotation")
        known = {category["id"] for category in self.categories}
        strange = [i for i, category in enumerate(self.category_ids.tolist()) if category not in known]
        if strange:
            first = objects[strange[0]]
            self._fail(
                f"{len(strange)} annotations have a category_id that no category has, such as {first['category_id']} "
                f"of annotation {first.get('id', strange[0])}; the file's are {some(sorted(known), 10)}"
            )
        if all(type(i) is int for i in self.places):
            for entry in objects:
                if type(entry["image_id"]) is str and _is_whole(entry["image_id"]):
                    entry["image_id"] = int(entry["image_id"])
                    self.converted += 1
        self.image_of = np.array([self.places.get(entry["image_id"], -1) for entry in objects], dtype=int)
        self.boxes = self._read_boxes()

    def _read_boxes(self) -> np.ndarray:
        """Boxes (x, y, width, height) of all objects, (N, 4)."""
        boxes = [entry["bbox"] for entry in self.objects]
        for i, box in enumerate(boxes):
            if not isinstance(box, list) or len(box) != 4:
                self._fail(
                    f"annotation {self._name(i)}: expected a bbox of 4 numbers (x, y, width, height), found {box!r}"
                )
        if not boxes:
            return np.zeros((0, 4))
        array = np.array(boxes)
        if array.dtype.kind not in "fi":
            for i, box in enumerate(boxes):
                if any(type(value) is str for value in box):
                    boxes[i] = self.objects[i]["bbox"] = [_number(value) for value in box]
                    self.converted += 1
                if not all(type(value) in (int, float) for value in boxes[i]):
                    self._fail(f"annotation {self._name(i)}: expected a bbox of 4 numbers, found {box!r}")
            array = np.array(boxes)
        array = array.astype(float)
        if not np.isfinite(array).all():
            i = int(np.flatnonzero(~np.isfinite(array).all(1))[0])
            self._fail(f"annotation {self._name(i)}: its bbox is not finite: {boxes[i]}")
        return array

    def _name(self, i: int) -> Any:
        return self.objects[i].get("id", f"number {i}")

    def repair(self, findings: Findings) -> list[str]:
        """Fill in what follows from the rest; return what was done, to be said."""
        objects, done = self.objects, []
        if self.converted:
            done.append(f"{self.converted} numbers written as text were made numbers")
        lacking = [i for i, entry in enumerate(objects) if entry.get("area") is None]
        for i in lacking:
            objects[i]["area"] = self._area(i)
        if lacking:
            done.append(f"the area of {len(lacking)} objects was filled in from their masks or boxes")
        before = self.converted
        self.areas = self._numbers(objects, "area", "annotation").astype(float)
        if self.converted > before:
            done.append(f"{self.converted - before} areas written as text were made numbers")
        lacking = [entry for entry in objects if entry.get("iscrowd") is None]
        for entry in lacking:
            entry["iscrowd"] = 0
        if lacking:
            done.append(f"iscrowd of {len(lacking)} objects was set to 0")
        ids = [entry.get("id") for entry in objects]
        # pycocotools takes a match with the annotation 0 for none.
        reason = (
            "some had none"
            if None in ids
            else "two had the same"
            if len(set(ids)) < len(ids)
            else "pycocotools counts matches with the id 0 as misses"
            if 0 in ids
            else "some were no whole numbers"
            if not all(type(i) is int for i in ids)
            else ""
        )
        if reason:
            for number, entry in enumerate(objects, 1):
                entry["id"] = number
            done.append(f"annotations were numbered anew from 1 ({reason})")
        slashes = [image for image in self.images if "\\" in image["file_name"]]
        for image in slashes:
            image["file_name"] = image["file_name"].replace("\\", "/")
        if slashes:
            done.append(f"\\ in the names of {len(slashes)} images was made /")
        return done

    def _area(self, i: int) -> float:
        """Area of an object, of its mask if it has one."""
        image = self.image_of[i]
        segmentation = self.objects[i].get("segmentation")
        width, height = self.boxes[i, 2:]
        if image < 0 or not segmentation:
            return float(width * height)
        try:
            size = int(self.heights[image]), int(self.widths[image])
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
                return float(masks.area(segmentation))
            encoded = masks.frPyObjects(segmentation, *size)
            return float(masks.area(masks.merge(encoded) if isinstance(encoded, list) else encoded))
        except Exception:
            return float(width * height)

    def check(self, findings: Findings) -> None:
        """Check boxes and masks.

        Raises:
            UserError: If they cannot be trained or evaluated.
        """
        orphans = np.flatnonzero(self.image_of < 0)
        if len(orphans):
            first = self.objects[orphans[0]]
            findings.warnings.append(
                f"{len(orphans)} annotations belong to images that are not in the file, such as image "
                f"{first['image_id']!r} of annotation {first['id']}; left out"
            )
        there = np.flatnonzero(self.image_of >= 0)
        x, y, w, h = self.boxes[there].T
        width, height = self.widths[self.image_of[there]], self.heights[self.image_of[there]]
        if len(there) and self.boxes[there].max() <= 1 and width.max() > 2:
            self._fail(
                f"all boxes lie within 0..1, such as {self.objects[there[0]]['bbox']} of annotation "
                f"{self._name(there[0])}; expected pixels: multiply them by the images' width and height"
            )
        margin = 2
        beyond = (x + w > width + margin) | (y + h > height + margin) | (x < -margin) | (y < -margin)
        corners = (w > x) & (h > y) & (w <= width + margin) & (h <= height + margin)
        polygons = self._polygons_say_corners(there) if corners.all() else False
        if polygons or (polygons is None and beyond.sum() >= max(2, len(there) // 20)):
            self._fail(
                f"the boxes are (x1, y1, x2, y2), it seems, such as {self.objects[there[0]]['bbox']} of annotation "
                f"{self._name(there[0])}: as (x, y, width, height), which is expected, {beyond.sum()} of {len(there)} "
                "reach beyond their image or lie beside their polygons"
            )
        if beyond.any():
            ids = [self._name(i) for i in there[beyond]]
            findings.warnings.append(
                f"{len(ids)} boxes reach beyond their image: annotation {some(ids)}; they are cut at its edge"
            )
        if self.use.with_masks:
            self._check_masks(findings, there)

    def _polygons_say_corners(self, there: np.ndarray) -> bool | None:
        """Whether boxes are (x1, y1, x2, y2) of their polygons, in a sample of objects; None without polygons."""
        votes = []
        for i in sample(there, read_all=False, number=200):
            polygons = self.objects[i].get("segmentation") or {}
            if type(polygons) is list and all(type(p) is list and len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
                points = np.concatenate([np.array(polygon, float).reshape(-1, 2) for polygon in polygons])
                low, high, box = points.min(0), points.max(0), self.boxes[i]
                as_corners = np.abs(box - [*low, *high]).max()
                as_sides = np.abs(box - [*low, *(high - low)]).max()
                votes.append(as_corners + 2 < as_sides)
        return np.mean(votes) > 0.9 if votes else None

    def _check_masks(self, findings: Findings, there: np.ndarray) -> None:
        used = [i for i in there.tolist() if self.category_ids[i] in self.labels]
        lacking = [i for i in used if not self.objects[i].get("segmentation")]
        if lacking:
            self._fail(
                f"{len(lacking)} of {len(used)} objects have no segmentation, such as annotation "
                f"{self._name(lacking[0])}, but masks are trained or evaluated; draw them, or use a configuration for "
                "boxes alone, such as configs/retinanet_swin_pc.py"
            )
        invalid = []
        for i in used:
            segmentation = self.objects[i]["segmentation"]
            if type(segmentation) is list:
                if not all(type(polygon) is list for polygon in segmentation):
                    self._fail(f"annotation {self._name(i)}: expected a list of polygons, [[x1, y1, x2, y2, ...], ...]")
                if not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation):
                    invalid.append(i)
            else:
                image = self.image_of[i]
                size = [int(self.heights[image]), int(self.widths[image])]
                runs = segmentation if type(segmentation) is dict else {}
                if list(runs.get("size") or ()) != size or not runs.get("counts"):
                    self._fail(
                        f"annotation {self._name(i)}: expected polygons, or run lengths with counts and the image's "
                        f"size {size} (height, width)"
                    )
        if len(invalid) == len(used) and used:
            self._fail(f"no object has a polygon of three points or more, such as annotation {self._name(invalid[0])}")
        if invalid:
            ids = some(self._name(i) for i in invalid)
            findings.warnings.append(
                f"{len(invalid)} objects have no polygon of three points or more: annotation {ids}; not trained"
            )

    def summarize(self, findings: Findings) -> list[int]:
        """Say what is used of the file, as mmdet's ``CocoDataset`` reads it.

        Returns:
            Indices of the images that are used.

        Raises:
            UserError: If nothing is left.
        """
        use, objects = self.use, self.objects
        there = self.image_of >= 0
        image_of = np.where(there, self.image_of, 0)
        x, y, w, h = self.boxes.T
        inside_w = np.minimum(x + w, self.widths[image_of]) - np.maximum(x, 0)
        inside_h = np.minimum(y + h, self.heights[image_of]) - np.maximum(y, 0)
        empty = there & ((inside_w <= 0) | (inside_h <= 0) | (self.areas <= 0) | (w < 1) | (h < 1))
        of_class = np.array([category in self.labels for category in self.category_ids.tolist()], dtype=bool)
        ignored = np.array([bool(entry.get("ignore")) for entry in objects], dtype=bool)
        crowd = np.array([bool(entry["iscrowd"]) for entry in objects], dtype=bool)
        kept, left_out = self._kept_images(np.unique(self.image_of[there & of_class]))
        in_kept = np.isin(self.image_of, kept)
        left = in_kept & of_class & ~ignored & ~empty & ~crowd

        if use.needs_objects and not objects:
            self._fail("there is no annotation in the file; it has images alone")
        if not kept:
            self._fail(f"none of the {len(self.images)} images is left; {'; '.join(left_out) or 'indices choose none'}")
        if use.needs_objects and not left.any():
            self._fail(f"no object of the classes {', '.join(map(repr, use.classes))} is left of {len(objects)}")
        others = there & ~of_class
        if others.any():
            names = {category["id"]: category["name"] for category in self.categories}
            counts = Counter(names[category] for category in self.category_ids[others].tolist()).most_common()
            findings.warnings.append(
                f"{others.sum()} objects are of categories that are not among classes: "
                f"{some((f'{name} {count}' for name, count in counts), 10)}; left out"
            )
        for what, chosen in (
            ("are smaller than a pixel, or outside their image", empty & of_class & in_kept),
            ("are marked 'ignore'", ignored & of_class & in_kept),
        ):
            if chosen.any():
                ids = some(self._name(i) for i in np.flatnonzero(chosen))
                findings.warnings.append(f"{chosen.sum()} objects {what}: annotation {ids}")

        labels = np.array([self.labels.get(category, -1) for category in self.category_ids.tolist()], dtype=int)
        for label, name in enumerate(use.classes):
            findings.classes.append(self._count(name, np.flatnonzero(left & (labels == label))))
        counts = [(entry.name, entry.count) for entry in findings.classes]
        if use.needs_objects and (none := [repr(name) for name, count in counts if not count]):
            findings.warnings.append(f"no object of class {some(none, 10)}")
        if crowds := (crowd & of_class & in_kept & ~empty).sum():
            left_out.append(f"{crowds} crowds (iscrowd) neither trained nor counted")
        findings.summary = "; ".join(
            [
                f"{len(kept)} of {len(self.images)} images, {left.sum()} of {len(objects)} objects "
                f"({some((f'{name} {count}' for name, count in counts), 10)})",
                *left_out,
            ]
        )
        return kept

    def _kept_images(self, shown: np.ndarray) -> tuple[list[int], list[str]]:
        """Indices of the images that are used, and what is left out; ``shown`` have an annotation of the classes."""
        use, kept, left_out = self.use, np.ones(len(self.images), dtype=bool), []
        filters = (use.filter_cfg or {}) if use.training else {}
        small = np.minimum(self.widths, self.heights) < filters.get("min_size", 0)
        bare = np.ones(len(self.images), dtype=bool)
        bare[shown] = False
        if small.any():
            left_out.append(f"{small.sum()} images smaller than {filters['min_size']} pixels left out")
        kept &= ~small
        if filters.get("filter_empty_gt"):
            if (bare & ~small).any():
                left_out.append(f"{(bare & ~small).sum()} images without objects left out")
            kept &= ~bare
        places = np.flatnonzero(kept)
        if use.indices is not None:
            chosen = places[: use.indices] if isinstance(use.indices, int) else places[list(use.indices)]
            if len(chosen) < len(places):
                left_out.append(f"{len(places) - len(chosen)} images left out by 'indices'")
            places = chosen
        return places.tolist(), left_out

    def _count(self, name: str, objects: np.ndarray) -> ClassCount:
        sizes = np.digitize(self.areas[objects], [SMALL, LARGE])
        images = np.unique(self.image_of[objects])
        names = [self.images[i]["file_name"] for i in sample(images, read_all=False, number=4)]
        return ClassCount(
            name=name,
            count=len(objects),
            images=len(images),
            sizes=np.bincount(sizes, minlength=3).tolist(),
            examples=[os.path.join(self.use.folder, name) for name in names],
        )


def _number(text: str) -> Any:
    """The number that ``text`` is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_whole(text: str) -> bool:
    return text.isdecimal() and (text == "0" or not text.startswith("0"))
