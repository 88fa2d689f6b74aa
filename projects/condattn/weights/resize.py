"""Weights of models of another image or window size: tables of positions are interpolated."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_bias_table(table: Tensor, length: int) -> Tensor:
    """Relative position biases ((2 w - 1)^2, heads) of another window, by bicubic interpolation.

    Three rows behind them, those of a class token (BEiT), stay as they are.

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
    """Position embeddings (1, tokens, channels) of another image size, by bicubic interpolation.

    Tokens in front of the patches (class, distillation) keep theirs; of more than there will be, the first are kept.

    Args:
        positions: The embeddings, of a square grid of patches and tokens in front of them.
        length: Number of tokens that there will be.
        grid: Rows and columns of patches that there will be; default: the largest square.
        front: Number of tokens in front of them that the model has, where it tells; up to two are known besides.

    Raises:
        ValueError: If the sizes are no such grids.
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
