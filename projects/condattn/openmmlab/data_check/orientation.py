"""Load images in the orientation in which they were annotated."""

from typing import Any

from mmcv.transforms import TRANSFORMS, LoadImageFromFile
from PIL import Image

from .sampling import any_size


@TRANSFORMS.register_module()
class LoadImageAsAnnotated(LoadImageFromFile):
    """Load an image either rotated by its EXIF header or as stored, whichever has the size of its annotation.

    Labelling tools differ in whether they apply the header. The size of the annotation is that in the annotation file
    (``height`` and ``width``), or that of the label map. If both sizes fit or neither does, the image is rotated by its
    header, as ``LoadImageFromFile`` does.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load the image of ``results``; see mmcv's ``LoadImageFromFile``."""
        loaded = super().transform(results)
        size, color_type = annotated_size(results), self.color_type
        if loaded is None or size in (None, loaded["ori_shape"]) or color_type not in ("color", "grayscale"):
            return loaded
        try:
            self.color_type = f"{color_type}_ignore_orientation"
            stored = super().transform(dict(results))
        finally:
            self.color_type = color_type
        return stored if stored["ori_shape"] == size else loaded


def annotated_size(results: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the annotation of a sample; None if it has none."""
    if "height" in results and "width" in results:
        return results["height"], results["width"]
    if results.get("seg_map_path"):
        with any_size(), Image.open(results["seg_map_path"]) as image:
            return image.size[::-1]
    return None
