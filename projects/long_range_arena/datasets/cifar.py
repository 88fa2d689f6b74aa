"""Image: what a photograph of 32 x 32 pixels shows, from the sequence of its grey levels."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS

from ..errors import DataError
from ..pickles import read_arrays
from .base import SequenceDataset, byte_numbers

TRAINING = [f"data_batch_{i}" for i in range(1, 6)]
GREY = np.array([0.2989, 0.587, 0.114])
"""Shares of red, green and blue in a grey level."""


@DATASETS.register_module()
class GreyCifar10(SequenceDataset):
    """CIFAR-10 for Python, ``data_batch_1`` to ``data_batch_5`` and ``test_batch``, as grey levels row after row.

    The last tenth of the training images validates, and does not train.

    Raises:
        DataError: If a file is missing or not in this format, or ``length`` is not 1,024.
    """

    SOURCE = (
        "unpack the Python version of CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, by: "
        "tar xzf cifar-10-python.tar.gz -C data"
    )

    def __init__(self, data_root: str, split: str, length: int = 1024, **kwargs: Any) -> None:
        if length != 1024:
            raise DataError(f"length: images have 1024 pixels, got {length}")
        super().__init__(data_root, split, length, **kwargs)

    def needed(self, root: Path) -> Iterable[Path]:
        """The files of the split."""
        return [root / name for name in (["test_batch"] if self.split == "test" else TRAINING)]

    def list_samples(self) -> list[dict[str, Any]]:
        """Read the images."""
        found = []
        for path in self.needed(Path(self.data_root)):
            images, labels = read_batch(path)
            greys = np.rint(images.reshape(-1, 3, 1024).transpose(0, 2, 1) @ GREY).astype(np.uint8)
            for i, (grey, label) in enumerate(zip(greys, labels, strict=True)):
                found.append(dict(grey=grey, gt_label=label, sample_id=f"{path.name}/{i}"))
        if self.split == "test":
            return found
        end = len(found) - len(found) // 10
        return found[:end] if self.split == "train" else found[end:]

    def sequences(self, info: Mapping[str, Any]) -> list[np.ndarray]:
        """The grey levels."""
        return [byte_numbers(info["grey"])]


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Read a file of CIFAR-10 for Python.

    Returns:
        Images (number, 3072) of uint8, channel after channel, and their labels.

    Raises:
        DataError: If it is not such a file.
    """
    content = read_arrays(path)
    content = content if isinstance(content, dict) else {}
    images, labels = (content.get(name.encode(), content.get(name)) for name in ("data", "labels"))
    if not (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and images.ndim == 2
        and images.shape[1] == 3072
        and isinstance(labels, list)
        and len(labels) == len(images)
        and all(isinstance(label, int) and 0 <= label < 10 for label in labels)
    ):
        raise DataError(f"{path}: expected data, (images, 3072) of uint8, and as many labels from 0 to 9")
    return images, labels
