"""What the data sets of all tasks share."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.structures import BaseDataElement

from ..errors import DataError, MissingDataError

PADDING = 0
"""Number of the padding token; those of all others are from 1 up."""
SPLITS = ("train", "val", "test")
ARCHIVE = (
    "the benchmark's archive, https://storage.googleapis.com/long-range-arena/lra_release.gz, which is unpacked by: "
    "tar xzf lra_release.gz -C data"
)


class SequenceDataset(BaseDataset):
    """Sequences of tokens and their classes.

    The information about a sample has at least ``sample_id`` and ``gt_label``. A sample is a dictionary of ``inputs``,
    the numbers of its tokens, (sequences, length) of int64, padded with 0 at the end, and ``data_samples``, a
    ``BaseDataElement`` with ``gt_label`` and, as meta information, ``sample_id``.

    Args:
        data_root: Folder with the data, such as data/lra_release/tsv_data. If they are not there, they are looked for
            in data/lra_release/lra_release/tsv_data, as the benchmark's archive has that folder twice.
        split: 'train', 'val' or 'test'.
        length: Number of tokens of a sequence, padding included.
        **kwargs: Of mmengine's ``BaseDataset``, but for ``pipeline``.

    Raises:
        DataError: If ``split`` is none of these.
        MissingDataError: If a file or folder is missing.
    """

    SOURCE: ClassVar[str]
    """Where the data come from, and where they are put."""

    def __init__(self, data_root: str, split: str, length: int, **kwargs: Any) -> None:
        if split not in SPLITS:
            raise DataError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        self.split, self.length = split, length
        root = next(filter(self._is_complete, _roots(Path(data_root))), Path(data_root))
        for path in self.needed(root):
            if not path.exists():
                raise MissingDataError(f"no data at {path}; {self.SOURCE}, or set data_root to where it is")
        super().__init__(data_root=str(root), pipeline=[], **kwargs)

    def _is_complete(self, root: Path) -> bool:
        return all(path.exists() for path in self.needed(root))

    @abstractmethod
    def needed(self, root: Path) -> Iterable[Path]:
        """Files and folders in ``root`` that must be there."""

    @abstractmethod
    def list_samples(self) -> list[dict[str, Any]]:
        """Information about each sample of the split."""

    @abstractmethod
    def sequences(self, info: Mapping[str, Any]) -> list[np.ndarray]:
        """The sequences of a sample: numbers of tokens, which are at most ``length``, without padding."""

    def load_data_list(self) -> list[dict[str, Any]]:
        """The same, unless there is none.

        Raises:
            DataError: If there is none, or the data are not in the expected format.
        """
        found = self.list_samples()
        if not found:
            raise DataError(f"{self.data_root}: no samples for split {self.split!r}; {self.SOURCE}")
        return found

    def prepare_data(self, idx: int) -> dict[str, Any]:
        """Make the sample with the number ``idx``."""
        info = self.get_data_info(idx)
        sequences = self.sequences(info)
        inputs = torch.full((len(sequences), self.length), PADDING)
        for row, numbers in zip(inputs, sequences, strict=True):
            row[: len(numbers)] = torch.from_numpy(numbers.astype(np.int64))
        sample = BaseDataElement(metainfo=dict(sample_id=info["sample_id"]), gt_label=torch.tensor(info["gt_label"]))
        return dict(inputs=inputs, data_samples=sample)


def _roots(folder: Path) -> tuple[Path, Path]:
    """The folder, and the same one below a second folder with the name of its parent."""
    return folder, folder.parent / folder.parent.name / folder.name


def byte_numbers(values: bytes | np.ndarray) -> np.ndarray:
    """Bytes, or grey levels from 0 to 255, as numbers of tokens from 1 to 256."""
    values = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else values
    return values.reshape(-1).astype(np.uint16) + 1
