"""Check the boxes and segmentations of objects against their images and against each other."""

from itertools import chain

import numpy as np

from ...wording import counted, shown
from .annotations import Annotations
from .masks import are_lists, are_polygons, bounds, count_runs, draw, drawable, near_image
from .sampling import sample

MARGIN = 2
"""Number of pixels by which a box may extend beyond its image without a warning."""
DECODED = 50_000
"""Number of masks whose run lengths are decoded; of more masks, an evenly spaced sample."""
OVERSHOOT = 0.1
"""Part of the image's side by which boxes that are (x1, y1, x2, y2) typically seem to reach beyond it."""
EXACT = 5000
"""Number of masks thinner than two pixels that are rasterised to find out whether they are empty."""


def check_boxes(table: Annotations) -> list[str]:
    """Check that the boxes of all objects are (x, y, width, height) in pixels, inside their images; return warnings.

    Raises:
        UserError: If the boxes cannot be used for training or evaluation.
    """
    warnings = []
    orphans = np.flatnonzero(table.image_of < 0)
    if len(orphans):
        belongs = counted(
            len(orphans), "annotation belongs to an image that is", "annotations belong to images that are"
        )
        warnings.append(
            f"{belongs} not in the file, such as image {shown(table.objects[orphans[0]]['image_id'])} of "
            f"{table.name(orphans[0])}; left out"
        )
    in_file = np.flatnonzero(table.image_of >= 0)
    if not len(in_file):
        return warnings
    x, y, w, h = table.boxes[in_file].T
    width, height = table.widths[table.image_of[in_file]], table.heights[table.image_of[in_file]]
    first = f"such as {shown(table.objects[in_file[0]]['bbox'])} of {table.name(in_file[0])}"
    if table.boxes[in_file].max() <= 1 and width.max() > 2:
        table.fail(
            f"all boxes lie within 0..1, {first}; expected pixels: multiply them by the images' width and height"
        )
    beyond = (x + w > width + MARGIN) | (y + h > height + MARGIN) | (x < -MARGIN) | (y < -MARGIN)
    corners = (w > x) & (h > y) & (w <= width + MARGIN) & (h <= height + MARGIN)
    polygons = _polygons_say_corners(table, in_file)
    overshoot = np.maximum((x + w - width) / width, (y + h - height) / height)[beyond]
    reach = beyond.sum() >= max(2, len(in_file) // 20) and corners.mean() >= 0.95 and np.median(overshoot) > OVERSHOOT
    if polygons or (polygons is None and reach):
        table.fail(
            f"the boxes are (x1, y1, x2, y2), it seems, {first}: as (x, y, width, height), which is expected, "
            f"{beyond.sum()} of {len(in_file)} reach beyond their image or lie beside their polygons; write width and "
            "height"
        )
    if beyond.any():
        reaches = table.counted(in_file[beyond], "box reaches beyond its image", "boxes reach beyond their images")
        warnings.append(f"{reaches}; {'it is cut at its edge' if beyond.sum() == 1 else 'they are cut at their edges'}")
    return warnings


def _polygons_say_corners(table: Annotations, in_file: np.ndarray) -> bool | None:
    """Whether the polygons of a sample of objects show that boxes are (x1, y1, x2, y2); None without polygons."""
    votes = []
    for i in sample(in_file, read_all=False, number=200):
        value = table.objects[i].get("segmentation")
        polygons = drawable([p for p in value if type(p) is list]) if type(value) is list else []
        if polygons and are_polygons(polygons):
            low, high = (limit[0] for limit in bounds([polygons]))
            as_corners = np.abs(table.boxes[i] - [*low, *high]).max()
            as_sides = np.abs(table.boxes[i] - [*low, *(high - low)]).max()
            votes.append(as_corners + MARGIN < as_sides)
    return np.mean(votes) > 0.9 if votes else None


def check_masks(table: Annotations, used: np.ndarray, evaluated: bool = False) -> list[str]:
    """Check the segmentations of the objects with the indices ``used``; return warnings.

    Args:
        table: The content of the annotation file.
        used: Indices of the objects.
        evaluated: Whether pycocotools draws them. It does not leave out polygons of less than three points, as mmdet's
            training does, so that those beside others are taken out of the table.

    Raises:
        UserError: If the segmentations cannot be used for training or evaluation.
    """
    segmentations = [table.objects[i].get("segmentation") for i in used.tolist()]
    if lacking := [i for i, value in zip(used, segmentations, strict=True) if not value]:
        has = "has" if len(used) == 1 else "have"
        table.fail(
            f"{len(lacking)} of {counted(len(used), 'object')} {has} no segmentation, such as "
            f"{table.name(lacking[0])}, but masks are trained or evaluated; draw them, or use a configuration for "
            "boxes alone, such as configs/retinanet_swin_pc.py"
        )
    for i, value in zip(used, segmentations, strict=True):
        if type(value) not in (list, dict):
            _refuse(table, i, "polygons, [[x1, y1, x2, y2, ...], ...], or run lengths")
    warnings: list[str] = []
    listed = np.array([type(value) is list for value in segmentations], dtype=bool)
    empty = np.zeros(len(used), dtype=bool)
    if listed.any():
        polygons = [value for value in segmentations if type(value) is list]
        empty[listed] = _check_polygons(table, used[listed], polygons, evaluated, listed.all(), warnings)
    if not listed.all():
        runs = [value for value in segmentations if type(value) is dict]
        empty[~listed] = _check_runs(table, used[~listed], runs)
    if len(used) and empty.all():
        table.fail(
            f"no object has a pixel in its mask, such as {table.name(used[0])}; draw the masks anew, in the images' "
            "pixels"
        )
    if empty.any():
        has = table.counted(used[empty], "object has no pixel in the mask", "objects have no pixel in the mask")
        warnings.append(f"{has}; draw them anew, or take them out")
    return warnings


def _refuse(table: Annotations, i: int, expected: str) -> None:
    expected = f"{expected} for its segmentation"
    table.refuse(table.name(i), expected, table.objects[i]["segmentation"], "correct it")


def _check_polygons(
    table: Annotations, used: np.ndarray, polygons: list[list], evaluated: bool, alone: bool, warnings: list[str]
) -> np.ndarray:
    """Check objects that have polygons, ``alone`` if no other has run lengths.

    Returns:
        Boolean array that is True where a mask is empty.
    """
    flat = list(chain.from_iterable(polygons))
    for are_valid, what in ((are_lists, ""), (are_polygons, " of numbers in pixels")):
        if not are_valid(flat):
            i = next(i for i, value in zip(used, polygons, strict=True) if not are_valid(value))
            _refuse(table, i, f"a list of polygons, [[x1, y1, x2, y2, ...], ...],{what}")
    given = polygons
    if len(drawable(flat)) < len(flat):
        polygons = [drawable(value) for value in polygons]
    drawn = np.array([bool(value) for value in polygons], dtype=bool)
    if not drawn.all():
        without = "no polygon of three points or more"
        has = table.counted(used[~drawn], f"object has {without}", f"objects have {without}")
        advice = "draw them with three points or more, [[x1, y1, x2, y2, x3, y3, ...], ...], or take them out"
        if evaluated or (alone and not drawn.any()):
            table.fail(f"{has}; {advice}")
        warnings.append(f"{has}; not trained")
    if evaluated:
        _leave_out_undrawable(table, used, given, polygons)
    empty = np.zeros(len(drawn), dtype=bool)
    if drawn.any():
        empty[drawn] = _compare(table, used[drawn], [value for value in polygons if value], warnings)
    return empty


def _leave_out_undrawable(table: Annotations, used: np.ndarray, given: list[list], drawn: list[list]) -> None:
    """Take the polygons that cannot be drawn out of the table; ``drawn`` has the others of each object."""
    changed = [(i, new) for i, old, new in zip(used, given, drawn, strict=True) if len(new) < len(old)]
    for i, polygons in changed:
        table.objects[i]["segmentation"] = polygons
    if changed:
        number = counted(len(changed), "object")
        table.repairs.append(f"polygons of less than three points, beside others of {number}, were left out")


def _compare(table: Annotations, used: np.ndarray, polygons: list[list], warnings: list[str]) -> np.ndarray:
    """Compare polygons with their boxes and images; return a boolean array that is True where a mask is empty."""
    low, high = bounds(polygons)
    image, boxes = table.image_of[used], table.boxes[used]
    size = np.stack([table.widths[image], table.heights[image]], 1)
    if (high <= 1).all() and (low >= 0).all() and boxes.max() > 1:
        table.fail(
            f"all polygons lie within 0..1, such as that of {table.name(used[0])}, and the boxes do not; expected "
            "pixels: multiply them by the images' width and height"
        )
    wild = ~near_image(low, high, size)
    if wild.any():
        what = "a polygon that is not finite, or lies further outside its image than that is large"
        table.fail(
            f"{table.counted(used[wild], f'object has {what}', f'objects have {what}')}; draw them anew, in the "
            "images' pixels"
        )
    start, sides = boxes[:, :2], boxes[:, 2:]
    common = np.minimum(start + sides, high) - np.maximum(start, low)
    elsewhere = (common < 0.1 * np.minimum(sides, high - low)).any(1)
    if elsewhere.mean() > 0.5:
        table.fail(
            f"the polygons of {elsewhere.sum()} of {counted(len(used), 'object')} lie beside the boxes, such as that "
            f"of {table.name(used[elsewhere][0])}; both must be of the same object, in pixels: export them anew"
        )
    if elsewhere.any():
        has = table.counted(
            used[elsewhere], "object has its polygon beside its box", "objects have their polygons beside their boxes"
        )
        warnings.append(f"{has}; look at them with --out")
    thin = (np.minimum(high, size) - np.maximum(low, 0) < 2).any(1)
    empty = np.zeros(len(used), dtype=bool)
    for n in np.flatnonzero(thin)[:EXACT]:
        empty[n] = not draw(polygons[n], int(size[n, 1]), int(size[n, 0]))
    return empty


def _check_runs(table: Annotations, used: np.ndarray, runs: list[dict]) -> np.ndarray:
    """Check objects that have run lengths; return a boolean array that is True where a mask is empty."""
    sizes = np.stack([table.heights, table.widths], 1)[table.image_of[used]]
    for i, value, size in zip(used, runs, sizes.tolist(), strict=True):
        if value.get("size") != size:
            table.fail(
                f"{table.name(i)}: expected polygons, or run lengths with counts and the image's size {size} (height, "
                f"width), found the size {shown(value.get('size'))}; export the masks anew"
            )
    decoded = np.array(sample(range(len(runs)), read_all=False, number=DECODED))
    totals, pixels = count_runs(runs[n].get("counts") for n in decoded)
    expected = sizes.prod(1)[decoded]
    wrong = np.flatnonzero(totals != expected)
    if len(wrong):
        n = wrong[0]
        counts = runs[decoded[n]].get("counts")
        found = shown(counts) if totals[n] < 0 else f"counts with the sum {totals[n]}"
        table.fail(
            f"{counted(len(wrong), 'object has')} run lengths that cannot be decoded, such as "
            f"{table.name(used[decoded[n]])}: expected counts of whole numbers from 0 up with the sum {expected[n]}, "
            f"height x width of its image, or their text as pycocotools writes it; found {found}; export the masks anew"
        )
    empty = np.zeros(len(runs), dtype=bool)
    empty[decoded] = pixels == 0
    return empty
