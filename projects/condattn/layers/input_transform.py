"""Functions of what a module is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.polar import rounding
from ..kernels.private import require
from ..kernels.switch import autocast, autocast_dtype
from .hooks import PickledHook

LARGE = -1e4
"""Masks that are added to scores hold 0 for tokens that take part, and less than this for the others."""


class InputTransform(PickledHook):
    """A forward pre-hook that replaces the first argument of a module by a function of it.

    Args:
        function: Takes the argument and returns another of its shape.
        method: The settings of the method that the transform is of.
    """

    def __init__(self, function: Callable[..., Tensor], method: object) -> None:
        self.function, self.method = function, method

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replace the argument, be it positional or the first keyword."""
        if args:
            return (self.transform(args[0], args, kwargs), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.transform(kwargs[name], args, kwargs)}

    def transform(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The argument in place of ``x``."""
        return self.function(x)


class TokenCorrection(InputTransform):
    """Adds a correction C(X) to the tokens X of each sample, (tokens, channels).

    C is computed in single precision at least. Masked tokens take no part, and are not changed.

    Args:
        function: Takes tokens (batch, tokens, channels) and, if they were computed in half precision, the part of the
            largest singular value below which others are rounding errors; returns C.
        method: As of :class:`InputTransform`.
        layout: See :class:`condattn.attention.tokens.TokenEntry`.
        mask: See there.
    """

    def __init__(
        self, function: Callable[[Tensor, float | None], Tensor], method: object, layout: str, mask: str
    ) -> None:
        super().__init__(function, method)
        self.layout, self.mask = layout, mask

    def transform(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """X + C, in the layout and the dtype of ``x``.

        Raises:
            ValueError: If the block is called with ``is_causal=True``, or the mask differs between queries, as that of
                a decoder does. On a GPU and in compiled models, which do not wait for the comparison of masks, that
                error is a ``RuntimeError``.
        """
        if kwargs.get("is_causal"):
            raise ValueError(
                f"the tokens of a {type(self.method).__name__} are mixed with one another, but with is_causal=True "
                "each token sees only those before it; remove the method, or is_causal"
            )
        dtype = x.dtype if x.dtype.itemsize < 4 else autocast_dtype(x)
        zero = None if dtype is None else rounding(dtype)
        tokens = {"tokens": x, "channels_last": x.flatten(1, -2), "channels_first": x.flatten(2).mT}[self.layout]
        with autocast(x, None):
            exact = tokens if tokens.dtype == torch.float64 else tokens.float()
            seen = self._seen(args, kwargs)
            if seen is not None:
                exact = exact * seen[..., None]
            # Values that are not finite reach the loss, whose check names where they come from.
            constant = self.function(exact.nan_to_num(0.0, 0.0, 0.0), zero)
            constant = (constant if seen is None else constant * seen[..., None]).to(x.dtype)
        return x + (constant.mT if self.layout == "channels_first" else constant).reshape(x.shape)

    def _seen(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """Which tokens take part, (batch, tokens), or None if all do."""
        if not self.mask:
            return None
        mask = kwargs.get(self.mask, args[1] if len(args) > 1 else None)
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"conditioned tokens cannot read a {type(mask).__name__} as the mask {self.mask!r}; expected a tensor, "
                "as the attention implementations 'sdpa' and 'eager' get"
            )
        if self.mask == "attn_mask" and mask.dim() == 2:
            mask = mask[None]
        rows = mask
        if mask.dim() > 2:
            every = mask.flatten(1, -2)
            rows = every[:, 0]
            if every.shape[1] > 1:
                require(
                    (every == rows[:, None]).all(),
                    f"the tokens of a {type(self.method).__name__} are mixed with one another, but the mask "
                    f"{self.mask!r} lets queries see different tokens; expected a mask of padding alone",
                )
        return rows if rows.dtype == torch.bool else rows > (LARGE if mask.dim() > 2 else 0)
