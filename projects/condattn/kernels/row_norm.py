"""Row normalisation of head outputs, alone or together with the projection that follows it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .switch import autocast_dtype, is_plain, triton_module


def normalize_rows(x: Tensor, eps: float, detach: bool, dim: int = -1) -> Tensor:
    """Divide each row by its Euclidean norm: ``x_i / max(||x_i||_2, eps)``.

    The norm is computed in float32 for half precision, and otherwise in the precision of ``x``. Zero rows stay zero,
    with a finite gradient. The result is saved for the backward pass instead of ``x``, because the projection that
    follows saves it anyway.

    Args:
        x: Rows of shape (..., d), or rows along ``dim``.
        eps: Smallest divisor. It is at least 2^-14 in float16, see :func:`smallest_divisor`.
        detach: Treat the norm as a constant in the backward pass instead of using the exact gradient.
        dim: The axis along which a row lies.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    if is_plain() or not (x.is_cuda or (x.requires_grad and torch.is_grad_enabled())):
        return normalize_rows_reference(x, eps, detach, dim)
    return _NormalizeRows.apply(x, smallest_divisor(x, eps), detach, dim)


def normalize_rows_reference(x: Tensor, eps: float, detach: bool, dim: int = -1) -> Tensor:
    """Reference implementation of :func:`normalize_rows`."""
    return _divide_reference(x, smallest_divisor(x, eps), dim, detach)[0]


def smallest_divisor(x: Tensor, eps: float) -> float:
    """Return ``eps``, or in float16 the smallest normal number, 2^-14, if that is larger.

    The gradient of a shorter row is divided by this constant, and the quotient by 1e-6 would overflow in float16, whose
    largest number is 65504. The entries of such rows are subnormal numbers, which consist mostly of rounding errors.
    """
    return max(eps, torch.finfo(x.dtype).tiny) if x.dtype == torch.float16 else eps


def normalized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, eps: float, detach: bool) -> Tensor:
    """Normalise the rows of each head in ``x`` to y, and project them: ``F.linear(y, weight, bias)``.

    ``x`` is saved for the backward pass, because fused attention saves it anyway, and y is recomputed there. The result
    can be differentiated only once. The reference implementation is the row norm followed by the linear layer.

    Args:
        x: The rows of all heads side by side, (..., heads * d).
        weight: (out features, heads * d).
        bias: (out features,), or None.
        heads: Number of heads.
        eps: Smallest divisor; see :func:`normalize_rows`.
        detach: See :func:`normalize_rows`.

    Returns:
        (..., out features).
    """
    dtype = autocast_dtype(x)
    if dtype:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _NormalizedLinear.apply(x, weight, bias, heads, smallest_divisor(x, eps), detach, dtype or x.dtype)


class _NormalizeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, detach, dim):
        y, norm = _divide(x, eps, dim)
        ctx.save_for_backward(norm, *(() if detach else (y,)))
        ctx.eps, ctx.dim = eps, dim
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        norm, *rest = ctx.saved_tensors
        return _divide_backward(gradient, rest[0] if rest else None, norm, ctx.eps, ctx.dim), None, None, None


class _NormalizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, heads, eps, detach, dtype):
        ctx.save_for_backward(x, weight)
        ctx.heads, ctx.eps, ctx.detach, ctx.dtype = heads, eps, detach, dtype
        y, _ = _divide(x.unflatten(-1, (heads, -1)), eps)
        return F.linear(y.flatten(-2).to(dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        y, norm = _divide(x.unflatten(-1, (ctx.heads, -1)), ctx.eps)
        count = x.shape[:-1].numel()
        rows, grad_x, grad_weight = gradient.reshape(count, len(weight)), None, None
        if needs_weight:
            grad_weight = rows.T @ y.reshape(count, x.shape[-1]).to(ctx.dtype)
        if needs_x:
            grad_y = (rows @ weight).to(x.dtype).view(y.shape)
            grad_x = _divide_backward(grad_y, None if ctx.detach else y, norm, ctx.eps).reshape(x.shape)
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None, None, None, None, None


def _divide(x: Tensor, eps: float, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Return the rows divided by their norms, and the norms, in which ``dim`` has size 1."""
    kernel = _kernel(x, dim)
    return kernel.divide(x.contiguous(), eps) if kernel else _divide_reference(x, eps, dim)


def _divide_reference(x: Tensor, eps: float, dim: int, detach: bool = False) -> tuple[Tensor, Tensor]:
    wide = _upcast(x)
    norm = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    if detach:
        norm = norm.detach()
    # The backward pass of a multiplication costs less than that of a division.
    return (wide * norm.clamp_min(eps).reciprocal()).to(x.dtype), norm


def _divide_backward(gradient: Tensor, y: Tensor | None, norm: Tensor, eps: float, dim: int = -1) -> Tensor:
    """Return the gradient with respect to ``x``; if ``y``, the normalised rows, is None, the norm is a constant."""
    if kernel := _kernel(gradient, dim):
        return kernel.divide_backward(gradient.contiguous(), y, norm, eps)
    wide, factor = _upcast(gradient), norm.clamp_min(eps).reciprocal()
    if y is None:
        return (wide * factor).to(gradient.dtype)
    y = _upcast(y)
    along = (wide * y).sum(dim, keepdim=True).mul_(factor).masked_fill_(norm < eps, 0.0)
    return (wide * factor).addcmul_(y, along, value=-1.0).to(gradient.dtype)


def _kernel(x: Tensor, dim: int) -> ModuleType | None:
    """Return the module of Triton kernels if it supports these rows, otherwise None."""
    if not x.is_cuda or dim not in (-1, x.dim() - 1):
        return None
    kernel = triton_module("row_norm_triton")
    return kernel if kernel and kernel.supports(x) else None


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
