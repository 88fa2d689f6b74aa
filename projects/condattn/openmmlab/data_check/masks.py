"""Measure segmentations: polygons, and run lengths as pycocotools writes them."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as masks

LARGEST = 2.0**53
"""Largest absolute value of a number that is accepted: float64 does not represent all larger integers."""
COMPRESSED = re.compile("(?:[P-o]{0,6}[0-O])+")
"""Compressed run lengths whose numbers have at most 7 characters, 35 bits; see :func:`_decode`."""


def are_numbers(values: Iterable[Any]) -> bool:
    """Whether all values are integers or floats; booleans do not count."""
    return set(map(type, values)) <= {int, float}


def floats(values: list[Any]) -> np.ndarray:
    """Convert values to float64; what is no number, or too large for it, becomes NaN."""
    if are_numbers(values):
        with suppress(OverflowError):
            return np.array(values, dtype=float)
    return np.array([v if are_numbers([v]) and abs(v) <= LARGEST else np.nan for v in values], dtype=float)


def are_lists(values: Iterable[Any]) -> bool:
    """Whether all values are lists."""
    return set(map(type, values)) <= {list}


def are_polygons(values: list[Any]) -> bool:
    """Whether all values are polygons, which are lists of numbers."""
    return are_lists(values) and are_numbers(chain.from_iterable(values))


def drawable(polygons: list[list]) -> list[list]:
    """Those of ``polygons`` that mmdet draws: they have three points or more, of two numbers each."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def bounds(polygons: Sequence[list[list]]) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest (x, y) of each object's polygons, (N, 2) each; every object must have a drawable polygon."""
    lengths = np.fromiter((sum(map(len, each)) for each in polygons), int, len(polygons))
    try:
        points = np.fromiter(chain.from_iterable(chain.from_iterable(polygons)), float, lengths.sum())
    except OverflowError:
        points = floats(list(chain.from_iterable(chain.from_iterable(polygons))))
    starts, points = (np.cumsum(lengths) - lengths) // 2, points.reshape(-1, 2)
    return np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)


def near_image(low: np.ndarray, high: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Whether bounds are finite, and reach no further outside an image of ``size`` (width, height) than it is large."""
    return ((low >= -size) & (high <= 2 * size)).all(-1)


def draw(polygons: list[list], height: int, width: int) -> float:
    """Number of pixels that the polygons of one object cover; their numbers must have been checked."""
    return float(masks.area(masks.merge(masks.frPyObjects([list(map(float, p)) for p in polygons], height, width))))


def mask_area(segmentation: Any, size: tuple[int, int]) -> float | None:
    """Number of pixels of an object's mask in an image of ``size`` (height, width); None if it cannot be drawn."""
    if type(segmentation) is dict and segmentation.get("size") == list(size):
        total, pixels = _count_runs(segmentation.get("counts"))
        return float(pixels) if total == size[0] * size[1] else None
    if type(segmentation) is not list or not are_polygons(segmentation) or not drawable(segmentation):
        return None
    polygons = drawable(segmentation)
    low, high = bounds([polygons])
    return draw(polygons, *size) if near_image(low, high, np.array(size[::-1])).all() else None


def count_runs(runs: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of masks given as run lengths: lists of numbers, or compressed text of pycocotools.

    Returns:
        The total number of pixels of each mask, -1 if its run lengths cannot be decoded; and the number of pixels of
        the object.
    """
    totals, pixels = np.array([_count_runs(counts) for counts in runs], dtype=np.int64).T
    return totals, pixels


def _count_runs(counts: Any) -> tuple[int, int]:
    runs: list = []
    if type(counts) is list and are_numbers(counts):
        runs = counts
    elif type(counts) is str and COMPRESSED.fullmatch(counts):
        runs = _decode(counts)
    if not runs or not 0 <= min(runs) <= max(runs) < 2**40 or any(run % 1 for run in runs):
        return -1, 0
    return int(sum(runs)), int(sum(runs[1::2]))


def _decode(text: str) -> list[int]:
    """Decode run lengths that pycocotools has compressed.

    Each number is written in groups of 5 bits, the lowest first, one character per group. The code of the character is
    the group plus 48, and the sixth bit is set in all groups but the last. From the fourth number on, the difference
    from the number two positions before is written.
    """
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    lengths = np.diff(ends, prepend=-1)
    begins = ends - lengths + 1
    place = np.arange(len(codes)) - np.repeat(begins, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * place), begins)
    numbers -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)  # the highest bit is the sign
    for parity in (1, 2):
        numbers[parity::2] = numbers[parity::2].cumsum()
    return numbers.tolist()
