"""A part of many files, read by several threads."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

SAMPLE = 5000
"""Files that are read where not all of them are asked for."""


def sample(items: Sequence[Any], read_all: bool, number: int = SAMPLE) -> list[Any]:
    """``items``, or if they are more than ``number`` and not all are asked for, as many at even distances."""
    if read_all or len(items) <= number:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, number).round().astype(int)]


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
    """``function`` of every item, by several threads, with a progress bar on a terminal."""
    with any_size(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        return list(tqdm(results, desc=what, total=len(items), unit="file", leave=False, disable=None))


@contextmanager
def any_size() -> Iterator[None]:
    """Let Pillow open images of every size, as OpenCV does, which loads them in training."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
