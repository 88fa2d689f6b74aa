"""Read an annotation file in COCO's format into arrays, and repair the defects that can be repaired."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import numpy as np

from ...wording import counted, listed, shown, some
from ..errors import UserError
from .masks import LARGEST, are_numbers, floats, mask_area


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
        warnings: Descriptions of what is doubtful.
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
        self.warnings: list[str] = []
        self._entries = {"image": self.images, "annotation": self.objects, "category": self.categories}
        self._converted: Counter[str] = Counter()  # "area" or "number" -> how many were written as text
        self._read_categories(list(classes))
        self._read_images()
        self._read_objects()
        self.repairs[:0] = self._conversions("number")

    def fail(self, message: str) -> NoReturn:
        """Raise a UserError that names the file."""
        raise UserError(f"{self.path}: {message}")

    def refuse(self, where: str, expected: str, found: Any, advice: str) -> NoReturn:
        """Raise a UserError about a value that is not what is expected at ``where``."""
        self.fail(f"{where}: expected {expected}, found {shown(found)}; {advice}")

    def name(self, i: int, kind: str = "annotation") -> str:
        """Return the kind of entry ``i`` and its id, or its number if it has none, for a message."""
        return f"{kind} {_id(self._entries[kind][i], i)}"

    def counted(self, chosen: np.ndarray, one: str, many: str | None = None) -> str:
        """Return the number of ``chosen`` objects with the words that agree with it, and the first of their ids.

        Args:
            chosen: Indices of objects, or a boolean array that is True for the chosen objects.
            one: Words for one object; see :func:`...wording.counted`.
            many: Words for several objects.
        """
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        kind = "annotation" if len(chosen) == 1 else "annotations"
        return f"{counted(len(chosen), one, many)}: {kind} {some(_id(self.objects[i], i) for i in chosen)}"

    def _conversions(self, what: str) -> list[str]:
        """Describe how many numbers written as text were converted; empty if there are none."""
        number = self._converted[what]
        one, many = f"{what} written as text was made a number", f"{what}s written as text were made numbers"
        return [counted(number, one, many)] if number else []

    def _require(self, kind: str, key: str) -> list[Any]:
        """Return the value of ``key`` in each entry of a kind; fail if an entry has none."""
        values = [entry.get(key) for entry in self._entries[kind]]
        if None in values:
            lacking = [i for i, value in enumerate(values) if value is None]
            verb = "has" if len(values) == 1 else "have"
            self.fail(
                f"{len(lacking)} of {counted(len(values), kind)} {verb} no {key!r}: "
                f"{some(self.name(i, kind) for i in lacking)}; write it there, or take them out"
            )
        return values

    def _numbers(self, kind: str, key: str) -> np.ndarray:
        """Return the value of ``key`` in each entry, a finite number; numbers written as text are converted."""
        values = self._require(kind, key)
        if str in set(map(type, values)):
            for i, text in enumerate(values):
                if type(text) is str and type(number := _number(text)) is not str:
                    values[i] = self._entries[kind][i][key] = number
                    self._converted["area" if key == "area" else "number"] += 1
        array = floats(values)
        if not (valid := np.abs(array) <= LARGEST).all():
            i = int(np.argmin(valid))
            self.refuse(self.name(i, kind), f"a number for {key!r}", values[i], "write a number")
        return array

    def _texts(self, kind: str, key: str) -> list[str]:
        """Return the value of ``key`` in each entry, which must be non-empty text."""
        values = self._require(kind, key)
        for i, value in enumerate(values):
            if type(value) is not str or not value:
                self.refuse(self.name(i, kind), f"text for {key!r}", value, "write it in quotation marks")
        return values

    def _read_categories(self, classes: list[str]) -> None:
        names = self._texts("category", "name")
        if unknown := [name for name in classes if name not in names]:
            self.fail(
                f"no category {listed(unknown)}; its {counted(len(names), 'category is')} {listed(names)}; name "
                "classes as there"
            )
        chosen = set(classes)
        in_file = [name for name in names if name in chosen]
        if twice := [name for name, count in Counter(in_file).items() if count > 1]:
            self.fail(f"the category {twice[0]!r} stands there {in_file.count(twice[0])} times; merge them into one")
        if in_file != classes:  # mmdet gives labels in the order of the file
            place = {name: i for i, name in enumerate(classes)}
            self.categories.sort(key=lambda category: place.get(category["name"], len(classes)))
            names = [category["name"] for category in self.categories]
            self.repairs.append("its categories were put into the order of classes")
        self._numbers("category", "id")
        ids = [category["id"] for category in self.categories]
        if len(set(ids)) < len(ids):
            self.fail(f"two categories have the id {Counter(ids).most_common(1)[0][0]}; number them anew")
        labels = {name: label for label, name in enumerate(classes)}
        self.labels = {i: labels[name] for i, name in zip(ids, names, strict=True) if name in labels}

    def _read_images(self) -> None:
        images = self.images
        if not images:
            self.fail("the list of images is empty; name the images there")
        ids = self._require("image", "id")
        names = self._texts("image", "file_name")
        if slashes := [image for image in images if "\\" in image["file_name"]]:
            for image in slashes:
                image["file_name"] = image["file_name"].replace("\\", "/")
            name = "name" if len(slashes) == 1 else "names"
            self.repairs.append(f"\\ in the {name} of {counted(len(slashes), 'image')} was made /")
        self.widths, self.heights = (self._sizes(key) for key in ("width", "height"))
        for i, value in enumerate(ids):
            if type(value) not in (int, str) or (type(value) is int and abs(value) > LARGEST):
                self.refuse(f"image number {i}", "a whole number or text for 'id'", value, "number it")
        if all(type(i) is str and _is_integer(i) for i in ids):  # the objects may refer to these ids as numbers
            ids = [int(i) for i in ids]
            for image, number in zip(images, ids, strict=True):
                image["id"] = number
            self._converted["number"] += len(ids)
        if len({type(i) for i in ids}) > 1:
            number, text = (next(i for i in ids if type(i) is kind) for kind in (int, str))
            self.fail(
                f"some images have a number for their id, such as {number}, and some a text, such as {shown(text)}; "
                "write all of them as numbers, or all as text"
            )
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            which = some(shown(name) for name, image_id in zip(names, ids, strict=True) if image_id == twice)
            self.fail(
                f"several images have the id {shown(twice)}: {which}; number them anew, and their objects with them"
            )
        self.places = {image_id: i for i, image_id in enumerate(ids)}
        if len(set(names)) < len(names):
            twice = [name for name, number in Counter(image["file_name"] for image in images).items() if number > 1]
            self.warnings.append(
                f"{counted(len(twice), 'image file is', 'image files are')} listed several times, each with a part of "
                f"the objects or with all: {some(twice)}; list each once, with all its objects"
            )

    def _sizes(self, key: str) -> np.ndarray:
        sizes = self._numbers("image", key)
        for i in np.flatnonzero((sizes < 1) | (sizes != np.floor(sizes)) | (sizes > 2**31)).tolist():
            self.fail(
                f"{self.name(i, 'image')} has no size: its {key} is {shown(self.images[i][key])}; write that of the "
                "file, in whole pixels from 1 up"
            )
        return sizes.astype(np.int64)

    def _read_objects(self) -> None:
        self._numbers("annotation", "category_id")
        self.category_ids = [entry["category_id"] for entry in self.objects]
        known = {category["id"] for category in self.categories}
        if strange := [i for i, category in enumerate(self.category_ids) if category not in known]:
            self.fail(
                f"{counted(len(strange), 'annotation has')} a category_id that no category has, such as "
                f"{self.category_ids[strange[0]]} of {self.name(strange[0])}; the file's are "
                f"{some(sorted(known), 10)}: add the category, or correct the id"
            )
        self._read_image_ids()
        self.boxes = self._read_boxes()
        self.ignored, self.crowd = self._flags("ignore"), self._flags("iscrowd")
        lacking = [entry for entry in self.objects if entry.get("iscrowd") is None]
        for entry in lacking:
            entry["iscrowd"] = 0
        if lacking:
            self.repairs.append(f"iscrowd of {counted(len(lacking), 'object')} was set to 0")
        self.areas = self._read_areas()
        self._renumber()
        self._warn_of_duplicates()

    def _warn_of_duplicates(self) -> None:
        """Warn of objects that have the image, category and box of another one."""
        keys = np.column_stack([self.image_of, np.array(self.category_ids), self.boxes])
        order = np.lexsort(keys.T)
        twice = order[1:][(keys[order[1:]] == keys[order[:-1]]).all(1)]
        twice = np.sort(twice[self.image_of[twice] >= 0])
        if len(twice):
            what = "the image, category and box of another one"
            has = self.counted(twice, f"object has {what}", f"objects have {what}")
            self.warnings.append(f"{has}; trained and counted twice: take them out")

    def _read_image_ids(self) -> None:
        ids = self._require("annotation", "image_id")
        integer_ids = all(type(i) is int for i in self.places)
        for i, image_id in enumerate(ids):
            if type(image_id) is int:
                continue
            if type(image_id) is str and integer_ids and _is_integer(image_id):
                ids[i] = self.objects[i]["image_id"] = int(image_id)
                self._converted["number"] += 1
            elif type(image_id) not in (str, float):
                expected = "the id of an image for 'image_id'"
                self.refuse(self.name(i), expected, image_id, "write the id of its image")
        self.image_of = np.array([self.places.get(image_id, -1) for image_id in ids], dtype=int)
        alike = {_normalised_id(image_id): image_id for image_id in self.places}
        for i in np.flatnonzero(self.image_of < 0).tolist():
            if _normalised_id(ids[i]) in alike:
                self.fail(
                    f"{self.name(i)}: its image_id is {shown(ids[i])}, and the image's id is "
                    f"{shown(alike[_normalised_id(ids[i])])}; write both in the same form"
                )

    def _read_boxes(self) -> np.ndarray:
        boxes = self._require("annotation", "bbox")
        expected, advice = "a bbox of 4 numbers (x, y, width, height)", "write its box in pixels"
        for i, box in enumerate(boxes):
            if type(box) is not list or len(box) != 4:
                self.refuse(self.name(i), expected, box, advice)
        if str in set(map(type, chain.from_iterable(boxes))):
            for i, box in enumerate(boxes):
                if str in map(type, box):
                    boxes[i] = self.objects[i]["bbox"] = [_number(v) if type(v) is str else v for v in box]
                    self._converted["number"] += 1
        array = floats(list(chain.from_iterable(boxes))).reshape(-1, 4)
        for i in np.flatnonzero(~(np.abs(array) <= LARGEST).all(1)).tolist():
            if not are_numbers(boxes[i]):
                self.refuse(self.name(i), expected, boxes[i], advice)
            self.fail(f"{self.name(i)}: its bbox is not finite, or is beyond every image: {shown(boxes[i])}; {advice}")
        return array

    def _flags(self, key: str) -> np.ndarray:
        """Return which objects have ``key`` set, as a boolean array; 0 and 1 written as text are converted."""
        values = [entry.get(key) for entry in self.objects]
        for i, value in enumerate(values):
            if value in (0, 1, None):
                continue
            if type(value) is not str or value.strip() not in ("0", "1"):
                self.refuse(self.name(i), f"0 or 1 for {key!r}", value, "write 0 or 1")
            values[i] = self.objects[i][key] = int(value)
            self._converted["number"] += 1
        return np.array(values, dtype=bool)

    def _read_areas(self) -> np.ndarray:
        lacking = np.array([entry.get("area") is None for entry in self.objects], dtype=bool)
        for i in np.flatnonzero(lacking).tolist():
            self.objects[i]["area"] = 0
        areas = self._numbers("annotation", "area")
        self.repairs += self._conversions("area")
        fill = lacking | ((areas <= 0) & (self.boxes[:, 2:] > 0).all(1))
        for i in np.flatnonzero(fill).tolist():
            areas[i] = self.objects[i]["area"] = self._area(i)
        if fill.any():
            self.repairs.append(f"the area of {counted(fill.sum(), 'object')} was filled in from their masks or boxes")
        return areas

    def _area(self, i: int) -> float:
        """Return the area of an object in pixels: of its mask if it has one, else of its box."""
        image = self.image_of[i]
        size = (int(self.heights[image]), int(self.widths[image]))
        area = mask_area(self.objects[i].get("segmentation"), size) if image >= 0 else None
        width, height = self.boxes[i, 2:].tolist()
        return area or max(width, 0) * max(height, 0)

    def _renumber(self) -> None:
        """Renumber the annotations from 1 unless their ids are distinct non-zero integers."""
        ids = [entry.get("id") for entry in self.objects]
        if not set(map(type, ids)) <= {int}:
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


def _id(entry: dict, i: int) -> str:
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
