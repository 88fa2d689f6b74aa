"""Images and labels in the IDX format of MNIST and Fashion-MNIST, compressed or not."""

import gzip
from pathlib import Path

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

NAMES = {"training": "train", "test": "t10k"}
"""Split of the data -> prefix of the names of its files."""
SOURCE = (
    "expected the four files of a release, such as that of Fashion-MNIST, https://github.com/zalandoresearch/"
    "fashion-mnist, which Debian's package dataset-fashion-mnist has in /usr/share/datasets/fashion-mnist"
)
"""Where the data come from."""


@DATASETS.register_module()
class IdxImages(BaseDataset):
    """Classification of the images in ``{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]``.

    Samples are ``img`` (H, W) of uint8, ``gt_label``, and ``img_id``, such as 'test/7'.

    Args:
        data_root: Folder with the files.
        split: 'training' or 'test'.
        held_out: True for every fifth image only, False for the other four fifths, None for all. (``indices`` would
            do the same, but tens of thousands of them in a config take seconds whenever it is printed or saved.)
        **kwargs: Arguments of mmengine's ``BaseDataset``.

    Raises:
        ValueError: If ``split`` is neither, or a file is not in the format.
        FileNotFoundError: If a file is not there.
    """

    def __init__(self, data_root: str, split: str, held_out: bool | None = None, **kwargs) -> None:
        if split not in NAMES:
            raise ValueError(f"split: expected one of {', '.join(NAMES)}, got {split!r}")
        self.split = split
        self.held_out = held_out
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read both files, and select the samples."""
        images = read_idx(self.data_root, f"{NAMES[self.split]}-images-idx3-ubyte", dimensions=3)
        labels = read_idx(self.data_root, f"{NAMES[self.split]}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise ValueError(f"{self.data_root}: {len(images)} images and {len(labels)} labels of {self.split}")
        return [
            dict(img=image, gt_label=int(label), img_id=f"{self.split}/{i}")
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
            if self.held_out is None or self.held_out == (i % 5 == 4)
        ]


def read_idx(folder: str | Path, name: str, dimensions: int) -> np.ndarray:
    """Read an array of bytes from the file ``name`` or ``name.gz`` in ``folder``.

    Raises:
        ValueError: If the file does not hold ``dimensions`` dimensions of bytes, or is truncated.
        FileNotFoundError: If there is no such file.
    """
    path = next((p for p in (Path(folder, name), Path(folder, f"{name}.gz")) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {name} or {name}.gz in {folder}; {SOURCE}")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise ValueError(f"{path}: expected an IDX file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(content, ">u4", dimensions, 4)
    if len(content) != header + int(shape.prod()):
        raise ValueError(f"{path}: expected {int(shape.prod())} values, got {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
