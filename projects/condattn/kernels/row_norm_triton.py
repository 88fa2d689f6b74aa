"""Triton kernels for row normalisation, with one read and one write of the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 1024
"""Largest supported number of entries in a row."""
ENTRIES = 4096
"""Number of entries that one program processes."""


def supports(x: Tensor) -> bool:
    """Return whether the kernels support these rows."""
    return x.dtype in DTYPES and 0 < x.shape[-1] <= LARGEST and x.numel() > 0


@triton.jit(do_not_specialize=["ROWS"])
def _forward(x, y, norms, ROWS, eps, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    exists = (rows < ROWS)[:, None] & (columns < D)[None, :]
    places = rows[:, None] * D + columns[None, :]
    values = tl.load(x + places, mask=exists, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(values * values, 1))
    tl.store(y + places, (values / tl.maximum(norm, eps)[:, None]).to(y.dtype.element_ty), mask=exists)
    tl.store(norms + rows, norm, mask=rows < ROWS)


@triton.jit(do_not_specialize=["ROWS"])
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


def divide(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Divide the rows of ``x``, contiguous, (..., d), by their norms.

    Returns the result in the dtype of ``x``, and the norms, (..., 1), in float32.
    """
    y, norm = torch.empty_like(x), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    grid, settings = _launch(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _forward[grid](x, y, norm, norm.numel(), eps, **settings)
    return y, norm


def divide_backward(gradient: Tensor, y: Tensor | None, norm: Tensor, eps: float) -> Tensor:
    """Return the gradient of ``x`` from a contiguous gradient of ``y``; if ``y`` is None, the norm is a constant."""
    result, detach = torch.empty_like(gradient), y is None
    grid, settings = _launch(gradient)
    y = gradient if y is None else y.contiguous()  # a placeholder, not read if detached
    with torch.cuda.device_of(gradient):
        _backward[grid](y, norm, gradient, result, norm.numel(), eps, DETACH=detach, **settings)
    return result


def _launch(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return the launch grid, and the block sizes of a program."""
    size = x.shape[-1]
    columns = triton.next_power_of_2(size)
    block = max(1, ENTRIES // columns)
    return (triton.cdiv(x.numel() // size, block),), dict(D=size, COLUMNS=columns, BLOCK=block)
