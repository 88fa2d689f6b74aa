"""Attention in shifted windows (Swin, arXiv 2103.14030), from projected tokens to head outputs in token order."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .row_norm import normalize_rows, smallest_divisor
from .switch import autocast, is_compiling, is_plain, is_upstream, triton_module
from .windows import Windows

LN2 = math.log(2.0)
ALIGNMENT = 16
"""PyTorch's memory-efficient attention needs an attention mask whose row stride is a multiple of this many elements."""


def window_attention(
    qkv: Tensor,
    padding: Tensor | None,
    bias: Tensor,
    grid: Windows,
    heads: int,
    scale: float,
    normalize: tuple[float, bool] | None = None,
) -> Tensor:
    """Compute softmax(scale Q K^T + bias + mask) V in each window, without saving attention maps for the backward pass.

    Tokens are projected before they are arranged in windows, so that padding is not projected. The queries, keys and
    values of padding are ``padding``.

    Args:
        qkv: Queries, keys and values of all heads, (B, height * width, 3 * heads * d).
        padding: Queries, keys and values of padding, (3 * heads * d,), such as the bias of the projection; None: zeros.
        bias: Added to the logits of each head, (heads, size^2, size^2).
        grid: The windows.
        heads: Number of heads.
        scale: Factor of Q K^T.
        normalize: ``eps`` and ``detach`` of :func:`condattn.kernels.row_norm.normalize_rows`, which then normalises the
            rows of each head's output; None: no normalisation.

    Returns:
        (B, height * width, heads * d), in the dtype of ``qkv``.

    Raises:
        ValueError: If the map does not have height * width tokens.
    """
    if qkv.shape[1] != grid.height * grid.width:
        raise ValueError(f"expected {grid.height} x {grid.width} tokens, found {qkv.shape[1]}")
    if len(qkv) == 0:
        return qkv[..., : qkv.shape[-1] // 3]
    padding = None if padding is None else padding.to(qkv.dtype)
    if (
        not is_plain()
        and qkv.is_cuda
        and (kernel := triton_module("window_attention_triton"))
        and kernel.supports(qkv, grid, heads)
    ):
        eps, detach = (smallest_divisor(qkv, normalize[0]), normalize[1]) if normalize else (None, False)
        attend = kernel.TritonWindowAttention.apply
        return attend(qkv.contiguous(), padding, bias, grid, heads, scale, eps, detach)
    arguments = padding, bias, grid, heads, scale
    if is_upstream() or qkv.device.type == "meta":
        outputs = window_attention_reference(qkv, *arguments)
    elif is_compiling() or qkv.is_cuda:
        outputs = window_attention_fused(qkv, *arguments)
    else:
        with autocast(qkv, None):
            outputs = _WindowAttention.apply(qkv.contiguous(), *arguments)
    if normalize is None:
        return outputs
    return normalize_rows(outputs.unflatten(-1, (heads, -1)), *normalize).flatten(-2)


def window_attention_reference(
    qkv: Tensor, padding: Tensor | None, bias: Tensor, grid: Windows, heads: int, scale: float
) -> Tensor:
    """Reference implementation of :func:`window_attention`: pad, roll, partition, attend, and reverse."""
    q, k, v = _cut(qkv, padding, grid, heads)
    logits = (q * scale) @ k.mT + bias
    if grid.shift:
        logits = logits + grid.mask(logits.dtype)[:, None]
    return _join(logits.softmax(-1).to(v.dtype) @ v, grid)


def window_attention_fused(
    qkv: Tensor, padding: Tensor | None, bias: Tensor, grid: Windows, heads: int, scale: float
) -> Tensor:
    """Compute the same with PyTorch's fused attention, for GPUs without the Triton kernel, and for ``torch.compile``.

    Bias and mask are summed to one attention mask, with the row stride that memory-efficient attention requires. Tokens
    are arranged in windows by indexing, because compilers take minutes for padding, rolling and partitioning maps of
    any size.
    """
    added = (bias + grid.mask(bias.dtype)[:, None]).flatten(0, 1) if grid.shift else bias
    added = F.pad(added.to(qkv.dtype), (0, -(grid.size**2) % ALIGNMENT))[..., : grid.size**2]
    tokens, places = grid.exchange()
    x = _Rows.apply(qkv, tokens, places, grid.is_padded, False)
    if padding is not None and grid.is_padded:
        x = torch.where((tokens < qkv.shape[1])[:, None], x, padding)
    x = x.reshape(len(qkv), -1, grid.size**2, 3, heads, qkv.shape[-1] // (3 * heads)).permute(3, 0, 1, 4, 2, 5)
    # Windows become heads if each has its own mask, and samples otherwise, so that no mask is copied.
    q, k, v = (x.flatten(2, 3) if grid.shift else x.flatten(1, 2)).unbind(0)
    x = F.scaled_dot_product_attention(q, k, v, added.expand(len(q), *added.shape), scale=scale)
    x = x.reshape(len(qkv), -1, heads, *x.shape[2:]).transpose(2, 3).reshape(len(qkv), -1, heads * x.shape[-1])
    return _Rows.apply(x, places, tokens, False, grid.is_padded)


class _Rows(torch.autograd.Function):
    """Select rows of (B, rows, C) by index, with zeros for the index ``rows``; the backward pass selects rows as well.

    Two flags say whether ``index`` and ``inverse`` contain the index for zeros.
    """

    @staticmethod
    def forward(ctx, x, index, inverse, zeros, zeros_back):
        ctx.save_for_backward(index, inverse)
        ctx.zeros = zeros, zeros_back
        if not zeros:
            return x.index_select(1, index)
        rows = x.index_select(1, index.clamp_max(x.shape[1] - 1))
        # Not in place, where TorchDynamo would lose the gradient.
        return rows.masked_fill((index == x.shape[1])[:, None], 0.0)

    @staticmethod
    def backward(ctx, gradient):
        index, inverse = ctx.saved_tensors
        return _Rows.apply(gradient, inverse, index, *reversed(ctx.zeros)), None, None, None, None


def _cut(qkv: Tensor, padding: Tensor | None, grid: Windows, heads: int) -> tuple[Tensor, ...]:
    """Return queries, keys and values, (B, windows, heads, size^2, d), by padding, rolling and partitioning the map."""
    batch, size, rows, columns = qkv.shape[0], grid.size, grid.rows, grid.columns
    x = qkv.reshape(batch, grid.height, grid.width, -1)
    if grid.is_padded:
        below, beside = rows * size - grid.height, columns * size - grid.width
        x = F.pad(x, (0, 0, 0, beside, 0, below))
        if padding is not None:
            outside = F.pad(x.new_zeros(grid.height, grid.width, 1), (0, 0, 0, beside, 0, below), value=1.0)
            x = x + outside * padding
    if grid.shift:
        x = x.roll((-grid.shift, -grid.shift), (1, 2))
    x = x.reshape(batch, rows, size, columns, size, 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.reshape(3, batch, rows * columns, heads, size * size, -1).unbind(0)


def _join(x: Tensor, grid: Windows) -> Tensor:
    """Rearrange head outputs, (B, windows, heads, size^2, d), to (B, height * width, heads * d)."""
    batch, _, heads, _, _ = x.shape
    x = x.reshape(batch, grid.rows, grid.columns, heads, grid.size, grid.size, -1).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(batch, grid.rows * grid.size, grid.columns * grid.size, -1)
    if grid.shift:
        x = x.roll((grid.shift, grid.shift), (1, 2))
    return x[:, : grid.height, : grid.width].reshape(batch, grid.height * grid.width, -1)


class _WindowAttention(torch.autograd.Function):
    """Gathers the rows of each head once; the backward pass recomputes the map from them and its normalisers."""

    @staticmethod
    def forward(ctx, qkv, padding, bias, grid, heads, scale):
        q, k, v = (_gather(qkv, padding, grid, heads, part) for part in range(3))
        # Softmax by in-place steps is faster than torch.softmax, and also gives the logarithm of its denominator.
        weights = _logits(q, k, bias, grid, heads, scale)
        largest = weights.amax(-1, keepdim=True)
        total = _exp2(weights, largest).sum(-1, keepdim=True)
        weights.div_(total)
        ctx.save_for_backward(q, k, v, bias, total.log2_().add_(largest))
        ctx.grid, ctx.heads, ctx.scale = grid, heads, scale
        ctx.batch, ctx.has_padding = qkv.shape[0], padding is not None
        outputs = torch.bmm(weights.to(v.dtype), v).flatten(0, 1)
        return outputs.index_select(0, grid.place_rows(heads, len(qkv), 1)).view(*qkv.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, bias, normalizers = ctx.saved_tensors
        grid, heads, batch, size = ctx.grid, ctx.heads, ctx.batch, v.shape[-1]
        rows = gradient.reshape(-1, size).index_select(0, grid.token_rows(heads, batch))
        if grid.is_padded:
            rows.index_fill_(0, grid.padding_rows(heads, batch), 0.0)
        rows = rows.view_as(v)
        with autocast(q, None):
            weights = _exp2(_logits(q, k, bias, grid, heads, ctx.scale), normalizers)
        grad_logits = torch.bmm(rows, v.mT).to(weights.dtype)
        grad_logits.mul_(weights)
        grad_logits.addcmul_(weights, grad_logits.sum(-1, keepdim=True), value=-1.0)
        grad_bias = grad_logits.view(-1, heads, *weights.shape[1:]).sum(0)
        grad_logits, weights = grad_logits.to(v.dtype), weights.to(v.dtype)
        grads = v.new_empty(3, *v.shape)
        torch.baddbmm(grads[0], grad_logits, k, beta=0, alpha=ctx.scale, out=grads[0])
        torch.baddbmm(grads[1], grad_logits.mT, q, beta=0, alpha=ctx.scale, out=grads[1])
        torch.bmm(weights.mT, rows, out=grads[2])
        grad_padding = None
        if ctx.has_padding:
            outside = grads.flatten(1, 2).index_select(1, grid.padding_rows(heads, batch))
            grad_padding = outside.view(3, heads, -1, size).sum(2).flatten()
        grad_qkv = grads.view(-1, size).index_select(0, grid.place_rows(heads, batch, 3))
        return grad_qkv.view(batch, -1, 3 * heads * size), grad_padding, grad_bias, None, None, None


def _gather(qkv: Tensor, padding: Tensor | None, grid: Windows, heads: int, part: int) -> Tensor:
    """Gather queries (part 0), keys (1) or values (2), (B * windows * heads, size^2, d)."""
    size = qkv.shape[-1] // (3 * heads)
    rows = qkv.view(-1, size)[part * heads :].index_select(0, grid.projected_rows(heads, len(qkv)))
    if grid.is_padded:
        outside = grid.padding_rows(heads, len(qkv))
        filling = rows.new_zeros(heads, len(outside) // heads, size)
        if padding is not None:
            filling.copy_(padding.view(3, heads, 1, size)[part])
        rows.index_copy_(0, outside, filling.flatten(0, 1))
    return rows.view(-1, grid.size**2, size)


def _logits(q: Tensor, k: Tensor, bias: Tensor, grid: Windows, heads: int, scale: float) -> Tensor:
    """Return logits / ln 2, (B * windows * heads, size^2, size^2), in float32 for half precision."""
    logits = _scaled(scale / LN2, q, k.mT).to(torch.promote_types(q.dtype, torch.float32))
    view = logits.view(-1, grid.rows, grid.columns, heads, *logits.shape[1:])
    view.add_(bias, alpha=1.0 / LN2)
    if grid.shift:
        last_row, last_column = grid.border_masks(logits.dtype)
        view[:, -1].add_(last_row[:, None], alpha=1.0 / LN2)
        view[:, :-1, -1].add_(last_column[:, None], alpha=1.0 / LN2)
    return logits


def _exp2(logits: Tensor, largest: Tensor) -> Tensor:
    """Compute 2^(logits - largest) in place, which is faster than e^.

    Masked logits are clamped to give small normal numbers, because denormal numbers are slow.
    """
    return logits.sub_(largest).clamp_min_(-80.0 / LN2).exp2_()


def _scaled(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """Return ``scale * a @ b`` for batches of matrices."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
