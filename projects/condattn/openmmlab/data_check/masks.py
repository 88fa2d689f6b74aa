"""Check the segmentations of objects: polygons against their images and boxes, run lengths against their images."""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as masks

from ...wording import counted, shown
from .runs import count_runs
from .sampling import sample

if TYPE_CHECKING:
    from .annotations import Annotations

DECODED = 50_000
"""Number of masks whose run lengths are decoded; of more masks, an evenly spaced sample."""
EXACT = 5000
"""Number of masks thinner than two pixels that are rasterised to find out whether they are empty."""


def check_masks(table: "Annotations", used: np.ndarray) -> list[str]:
    """Check the segmentations of the objects with the indices ``used``; return warnings.

    Raises:
        UserError: If the segmentations cannot be used for training or evaluation.
    """
    segmentations = [table.objects[i].get("segmentation") for i in used.tolist()]
    if not all(segmentations):
        lacking = [i for i, value in zip(used, segmentations, strict=True) if not value]
        has = "has" if len(used) == 1 else "have"
        table.fail(
            f"{len(lacking)} of {counted(len(used), 'object', 'objects')} {has} no segmentation, such as annotation "
            f"{table.name(lacking[0])}, but masks are trained or evaluated; draw them, or use a configuration for "
            "boxes alone, such as configs/retinanet_swin_pc.py"
        )
    known = {list: 1, dict: 2}
    kinds = np.array([known.get(kind, 0) for kind in map(type, segmentations)], dtype=int)
    if len(strange := used[kinds == 0]):
        _fail_format(table, strange[0], "polygons, [[x1, y1, x2, y2, ...], ...], or run lengths")
    warnings = []
    empty = np.zeros(len(used), dtype=bool)
    for kind, check in ((1, _check_polygons), (2, _check_runs)):
        places = np.flatnonzero(kinds == kind)
        if len(places):
            empty[places] = check(table, used[places], [segmentations[i] for i in places], warnings)
    if len(used) and empty.all():
        table.fail(
            f"no object has a pixel in its mask, such as annotation {table.name(used[0])}; draw the masks anew, in the "
            "images' pixels"
        )
    if empty.any():
        has = counted(empty.sum(), "object has", "objects have")
        warnings.append(f"{has} no pixel in the mask: {table.names(used[empty])}; draw them anew, or take them out")
    return warnings


def _fail_format(table: "Annotations", i: int, expected: str) -> None:
    found = table.objects[i]["segmentation"]
    table.fail(
        f"annotation {table.name(i)}: expected {expected} for its segmentation, found {shown(found)}; correct it"
    )


def _check_polygons(table: "Annotations", used: np.ndarray, polygons: list[list], warnings: list[str]) -> np.ndarray:
    """Check objects that have polygons; return a boolean array that is True where a mask is empty."""
    expected = "a list of polygons, [[x1, y1, x2, y2, ...], ...],"
    flat = list(chain.from_iterable(polygons))
    if set(map(type, flat)) != {list}:
        number = next(n for n, value in enumerate(polygons) if set(map(type, value)) != {list})
        _fail_format(table, used[number], expected)
    lengths = np.fromiter(map(len, flat), int, len(flat))
    if ((lengths >= 6) & (lengths % 2 == 0)).all():
        drawable = polygons
    else:
        drawable = [[polygon for polygon in value if is_drawable(polygon)] for value in polygons]
    drawn = np.fromiter(map(bool, drawable), bool, len(drawable))
    for i in np.flatnonzero(~drawn)[:EXACT]:
        if any(type(number) not in (int, float) for number in chain.from_iterable(polygons[i])):
            _fail_format(table, used[i], expected)
    if not drawn.any():
        table.fail(
            f"no object has a polygon of three points or more, such as annotation {table.name(used[0])}; draw them "
            "with three points or more, [[x1, y1, x2, y2, x3, y3, ...], ...]"
        )
    if not drawn.all():
        has = counted((~drawn).sum(), "object has", "objects have")
        warnings.append(f"{has} no polygon of three points or more: {table.names(used[~drawn])}; not trained")
    used, drawable = used[drawn], [value for value in drawable if value]
    if not set(map(type, chain.from_iterable(chain.from_iterable(drawable)))) <= {int, float}:
        number = next(n for n, value in enumerate(drawable) if not _are_numbers(value))
        _fail_format(table, used[number], f"{expected} of numbers in pixels")
    low, high = bounds(drawable)
    empty = np.zeros(len(drawn), dtype=bool)
    empty[drawn] = _compare(table, used, drawable, low, high, warnings)
    return empty


def _are_numbers(polygons: list[list]) -> bool:
    return all(type(number) in (int, float) for number in chain.from_iterable(polygons))


def is_drawable(polygon: Any) -> bool:
    """Whether mmdet draws a polygon: it must have three points or more, of two numbers each."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def bounds(polygons: Sequence[list[list]]) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest (x, y) of each object's polygons, (N, 2) each; every object must have a polygon."""
    parts = np.fromiter(map(len, polygons), int, len(polygons))
    sizes = np.fromiter(map(len, chain.from_iterable(polygons)), int, parts.sum())
    lengths = np.add.reduceat(sizes, np.cumsum(parts) - parts)
    numbers = chain.from_iterable(chain.from_iterable(polygons))
    try:
        points = np.fromiter(numbers, float, lengths.sum())
    except OverflowError:
        numbers = chain.from_iterable(chain.from_iterable(polygons))
        points = np.array([number if abs(number) < 1e300 else np.inf for number in numbers])
    starts = (np.cumsum(lengths) - lengths) // 2
    points = points.reshape(-1, 2)
    return np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)


def _compare(
    table: "Annotations", used: np.ndarray, polygons: list, low: np.ndarray, high: np.ndarray, warnings: list[str]
) -> np.ndarray:
    """Compare polygons with their boxes and images; return a boolean array that is True where a mask is empty."""
    image = table.image_of[used]
    size = np.stack([table.widths[image], table.heights[image]], 1)
    wild = ~(np.isfinite(low) & np.isfinite(high) & (low >= -size) & (high <= 2 * size)).all(1)
    boxes = table.boxes[used]
    if (high <= 1).all() and (low >= 0).all() and boxes.max() > 1:
        table.fail(
            f"all polygons lie within 0..1, such as that of annotation {table.name(used[0])}, and the boxes do not; "
            "expected pixels: multiply them by the images' width and height"
        )
    if wild.any():
        lies = counted(wild.sum(), "object has", "objects have")
        table.fail(
            f"{lies} a polygon that is not finite, or lies further outside its image than that is large: "
            f"{table.names(used[wild])}; draw them anew, in the images' pixels"
        )
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    common = np.minimum(end, high) - np.maximum(start, low)
    elsewhere = (common < 0.1 * np.minimum(boxes[:, 2:], high - low)).any(1)
    if elsewhere.mean() > 0.5:
        table.fail(
            f"the polygons of {elsewhere.sum()} of {counted(len(used), 'object', 'objects')} lie beside the boxes, "
            "such as "
            f"that of annotation {table.name(used[elsewhere][0])}; both must be of the same object, in pixels: export "
            "them anew"
        )
    if elsewhere.any():
        has = counted(
            elsewhere.sum(), "object has its polygon beside its box", "objects have their polygons beside their boxes"
        )
        warnings.append(f"{has}: {table.names(used[elsewhere])}; look at them with --out")
    thin = (np.minimum(high, size) - np.maximum(low, 0) < 2).any(1)
    empty = np.zeros(len(used), dtype=bool)
    for n in np.flatnonzero(thin)[:EXACT]:
        empty[n] = not _draw(polygons[n], int(size[n, 1]), int(size[n, 0]))
    return empty


def _draw(polygons: list[list], height: int, width: int) -> float:
    """Number of pixels that the polygons of one object cover; their numbers must have been checked."""
    return float(masks.area(masks.merge(masks.frPyObjects([list(map(float, p)) for p in polygons], height, width))))


def _check_runs(table: "Annotations", used: np.ndarray, runs: list[dict], warnings: list[str]) -> np.ndarray:
    """Check objects that have run lengths; return a boolean array that is True where a mask is empty."""
    sizes = [[int(table.heights[image]), int(table.widths[image])] for image in table.image_of[used]]
    for i, value, size in zip(used, runs, sizes, strict=True):
        if value.get("size") != size:
            table.fail(
                f"annotation {table.name(i)}: expected polygons, or run lengths with counts and the image's size "
                f"{size} (height, width), found the size {shown(value.get('size'))}; export the masks anew"
            )
    expected = np.prod(np.array(sizes, dtype=np.int64), 1)
    decoded = sample(range(len(runs)), read_all=False, number=DECODED)
    totals, pixels = expected.copy(), expected.copy()
    totals[decoded], pixels[decoded] = count_runs([runs[n].get("counts") for n in decoded])
    wrong = np.flatnonzero(totals != expected)
    if len(wrong):
        i, counts = used[wrong[0]], runs[wrong[0]].get("counts")
        found = shown(counts) if totals[wrong[0]] < 0 else f"counts with the sum {totals[wrong[0]]}"
        has = counted(len(wrong), "object has", "objects have")
        table.fail(
            f"{has} run lengths that cannot be decoded, such as annotation {table.name(i)}: expected counts of whole "
            f"numbers from 0 up with the sum {expected[wrong[0]]}, height x width of its image, or their text as "
            f"pycocotools writes it; found {found}; export the masks anew"
        )
    return pixels == 0


def mask_area(segmentation: Any, size: tuple[int, int]) -> float | None:
    """Number of pixels of an object's mask in an image of ``size`` (height, width); None if it cannot be drawn."""
    if type(segmentation) is dict and segmentation.get("size") == list(size):
        totals, pixels = count_runs([segmentation.get("counts")])
        return float(pixels[0]) if totals[0] == size[0] * size[1] else None
    if type(segmentation) is not list or set(map(type, segmentation)) != {list}:
        return None
    drawable = [polygon for polygon in segmentation if is_drawable(polygon)]
    if not drawable or not _are_numbers(drawable):
        return None
    low, high = bounds([drawable])
    limits = np.array(size[::-1])
    if not (np.isfinite(low) & np.isfinite(high) & (low >= -limits) & (high <= 2 * limits)).all():
        return None
    return _draw(drawable, *size)
