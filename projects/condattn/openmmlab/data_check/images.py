"""Check that images exist, can be read, have the size and orientation of their annotations, and are not too dark."""

import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ...wording import counted, some
from .findings import Findings
from .sampling import in_parallel, sample

ORIENTATION = 0x0112
"""EXIF's tag for the orientation: 1 is upright, 2 to 4 keep width and height, 5 to 8 exchange them."""

DARK = 2**14
"""Images with 16 bits per channel and all values below this are nearly black: only the upper 8 bits are loaded."""

WIDTH_TAG, HEIGHT_TAG = 256, 257
"""TIFF's tags of the size as stored."""

NO_IMAGE = "is no image"

JPEG = ("JPEG", "MPO")
"""Pillow's names of JPEG, whose EXIF orientation OpenCV applies; it does not apply one in XMP."""


@dataclass
class ImageFile:
    """The properties of an image file or a label map.

    Attributes:
        path: Path of the file.
        problem: Why it cannot be used; empty if it can.
        size: Width and height in pixels, as stored.
        orientation: The orientation in its header that is applied when it is loaded, 1 to 8.
        is_disregarded: Whether its header has an orientation that OpenCV does not apply.
        brightest: Largest value of an image with 16 bits per channel; -1 for other images.
        values: Value -> number of pixels that have it, in a label map; empty for other images.
    """

    path: str
    problem: str = ""
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    is_disregarded: bool = False
    brightest: int = -1
    values: dict[int, int] = field(default_factory=dict)

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height after the rotation that the header asks for."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def check_images(
    findings: Findings,
    paths: Sequence[str],
    sizes: Sequence[tuple[int, int] | None],
    read_all: bool = False,
    annotation: str = "annotation",
    look: bool = True,
    everywhere: Sequence[str] = (),
) -> list[str]:
    """Check the images at ``paths``.

    Args:
        findings: The findings, to which those about the images are added.
        paths: Paths of the images.
        sizes: Width and height of each image according to its annotation; None if not known.
        read_all: Read every image instead of a sample.
        annotation: What the messages call the source of the sizes.
        look: Whether to read the files; otherwise only their existence is checked.
        everywhere: All paths that must exist, if ``paths`` is only a part of them.

    Returns:
        The files and folders that were read.
    """
    missing = find_missing(everywhere or paths)
    if missing:
        findings.errors.append(_describe_missing(missing, len(everywhere or paths)))
    folders = sorted({os.path.dirname(path) for path in paths})
    if not look:
        return folders
    expected = dict(zip(paths, sizes, strict=True))
    missing_paths = set(missing)
    images = in_parallel(inspect, sample([path for path in paths if path not in missing_paths], read_all), "images")
    if bad := [f"{image.path} {image.problem}" for image in images if image.problem]:
        findings.errors.append(
            f"{counted(len(bad), 'image')} cannot be read: {some(bad)}; replace them, or take them out"
        )
    good = [image for image in images if not image.problem]
    _check_sizes(findings, [image for image in good if expected[image.path]], expected, annotation)
    _check_depth(findings, good)
    return folders + [image.path for image in images]


def find_missing(paths: Iterable[str]) -> list[str]:
    """Return those of ``paths`` that do not exist; each folder is listed once."""
    folders = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    there = {folder: names_in(folder) for folder in folders}
    return [path for folder in folders for path in folders[folder] if os.path.basename(path) not in there[folder]]


def walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder at and below ``folder`` with the names of its files; linked folders too, each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield place, names


def names_in(folder: str) -> set[str]:
    """Return the names of the entries of ``folder``; empty if it cannot be listed."""
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries}
    except (OSError, ValueError):
        return set()


def _describe_missing(missing: list[str], number: int) -> str:
    first = Path(missing[0])
    alike = [name for name in names_in(str(first.parent)) if _bare(name) == _bare(first.name)]
    hint = "put them there, or set data_root and data_prefix to where they are"
    if first.parent.is_dir() and not os.access(first.parent, os.R_OK | os.X_OK):
        hint = f"the folder {first.parent} may not be read: change its permissions"
    elif alike:
        hint = f"the folder has {some(sorted(alike))}: rename the files, or write their names as they are"
        if any(normalize("NFC", name) == normalize("NFC", first.name) for name in alike):
            hint += " (accents are other Unicode characters there)"
    elif (first.parent.parent / first.name).is_file():
        hint = f"they are in {first.parent.parent}: take the folder out of file_name or of data_prefix"
    verb = "is" if number == 1 else "are"
    return f"{len(missing)} of {counted(number, 'image')} {verb} missing: {some(map(_short, missing))}; {hint}"


def _bare(name: str) -> str:
    """The stem of a file name without differences in case, Unicode form and URL encoding."""
    return normalize("NFC", unquote(Path(name).stem)).lower()


def _short(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}...{path[-80:]}"


def inspect(path: str) -> ImageFile:
    """Read the header of an image file, and check that the file is not truncated."""
    result = examine(path, _inspect)
    if result.problem.startswith(NO_IMAGE):
        with open(path, "rb") as file:
            result.problem += f"; it begins with {file.read(16)!r}"
    return result


def examine(path: str, look: Callable[[ImageFile, Image.Image], None]) -> ImageFile:
    """Open an image file, and let ``look`` write its properties into the result; an unusable file is a problem."""
    result = ImageFile(path, no_file(path))
    if result.problem:
        return result
    try:
        with Image.open(path) as image:
            result.size = image.size
            look(result, image)
    except UnidentifiedImageError:
        result.problem = NO_IMAGE
    except PermissionError:
        result.problem = "may not be read (change its permissions)"
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, OverflowError, struct.error, MemoryError) as error:
        result.problem = f"is damaged or cut short ({error})"
    return result


def _inspect(result: ImageFile, image: Image.Image) -> None:
    if is_tiff := image.format == "TIFF":  # Pillow rotates the size of a TIFF
        result.size = image.tag_v2[WIDTH_TAG], image.tag_v2[HEIGHT_TAG]
    result.orientation = _orientation(image.getexif())
    if not _has_end_marker(result.path, image.format):
        image.load()
    deep, jpeg = _is_16_bit(result.path, image), image.format in JPEG
    is_exif = jpeg and result.orientation == _orientation(_exif(image))
    if deep or (result.orientation != 1 and not is_exif) or not (jpeg or image.format == "PNG"):
        _decode(result, deep, is_tiff)


def _exif(image: Image.Image) -> Image.Exif:
    """The EXIF header of an image alone; Pillow's ``getexif`` also takes the orientation from XMP."""
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif


def _orientation(exif: Image.Exif) -> int:
    value = exif.get(ORIENTATION, 1)
    return value if type(value) is int and 1 <= value <= 8 else 1  # other values count as upright, as in OpenCV


def _decode(result: ImageFile, deep: bool, is_tiff: bool) -> None:
    """Decode an image as OpenCV does in training, and note what it makes of the header and of 16 bits a channel.

    OpenCV applies the orientation of a TIFF even where it is told not to, and that of other formats if it reads it.
    """
    data = np.fromfile(result.path, np.uint8)
    flags = [cv2.IMREAD_COLOR, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, cv2.IMREAD_UNCHANGED]
    wanted = (True, result.orientation != 1, deep)
    try:
        loaded, stored, raw = (cv2.imdecode(data, f) if w else None for f, w in zip(flags, wanted, strict=True))
    except cv2.error as error:
        result.problem = f"cannot be decoded by OpenCV, which loads images in training ({error.err})"
        return
    if loaded is None:
        result.problem = "cannot be decoded by OpenCV, which loads images in training; save it as JPEG or PNG"
        return
    if stored is not None and np.array_equal(loaded, stored):
        result.size, result.is_disregarded = loaded.shape[1::-1], not is_tiff
        if result.is_disregarded or result.orientation >= 5:
            result.orientation = 1
    if raw is not None and raw.dtype == np.uint16:
        result.brightest = int(raw.max())


def no_file(path: str) -> str:
    """Describe why ``path`` is not a file with content; empty if it is one."""
    try:
        if os.path.isdir(path):
            return "is a folder"
        return "" if os.path.getsize(path) else "is empty"
    except FileNotFoundError:
        return f"is a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else "is not there"
    except (OSError, ValueError) as error:
        return f"cannot be opened ({error})"


def _has_end_marker(path: str, format: str | None) -> bool:
    """Whether the file has the end marker of its format near its end; False for formats other than JPEG and PNG."""
    marks = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
    if format not in marks:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return marks[format] in file.read()


def _is_16_bit(path: str, image: Image.Image) -> bool:
    """Whether an image has 16 bits per channel."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24] == 16
    bits = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)
    return image.mode.startswith("I;16") or max(bits if isinstance(bits, tuple) else (bits,)) == 16


def _check_sizes(findings: Findings, images: list[ImageFile], expected: dict, annotation: str) -> None:
    """Compare the sizes of images, upright and as stored, with those of their annotations."""
    wrong, turned, unclear = [], [], []
    for image in images:
        size = expected[image.path]
        if size not in (image.upright_size, image.size):
            (width, height), (its_width, its_height) = image.upright_size, size
            wrong.append(f"{image.path} is {width} x {height}, its {annotation} {its_width} x {its_height}")
        elif size != image.upright_size:
            turned.append(image.path)
        elif size == image.size and image.orientation != 1:
            unclear.append(image.path)
    findings.as_annotated = bool(turned)
    disregarded = [image.path for image in images if image.is_disregarded and image.size == expected[image.path]]
    if wrong:
        findings.errors.append(
            f"{counted(len(wrong), 'image is')} not as large as the {annotation} says (width x height): {some(wrong)}; "
            f"the labels would lie beside the objects: make the {annotation} for the images as they are, or the reverse"
        )
    for paths, one, many, then in (
        (
            turned,
            "image is rotated by its EXIF header while its annotation is not",
            "images are rotated by their EXIF header while their annotations are not",
            "loaded as stored, as annotated",
        ),
        (
            unclear,
            "image is turned or mirrored by its EXIF header, and its size does not tell whether its annotation is too",
            "images are turned or mirrored by their EXIF header, and their sizes do not tell whether their annotations "
            "are too",
            "loaded as the header says: look at them with --out",
        ),
        (
            disregarded,
            "image has an orientation in its header that OpenCV does not apply (in XMP, WebP or AVIF)",
            "images have an orientation in their headers that OpenCV does not apply (in XMP, WebP or AVIF)",
            "loaded as stored: look at them with --out",
        ),
    ):
        if paths:
            findings.warnings.append(f"{counted(len(paths), one, many)}: {some(paths)}; {then}")


def _check_depth(findings: Findings, images: list[ImageFile]) -> None:
    """Report images with 16 bits per channel: an error if most of them are nearly black in their upper 8 bits."""
    deep = [image for image in images if image.brightest >= 0]
    dark = [image for image in deep if image.brightest < DARK]
    names = some(f"{image.path} ({image.brightest})" for image in dark)
    if 2 * len(dark) > len(deep):
        findings.errors.append(
            f"{counted(len(dark), 'image has')} 16 bits a channel, but no value above "
            f"{max(image.brightest for image in dark)}: {names}; only the upper 8 bits are loaded, nearly black: scale "
            "the values to 0..65535, or to 8 bits"
        )
    elif deep:
        findings.warnings.append(
            f"{counted(len(deep), 'image has')} 16 bits a channel: {some(image.path for image in deep)}; the upper 8 "
            "bits are used" + (f", which leaves {len(dark)} nearly black: {names}" if dark else "")
        )
