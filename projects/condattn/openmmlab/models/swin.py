"""Swin's blocks with less memory traffic: the same parameters and function; upstream's forward is the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.feed_forward import feed_forward
from ...kernels.private import has_backward_or_global_hooks, has_saved_tensors_hooks
from ...kernels.switch import autocast, autocast_dtype, is_compiling, is_ordinary, is_upstream
from ...kernels.window_attention import window_attention
from ...kernels.windows import Windows
from ...layers.class_swap import swap_class
from ...layers.first_forward import FirstForward, count_hooks
from ...layers.head_norm import HeadNorm
from ...layers.head_transform import HeadTransformLinear
from ...methods.parsing import DEFAULT, Conditioning
from .base import ConditionedBackbone


class FastShiftWindowMSA:
    """Mixin in front of upstream's ``ShiftWindowMSA``: projections before windows, no map rebuilt, no mask rebuilt.

    Upstream's forward runs where attention has dropout, where its ``w_msa`` or what is in it is not as upstream built
    it or has hooks, and where :func:`condattn.kernels.switch.is_upstream` says so. The projections are called as they
    are, whatever they are.
    """

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H * W, C) to the same shape; see upstream."""
        msa = self.w_msa
        watched = any(is_watched(module) for module in (msa, msa.softmax, msa.attn_drop))
        if watched or (self.training and msa.attn_drop.p) or not isinstance(msa.qkv, nn.Linear) or is_upstream():
            return super().forward(query, hw_shape)
        grid = Windows(*hw_shape, self.window_size, self.shift_size, query.device)
        proj = msa.proj
        plain = type(proj) is HeadTransformLinear and type(proj.head_transform) is HeadNorm
        inside = plain and not is_watched(proj)
        normalize = (proj.head_transform.eps, proj.head_transform.detach) if inside else None
        attention = grid, msa.num_heads, msa.scale, normalize
        heads = window_attention(msa.qkv(query), msa.qkv.bias, self._bias(), *attention)
        x = F.linear(heads, proj.weight, proj.bias) if inside else proj(heads)
        if not is_compiling():
            FirstForward.forget(msa)
        return drop_path(msa.proj_drop(x), self.drop)

    def _bias(self) -> Tensor:
        """The relative position bias, (heads, N, N)."""
        msa = self.w_msa
        return F.embedding(msa.relative_position_index, msa.relative_position_bias_table).permute(2, 0, 1).contiguous()


class FastSwinBlock:
    """Mixin in front of upstream's ``SwinBlock``: normalised tokens and activations are computed again in the backward.

    That is cheap, and saves half of what a block keeps. Upstream's forward runs where it checkpoints the whole block,
    where the feed-forward network is another or has hooks, and where :func:`condattn.kernels.switch.is_upstream` says
    so. Compiled, the same operations are in their plain form.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H * W, C) to the same shape; see upstream."""
        ffn = self.ffn
        checkpointed = self.with_cp and x.requires_grad and torch.is_grad_enabled()
        if is_upstream() or checkpointed or ffn.num_fcs != 2 or not ffn.add_identity or is_watched(ffn):
            return super().forward(x, hw_shape)
        x = x + recompute_in_backward(self.norm1, x, lambda normalized: self.attn(normalized, hw_shape))
        out = recompute_in_backward(self.norm2, x, lambda normalized: _feed_forward(normalized, ffn))
        return x + drop_path(ffn.gamma2(out), ffn.dropout_layer)


def _feed_forward(x: Tensor, ffn: nn.Module) -> Tensor:
    """The layers of mmcv's ``FFN`` with one hidden layer."""
    (linear, activation, drop), projection, drop_out = ffn.layers
    kinds = zip((linear, activation, projection), ("Linear", "GELU", "Linear"), strict=True)
    usual = all(is_usual(*one) for one in kinds) and getattr(activation, "approximate", "none") == "none"
    if not usual or (drop.training and drop.p) or any(map(is_watched, ffn.layers.modules())):
        return ffn.layers(x)
    return drop_out(feed_forward(x, linear.weight, linear.bias, projection.weight, projection.bias))


class FastPatchMerging:
    """Mixin in front of upstream's ``PatchMerging``: pixels are put side by side by rows; the norm is computed again.

    Upstream's forward runs for other patches than 2 x 2 that lie side by side, where a layer that is not called has
    hooks, and where :func:`condattn.kernels.switch.is_upstream` says so.
    """

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """(B, H * W, C) to (B, ceil(H / 2) * ceil(W / 2), 2 C), and that size; see upstream."""
        unfold, padding = self.sampler, self.adap_padding
        usual = (unfold.kernel_size, unfold.stride, unfold.padding, unfold.dilation) == ((2, 2), (2, 2), (0, 0), (1, 1))
        usual = usual and padding is not None and padding.padding == "corner"
        if not usual or is_watched(unfold) or is_watched(padding) or is_upstream():
            return super().forward(x, input_size)
        height, width = input_size
        channels = x.shape[-1]
        x = x.view(len(x), height, width, channels)
        below, beside = (height + 1) // 2 * 2 - height, (width + 1) // 2 * 2 - width
        x = _pad(x, 0, 0, 0, beside, 0, below)
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x.view(len(x), height, 2, width, 2, channels).transpose(2, 3).reshape(len(x), height * width, 4, channels)
        # Two copies of rows are faster than one of single numbers.
        x = x.mT.reshape(len(x), height * width, 4 * channels)
        return recompute_in_backward(self.norm, x, self.reduction) if self.norm else self.reduction(x), (height, width)


class FastPatchEmbed:
    """Mixin in front of upstream's ``PatchEmbed``: one product of matrices, whose result has its channels last.

    Upstream's forward runs for patches that overlap or leave gaps, for padding on all sides, where the convolution is
    another, where it or the padding has hooks, and where :func:`condattn.kernels.switch.is_upstream` says so.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) to (B, rows * columns of patches, embed_dims), and those rows and columns; see upstream."""
        conv = self.projection
        if not is_usual(conv, "Conv2d") or is_watched(conv) or is_upstream():
            return super().forward(x)
        if (conv.stride, conv.padding, conv.dilation, conv.groups) != (conv.kernel_size, (0, 0), (1, 1), 1):
            return super().forward(x)
        padding, (height, width) = self.adap_padding, conv.kernel_size
        if padding and (padding.padding != "corner" or is_watched(padding)):
            return super().forward(x)
        if padding:
            rows, columns = (x.shape[2] + height - 1) // height, (x.shape[3] + width - 1) // width
            x = _pad(x, 0, columns * width - x.shape[3], 0, rows * height - x.shape[2])
        rows, columns = x.shape[2] // height, x.shape[3] // width
        x = x[..., : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), rows * columns, conv.weight[0].numel())
        x = F.linear(x, conv.weight.flatten(1), conv.bias)
        return self.norm(x) if self.norm else x, (rows, columns)


def _pad(x: Tensor, *pad: int) -> Tensor:
    """``F.pad``, but no copy where nothing is padded; compiled, one graph for both."""
    return F.pad(x, pad) if is_compiling() or any(pad) else x


def is_watched(module: nn.Module) -> bool:
    """Whether someone wants to see the calls of a module itself, by hooks or by a forward of its own."""
    return count_hooks(module) > 0 or has_backward_or_global_hooks(module) or "forward" in module.__dict__


def is_usual(layer: nn.Module, name: str) -> bool:
    """Whether a layer is of torch's or mmcv's class of that name, not one of the same name or weights that do more."""
    kind = type(layer)
    known = kind.__name__ == name and kind.__module__.startswith(("torch.nn.modules.", "mmcv.cnn."))
    return known and all(map(is_ordinary, layer.parameters(recurse=False)))


def drop_path(x: Tensor, layer: nn.Module) -> Tensor:
    """Stochastic depth as mmcv's ``DropPath`` has it, with the same random numbers, by one product."""
    if type(layer).__name__ != "DropPath" or not layer.training or not layer.drop_prob or is_watched(layer):
        return layer(x)
    keep = 1 - layer.drop_prob
    kept = keep + torch.rand((len(x), *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device)
    return x * kept.floor_().div_(keep)


def recompute_in_backward(module: nn.Module, x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
    """``then(module(x))``, where ``module(x)`` is not kept for the backward, but computed again from ``x``.

    Args:
        module: Without randomness or state that changes.
        x: Its input, which is kept for its own backward anyway.
        then: What gets its output.

    Returns:
        What ``then`` returns.
    """
    output = module(x)
    # What is kept is a compiler's to choose, or an outer hook's, such as checkpointing's.
    if not torch.is_grad_enabled() or is_compiling() or is_watched(module) or has_saved_tensors_hooks():
        return then(output)
    half = autocast_dtype(x)
    if half:  # as the linear layer that gets it would
        output = output.to(half)
    # Numbers, not the tensor: what the hooks refer to lives as long as the graph.
    place, size, dtype, source = output.data_ptr(), output.numel(), output.dtype, x.detach()

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype) == (place, size, dtype)
        if not same or not tensor.is_contiguous():
            return tensor.detach()  # itself would keep the graph that keeps it
        return partial(again, tensor.shape)

    def again(shape: torch.Size) -> Tensor:
        with torch.no_grad(), autocast(source, half):
            return module(source).to(dtype).view(shape)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return then(output)


MIXINS = {
    "PatchEmbed": FastPatchEmbed,
    "ShiftWindowMSA": FastShiftWindowMSA,
    "SwinBlock": FastSwinBlock,
    "PatchMerging": FastPatchMerging,
}
"""Name of an upstream class -> the mixin that gives it a fast forward."""


def make_fast_classes(upstream: ModuleType, place: str) -> dict[type[nn.Module], type[nn.Module]]:
    """Subclasses with a fast forward of a toolbox's Swin.

    Args:
        upstream: The toolbox's module with the classes.
        place: Name of the module that is to have the subclasses, where pickle looks for them.

    Returns:
        Upstream's classes -> their subclasses.
    """
    made = {}
    for name, mixin in MIXINS.items():
        cls = getattr(upstream, name)
        text = f"``{cls.__module__}.{name}`` with a fast forward."
        made[cls] = type(f"Fast{name}", (mixin, cls), {"__module__": place, "__doc__": text})
        setattr(sys.modules[place], f"Fast{name}", made[cls])
    return made


class ConditionedSwin(ConditionedBackbone):
    """Mixin in front of upstream's ``SwinTransformer``: the same arguments, ``conditioning``, and ``fast_attention``.

    Args:
        conditioning: See :class:`ConditionedBackbone`.
        fast_attention: Whether patches and blocks run with less memory traffic, equal to upstream but for rounding.
            False: upstream's own forward.
        **kwargs: The upstream class's arguments.

    Raises:
        ValueError: As :class:`ConditionedBackbone`.
    """

    fast_classes: ClassVar[Mapping[type[nn.Module], type[nn.Module]]]
    """Upstream's classes -> their subclasses with a fast forward."""

    def __init__(self, *args, conditioning: Conditioning = DEFAULT, fast_attention: bool = True, **kwargs) -> None:
        super().__init__(*args, conditioning=conditioning, **kwargs)
        for module in self.modules() if fast_attention else ():
            if type(module) in self.fast_classes:
                swap_class(module, self.fast_classes[type(module)])
