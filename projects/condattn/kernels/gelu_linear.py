"""The second half of a feed-forward network, keeping its hidden layer once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .switch import is_plain


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU(hidden) W^T + b, whose backward computes the GELU again instead of keeping it.

    Args:
        hidden: (..., hidden features), before the activation.
        weight: W, (out features, hidden features).
        bias: b, (out features,), or None.

    Returns:
        (..., out features).
    """
    if is_plain():
        return gelu_linear_reference(hidden, weight, bias)
    if torch.is_autocast_enabled(hidden.device.type):  # as a linear layer would
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
    return _GeluLinear.apply(hidden, weight, bias)


def gelu_linear_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain twin of :func:`gelu_linear`."""
    return F.linear(F.gelu(hidden), weight, bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight)
        return gelu_linear_reference(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        rows, gradient = hidden.flatten(0, -2), gradient.flatten(0, -2)
        active = F.gelu(rows)
        grad_weight = gradient.T @ active if ctx.needs_input_grad[1] else None
        grad_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        grad_hidden = torch.mm(gradient, weight, out=active)  # one buffer for three
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, rows, grad_input=grad_hidden)
        return grad_hidden.view_as(hidden), grad_weight, grad_bias
