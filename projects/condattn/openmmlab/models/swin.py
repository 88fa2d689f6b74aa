"""Swin layers with less memory traffic and the same parameters; upstream's forward is the reference implementation."""

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
    """Mixin for upstream's ``ShiftWindowMSA`` that projects tokens before it puts them into windows.

    It does not rebuild the feature map and the mask in each forward. Upstream's forward runs instead if attention
    dropout is active, if ``w_msa``, its softmax or its dropout is not of the class that upstream builds or has hooks
    that would not be called, or if :func:`condattn.kernels.switch.is_upstream` says so. The projections may be of any
    class and have hooks; only a ``HeadTransformLinear`` with a ``HeadNorm`` and without hooks is not called, but
    computed here.
    """

    upstream: ClassVar[ModuleType]
    """The toolbox's module of which the class is."""

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Map (B, H * W, C) to the same shape; see upstream."""
        msa = self.w_msa
        if is_upstream() or not self._is_upstreams(msa) or (self.training and msa.attn_drop.p):
            return super().forward(query, hw_shape)
        grid = Windows(*hw_shape, self.window_size, self.shift_size, query.device)
        proj = msa.proj
        plain = type(proj) is HeadTransformLinear and type(proj.head_transform) is HeadNorm
        is_fused = plain and not has_forward_hooks(proj)
        normalize = (proj.head_transform.eps, proj.head_transform.detach) if is_fused else None
        attention = grid, msa.num_heads, msa.scale, normalize
        heads = window_attention(msa.qkv(query), msa.qkv.bias, self._bias(), *attention)
        x = F.linear(heads, proj.weight, proj.bias) if is_fused else proj(heads)
        if not is_compiling():
            FirstForward.forget(msa)
        return drop_path(msa.proj_drop(x), self.drop)

    def _is_upstreams(self, msa: nn.Module) -> bool:
        """Whether ``msa`` computes what upstream's class does, and nothing observes the parts that are not called."""
        if type(msa) is not self.upstream.WindowMSA or not isinstance(msa.qkv, nn.Linear):
            return False
        parts = is_standard(msa.softmax, "Softmax") and msa.softmax.dim == -1 and is_standard(msa.attn_drop, "Dropout")
        return parts and not any(has_forward_hooks(module) for module in (msa, msa.softmax, msa.attn_drop))

    def _bias(self) -> Tensor:
        """The relative position bias, (heads, N, N)."""
        msa = self.w_msa
        return F.embedding(msa.relative_position_index, msa.relative_position_bias_table).permute(2, 0, 1).contiguous()


class FastSwinBlock:
    """Mixin for upstream's ``SwinBlock`` that recomputes normalised tokens and activations in the backward.

    This is cheap, and halves the memory that a block saves for the backward. Upstream's forward runs instead if it
    checkpoints the whole block, if the feed-forward network is not upstream's or has hooks, or if
    :func:`condattn.kernels.switch.is_upstream` says so. Under ``torch.compile`` the same operations run in plain form.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Map (B, H * W, C) to the same shape; see upstream."""
        ffn = self.ffn
        checkpointed = self.with_cp and x.requires_grad and torch.is_grad_enabled()
        if is_upstream() or checkpointed or ffn.num_fcs != 2 or not ffn.add_identity or has_forward_hooks(ffn):
            return super().forward(x, hw_shape)
        x = x + recompute_in_backward(self.norm1, x, lambda normalized: self.attn(normalized, hw_shape))
        out = recompute_in_backward(self.norm2, x, lambda normalized: _feed_forward(normalized, ffn))
        return x + drop_path(ffn.gamma2(out), ffn.dropout_layer)


def _feed_forward(x: Tensor, ffn: nn.Module) -> Tensor:
    """Apply the layers of mmcv's ``FFN`` with one hidden layer, by the fast operation if it supports them."""
    (linear, activation, drop), projection, drop_out = ffn.layers
    kinds = zip((linear, activation, projection), ("Linear", "GELU", "Linear"), strict=True)
    plain = all(is_standard(*one) for one in kinds) and getattr(activation, "approximate", "none") == "none"
    if not plain or (drop.training and drop.p) or any(map(has_forward_hooks, ffn.layers.modules())):
        return ffn.layers(x)
    return drop_out(feed_forward(x, linear.weight, linear.bias, projection.weight, projection.bias))


class FastPatchMerging:
    """Mixin for upstream's ``PatchMerging`` that merges pixels by copying rows and recomputes the norm in the backward.

    Upstream's forward runs instead if patches are not 2 x 2, adjacent and padded at the corner, if a layer that is not
    called here has hooks, or if :func:`condattn.kernels.switch.is_upstream` says so.
    """

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, H * W, C) to (B, ceil(H / 2) * ceil(W / 2), 2 C); return it and its size; see upstream."""
        unfold, padding = self.sampler, self.adap_padding
        plain = (unfold.kernel_size, unfold.stride, unfold.padding, unfold.dilation) == ((2, 2), (2, 2), (0, 0), (1, 1))
        plain = plain and padding is not None and padding.padding == "corner"
        if not plain or has_forward_hooks(unfold) or has_forward_hooks(padding) or is_upstream():
            return super().forward(x, input_size)
        height, width = input_size
        channels = x.shape[-1]
        x = x.view(len(x), height, width, channels)
        below, beside = (height + 1) // 2 * 2 - height, (width + 1) // 2 * 2 - width
        x = _pad(x, 0, 0, 0, beside, 0, below)
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x.view(len(x), height, 2, width, 2, channels).transpose(2, 3).reshape(len(x), height * width, 4, channels)
        # Two copies of whole rows are faster than one copy of single elements.
        x = x.mT.reshape(len(x), height * width, 4 * channels)
        return recompute_in_backward(self.norm, x, self.reduction) if self.norm else self.reduction(x), (height, width)


class FastPatchEmbed:
    """Mixin for upstream's ``PatchEmbed`` that computes the convolution as one matrix product, with channels last.

    Upstream's forward runs instead if patches overlap or leave gaps, if there is padding on all sides, if the
    convolution is not an ordinary ``Conv2d``, if it or the padding has hooks, or if
    :func:`condattn.kernels.switch.is_upstream` says so.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, C, H, W) to (B, rows * columns, embed_dims); return it and (rows, columns); see upstream."""
        conv = self.projection
        if not is_standard(conv, "Conv2d") or has_forward_hooks(conv) or is_upstream():
            return super().forward(x)
        if (conv.stride, conv.padding, conv.dilation, conv.groups) != (conv.kernel_size, (0, 0), (1, 1), 1):
            return super().forward(x)
        padding, (height, width) = self.adap_padding, conv.kernel_size
        if padding and (padding.padding != "corner" or has_forward_hooks(padding)):
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
    """``F.pad`` without a copy if there is no padding; when compiling, always ``F.pad``: one graph for both cases."""
    return F.pad(x, pad) if is_compiling() or any(pad) else x


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether calls of ``module`` are observed, by hooks or by a ``forward`` set on the instance."""
    return count_hooks(module) > 0 or has_backward_or_global_hooks(module) or "forward" in module.__dict__


def is_standard(layer: nn.Module, name: str) -> bool:
    """Whether ``layer`` is exactly of torch's or mmcv's class ``name``, with ordinary tensors as weights."""
    kind = type(layer)
    known = kind.__name__ == name and kind.__module__.startswith(("torch.nn.modules.", "mmcv.cnn."))
    return known and all(map(is_ordinary, layer.parameters(recurse=False)))


def drop_path(x: Tensor, layer: nn.Module) -> Tensor:
    """Stochastic depth as in mmcv's ``DropPath``, with the same random numbers but a single product."""
    if type(layer).__name__ != "DropPath" or not layer.training or not layer.drop_prob or has_forward_hooks(layer):
        return layer(x)
    keep = 1 - layer.drop_prob
    mask = keep + torch.rand((len(x), *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device)
    return x * mask.floor_().div_(keep)


def recompute_in_backward(module: nn.Module, x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute ``then(module(x))``, and recompute ``module(x)`` in the backward instead of saving it.

    Args:
        module: A module without randomness or changing state.
        x: The input of ``module``, which is saved for its backward anyway.
        then: The function to apply to the output of ``module``.

    Returns:
        The result of ``then``.
    """
    output = module(x)
    # Which tensors are saved is the decision of a compiler, or of outer hooks, such as those of checkpointing.
    if not torch.is_grad_enabled() or is_compiling() or has_forward_hooks(module) or has_saved_tensors_hooks():
        return then(output)
    half = autocast_dtype(x)
    if half:  # as the linear layer that receives it would cast it
        output = output.to(half)
    # Numbers instead of the tensor: whatever the hooks refer to lives as long as the graph.
    place, size, dtype, source = output.data_ptr(), output.numel(), output.dtype, x.detach()

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype) == (place, size, dtype)
        if not same or not tensor.is_contiguous():
            return tensor.detach()  # the tensor itself refers to the graph, and would form a cycle with it
        return partial(recompute, tensor.shape)

    def recompute(shape: torch.Size) -> Tensor:
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
    """Create subclasses with a fast forward for the classes of a toolbox's Swin.

    Args:
        upstream: The toolbox's module with the classes.
        place: Name of the module to put the subclasses into, where pickle looks for them.

    Returns:
        Upstream's classes -> their subclasses.
    """
    made = {}
    for name, mixin in MIXINS.items():
        cls = getattr(upstream, name)
        text = f"``{cls.__module__}.{name}`` with a fast forward."
        made[cls] = type(f"Fast{name}", (mixin, cls), {"__module__": place, "__doc__": text, "upstream": upstream})
        setattr(sys.modules[place], f"Fast{name}", made[cls])
    return made


class ConditionedSwin(ConditionedBackbone):
    """Mixin to be placed before upstream's ``SwinTransformer``; it adds ``conditioning`` and ``fast_attention``.

    Args:
        conditioning: See :class:`ConditionedBackbone`.
        fast_attention: Whether patches and blocks run with less memory traffic, equal to upstream up to rounding. If
            False, upstream's own forward runs.
        **kwargs: Arguments of the upstream class.

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
