"""Check the label maps of a data set for semantic segmentation as mmseg will read them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ...wording import counted, listed, some
from .findings import ClassCount, Findings
from .images import ImageFile, check_images, examine, find_missing, names_in, walk
from .sampling import in_parallel, sample

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Largest number of pixels of a label map that Pillow, which loads them in training, opens."""


@dataclass
class MapUse:
    """How a data set uses images and label maps.

    Attributes:
        images: Paths of the images that are used.
        maps: Paths of their label maps.
        total: Number of images before ``indices`` selected some of them.
        folder: Folder that was searched for images; empty if a file lists them.
        suffix: File name suffix of the images.
        map_suffix: File name suffix of the label maps.
        map_folder: Folder of the label maps.
        classes: Names of the classes.
        ignore_index: Label of pixels that are ignored.
        reduce_zero_label: Whether 0 is ignored and every other value is reduced by 1.
        label_map: Label in a file -> label among the chosen classes; None if there is no such mapping.
        training: Whether the data are used for training.
        list_file: File that lists the images; empty if the folder was searched.
        read_all: Read every file instead of a sample.
        plain_images: Whether images are loaded as mmcv does by default; if not, only their existence is checked.
        plain_maps: Whether label maps are loaded as mmseg does by default; if not, only their existence is checked.
    """

    images: Sequence[str]
    maps: Sequence[str]
    total: int
    folder: str
    suffix: str
    map_suffix: str
    map_folder: str
    classes: Sequence[str]
    ignore_index: int
    reduce_zero_label: bool
    label_map: dict[int, int] | None
    training: bool
    list_file: str = ""
    read_all: bool = False
    plain_images: bool = True
    plain_maps: bool = True


def check_label_maps(use: MapUse) -> tuple[Findings, list[str]]:
    """Check images and label maps.

    Returns:
        The findings, and the files and folders that were read.
    """
    findings = Findings()
    others, read = _other_images(use) if use.folder else ([], [])
    if use.list_file:
        read.append(use.list_file)
        findings.errors += _check_list(use)
    if not findings.errors and not use.images:
        hint = f"; it has {some(others)}: set img_suffix" if others else ": put the images there, or set data_prefix"
        findings.errors.append(f"no image with the suffix {use.suffix} in {use.folder or use.list_file}{hint}")
    if findings.errors:
        return findings, read
    if others:
        findings.warnings.append(
            f"{counted(len(others), 'image has')} another suffix than {use.suffix} in {use.folder}: {some(others)}; "
            "left out: rename them, or make them a data set of their own with another img_suffix"
        )
    if unused := _unused_maps(use):
        findings.warnings.append(
            f"{counted(len(unused), 'label map has', 'label maps have')} no image: {some(unused)}; left out: put the "
            "images beside the others, with the same names"
        )
    missing = find_missing(use.maps)
    if missing:
        findings.errors.append(_describe_missing(use, missing))
    missing_paths = set(missing)
    pairs = sample(list(zip(use.images, use.maps, strict=True)), use.read_all)
    there = [path for _, path in pairs if path not in missing_paths] if use.plain_maps else []
    maps = in_parallel(partial(examine, look=_count_values), there, "label maps")
    read += sorted({os.path.dirname(path) for path in use.maps}) + there
    if bad := [f"{label_map.path} {label_map.problem}" for label_map in maps if label_map.problem]:
        findings.errors.append(
            f"{counted(len(bad), 'label map')} cannot be used: {some(bad)}; write them anew, with one channel of class "
            "indices"
        )
    good = {label_map.path: label_map for label_map in maps if not label_map.problem}
    if not use.classes:
        unnamed = "metainfo has no classes, so that the values of label maps cannot be checked; name them"
        findings.warnings.append(unnamed)
    elif use.plain_maps:
        _check_values(findings, use, [(image, good[path]) for image, path in pairs if path in good])
    images, maps_of_images = zip(*pairs, strict=True)
    sizes = [good[path].size if path in good else None for path in maps_of_images]
    looks = dict(read_all=True, annotation="label map", look=use.plain_images, everywhere=use.images)
    read += check_images(findings, images, sizes, **looks)
    total = max(sum(entry.count for entry in findings.classes), 1)
    shares = sorted(((entry.count / total, entry.name) for entry in findings.classes), key=lambda share: -share[0])
    parts = f" ({some((f'{name} {100 * share:.3g} %' for share, name in shares), 10)})" if good and shares else ""
    part = f", {len(pairs)} of them read" if len(pairs) < len(use.images) else ""
    findings.summary = (
        f"{len(use.images)} of {counted(use.total, 'image')}{part}, {counted(len(use.classes), 'class')}{parts}"
    )
    return findings, read


def _check_list(use: MapUse) -> Iterator[str]:
    """Yield what is wrong with the lines of the file that lists the images."""
    lines = [line.strip() for line in Path(use.list_file).read_text(errors="replace").splitlines()]
    blank = [number for number, line in enumerate(lines, 1) if not line]
    names = [line for line in lines if use.suffix and line.endswith(use.suffix)]
    if blank:
        yield f"{use.list_file}: {counted(len(blank), 'line is')} blank: line {some(blank)}; take them out"
    elif names:
        yield (
            f"{use.list_file}: {counted(len(names), 'name has')} the suffix {use.suffix}, such as {names[0]}, which "
            "mmseg adds; write names without it, or set img_suffix and seg_map_suffix"
        )


def _describe_missing(use: MapUse, missing: list[str]) -> str:
    verb = "has" if len(use.maps) == 1 else "have"
    hint = ""
    folder = os.path.dirname(missing[0])
    if len(missing) == len(use.maps):
        names = sorted(names_in(folder))
        hint = f"; {folder} has {some(names)}: set seg_map_suffix" if names else f"; {folder} is empty, or not there"
    return (
        f"{len(missing)} of {counted(len(use.maps), 'image')} {verb} no label map: {some(missing)} not "
        f"there; expected the image's name with {use.map_suffix} in place of {use.suffix}{hint}"
    )


def _other_images(use: MapUse) -> tuple[list[str], list[str]]:
    """Return the images that are left out because of their suffix, and the folders that were searched.

    A file that accompanies a used image, such as a_color.png beside a.jpg, does not count as left out.
    """
    folders, others = [], []
    used = {os.path.relpath(path, use.folder).removesuffix(use.suffix) for path in use.images}
    maps = os.path.realpath(use.map_folder)
    for folder, names in walk(use.folder):
        folders.append(folder)
        suffixes = (use.suffix, use.map_suffix) if Path(os.path.realpath(folder)).is_relative_to(maps) else use.suffix
        for name in names:
            is_image = Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
            if not is_image or name.endswith(suffixes):
                continue
            path = os.path.relpath(os.path.join(folder, name), use.folder)
            if path.lower().endswith(use.suffix.lower()) or not _accompanies(path, used):
                others.append(name)
    return sorted(others), folders


def _unused_maps(use: MapUse) -> list[str]:
    """Names of the label maps that no image has; empty if a part of the images was selected, or maps lie among them."""
    folders = [Path(os.path.realpath(folder)) for folder in (use.folder, use.map_folder)]
    if not use.folder or len(use.images) < use.total or folders[0].is_relative_to(folders[1]):
        return []
    used = {os.path.normpath(path) for path in use.maps}
    return sorted(
        name
        for folder, names in walk(use.map_folder)
        for name in names
        if name.endswith(use.map_suffix)
        and not name.startswith(".")
        and os.path.normpath(os.path.join(folder, name)) not in used
    )


def _accompanies(path: str, used: set[str]) -> bool:
    """Whether ``path`` begins with the path of a used image without its suffix, then a character like '_' or '.'."""
    return any(path[:i] in used for i, letter in enumerate(path) if not letter.isalnum())


def _count_values(result: ImageFile, image: Image.Image) -> None:
    """Count the pixels of each value of a label map."""
    if (channels := len(image.getbands())) != 1:
        result.problem = f"has {channels} channels ({image.mode}); expected one, whose values are classes"
    elif PIXELS and image.width * image.height > PIXELS:
        result.problem = f"has more than {PIXELS} pixels, the most that Pillow loads in training; cut it into tiles"
    elif image.mode in ("L", "P"):
        result.values = {value: count for value, count in enumerate(image.histogram()) if count}
    else:
        values, counts = np.unique(np.asarray(image), return_counts=True)
        numbers = (value if value % 1 else int(value) for value in values.tolist())
        result.values = dict(zip(numbers, counts.tolist(), strict=True))


def to_classes(values: np.ndarray, use: MapUse) -> np.ndarray:
    """Convert values from 0 to 255 in a file to labels, as mmseg's ``LoadAnnotations`` does."""
    labels = values.astype(np.int64)
    if use.reduce_zero_label:
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    if use.label_map:
        labels = np.array([use.label_map.get(int(label), int(label)) for label in labels])
    return labels


def _check_values(findings: Findings, use: MapUse, good: list[tuple[str, ImageFile]]) -> None:
    """Check the values of label maps, given with their images, and count the pixels of each class."""
    number = len(use.classes)
    labels = to_classes(np.arange(256), use).tolist()
    ignored = {use.ignore_index}
    if use.label_map or use.reduce_zero_label:
        ignored.add(255)  # the label that mmseg gives to values that are left out
    classes = np.zeros((len(good), number), dtype=np.int64)
    strange: dict[str, list[float]] = {}
    for row, (_, entry) in enumerate(good):
        for value, pixels in entry.values.items():
            label = labels[value] if value in range(256) else -1
            if 0 <= label < number and label not in ignored:
                classes[row, label] += pixels
            elif label not in ignored:
                strange.setdefault(entry.path, []).append(value)
    raw = set().union(*(entry.values for _, entry in good))
    if raw == {0, 255} and number > 1 and use.ignore_index == 255 and not use.reduce_zero_label:
        findings.errors.append(
            f"the label maps hold 0 and 255 alone; 255 is ignored, so that {use.classes[1]!r} has no pixel: write 1 in "
            "place of 255 (values are indices of classes)"
        )
    elif strange:
        first, values = next(iter(strange.items()))
        reduced = " (reduce_zero_label takes 1 off)" if use.reduce_zero_label else ""
        findings.errors.append(
            f"{counted(len(strange), 'label map has')} values that no class has, such as {some(values)} in {first}; "
            f"expected 0 to {number - 1}{reduced} for {counted(number, 'class')} ({listed(use.classes)}), or "
            f"{use.ignore_index} for pixels to ignore: write the maps anew, or name all classes"
        )
    elif good:
        _check_classes(findings, use, [entry.path for _, entry in good], classes)
    for label, name in enumerate(use.classes):
        rows = np.flatnonzero(classes[:, label])
        examples = [good[i][0] for i in sample(rows, read_all=False, number=4)]
        findings.classes.append(ClassCount(name, int(classes[:, label].sum()), len(rows), examples=examples))


def _check_classes(findings: Findings, use: MapUse, paths: list[str], classes: np.ndarray) -> None:
    """Report classes without pixels and label maps without labels; ``classes`` has the pixels of each map and class."""
    present = [name for name, pixels in zip(use.classes, classes.sum(0), strict=True) if pixels]
    if not present:
        findings.barren = (
            f"every pixel of the label maps is ignored ({use.ignore_index}); there is nothing to learn from: write the "
            "index of its class into each pixel"
        )
    elif len(present) == 1 and use.training:
        findings.barren = (
            f"every labelled pixel is {present[0]!r}; with one class alone there is nothing to learn: label what is "
            "not the object as a class of its own, such as 'background'"
        )
    else:
        if absent := [name for name in use.classes if name not in present]:
            findings.warnings.append(f"no pixel of class {listed(absent)}")
        if ignored := [path for path, counts in zip(paths, classes, strict=True) if not counts.any()]:
            findings.warnings.append(f"{counted(len(ignored), 'label map is')} ignored in every pixel: {some(ignored)}")
