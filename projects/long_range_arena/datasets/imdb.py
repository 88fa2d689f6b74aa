"""Text: whether a review of a film is positive, from its bytes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS

from ..errors import DataError
from .base import SequenceDataset, byte_numbers


@DATASETS.register_module()
class ImdbReviews(SequenceDataset):
    """Reviews in ``{train,test}/{neg,pos}/*.txt``, cut off after ``length`` bytes.

    Every tenth review of each class of the training data validates, and does not train. (The benchmark validates on
    the test reviews, so that choosing a checkpoint there would be choosing it by the figure that is reported.)

    Raises:
        DataError: If a folder is missing or has no reviews.
    """

    SOURCE = (
        "unpack the Large Movie Review Dataset, https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz, by: "
        "tar xzf aclImdb_v1.tar.gz -C data"
    )

    def _part(self) -> str:
        return "test" if self.split == "test" else "train"

    def needed(self, root: Path) -> Iterable[Path]:
        """The folders of both classes."""
        return [root / self._part() / name for name in ("neg", "pos")]

    def list_samples(self) -> list[dict[str, Any]]:
        """List the reviews; they are read when they are needed."""
        found = []
        for label, folder in enumerate(self.needed(Path(self.data_root))):
            paths = sorted(folder.glob("*.txt"))
            if not paths:
                raise DataError(f"{folder}: expected reviews, as files *.txt, and there are none; {self.SOURCE}")
            for i, path in enumerate(paths):
                if self.split == "test" or (self.split == "val") == (i % 10 == 9):
                    found.append(
                        dict(path=str(path), gt_label=label, sample_id=f"{self._part()}/{folder.name}/{path.stem}")
                    )
        return found

    def sequences(self, info: Mapping[str, Any]) -> list[np.ndarray]:
        """The first ``length`` bytes of the review."""
        with open(info["path"], "rb") as file:
            return [byte_numbers(file.read(self.length))]
