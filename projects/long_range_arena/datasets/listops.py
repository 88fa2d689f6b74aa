"""ListOps: the value of an expression, out of ten."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS

from ..errors import DataError
from ..generate import COLUMNS
from ..grammar import TOKENS, from_source, hash_of
from .base import ARCHIVE, SequenceDataset

NUMBERS = {token: number for number, token in enumerate(TOKENS, 1)}


@DATASETS.register_module()
class ListOps(SequenceDataset):
    """Expressions in ``basic_{train,val,test}.tsv``, with the columns Source and Target.

    ``sample_id`` is made from the expression, so that one which is in two files has one name.

    Raises:
        DataError: If a file is missing or not in this format, or an expression has more than ``length`` tokens.
    """

    SOURCE = (
        "generate it with python -m long_range_arena.generate FOLDER, or take the folder listops-1000 from " + ARCHIVE
    )

    def needed(self, root: Path) -> Iterable[Path]:
        """The file of the split."""
        return [root / f"basic_{self.split}.tsv"]

    def list_samples(self) -> list[dict[str, Any]]:
        """Read the expressions."""
        (path,) = self.needed(Path(self.data_root))
        with path.open(newline="") as file:
            rows = csv.reader(file, delimiter="\t")
            if tuple(next(rows, ())) != COLUMNS:
                raise DataError(f"{path}: expected the columns {' and '.join(COLUMNS)}, separated by a tab, in line 1")
            return [self._read(row, f"{path}, line {line}") for line, row in enumerate(rows, 2)]

    def _read(self, row: list[str], where: str) -> dict[str, Any]:
        if len(row) != 2 or row[1] not in TOKENS or not row[1].isdecimal():
            raise DataError(f"{where}: expected an expression, a tab and its value from 0 to 9")
        tokens = from_source(row[0])
        if len(tokens) > self.length:
            raise DataError(
                f"{where}: an expression of {len(tokens)} tokens, and the data set's length is {self.length}; raise "
                "length in a copy of the configuration, or train_dataloader.dataset.length, those of the val and "
                "test_dataloader, and model.encoder.module.length"
            )
        if unknown := set(tokens) - NUMBERS.keys():
            raise DataError(f"{where}: expected the tokens {' '.join(TOKENS)}, found {min(unknown)!r}")
        numbers = np.array([NUMBERS[token] for token in tokens], np.uint8)
        return dict(numbers=numbers, gt_label=int(row[1]), sample_id=f"{hash_of(tokens):016x}")

    def sequences(self, info: Mapping[str, Any]) -> list[np.ndarray]:
        """The expression."""
        return [info["numbers"]]
