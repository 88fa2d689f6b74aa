"""The digit scenes as an mmdet data set."""

from __future__ import annotations

from mmdet.datasets import CocoDataset
from mmengine.registry import DATASETS

from .digit_scenes import CLASSES, PALETTE, ensure_digit_scenes


@DATASETS.register_module()
class DigitScenesDetection(CocoDataset):
    """The digit scenes with boxes and instance masks; written to `data_root` when they are loaded and missing.

    Args:
        split: 'training' or 'validation'.
        data_root: the folder of the digit scenes.
        kwargs: as for `CocoDataset`.

    Raises:
        FileExistsError: `data_root` holds something that is no finished set of digit scenes.

    """

    METAINFO = {"classes": CLASSES, "palette": PALETTE}  # noqa: RUF012 (mmengine's own form)

    def __init__(self, split: str, data_root: str = "data/digit_scenes", **kwargs):
        super().__init__(
            data_root=data_root,
            ann_file=f"annotations/instances_{split}.json",
            data_prefix={"img": f"images/{split}"},
            **kwargs,
        )

    def full_init(self) -> None:
        """Write the scenes if they are missing, and load them as upstream does."""
        ensure_digit_scenes(self.data_root)
        super().full_init()
