"""Images in one folder for each class: the names of the classes, for mmpretrain's ``CustomDataset``."""

from collections.abc import Sequence
from pathlib import Path

from ...wording import some
from ..errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif")
"""Suffixes of the files that ``CustomDataset`` takes for images, in lower case."""


def class_names(data_root: str | Path, setting: str, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """The names of the class folders in ``data_root/SPLIT/``, in the order of their labels.

    Args:
        data_root: Folder with one folder for each split.
        setting: Where a user names ``data_root``, for messages: 'the environment variable IMAGE_FOLDER'.
        splits: Names of the splits, which have the same classes.

    Raises:
        UserError: If a split is missing, has fewer than two classes or other classes than the first one, or if a class
            folder holds no image, at any depth.
    """
    layout = f"{setting} names {data_root}: expected images in {data_root}/{{{','.join(splits)}}}/CLASS/"
    names: dict[str, list[str]] = {}
    for split in splits:
        folder = Path(data_root, split)
        if not folder.is_dir():
            raise UserError(f"{layout}, and there is no folder {folder}; name another")
        names[split] = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if len(names[split]) < 2:
            raise UserError(f"{layout}, one folder for each of at least two classes, found {names[split]} in {folder}")
        if other := set(names[split]) ^ set(names[splits[0]]):
            raise UserError(
                f"{layout}, and the same classes in each; not in both of {splits[0]} and {split}: {some(sorted(other))}"
            )
        if empty := [name for name in names[split] if not _has_image(folder / name)]:
            raise UserError(
                f"{layout}, with the suffixes {', '.join(SUFFIXES)}; without one in {folder}: {some(empty)}"
            )
    return names[splits[0]]


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))
