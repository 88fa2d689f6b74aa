"""Retrieval: whether one of two papers cites the other, from the bytes of their texts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS

from ..errors import DataError
from .base import ARCHIVE, SequenceDataset, byte_numbers

LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
PARTS = dict(train="train", val="eval", test="test")


@DATASETS.register_module()
class AanPairs(SequenceDataset):
    """Pairs of papers in ``new_aan_pairs.{train,eval,test}.tsv``: label, two names and two texts, without a header.

    Texts are cut off after ``length`` bytes. They stay on the disk until they are needed.

    Raises:
        DataError: If a file is missing or not in this format.
    """

    SOURCE = f"its folder tsv_data is in {ARCHIVE}"

    def needed(self, root: Path) -> Iterable[Path]:
        """The file of the split."""
        return [root / f"new_aan_pairs.{PARTS[self.split]}.tsv"]

    def list_samples(self) -> list[dict[str, Any]]:
        """Note where each pair begins."""
        (path,) = self.needed(Path(self.data_root))
        found, begin = [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                fields = line.split(b"\t")
                if len(fields) != 5 or fields[0] not in LABELS:
                    raise DataError(
                        f"{path}, line {number}: expected a label (0 or 1), two names and two texts, separated by "
                        f"tabs, found {len(fields)} fields that begin with {fields[0][:20]!r}"
                    )
                found.append(dict(begin=begin, gt_label=LABELS[fields[0]], sample_id=f"{self.split}/{number}"))
                begin += len(line)
        return found

    def sequences(self, info: Mapping[str, Any]) -> list[np.ndarray]:
        """The first ``length`` bytes of both texts."""
        (path,) = self.needed(Path(self.data_root))
        with path.open("rb") as file:
            file.seek(info["begin"])
            texts = file.readline().rstrip(b"\r\n").split(b"\t")[3:]
        return [byte_numbers(text[: self.length]) for text in texts]
