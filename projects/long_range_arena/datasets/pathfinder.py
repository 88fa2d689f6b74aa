"""Pathfinder: whether a dashed curve joins two points, from the sequence of an image's grey levels."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from .base import ARCHIVE, SequenceDataset, byte_numbers

DIFFICULTIES = ("curv_baseline", "curv_contour_length_9", "curv_contour_length_14")
TENTHS = dict(train=(0, 8), val=(8, 9), test=(9, 10))
"""Split -> its tenths of the images, from and to."""


@DATASETS.register_module()
class Pathfinder32(SequenceDataset):
    """Images of 32 x 32 pixels that ``DIFFICULTY/metadata/*.npy`` list, as grey levels row after row.

    In each line of these files, which are texts, the first two fields are folder and name of an image, and the fourth
    is its label. Images are shuffled, always in the same way; eight tenths train, one validates, one tests. Images
    whose files are empty, of which the archive has some, are left out.

    Args:
        data_root: The folder pathfinder32.
        split: 'train', 'val' or 'test'.
        length: 1,024, the number of pixels.
        difficulty: 'curv_baseline', 'curv_contour_length_9' or 'curv_contour_length_14', the most difficult.
        **kwargs: Of mmengine's ``BaseDataset``, but for ``pipeline``.

    Raises:
        DataError: If a file is missing or not in this format, or a setting is wrong.
    """

    SOURCE = f"its folder pathfinder32 is in {ARCHIVE}"

    def __init__(
        self, data_root: str, split: str, length: int = 1024, difficulty: str = DIFFICULTIES[-1], **kwargs: Any
    ) -> None:
        if difficulty not in DIFFICULTIES:
            raise DataError(f"difficulty: expected one of {', '.join(DIFFICULTIES)}, got {difficulty!r}")
        if length != 1024:
            raise DataError(f"length: images have 1024 pixels, got {length}")
        self.difficulty = difficulty
        super().__init__(data_root, split, length, **kwargs)

    def needed(self, root: Path) -> Iterable[Path]:
        """The folders of images and lists."""
        return [root / self.difficulty / name for name in ("imgs", "metadata")]

    def list_samples(self) -> list[dict[str, Any]]:
        """List the images; they are read when they are needed."""
        found = list(self._listed())
        order = np.random.default_rng(0).permutation(len(found))
        begin, end = (len(found) * tenths // 10 for tenths in TENTHS[self.split])
        return [found[i] for i in order[begin:end]]

    def _listed(self) -> Iterator[dict[str, Any]]:
        folder = Path(self.data_root, self.difficulty)
        for path in sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.name), path.name)):
            try:
                lines = path.read_text().splitlines()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: expected a text, a line for each image") from error
            for number, line in enumerate(lines, 1):
                fields = line.split()
                if len(fields) < 4 or fields[3] not in ("0", "1"):
                    raise DataError(
                        f"{path}, line {number}: expected folder and name of an image, a number and a label (0 or 1)"
                    )
                image = folder / fields[0] / fields[1]
                if not image.is_file():
                    raise DataError(f"{path}, line {number}: there is no image {image}; {self.SOURCE}")
                if image.stat().st_size:
                    name = f"{self.difficulty}/{fields[0]}/{fields[1]}"
                    yield dict(path=str(image), gt_label=int(fields[3]), sample_id=name)

    def sequences(self, info: Mapping[str, Any]) -> list[np.ndarray]:
        """The grey levels."""
        try:
            with Image.open(info["path"]) as image:
                pixels = np.asarray(image.convert("L"))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{info['path']}: expected an image, and it was not read: {error}") from error
        if pixels.shape != (32, 32):
            raise DataError(f"{info['path']}: expected 32 x 32 pixels, found {pixels.shape[1]} x {pixels.shape[0]}")
        return [byte_numbers(pixels)]
