"""Check image files: there, readable, as large as their annotations say, upright, and bright enough to be seen."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

SAMPLE = 5000
"""Files that are read where not all of them are asked for."""

ORIENTATION = 0x0112
"""EXIF's tag for the orientation; 1 is upright, 2 to 4 keep the sides' lengths, 5 to 8 exchange them."""


@dataclass
class ImageFile:
    """What the header of an image file says.

    Attributes:
        path: Of the file.
        problem: Why it cannot be read, or empty.
        size: Width and height in pixels, as stored.
        orientation: EXIF's.
        brightest: Largest value of an image with 16 bits a channel; -1 for others.
    """

    path: str
    problem: str = ""
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    brightest: int = -1

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height after the rotation that the header asks for."""
        return self.size[::-1] if self.orientation >= 5 else self.size


@dataclass
class ImageReport:
    """What a check of images has found; see :class:`.findings.Findings`."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    as_annotated: bool = False
    read: list[str] = field(default_factory=list)


def some(names: Iterable[Any], number: int = 3) -> str:
    """The first of ``names``, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(map(str, names[:number])) + rest


def sample(items: Sequence[Any], read_all: bool, number: int = SAMPLE) -> list[Any]:
    """``items``, or if they are more than ``number`` and not all are asked for, as many at even distances."""
    if read_all or len(items) <= number:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, number).round().astype(int)]


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
    """``function`` of every item, by several threads, with a progress bar on a terminal."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        return list(tqdm(results, desc=what, total=len(items), unit="file", leave=False, disable=None))


def check_images(
    paths: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    read_all: bool = False,
    annotation: str = "annotation",
) -> ImageReport:
    """Check the images at ``paths``.

    Args:
        paths: Of the images.
        sizes: Width and height that their annotations have.
        read_all: Read each of them, not a sample.
        annotation: What has the sizes.
    """
    report = ImageReport()
    missing = find_missing(paths)
    if missing:
        report.errors.append(_describe_missing(missing, len(paths)))
    expected = dict(zip(paths, sizes, strict=True))
    gone = set(missing)
    images = in_parallel(inspect, sample([path for path in paths if path not in gone], read_all), "images")
    report.read = [*sorted({os.path.dirname(path) for path in paths}), *(image.path for image in images)]
    if bad := [f"{image.path} {image.problem}" for image in images if image.problem]:
        report.errors.append(f"{len(bad)} images cannot be read: {some(bad)}")
    good = [image for image in images if not image.problem]
    _check_sizes(report, good, expected, annotation)
    _check_depth(report, good)
    return report


def find_missing(paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that are not there; folders are listed, once each."""
    folders = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    missing = []
    for folder, files in folders.items():
        there = _names(folder)
        missing += [path for path in files if os.path.basename(path) not in there]
    return missing


def _names(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _describe_missing(missing: list[str], number: int) -> str:
    first = Path(missing[0])
    alike = [name for name in _names(str(first.parent)) if Path(name).stem.lower() == first.stem.lower()]
    if alike:
        hint = f"; the folder has {some(sorted(alike))}: rename the files, or write their names as they are"
    else:
        hint = "; put them there, or set data_root and data_prefix to where they are"
    return f"{len(missing)} of {number} images are missing: {some(missing)}{hint}"


def inspect(path: str) -> ImageFile:
    """Read the header of an image file, and see that the file goes to its end."""
    if not os.path.getsize(path):
        return ImageFile(path, problem="is empty")
    try:
        with Image.open(path) as image:
            result = ImageFile(path, size=image.size, orientation=image.getexif().get(ORIENTATION, 1))
            if not _ends(path, image.format):
                image.load()
            deep = _is_deep(path, image)
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            start = file.read(16)
        return ImageFile(path, problem=f"is no image; it begins with {start!r}")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return ImageFile(path, problem=f"is damaged or cut short ({error})")
    if deep:
        pixels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        if pixels is None:
            return ImageFile(path, problem="cannot be decoded by OpenCV, which loads images in training")
        result.brightest = int(pixels.max()) if pixels.dtype == np.uint16 else -1
    return result


def _ends(path: str, format: str | None) -> bool:
    """Whether the last bytes are those that end a file of this format; False where that cannot be told."""
    marks = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
    if format not in marks:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return marks[format] in file.read()


def _is_deep(path: str, image: Image.Image) -> bool:
    """Whether a channel has 16 bits."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24] == 16
    bits = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)
    return image.mode.startswith("I;16") or max(bits if isinstance(bits, tuple) else (bits,)) == 16


def _check_sizes(report: ImageReport, images: list[ImageFile], expected: dict, annotation: str) -> None:
    """Compare sizes with those of the annotations, upright and as stored."""
    wrong, unclear = [], []
    for image in images:
        size = expected[image.path]
        fits_upright, fits_stored = size == image.upright_size, size == image.size
        if not fits_upright and not fits_stored:
            wrong.append(f"{image.path} is {_by(image.upright_size)}, its {annotation} {_by(size)}")
        elif not fits_upright:
            report.as_annotated = True
        elif fits_stored and image.orientation != 1:
            unclear.append(image.path)
    if wrong:
        report.errors.append(
            f"{len(wrong)} images are not as large as their {annotation} says (width x height): {some(wrong)}; the "
            f"labels would lie beside the objects: make the {annotation} for the images as they are, or the reverse"
        )
    if report.as_annotated:
        report.warnings.append(
            "some images are rotated by their EXIF header while their annotations are not; these images are loaded as "
            "stored, as they were annotated"
        )
    if unclear:
        report.warnings.append(
            f"{len(unclear)} images are turned or mirrored by their EXIF header, and their sizes do not tell whether "
            f"their annotations are too: {some(unclear)}; they are loaded as the header says: look at them with --out"
        )


def _check_depth(report: ImageReport, images: list[ImageFile]) -> None:
    deep = [image for image in images if image.brightest >= 0]
    if not deep:
        return
    brightest = max(image.brightest for image in deep)
    names = some(image.path for image in deep)
    if brightest < 2**14:
        report.errors.append(
            f"{len(deep)} images have 16 bits a channel, but no value above {brightest}: {names}; only the upper 8 "
            f"bits are loaded, 0 to {brightest >> 8} of 255, nearly black: scale the values to 0..65535, or to 8 bits"
        )
    else:
        report.warnings.append(f"{len(deep)} images have 16 bits a channel: {names}; the upper 8 bits are used")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
