"""Indices and masks of the tokens in shifted windows (Swin, arXiv 2103.14030)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .switch import is_compiling

MASKED = -100.0
"""Value added to the logits of tokens that are not neighbours, as in every implementation of Swin."""


@dataclass(frozen=True)
class Windows:
    """Windows of ``size`` x ``size`` tokens on a map that is padded to whole windows and rolled by ``shift``.

    The windows, and the tokens in each window, are in row-major order. A place is a position of a token in a window.

    Attributes:
        height: Rows of the map.
        width: Columns of the map.
        size: Tokens along the side of a window.
        shift: How far the windows are moved down and to the right; 0 for windows that are not shifted.
        device: Device of the index tensors.
    """

    height: int
    width: int
    size: int
    shift: int
    device: torch.device

    @property
    def rows(self) -> int:
        """Number of windows from top to bottom."""
        return -(-self.height // self.size)

    @property
    def columns(self) -> int:
        """Number of windows from left to right."""
        return -(-self.width // self.size)

    @property
    def is_padded(self) -> bool:
        """Whether windows contain padding; always True while compiling, because other map sizes may need it."""
        return is_compiling() or self.height % self.size > 0 or self.width % self.size > 0

    @property
    def tokens(self) -> Tensor:
        """Index of the token at each place, (windows * size^2,); height * width at padding."""
        y, x = self._places()
        y, x = _modulo(y + self.shift, self.rows * self.size), _modulo(x + self.shift, self.columns * self.size)
        return torch.where((y < self.height) & (x < self.width), y * self.width + x, self.height * self.width)

    @property
    def places(self) -> Tensor:
        """Index of the place of each token, (height * width,): window * size^2 + index in the window."""
        token = torch.arange(self.height * self.width, device=self.device)
        y = _modulo(token // self.width - self.shift, self.rows * self.size)
        x = _modulo(_modulo(token, self.width) - self.shift, self.columns * self.size)
        window = y // self.size * self.columns + x // self.size
        return window * self.size**2 + _modulo(y, self.size) * self.size + _modulo(x, self.size)

    @property
    def regions(self) -> Tensor:
        """Region of the map that each place is from, (windows, size^2); only tokens of one region are neighbours."""
        y, x = self._places()
        return (3 * self._part(y, self.rows) + self._part(x, self.columns)).view(-1, self.size**2)

    def exchange(self) -> tuple[Tensor, Tensor]:
        """Return :attr:`tokens` and :attr:`places`, cached except while compiling."""
        return (self.tokens, self.places) if is_compiling() else _exchange(self)

    def projected_rows(self, heads: int, batch: int) -> Tensor:
        """Return, for each row of (B, windows, heads, size^2), the row of (B, tokens, 3, heads) that holds its query.

        Keys and values are ``heads`` and ``2 * heads`` rows further. Padding gets the row of the first token for its
        head.
        """
        return _rows(self, "projected", heads, batch)

    def token_rows(self, heads: int, batch: int) -> Tensor:
        """Return, for each row of (B, windows, heads, size^2), its row in (B, tokens, heads).

        Padding is treated as in :meth:`projected_rows`.
        """
        return _rows(self, "token", heads, batch)

    def padding_rows(self, heads: int, batch: int) -> Tensor:
        """Return the rows of (B, windows, heads, size^2) that are padding, (heads * B * paddings,), head by head."""
        return _rows(self, "padding", heads, batch)

    def place_rows(self, heads: int, batch: int, parts: int) -> Tensor:
        """Return, for each row of (B, tokens, parts, heads), its row in (parts, B, windows, heads, size^2)."""
        return _rows(self, "place", heads, batch, parts)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the attention mask of each window, (windows, size^2, size^2), of 0 and ``MASKED``."""
        return _mask(self.regions, dtype)

    def border_masks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return :meth:`mask` of the only windows where it is not 0.

        They are the last row of windows, and the last column of windows without its last one.
        """
        return _border_masks(self, dtype)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Return row and column of each place on the padded and rolled map, (windows * size^2,) each."""
        place = torch.arange(self.rows * self.columns * self.size**2, device=self.device)
        window, inside = place // self.size**2, _modulo(place, self.size**2)
        y = window // self.columns * self.size + inside // self.size
        return y, _modulo(window, self.columns) * self.size + _modulo(inside, self.size)

    def _part(self, places: Tensor, count: int) -> Tensor:
        last = count * self.size
        return (places >= last - self.size).long() + (places >= last - self.shift).long() * (self.shift > 0)


def _modulo(numbers: Tensor, divisor: int) -> Tensor:
    """``numbers % divisor``, of whose range TorchInductor knows so little that it cannot compile indices for a GPU."""
    return numbers - numbers // divisor * divisor


# The caches keep only the most recent image sizes, because the index tensors take memory.


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _exchange(grid: Windows) -> tuple[Tensor, Tensor]:
    return grid.tokens, grid.places


def _mask(regions: Tensor, dtype: torch.dtype) -> Tensor:
    return (regions[:, :, None] != regions[:, None, :]).to(dtype) * MASKED


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _border_masks(grid: Windows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    regions = grid.regions.view(grid.rows, grid.columns, -1)
    return _mask(regions[-1], dtype), _mask(regions[:-1, -1], dtype)


@lru_cache(maxsize=96)
@torch.inference_mode(False)
def _rows(grid: Windows, kind: str, heads: int, batch: int, parts: int = 1) -> Tensor:
    place, count = grid.places, grid.size**2
    token = grid.tokens.view(-1, count)
    head, image = (torch.arange(number, device=grid.device) for number in (heads, batch))
    if kind in ("projected", "token"):
        rows = token[:, None, :] % len(place) + image[:, None, None, None] * len(place)
        rows = rows * (3 * heads if kind == "projected" else heads) + head[:, None]
    elif kind == "padding":
        window, outside = (token == len(place)).nonzero(as_tuple=True)
        rows = ((window + image[:, None] * len(token)) * heads + head[:, None, None]) * count + outside
        return rows.flatten()
    else:
        part = torch.arange(parts, device=grid.device)[:, None] * batch + image[:, None, None, None]
        rows = (((place // count)[:, None, None] + part * len(token)) * heads + head) * count
        rows = rows + (place % count)[:, None, None]
    return rows.flatten().int()
