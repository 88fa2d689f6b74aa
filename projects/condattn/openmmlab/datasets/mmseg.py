"""The digit scenes as an mmseg data set."""

from __future__ import annotations

from mmengine.registry import DATASETS
from mmseg.datasets import BaseSegDataset

from .digit_scenes import CLASSES, PALETTE, ensure_digit_scenes


@DATASETS.register_module()
class DigitScenesSegmentation(BaseSegDataset):
    """The digit scenes with semantic maps: background and ten digits; written to `data_root` when loaded and missing.

    Args:
        split: 'training' or 'validation'.
        data_root: the folder of the digit scenes.
        kwargs: as for `BaseSegDataset`.

    Raises:
        FileExistsError: `data_root` holds something that is no finished set of digit scenes.

    """

    METAINFO = {"classes": ("background", *CLASSES), "palette": [(128, 128, 128), *PALETTE]}  # noqa: RUF012

    def __init__(self, split: str, data_root: str = "data/digit_scenes", **kwargs):
        super().__init__(
            data_root=data_root,
            data_prefix={"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
            **kwargs,
        )

    def full_init(self) -> None:
        """Write the scenes if they are missing, and load them as upstream does."""
        ensure_digit_scenes(self.data_root)
        super().full_init()
