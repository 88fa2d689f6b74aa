"""Transforms of head outputs, applied before the output projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.adapters import inner
from ..attention.site import AttentionSite
from .class_swap import ConditionedLayer
from .hooks import PickledHook


class HeadTransform(PickledHook, ABC):
    """Base class of functions of the outputs of each head of a site, which lie side by side in one tensor.

    An instance can also be registered as a forward pre-hook. Subclasses implement :meth:`transform_heads`.

    Args:
        site: Describes the heads.
        method: The method that the transform belongs to, shown when the layer is printed.
    """

    def __init__(self, site: AttentionSite, method: object = None) -> None:
        out = site.out
        assert out is not None  # otherwise there is nothing to transform
        self.method = method
        self.axis = out.axis
        self.channels = out.channels
        self.num_heads = site.heads_of(out)
        self.interleaved = out.interleaved
        self.observer: Callable[[Tensor], None] | None = None  # if set, receives the outputs; they stay untransformed

    @abstractmethod
    def transform_heads(self, x: Tensor, heads: int, channels: int) -> Tensor:
        """Transform the outputs of all heads.

        Args:
            x: The head outputs. Tokens, or rows and columns of pixels, lie along the other axes.
            heads: The axis along which the heads lie.
            channels: The axis along which the channels of a head lie.

        Returns:
            A tensor of the same shape.
        """

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        """Transform the first argument, as a forward pre-hook, unless an adapter around the module has done so."""
        return args if module.is_prepared else (self.transform(args[0]), *args[1:])

    def transform(self, x: Tensor) -> Tensor:
        """Transform the head outputs in ``x``; if an observer is set, pass them to it instead."""
        if self.observer is not None:
            self.observer(x)
            return x
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """Compute the transform of ``x``, a tensor with the channels of all heads along the site's axis."""
        if self.channels is None:
            return self._transform(x)
        before, after = self.channels.start, x.shape[self.axis] - self.channels.stop
        parts = list(x.split([before, x.shape[self.axis] - before - after, after], dim=self.axis))
        parts[1] = self._transform(parts[1])
        return torch.cat(parts, dim=self.axis)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``F.linear`` of the transformed head outputs ``x``, (..., channels)."""
        return F.linear(self.transform(x), weight, bias)

    def scales(self, x: Tensor) -> Tensor:
        """Compute the factor of each head that brings its transformed outputs closest to its outputs in ``x``.

        Returns:
            The least-squares factors, (num_heads,), in float64; 0 for a head whose transformed outputs are all zero.
        """
        wide = x.double()
        plain, transformed = self.rows(wide), self.rows(self.compute(wide))
        squares = transformed.square().sum((0, 2, 3)).clamp_min(torch.finfo(torch.float64).tiny)
        return (plain * transformed).sum((0, 2, 3)) / squares

    def rows(self, x: Tensor) -> Tensor:
        """Return the head outputs in ``x``, whose axis 0 is the samples, as matrices (samples, num_heads, rows, d)."""
        part = x if self.channels is None else x.movedim(self.axis, -1)[..., self.channels].movedim(-1, self.axis)
        heads, head_axis, channel_axis = self._split(part)
        heads = heads.movedim((head_axis, channel_axis), (-2, -1))
        return heads.flatten(1, -3).transpose(1, 2) if heads.dim() > 3 else heads.unsqueeze(2)

    def _transform(self, x: Tensor) -> Tensor:
        heads, head_axis, channel_axis = self._split(x)
        first = min(head_axis, channel_axis)
        return self.transform_heads(heads, head_axis, channel_axis).flatten(first, first + 1)

    def _split(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Split the axis of ``x`` with the channels of all heads; return the head and the channel axis as well."""
        axis = self.axis % x.dim()
        if self.interleaved:
            return x.unflatten(axis, (-1, self.num_heads)), axis + 1, axis
        return x.unflatten(axis, (self.num_heads, -1)), axis, axis + 1


def head_transform_of(site: AttentionSite) -> HeadTransform | None:
    """Return the transform of the head outputs of ``site``, or None."""
    return None if site.out is None else getattr(inner(site.out.owner), "head_transform", None)


class HeadTransformLinear(ConditionedLayer, nn.Linear):
    """An output projection that transforms each head's part of its input first.

    Shape: input (..., num_heads * d), output (..., out features), as ``nn.Linear``.
    """

    host = nn.Linear
    head_transform: HeadTransform
    is_prepared: bool = False
    """Whether an adapter around the layer has already transformed the input."""

    def forward(self, input: Tensor) -> Tensor:
        """Project the transformed head outputs."""
        if self.is_prepared:
            return F.linear(input, self.weight, self.bias)
        return self.head_transform.project(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the settings of ``nn.Linear``, followed by those of the method."""
        return f"{super().extra_repr()}, num_heads={self.head_transform.num_heads}, {self.head_transform.method}"


PLAIN_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
