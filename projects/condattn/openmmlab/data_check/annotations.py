"""Read an annotation file in COCO's format into arrays, and repair the defects that can be repaired."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...wording import counted, listed, shown, some
from ..errors import UserError
from .masks import mask_area

LARGEST = 2.0**53
"""Largest absolute value of a number that is accepted: float64 does not represent all larger integers."""
MANY = {"image": "images", "annotation": "annotations", "category": "categories"}
"""Kind of an entry -> its plural, for messages."""


class Annotations:
    """The content of an annotation file, in arrays.

    Args:
        content: The parsed content of the file; repairs are made in it, in place.
        path: Path of the file, for messages.
        classes: Names of the classes.

    Attributes:
        images: The file's entries of images.
        objects: The file's entries of annotations, one per object.
        categories: The file's entries of categories.
        repairs: Descriptions of the repairs, to be reported.
        labels: Id of a category -> index of its class.
        places: Id of an image -> its index.
        widths: Width of each image, in pixels.
        heights: Height of each image, in pixels.
        category_ids: Category id of each object.
        image_of: Index of the image of each object; -1 if the image is not in the file.
        boxes: x, y, width and height of each object's box, in pixels, (N, 4).
        areas: Area of each object, in pixels.
        crowd: Boolean array: which objects are crowds (``iscrowd``).
        ignored: Boolean array: which objects are marked ``ignore``.

    Raises:
        UserError: If required content is missing or invalid and cannot be repaired.
    """

    def __init__(self, content: dict[str, Any], path: str, classes: Sequence[str]) -> None:
        self.path = path
        self.images: list[dict] = content["images"]
        self.objects: list[dict] = content["annotations"]
        self.categories: list[dict] = content["categories"]
        self.repairs: list[str] = []
        self._converted = 0
        self._read_categories(list(classes))
        self._read_images()
        self._read_objects()
        if self._converted:
            was = counted(
                self._converted, "number written as text was made a number", "numbers written as text were made numbers"
            )
            self.repairs.insert(0, was)

    def fail(self, message: str) -> None:
        """Raise a UserError that names the file."""
        raise UserError(f"{self.path}: {message}")

    def name(self, i: int) -> str:
        """Return the id of object ``i``, or its number if it has none, for a message."""
        return _name(self.objects[i], i)

    def names(self, chosen: Sequence[int]) -> str:
        """Return the first ids of the objects with the indices ``chosen``, for a message."""
        kind = "annotation" if len(chosen) == 1 else "annotations"
        return f"{kind} {some(map(self.name, chosen))}"

    def _require(self, entries: list[dict], key: str, kind: str) -> list[Any]:
        """Return the value of ``key`` in each entry; fail if an entry has none."""
        values = [entry.get(key) for entry in entries]
        if None in values:
            lacking = [i for i, value in enumerate(values) if value is None]
            which = some(f"{kind} {_name(entries[i], i)}" for i in lacking)
            verb = "has" if len(entries) == 1 else "have"
            self.fail(
                f"{len(lacking)} of {counted(len(entries), kind, MANY[kind])} {verb} no {key!r}: {which}; write it "
                "there, or take them out"
            )
        return values

    def _numbers(self, entries: list[dict], key: str, kind: str) -> np.ndarray:
        """Return the value of ``key`` in each entry, a finite number; numbers written as text are converted."""
        values = self._require(entries, key, kind)
        types = set(map(type, values))
        if str in types:
            for i, value in enumerate(values):
                if type(value) is str:
                    values[i] = entries[i][key] = _number(value)
                    self._converted += type(values[i]) is not str
            types = set(map(type, values))
        if not types <= {int, float}:
            bad = next(i for i, value in enumerate(values) if type(value) not in (int, float))
            self._expect_number(entries, key, kind, bad)
        try:
            array = np.array(values, dtype=float)
        except OverflowError:
            array = np.array([value if abs(value) <= LARGEST else np.inf for value in values], dtype=float)
        strange = np.flatnonzero(~(np.abs(array) <= LARGEST))
        if len(strange):
            self._expect_number(entries, key, kind, strange[0])
        return array

    def _expect_number(self, entries: list[dict], key: str, kind: str, i: int) -> None:
        value = entries[i][key]
        self.fail(f"{kind} {_name(entries[i], i)}: expected a number for {key!r}, found {shown(value)}; write a number")

    def _texts(self, entries: list[dict], key: str, kind: str) -> list[str]:
        """Return the value of ``key`` in each entry, which must be non-empty text."""
        values = self._require(entries, key, kind)
        for i, value in enumerate(values):
            if type(value) is not str or not value:
                self.fail(
                    f"{kind} {_name(entries[i], i)}: expected text for {key!r}, found {shown(value)}; write it in "
                    "quotation marks"
                )
        return values

    def _read_categories(self, classes: list[str]) -> None:
        categories = self.categories
        names = self._texts(categories, "name", "category")
        if unknown := [name for name in classes if name not in names]:
            self.fail(
                f"no category {listed(unknown)}; its {counted(len(names), 'category is', 'categories are')} "
                f"{listed(names)}; name classes as there"
            )
        chosen = set(classes)
        in_file = [name for name in names if name in chosen]
        if twice := [name for name, count in Counter(in_file).items() if count > 1]:
            self.fail(f"the category {twice[0]!r} stands there {in_file.count(twice[0])} times; merge them into one")
        if in_file != classes:
            order = in_file if len(in_file) <= 10 else f"the names in that order, {listed(in_file)}"
            self.fail(f"the classes are in another order there, and labels follow the file; set classes = {order}")
        self._numbers(categories, "id", "category")
        ids = [category["id"] for category in categories]
        if len(set(ids)) < len(ids):
            self.fail(f"two categories have the id {Counter(ids).most_common(1)[0][0]}; number them anew")
        labels = {name: label for label, name in enumerate(classes)}
        self.labels = {entry["id"]: labels[entry["name"]] for entry in categories if entry["name"] in labels}

    def _read_images(self) -> None:
        images = self.images
        if not images:
            self.fail("the list of images is empty; name the images there")
        ids = self._require(images, "id", "image")
        names = self._texts(images, "file_name", "image")
        if slashes := [image for image in images if "\\" in image["file_name"]]:
            for image in slashes:
                image["file_name"] = image["file_name"].replace("\\", "/")
            where = counted(len(slashes), "image", "images")
            self.repairs.append(f"\\ in the {'name' if len(slashes) == 1 else 'names'} of {where} was made /")
        self.widths, self.heights = (self._sizes(key) for key in ("width", "height"))
        for i, value in enumerate(ids):
            if type(value) not in (int, str) or (type(value) is int and abs(value) > LARGEST):
                self.fail(
                    f"image number {i}: expected a whole number or text for 'id', found {shown(value)}; number it"
                )
        if all(type(i) is str and _is_integer(i) for i in ids):  # the objects may refer to these ids as numbers
            for image in images:
                image["id"] = int(image["id"])
            self._converted += len(ids)
            ids = [image["id"] for image in images]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            which = some(shown(name) for name, image_id in zip(names, ids, strict=True) if image_id == twice)
            self.fail(
                f"several images have the id {shown(twice)}: {which}; number them anew, and their objects with them"
            )
        self.places = {image_id: i for i, image_id in enumerate(ids)}

    def _sizes(self, key: str) -> np.ndarray:
        sizes = self._numbers(self.images, key, "image")
        wrong = np.flatnonzero((sizes < 1) | (sizes != np.floor(sizes)) | (sizes > 2**31))
        if len(wrong):
            image = self.images[wrong[0]]
            self.fail(
                f"image {_name(image, wrong[0])} has no size: its {key} is {shown(image[key])}; write that of the "
                "file, in whole pixels from 1 up"
            )
        return sizes.astype(np.int64)

    def _read_objects(self) -> None:
        objects = self.objects
        self._numbers(objects, "category_id", "annotation")
        self.category_ids = [entry["category_id"] for entry in objects]
        known = {category["id"] for category in self.categories}
        if not set(self.category_ids) <= known:
            strange = [i for i, category in enumerate(self.category_ids) if category not in known]
            has = counted(len(strange), "annotation has", "annotations have")
            self.fail(
                f"{has} a category_id that no category has, such as {self.category_ids[strange[0]]} of annotation "
                f"{self.name(strange[0])}; the file's are {some(sorted(known), 10)}: add the category, or correct the "
                "id"
            )
        self._read_image_ids()
        self.boxes = self._read_boxes()
        self.ignored, self.crowd = self._flags("ignore"), self._flags("iscrowd")
        self._fill_in_crowds()
        self._read_areas()
        self._renumber()

    def _read_image_ids(self) -> None:
        objects = self.objects
        ids = self._require(objects, "image_id", "annotation")
        integer_ids = all(type(i) is int for i in self.places)
        if set(map(type, ids)) != {int}:
            for i, image_id in enumerate(ids):
                if type(image_id) is str and integer_ids and _is_integer(image_id):
                    ids[i] = objects[i]["image_id"] = int(image_id)
                    self._converted += 1
                elif type(image_id) not in (int, str, float):
                    self.fail(
                        f"annotation {self.name(i)}: expected the id of an image for 'image_id', found "
                        f"{shown(image_id)}; write the id of its image"
                    )
        self.image_of = np.array([self.places.get(image_id, -1) for image_id in ids], dtype=int)
        alike = {_normalised_id(image_id): image_id for image_id in self.places}
        for i in np.flatnonzero(self.image_of < 0).tolist():
            image_id = objects[i]["image_id"]
            if _normalised_id(image_id) in alike:
                self.fail(
                    f"annotation {self.name(i)}: its image_id is {shown(image_id)}, and the image's id is "
                    f"{shown(alike[_normalised_id(image_id)])}; write both in the same form"
                )

    def _read_boxes(self) -> np.ndarray:
        boxes = self._require(self.objects, "bbox", "annotation")
        expected = "expected a bbox of 4 numbers (x, y, width, height)"
        for i, box in enumerate(boxes):
            if type(box) is not list or len(box) != 4:
                self.fail(f"annotation {self.name(i)}: {expected}, found {shown(box)}; write its box in pixels")
        if not boxes:
            return np.zeros((0, 4))
        try:
            array = np.array(boxes)
        except (ValueError, OverflowError):
            array = np.array(None)
        if array.dtype.kind not in "fi" or array.ndim != 2:
            for i, box in enumerate(boxes):
                if str in set(map(type, box)):
                    numbers = [_number(value) if type(value) is str else value for value in box]
                    boxes[i] = self.objects[i]["bbox"] = numbers
                    self._converted += 1
                if not all(type(value) in (int, float) for value in boxes[i]):
                    self.fail(f"annotation {self.name(i)}: {expected}, found {shown(box)}; write its box in pixels")
            boxes = [[value if abs(value) <= LARGEST else np.inf for value in box] for box in boxes]
            array = np.array(boxes)
        array = array.astype(float)
        strange = np.flatnonzero(~(np.abs(array) <= LARGEST).all(1))
        if len(strange):
            i = int(strange[0])
            self.fail(
                f"annotation {self.name(i)}: its bbox is not finite, or is beyond every image: "
                f"{shown(self.objects[i]['bbox'])}; write its box in pixels"
            )
        return array

    def _flags(self, key: str) -> np.ndarray:
        """Return which objects have ``key`` set, as a boolean array; 0 and 1 written as text are converted."""
        values = [entry.get(key) for entry in self.objects]
        if set(map(type, values)) <= {int, type(None)} and {*values} <= {0, 1, None}:
            return np.array(values, dtype=bool)
        for i, value in enumerate(values):
            if value in (0, 1, None):
                continue
            if type(value) is str and value.strip() in ("0", "1"):
                values[i] = self.objects[i][key] = int(value)
                self._converted += 1
            else:
                self.fail(f"annotation {self.name(i)}: expected 0 or 1 for {key!r}, found {shown(value)}; write 0 or 1")
        return np.array(values, dtype=bool)

    def _fill_in_crowds(self) -> None:
        lacking = [entry for entry in self.objects if entry.get("iscrowd") is None]
        for entry in lacking:
            entry["iscrowd"] = 0
        if lacking:
            self.repairs.append(f"iscrowd of {counted(len(lacking), 'object', 'objects')} was set to 0")

    def _read_areas(self) -> None:
        objects = self.objects
        lacking = np.array([entry.get("area") is None for entry in objects], dtype=bool)
        for i in np.flatnonzero(lacking).tolist():
            objects[i]["area"] = 0
        before, self._converted = self._converted, 0
        self.areas = self._numbers(objects, "area", "annotation")
        if self._converted:
            self.repairs.append(
                counted(
                    self._converted, "area written as text was made a number", "areas written as text were made numbers"
                )
            )
        self._converted = before
        fill = lacking | ((self.areas <= 0) & (self.boxes[:, 2] > 0) & (self.boxes[:, 3] > 0))
        for i in np.flatnonzero(fill).tolist():
            self.areas[i] = objects[i]["area"] = self._area(i)
        if fill.any():
            number = counted(fill.sum(), "object", "objects")
            self.repairs.append(f"the area of {number} was filled in from their masks or boxes")

    def _area(self, i: int) -> float:
        """Return the area of an object in pixels: of its mask if it has one, else of its box."""
        image = self.image_of[i]
        size = (int(self.heights[image]), int(self.widths[image])) if image >= 0 else None
        area = mask_area(self.objects[i].get("segmentation"), size) if size else None
        width, height = self.boxes[i, 2:].tolist()
        return area or max(width, 0) * max(height, 0)

    def _renumber(self) -> None:
        """Renumber the annotations from 1 unless their ids are distinct non-zero integers."""
        ids = [entry.get("id") for entry in self.objects]
        types = set(map(type, ids))
        if not types <= {int}:
            reason = "some had none" if None in ids else "some were no whole numbers"
        elif ids and max(max(ids), -min(ids)) > LARGEST:
            reason = "some were too large"
        elif len(set(ids)) < len(ids):
            reason = "two had the same"
        elif 0 in ids:  # pycocotools treats a match with annotation id 0 as no match
            reason = "pycocotools counts matches with the id 0 as misses"
        else:
            return
        for number, entry in enumerate(self.objects, 1):
            entry["id"] = number
        self.repairs.append(f"annotations were numbered anew from 1 ({reason})")


def _name(entry: dict, i: int) -> str:
    value = entry.get("id")
    return f"number {i}" if value is None else value if type(value) is str and len(value) < 80 else shown(value)


def _number(text: str) -> Any:
    """Convert ``text`` to an int or a float; return it unchanged if it is neither."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _normalised_id(image_id: Any) -> Any:
    """Return an image id as text without leading zeros or ``.0``, which tools write differently, for comparison."""
    if type(image_id) is float and image_id.is_integer():
        return str(int(image_id))
    return str(image_id).strip().lstrip("0") or "0"


def _is_integer(text: str) -> bool:
    """Whether ``text`` is a non-negative decimal integer without leading zeros, of at most 15 digits."""
    return text.isascii() and text.isdecimal() and len(text) < 16 and (text == "0" or not text.startswith("0"))
