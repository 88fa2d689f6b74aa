"""Row normalisation of head outputs."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .switch import is_plain, triton_module


def normalize_rows(x: Tensor, eps: float, detach: bool, dim: int = -1) -> Tensor:
    """Divide each row by its Euclidean norm: ``x_i / max(||x_i||_2, eps)``.

    The norm is taken in float32 for half precision, else in the precision of ``x``. Zero rows stay zero, with a
    finite gradient. For the backward the result is kept, which the projection behind it keeps anyway, and not ``x``.

    Args:
        x: Rows of shape (..., d), or lying along ``dim``.
        eps: Smallest divisor.
        detach: Treat the norm as a constant in backpropagation instead of using the exact gradient.
        dim: The axis along which a row lies.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    if is_plain() or not (x.is_cuda or (x.requires_grad and torch.is_grad_enabled())):
        return normalize_rows_reference(x, eps, detach, dim)
    if x.is_cuda and dim in (-1, x.dim() - 1) and (kernel := triton_module("row_norm_triton")) and kernel.supports(x):
        return kernel.TritonNormalizeRows.apply(x.contiguous(), eps, detach)
    return _NormalizeRows.apply(x, eps, detach, dim)


def normalize_rows_reference(x: Tensor, eps: float, detach: bool, dim: int = -1) -> Tensor:
    """The plain twin of :func:`normalize_rows`."""
    wide = _wide(x)
    norm = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    if detach:
        norm = norm.detach()
    # The backward of a product costs less than that of a quotient.
    return (wide * norm.clamp_min(eps).reciprocal()).to(x.dtype)


class _NormalizeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, detach, dim):
        wide = _wide(x)
        norm = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
        y = (wide * norm.clamp_min(eps).reciprocal()).to(x.dtype)
        ctx.save_for_backward(norm, *(() if detach else (y,)))
        ctx.eps, ctx.dim = eps, dim
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        norm, *rest = ctx.saved_tensors
        wide, factor = _wide(gradient), norm.clamp_min(ctx.eps).reciprocal()
        result = wide * factor
        if rest:
            y = _wide(rest[0])
            along = torch.linalg.vecdot(wide, y, dim=ctx.dim).unsqueeze(ctx.dim)
            along = along.mul_(factor).masked_fill_(norm < ctx.eps, 0.0)
            result.addcmul_(y, along, value=-1.0)
        return result.to(gradient.dtype), None, None, None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
