"""Resize the position tables in weights of a model with another image or window size, by interpolation."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_bias_table(table: Tensor, length: int) -> Tensor:
    """Resize relative position biases ((2 w - 1)^2, heads) to another window, by bicubic interpolation.

    Three rows at the end, those of a class token (BEiT), are kept unchanged.

    Raises:
        ValueError: If one of the tables is not that of a square window.
    """
    old, new = math.isqrt(len(table)), math.isqrt(length)
    behind = len(table) - old * old
    if behind not in (0, 3) or length - new * new != behind:
        raise ValueError(f"tables of {len(table)} and {length} rows are not both of square windows")
    resized = _bicubic(table[: old * old].T.unflatten(1, (old, old)), (new, new)).flatten(1).T
    return torch.cat([resized, table[old * old :]])


def resize_positions(
    positions: Tensor, length: int, grid: tuple[int, int] | None = None, front: int | None = None
) -> Tensor:
    """Resize position embeddings (1, tokens, channels) to another image size, by bicubic interpolation.

    Tokens in front of the patches (class, distillation) keep their embeddings. If the model has fewer of them, the
    first ones are kept.

    Args:
        positions: The embeddings of tokens in front, and of a square grid of patches after them.
        length: Number of tokens in the result.
        grid: Rows and columns of patches in the result; default: the largest square.
        front: Number of tokens in front of the patches, if the model reports it; 0, 1 and 2 are accepted in any case.

    Raises:
        ValueError: If the sizes do not belong to such grids.
    """
    old = math.isqrt(positions.shape[1])
    extra = positions.shape[1] - old * old
    rows, columns = grid or (math.isqrt(length), math.isqrt(length))
    wanted = length - rows * columns
    if extra not in (0, 1, 2, front) or not 0 <= wanted <= extra:
        raise ValueError(f"positions of {positions.shape[1]} tokens cannot become those of {length}")
    patches = positions[0, extra:].T.unflatten(1, (old, old))
    resized = patches if (rows, columns) == (old, old) else _bicubic(patches, (rows, columns))
    return torch.cat([positions[:, :wanted], resized.flatten(1).T[None]], dim=1)


def _bicubic(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None].float(), size, mode="bicubic", align_corners=False)[0].to(maps.dtype)
