"""Row normalisation in one read and one write, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 1024
"""Numbers in a row."""
ENTRIES = 4096
"""Of a program."""


def supports(x: Tensor) -> bool:
    """Whether the kernel takes these rows."""
    return x.dtype in DTYPES and 0 < x.shape[-1] <= LARGEST and x.numel() > 0


@triton.jit
def _forward(x, y, norms, ROWS, eps, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    exists = (rows < ROWS)[:, None] & (columns < D)[None, :]
    places = rows[:, None] * D + columns[None, :]
    values = tl.load(x + places, mask=exists, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(values * values, 1))
    tl.store(y + places, (values / tl.maximum(norm, eps)[:, None]).to(y.dtype.element_ty), mask=exists)
    tl.store(norms + rows, norm, mask=rows < ROWS)


@triton.jit
def _backward(
    y, norms, grad_y, grad_x, ROWS, eps,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    exists = (rows < ROWS)[:, None] & (columns < D)[None, :]
    places = rows[:, None] * D + columns[None, :]
    grad = tl.load(grad_y + places, mask=exists, other=0.0).to(tl.float32)
    norm = tl.load(norms + rows, mask=rows < ROWS, other=1.0)
    if not DETACH:
        unit = tl.load(y + places, mask=exists, other=0.0).to(tl.float32)
        along = tl.where(norm < eps, 0.0, tl.sum(unit * grad, 1))
        grad -= unit * along[:, None]
    tl.store(grad_x + places, (grad / tl.maximum(norm, eps)[:, None]).to(grad_x.dtype.element_ty), mask=exists)


class TritonNormalizeRows(torch.autograd.Function):
    """As :func:`condattn.kernels.row_norm.normalize_rows`, of the last axis of a contiguous tensor on a GPU."""

    @staticmethod
    def forward(ctx, x, eps, detach):
        """Rows (..., d) of norm one."""
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        y, norms = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        columns = triton.next_power_of_2(size)
        ctx.settings = dict(D=size, COLUMNS=columns, BLOCK=max(1, ENTRIES // columns))
        _forward[(triton.cdiv(rows, ctx.settings["BLOCK"]),)](x, y, norms, rows, eps, **ctx.settings)
        ctx.save_for_backward(*(() if detach else (y,)), norms)
        ctx.eps, ctx.detach = eps, detach
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """The gradient of ``x``."""
        *kept, norms = ctx.saved_tensors
        gradient = gradient.contiguous()
        result, rows = torch.empty_like(gradient), len(norms)
        blocks = triton.cdiv(rows, ctx.settings["BLOCK"])
        unit = kept[0] if kept else gradient  # which is not read then
        _backward[(blocks,)](unit, norms, gradient, result, rows, ctx.eps, DETACH=ctx.detach, **ctx.settings)
        return result, None, None
