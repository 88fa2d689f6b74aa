"""Check the label maps of a semantic segmentation as mmseg will read them."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .findings import ClassCount, Findings
from .images import check_images, find_missing, in_parallel, sample, some

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass
class MapUse:
    """How a data set uses images and label maps.

    Attributes:
        images: Paths of the images that are used.
        maps: Paths of their label maps.
        total: Number of images before a part of them was chosen.
        folder: Folder that was searched for images; empty if a file lists them.
        suffix: Of the images.
        map_suffix: Of the label maps.
        classes: Names of the classes.
        ignore_index: Value of pixels that count for nothing.
        reduce_zero_label: Whether 0 is ignored, and every other value is one too high.
        label_map: From a value to that of the chosen classes.
        training: Whether the data train.
        read_all: Read every file, not a sample.
    """

    images: Sequence[str]
    maps: Sequence[str]
    total: int
    folder: str
    suffix: str
    map_suffix: str
    classes: Sequence[str]
    ignore_index: int
    reduce_zero_label: bool
    label_map: dict[int, int] | None
    training: bool
    read_all: bool = False


@dataclass
class LabelMap:
    """What a label map holds.

    Attributes:
        path: Of the file.
        problem: Why it cannot be used, or empty.
        size: Width and height in pixels.
        values: Number of pixels of each value.
    """

    path: str
    problem: str = ""
    size: tuple[int, int] = (0, 0)
    values: np.ndarray | None = None


def check_label_maps(use: MapUse) -> tuple[Findings, list[str]]:
    """Check images and label maps.

    Returns:
        The findings, and the files and folders that they were taken from.
    """
    findings = Findings()
    read = [use.folder] if use.folder else []
    others = _other_images(use)
    if not use.images:
        hint = f"; it has {some(others)}: set img_suffix" if others else ""
        findings.errors.append(f"no image with the suffix {use.suffix} in {use.folder or 'the list'}{hint}")
        return findings, read
    if others:
        findings.warnings.append(
            f"{len(others)} images in {use.folder} have another suffix than {use.suffix}: {some(others)}; left out: "
            "rename them, or make them a data set of their own with another img_suffix"
        )
    missing = set(find_missing(use.maps))
    if missing:
        findings.errors.append(
            f"{len(missing)} of {len(use.maps)} images have no label map: {some(sorted(missing))} not there; expected "
            f"the image's name with {use.map_suffix} in place of {use.suffix}"
        )
    pairs = [(image, path) for image, path in zip(use.images, use.maps, strict=True) if path not in missing]
    pairs = sample(pairs, use.read_all)
    maps = in_parallel(read_label_map, [path for _, path in pairs], "label maps")
    read += sorted({os.path.dirname(path) for path in use.maps}) + [label_map.path for label_map in maps]
    if bad := [f"{label_map.path} {label_map.problem}" for label_map in maps if label_map.problem]:
        findings.errors.append(f"{len(bad)} label maps cannot be used: {some(bad)}")
    good = [(image, entry) for (image, _), entry in zip(pairs, maps, strict=True) if not entry.problem]
    pixels = _check_values(findings, use, good)
    report = check_images(
        [image for image, _ in good], [entry.size for _, entry in good], read_all=True, annotation="label map"
    )
    findings.errors += report.errors
    findings.warnings += report.warnings
    findings.as_annotated = report.as_annotated
    total = max(pixels.sum(), 1)
    shares = sorted(zip(use.classes, pixels.sum(0), strict=True), key=lambda entry: -entry[1]) if len(pixels) else []
    part = f", {len(pairs)} of them read" if len(pairs) < len(use.images) else ""
    findings.summary = (
        f"{len(use.images)} of {use.total} images{part}, {len(use.classes)} classes "
        f"({some((f'{name} {100 * count / total:.3g} %' for name, count in shares), 10)})"
    )
    return findings, [*read, *report.read]


def _other_images(use: MapUse) -> list[str]:
    """Images in the folder that have another suffix than is looked for."""
    if not use.folder:
        return []
    files = (name for _, _, names in os.walk(use.folder) for name in names)
    # A label map may lie beside its image.
    return sorted(
        name
        for name in files
        if Path(name).suffix.lower() in SUFFIXES and not name.endswith((use.suffix, use.map_suffix))
    )


def read_label_map(path: str) -> LabelMap:
    """Read a label map, and count the pixels of each value."""
    if not os.path.getsize(path):
        return LabelMap(path, "is empty")
    try:
        with Image.open(path) as image:
            if len(image.getbands()) != 1:
                return LabelMap(
                    path, f"has {len(image.getbands())} channels ({image.mode}); expected one, whose values are classes"
                )
            if image.mode in ("L", "P"):
                values = np.array(image.histogram(), dtype=np.int64)
            else:
                values = np.bincount(np.asarray(image).astype(np.int64).clip(0).ravel(), minlength=256)
            return LabelMap(path, size=image.size, values=values)
    except UnidentifiedImageError:
        return LabelMap(path, "is no image")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return LabelMap(path, f"is damaged or cut short ({error})")


def to_classes(values: np.ndarray, use: MapUse) -> np.ndarray:
    """Class of each value from 0 to 255 that stands in a file, as mmseg's ``LoadAnnotations`` makes it."""
    labels = values.astype(np.int64)
    if use.reduce_zero_label:
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    if use.label_map:
        labels = np.array([use.label_map.get(int(label), int(label)) for label in labels])
    return labels


def _check_values(findings: Findings, use: MapUse, good: list[tuple[str, LabelMap]]) -> np.ndarray:
    """Check the values of label maps; return the pixels of each class, (number of maps, classes)."""
    number = len(use.classes)
    labels = to_classes(np.arange(256), use)
    classes = np.zeros((len(good), number), dtype=np.int64)
    too_high: dict[str, list[int]] = {}
    raw = Counter()
    for row, (_, entry) in enumerate(good):
        for value in np.flatnonzero(entry.values).tolist():
            raw[value] += int(entry.values[value])
            label = labels[value] if value < 256 else value
            if label < number and value < 256:
                classes[row, label] += entry.values[value]
            elif label != use.ignore_index:
                too_high.setdefault(entry.path, []).append(value)
    names = ", ".join(map(repr, use.classes))
    if set(raw) == {0, 255} and number > 1 and use.ignore_index == 255 and not use.reduce_zero_label:
        findings.errors.append(
            f"the label maps hold 0 and 255 alone; 255 is ignored, so that {use.classes[1]!r} has no pixel: write 1 in "
            "place of 255 (values are indices of classes)"
        )
    elif too_high:
        first, values = next(iter(too_high.items()))
        reduced = " (reduce_zero_label takes 1 off)" if use.reduce_zero_label else ""
        findings.errors.append(
            f"{len(too_high)} label maps have values that no class has, such as {some(values)} in {first}; expected 0 "
            f"to {number - 1}{reduced} for {number} classes ({names}), or {use.ignore_index} for pixels to ignore"
        )
    else:
        _check_classes(findings, use, good, classes)
    for label, name in enumerate(use.classes):
        shown = np.flatnonzero(classes[:, label])
        examples = [good[i][0] for i in sample(shown, read_all=False, number=4)]
        findings.classes.append(ClassCount(name, int(classes[:, label].sum()), len(shown), examples=examples))
    return classes


def _check_classes(findings: Findings, use: MapUse, good: list, classes: np.ndarray) -> None:
    if not good:
        return
    shown = np.flatnonzero(classes.sum(0))
    if not len(shown):
        findings.errors.append(
            f"every pixel of the label maps is ignored ({use.ignore_index}); there is nothing to learn from"
        )
        return
    if len(shown) == 1 and use.training:
        findings.errors.append(
            f"every labelled pixel is {use.classes[shown[0]]!r}; with one class alone there is nothing to learn: label "
            "what is not the object as a class of its own, such as 'background'"
        )
        return
    absent = [repr(name) for label, name in enumerate(use.classes) if label not in set(shown)]
    if absent:
        findings.warnings.append(f"no pixel of class {some(absent, 10)}")
    ignored = [entry.path for row, (_, entry) in enumerate(good) if not classes[row].any()]
    if ignored:
        findings.warnings.append(f"{len(ignored)} label maps are ignored in every pixel: {some(ignored)}")
