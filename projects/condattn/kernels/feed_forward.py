"""The feed-forward network of a transformer block, computed in chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .private import gelu
from .switch import autocast, autocast_dtype, is_plain

PART = 2**21
"""Hidden elements per chunk on a CPU (8 MiB in float32), so that they stay in its cache between two layers."""
LEAST = 256
"""Least number of tokens per chunk; matrix products of fewer tokens are slow."""


def feed_forward(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
) -> Tensor:
    """Compute GELU(x W_in^T + b_in) W_out^T + b_out, saving the hidden layer only once, before the GELU.

    The backward pass recomputes the GELU. On a CPU, in single or double precision, it never holds the gradient of the
    whole hidden layer. Without gradients, the forward pass never holds the whole hidden layer either.

    Args:
        x: (..., in features).
        weight_in: W_in, (hidden features, in features).
        bias_in: b_in, (hidden features,), or None.
        weight_out: W_out, (out features, hidden features).
        bias_out: b_out, (out features,), or None.

    Returns:
        (..., out features).
    """
    if is_plain():
        return feed_forward_reference(x, weight_in, bias_in, weight_out, bias_out)
    tensors: tuple[Tensor | None, ...] = (x, weight_in, bias_in, weight_out, bias_out)
    if dtype := autocast_dtype(x):  # as autocast does for linear layers
        tensors = tuple(one if one is None else one.to(dtype) for one in tensors)
    keep = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)
    with autocast(x, None):
        return _FeedForward.apply(*tensors, keep)


def feed_forward_reference(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
) -> Tensor:
    """Reference implementation of :func:`feed_forward`."""
    return F.linear(F.gelu(F.linear(x, weight_in, bias_in)), weight_out, bias_out)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_in, bias_in, weight_out, bias_out, keep):
        rows, features = x.flatten(0, -2), len(weight_in)
        active = _buffer(rows, features)
        hidden = rows.new_empty(len(rows), features) if keep else active
        outputs = rows.new_empty(len(rows), len(weight_out))
        for part in _parts(rows, features):
            before = hidden[part] if keep else hidden[: len(rows[part])]
            _project(rows[part], weight_in, bias_in, before)
            after = gelu(before, out=active[: len(before)])
            _project(after, weight_out, bias_out, outputs[part])
        if keep:
            ctx.save_for_backward(x, hidden, weight_in, weight_out)
        return outputs.view(*x.shape[:-1], len(weight_out))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, hidden, weight_in, weight_out = ctx.saved_tensors
        needs_x, needs_in, needs_bias_in, needs_out, needs_bias_out, _ = ctx.needs_input_grad
        rows, gradient, features = x.flatten(0, -2), gradient.flatten(0, -2), len(weight_in)
        grad_x = x.new_empty(rows.shape) if needs_x else None
        grad_in = torch.empty_like(weight_in) if needs_in else None
        grad_bias_in = rows.new_zeros(features) if needs_bias_in else None
        grad_out = torch.empty_like(weight_out) if needs_out else None
        buffer = _buffer(rows, features)
        for part in _parts(rows, features):
            before, change, beta = hidden[part], gradient[part], int(part.start > 0)
            active = gelu(before, out=buffer[: len(before)])
            if grad_out is not None:
                grad_out.addmm_(change.T, active, beta=beta)
            change = torch.mm(change, weight_out, out=active)
            torch.ops.aten.gelu_backward.grad_input(change, before, grad_input=change)
            if grad_bias_in is not None:
                grad_bias_in += change.sum(0)
            if grad_in is not None:
                grad_in.addmm_(change.T, rows[part], beta=beta)
            if grad_x is not None:
                torch.mm(change, weight_in, out=grad_x[part])
        grad_bias_out = gradient.sum(0) if needs_bias_out else None
        return grad_x if grad_x is None else grad_x.view_as(x), grad_in, grad_bias_in, grad_out, grad_bias_out, None


def _parts(rows: Tensor, features: int) -> Iterator[slice]:
    """Return the slices of rows that are processed one after the other; if there are no rows, one empty slice."""
    step = _step(rows, features)
    return (slice(start, start + step) for start in range(0, max(1, len(rows)), step))


def _step(rows: Tensor, features: int) -> int:
    """Return the number of rows per chunk.

    It is all rows in half precision, where a sum over chunks would round, and on GPUs, where it would launch more
    kernels.
    """
    whole = rows.is_cuda or rows.dtype in (torch.float16, torch.bfloat16)
    return max(1, len(rows) if whole else min(len(rows), max(LEAST, PART // features)))


def _buffer(rows: Tensor, features: int) -> Tensor:
    return rows.new_empty(min(len(rows), _step(rows, features)), features)


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias, rows, weight.T, out=out)
