"""Choose some of many files, and process them with several threads."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...wording import counted, some
from ..errors import UserError

SAMPLE = 5000
"""Maximum number of files that are read, unless all are requested."""


def sample(items: Sequence[Any], read_all: bool, number: int = SAMPLE) -> list[Any]:
    """Return ``number`` evenly spaced ``items``; all of them if there are no more, or if ``read_all`` is set."""
    if read_all or len(items) <= number:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, number).round().astype(int)]


def choose(number: int, indices: int | Sequence[int] | None) -> Sequence[int]:
    """Return the positions that mmengine's ``indices`` select of ``number`` images.

    Raises:
        UserError: If there are too few images.
    """
    places = range(number)
    if indices is None:
        return places
    if isinstance(indices, int):
        return places[:indices] if indices >= 0 else places[indices:]
    if beyond := [i for i in indices if not -number <= i < number]:
        there = counted(number, "image is")
        raise UserError(f"indices has {some(beyond)}, and {there} there; give indices below {number}")
    return [places[i] for i in indices]


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
    """Apply ``function`` to every item with several threads; a terminal shows a progress bar."""
    with any_size(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        return list(tqdm(results, desc=what, total=len(items), unit="file", leave=False, disable=None))


@contextmanager
def any_size() -> Iterator[None]:
    """Let Pillow open images of any size, as OpenCV, which loads the images in training, does."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
