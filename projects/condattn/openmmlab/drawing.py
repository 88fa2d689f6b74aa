"""Names and colours of classes in the form in which the visualizers of mmdet and mmseg draw them."""

from typing import Any

import numpy as np


def drawn_meta(meta: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is known of the classes of a data set in the form that a visualizer needs.

    Args:
        meta: The ``metainfo`` of a data set, as it is or from a checkpoint. mmdet gives a list for data sets that
            differ, of which the first counts. Keys may be in upper case, as in older checkpoints.

    Returns:
        ``meta`` with keys in lower case. If there are fewer colours than classes, all colours are random: mmdet keeps
        COCO's 80 colours when the configuration names other classes, and refuses to draw with too few.
    """
    first = meta[0] if isinstance(meta, list | tuple) else meta
    result = {key.lower(): value for key, value in first.items()}
    number, palette = len(result.get("classes") or ()), result.get("palette")
    if isinstance(palette, list | None) and len(palette or ()) < number:
        # The colours of mmdet's palette 'random', which mmseg does not know.
        result["palette"] = [tuple(colour) for colour in _random_colours(number)]
    return result


def _random_colours(number: int) -> list[list[int]]:
    return np.random.RandomState(42).randint(0, 256, size=(number, 3)).tolist()
