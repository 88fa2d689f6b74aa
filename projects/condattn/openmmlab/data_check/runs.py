"""Decode the run lengths of many masks at once, and count their pixels; malformed input is detected."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

LONGEST = 7
"""Maximum number of characters of one number in a compressed mask: 35 bits."""
BATCH = 50
"""Number of masks decoded at once: so few that their numbers stay in the CPU caches."""


def count_runs(runs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of masks given as run lengths: lists of numbers, or compressed text of pycocotools.

    Returns:
        The total number of pixels of each mask, -1 if its run lengths cannot be decoded; and the number of pixels of
        the object.
    """
    totals, pixels = np.full(len(runs), -1, dtype=np.int64), np.zeros(len(runs), dtype=np.int64)
    lists = [i for i, counts in enumerate(runs) if type(counts) is list and _are_counts(counts)]
    if lists:
        lengths = [len(runs[i]) for i in lists]
        numbers = np.fromiter(chain.from_iterable(runs[i] for i in lists), float, sum(lengths)).astype(np.int64)
        totals[lists], pixels[lists] = _sums(numbers, np.array(lengths))
    texts = [i for i, counts in enumerate(runs) if type(counts) is str and counts and counts.isascii()]
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        totals[batch], pixels[batch] = _decode([runs[i] for i in batch])
    return totals, pixels


def _are_counts(counts: list) -> bool:
    return (
        bool(counts)
        and set(map(type, counts)) <= {int, float}
        and all(0 <= number < 2**40 for number in (min(counts), max(counts)))
        and all(number == number // 1 for number in counts if type(number) is float)
    )


def _sums(numbers: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum all run lengths of each mask (-1 if one is negative), and those at odd positions, which are the object's."""
    starts = np.cumsum(lengths) - lengths
    odd = (np.arange(len(numbers)) - np.repeat(starts, lengths)) % 2
    totals = np.add.reduceat(numbers, starts)
    totals[np.minimum.reduceat(numbers, starts) < 0] = -1
    return totals, np.add.reduceat(numbers * odd, starts)


def _running_sums(numbers: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Cumulative sums that restart with each owner; the numbers of an owner must be contiguous."""
    summed = np.cumsum(numbers)
    begin = np.flatnonzero(np.diff(owner, prepend=-1))
    before = np.where(begin > 0, summed[begin - 1], 0)
    return summed - np.repeat(before, np.diff(np.append(begin, len(numbers))))


def _decode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Decode masks that pycocotools has compressed.

    Each number is written in groups of 5 bits, the lowest first, one character per group. The code of the character is
    the group plus 48, and the sixth bit is set in all groups but the last. From the fourth number on, the difference
    from the number two positions before is written.
    """
    totals, pixels = np.full(len(texts), -1, dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
    lengths = np.array([len(text) for text in texts])
    codes = np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int64) - 48
    starts = np.cumsum(lengths) - lengths
    more = (codes & 32) != 0
    valid = (np.minimum.reduceat(codes, starts) >= 0) & (np.maximum.reduceat(codes, starts) < 64)
    valid &= ~more[starts + lengths - 1]
    valid_codes = np.repeat(valid, lengths)
    codes, more, owner = codes[valid_codes], more[valid_codes], np.repeat(np.arange(len(texts)), lengths)[valid_codes]
    if not len(codes):
        return totals, pixels
    ends = np.flatnonzero(~more)
    begins = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(begins, ends - begins + 1)
    numbers = np.add.reduceat((codes & 31) << (5 * np.minimum(place, LONGEST)), begins)
    numbers -= np.where(codes[ends] & 16, np.int64(1) << (5 * np.minimum(place[ends] + 1, LONGEST + 1)), 0)
    owner = owner[begins]
    too_long = np.zeros(len(texts), dtype=bool)
    too_long[owner[place[ends] >= LONGEST]] = True
    counts = np.bincount(owner, minlength=len(texts))
    first = np.cumsum(counts) - counts
    index = np.arange(len(numbers)) - first[owner]
    values = numbers.copy()
    for parity in (0, 1):
        chosen = np.flatnonzero((index % 2 == parity) & (index > 0))
        values[chosen] = _running_sums(numbers[chosen], owner[chosen])
    chosen = np.flatnonzero(counts)
    totals[chosen], pixels[chosen] = _sums(values, counts[chosen])
    totals[too_long] = -1
    return totals, pixels
