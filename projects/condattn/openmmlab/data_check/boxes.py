"""Check that boxes are (x, y, width, height) in pixels, lie inside their images, and match their polygons."""

import numpy as np

from ...wording import counted, shown
from .annotations import Annotations
from .masks import bounds, is_drawable
from .sampling import sample

MARGIN = 2
"""Number of pixels by which a box may extend beyond its image without a warning."""


def check_boxes(table: Annotations) -> list[str]:
    """Check the boxes of all objects whose images are in the file; return warnings.

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
            f"{belongs} not in the file, such as image {shown(table.objects[orphans[0]]['image_id'])} of annotation "
            f"{table.name(orphans[0])}; left out"
        )
    in_file = np.flatnonzero(table.image_of >= 0)
    if not len(in_file):
        return warnings
    x, y, w, h = table.boxes[in_file].T
    width, height = table.widths[table.image_of[in_file]], table.heights[table.image_of[in_file]]
    first = f"such as {shown(table.objects[in_file[0]]['bbox'])} of annotation {table.name(in_file[0])}"
    if table.boxes[in_file].max() <= 1 and width.max() > 2:
        table.fail(
            f"all boxes lie within 0..1, {first}; expected pixels: multiply them by the images' width and height"
        )
    beyond = (x + w > width + MARGIN) | (y + h > height + MARGIN) | (x < -MARGIN) | (y < -MARGIN)
    corners = (w > x) & (h > y) & (w <= width + MARGIN) & (h <= height + MARGIN)
    polygons = _polygons_say_corners(table, in_file)
    reach = beyond.sum() >= max(2, len(in_file) // 20) and corners.mean() >= 0.95
    if polygons or (polygons is None and reach):
        table.fail(
            f"the boxes are (x1, y1, x2, y2), it seems, {first}: as (x, y, width, height), which is expected, "
            f"{beyond.sum()} of {len(in_file)} reach beyond their image or lie beside their polygons; write width and "
            "height"
        )
    if beyond.any():
        reaches = counted(beyond.sum(), "box reaches beyond its image", "boxes reach beyond their images")
        cut = "it is cut at its edge" if beyond.sum() == 1 else "they are cut at their edges"
        warnings.append(f"{reaches}: {table.names(in_file[beyond])}; {cut}")
    return warnings


def _polygons_say_corners(table: Annotations, in_file: np.ndarray) -> bool | None:
    """Whether the polygons of a sample of objects show that boxes are (x1, y1, x2, y2); None without polygons."""
    votes = []
    for i in sample(in_file, read_all=False, number=200):
        value = table.objects[i].get("segmentation")
        polygons = [p for p in value if type(p) is list and is_drawable(p)] if type(value) is list else []
        if polygons and all(type(number) in (int, float) for polygon in polygons for number in polygon):
            low, high = (limit[0] for limit in bounds([polygons]))
            as_corners = np.abs(table.boxes[i] - [*low, *high]).max()
            as_sides = np.abs(table.boxes[i] - [*low, *(high - low)]).max()
            votes.append(as_corners + MARGIN < as_sides)
    return np.mean(votes) > 0.9 if votes else None
