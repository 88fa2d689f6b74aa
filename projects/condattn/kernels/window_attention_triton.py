"""Triton kernels for attention in shifted windows, in one pass over memory: attention maps are never written.

A program of the forward pass computes one window and head. It finds its tokens in the map by itself, so that nothing is
padded, rolled or partitioned. A program of the backward pass computes one head and several windows in sequence, and
accumulates its own sum of their bias gradients. No two programs write to the same address, so results are
deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .windows import MASKED, Windows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (16, 32, 64, 128)
LARGEST = 256
"""Largest supported number of tokens in a window."""
OFFSETS = 2**31
"""An image has fewer entries than this, because offsets in it have 32 bits."""
RUNTIME_SIZES = ["HEIGHT", "WIDTH", "ROWS", "COLUMNS", "WINDOWS", "EACH"]
"""Sizes for which no kernel of their own is compiled, because they differ from one batch of images to the next."""
BACKWARD_WARPS = 8
PROGRAMS = 4
"""Number of programs of the backward pass for each multiprocessor."""


def supports(qkv: Tensor, grid: Windows, heads: int) -> bool:
    """Return whether the kernels support these tensors, and the GPU has the shared memory that they need."""
    size, places = qkv.shape[-1] // (3 * heads), _places(grid)
    if qkv.dtype not in DTYPES or size not in HEAD_SIZES or grid.size**2 > LARGEST or not len(qkv):
        return False
    if qkv.shape[1:].numel() >= OFFSETS:
        return False
    gpu: Any = torch.cuda.get_device_properties(qkv.device)  # the type stub lacks an attribute
    return shared_memory(places, size, qkv.element_size()) <= gpu.shared_memory_per_block_optin


def shared_memory(places: int, size: int, bytes_each: int) -> int:
    """Return the most shared memory that the kernels need, in bytes, as the compiler reports for sm_90.

    It holds keys, values, and the rows that are processed at a time.
    """
    rows = rows_at_a_time(places, size, bytes_each)
    return 2 * (places + rows) * size * bytes_each + 2 * rows * places * bytes_each


def rows_at_a_time(places: int, size: int, bytes_each: int) -> int:
    """Return the rows of the map that a program processes at a time; with more, the compiler spills registers."""
    return min(places, 64 if places <= 64 and size * bytes_each <= 128 else 16)


def forward_warps(places: int) -> int:
    """Return the number of warps of a program of the forward pass."""
    return 4 if places <= 64 else 8


@triton.jit
def _locate(window, places, HEIGHT, WIDTH, ROWS, COLUMNS, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    """Return, for each place of a window, its token, whether it is one (and not padding), and its region of the map."""
    y = (window // COLUMNS) * SIZE + places // SIZE
    x = (window % COLUMNS) * SIZE + places % SIZE
    region = 3 * ((y >= ROWS * SIZE - SIZE).to(tl.int32) + (y >= ROWS * SIZE - SHIFT).to(tl.int32))
    region += (x >= COLUMNS * SIZE - SIZE).to(tl.int32) + (x >= COLUMNS * SIZE - SHIFT).to(tl.int32)
    y = (y + SHIFT) % (ROWS * SIZE)
    x = (x + SHIFT) % (COLUMNS * SIZE)
    inside = (places < SIZE * SIZE) & (y < HEIGHT) & (x < WIDTH)
    return y * WIDTH + x, inside, region


@triton.jit
def _load_part(qkv, padding, part: tl.constexpr, token, inside, exists, head, HEADS: tl.constexpr, D: tl.constexpr):
    """Load queries (part 0), keys (1) or values (2) of one head at these places, (places, d)."""
    channel = (part * HEADS + head) * D + tl.arange(0, D)
    rows = tl.load(qkv + token[:, None] * (3 * HEADS * D) + channel[None, :], mask=inside[:, None], other=0.0)
    outside = tl.load(padding + channel)
    return tl.where((exists & ~inside)[:, None], outside[None, :], rows)


@triton.jit
def _softmax(
    q, k, bias, rows, columns, region, regions, scale,
    N: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Compute rows of the attention map of one window and head, (rows, columns), in float32."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    exists = (rows < N)[:, None] & (columns < N)[None, :]
    logits += tl.load(bias + rows[:, None] * N + columns[None, :], mask=exists, other=0.0)
    if SHIFT > 0:
        logits += tl.where(region[:, None] != regions[None, :], MASK, 0.0)
    logits = tl.where((columns < N)[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _forward(
    qkv, padding, bias, out, norms, HEIGHT, WIDTH, ROWS, COLUMNS, scale, eps,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    window, head = tl.program_id(0), tl.program_id(1)
    image, window = window // (ROWS * COLUMNS), window % (ROWS * COLUMNS)
    tokens = image.to(tl.int64) * HEIGHT * WIDTH
    qkv += tokens * 3 * HEADS * D
    out += tokens * HEADS * D
    norms += tokens * HEADS
    N: tl.constexpr = SIZE * SIZE
    bias += head * N * N
    columns = tl.arange(0, PLACES)
    token_k, inside_k, regions = _locate(window, columns, HEIGHT, WIDTH, ROWS, COLUMNS, SIZE, SHIFT)
    k = _load_part(qkv, padding, 1, token_k, inside_k, columns < N, head, HEADS, D)
    v = _load_part(qkv, padding, 2, token_k, inside_k, columns < N, head, HEADS, D)
    for start in range(0, PLACES, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        token, inside, region = _locate(window, rows, HEIGHT, WIDTH, ROWS, COLUMNS, SIZE, SHIFT)
        q = _load_part(qkv, padding, 0, token, inside, rows < N, head, HEADS, D)
        weights = _softmax(q, k, bias, rows, columns, region, regions, scale, N, SHIFT, PRECISION, MASK)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        if NORMALIZE:
            norm = tl.sqrt(tl.sum(result * result, 1))
            result = result / tl.maximum(norm, eps)[:, None]
            tl.store(norms + token * HEADS + head, norm, mask=inside)
        places = token[:, None] * (HEADS * D) + head * D + tl.arange(0, D)[None, :]
        tl.store(out + places, result.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _backward(
    qkv, padding, bias, out, norms, grad_out, grad_qkv, grad_padding, grad_bias,
    HEIGHT, WIDTH, ROWS, COLUMNS, WINDOWS, EACH, scale, eps,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, DETACH: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    N: tl.constexpr = SIZE * SIZE
    bias += head * N * N
    grad_bias += (chunk * HEADS + head) * N * N
    columns, channel = tl.arange(0, PLACES), tl.arange(0, D)
    summed = tl.zeros([BLOCK, PLACES], tl.float32)
    padding_k, padding_v = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for number in range(chunk * EACH, tl.minimum(chunk * EACH + EACH, WINDOWS)):
        window = number % (ROWS * COLUMNS)
        tokens = (number // (ROWS * COLUMNS)).to(tl.int64) * HEIGHT * WIDTH
        projected, grad_projected = qkv + tokens * 3 * HEADS * D, grad_qkv + tokens * 3 * HEADS * D
        token_k, inside_k, regions = _locate(window, columns, HEIGHT, WIDTH, ROWS, COLUMNS, SIZE, SHIFT)
        k = _load_part(projected, padding, 1, token_k, inside_k, columns < N, head, HEADS, D)
        v = _load_part(projected, padding, 2, token_k, inside_k, columns < N, head, HEADS, D)
        grad_k, grad_v = tl.zeros([PLACES, D], tl.float32), tl.zeros([PLACES, D], tl.float32)
        for start in range(0, PLACES, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            token, inside, region = _locate(window, rows, HEIGHT, WIDTH, ROWS, COLUMNS, SIZE, SHIFT)
            q = _load_part(projected, padding, 0, token, inside, rows < N, head, HEADS, D)
            places = tokens * HEADS * D + token[:, None] * (HEADS * D) + head * D + channel[None, :]
            grad = tl.load(grad_out + places, mask=inside[:, None], other=0.0).to(tl.float32)
            if NORMALIZE:
                norm = tl.load(norms + tokens * HEADS + token * HEADS + head, mask=inside, other=1.0)
                if not DETACH:
                    unit = tl.load(out + places, mask=inside[:, None], other=0.0).to(tl.float32)
                    along = tl.where(norm < eps, 0.0, tl.sum(unit * grad, 1))
                    grad -= unit * along[:, None]
                grad = grad / tl.maximum(norm, eps)[:, None]
            weights = _softmax(q, k, bias, rows, columns, region, regions, scale, N, SHIFT, PRECISION, MASK)
            grad = grad.to(v.dtype)
            grad_v += tl.dot(tl.trans(weights.to(v.dtype)), grad, input_precision=PRECISION)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None])
            if PLACES == BLOCK:
                summed += grad_logits
            else:  # too many for registers; only this program uses this memory
                where = grad_bias + rows[:, None] * N + columns[None, :]
                exists = (rows < N)[:, None] & (columns < N)[None, :]
                before = tl.load(where, mask=exists & (number > chunk * EACH), other=0.0)
                tl.store(where, before + grad_logits, mask=exists)
                tl.debug_barrier()
            grad_logits = grad_logits.to(v.dtype)
            grad_k += tl.dot(tl.trans(grad_logits), q, input_precision=PRECISION)
            grad_q = tl.dot(grad_logits, k, input_precision=PRECISION) * scale
            places = token[:, None] * (3 * HEADS * D) + head * D + channel[None, :]
            tl.store(grad_projected + places, grad_q.to(grad_qkv.dtype.element_ty), mask=inside[:, None])
        grad_k *= scale
        places = token_k[:, None] * (3 * HEADS * D) + (HEADS + head) * D + channel[None, :]
        tl.store(grad_projected + places, grad_k.to(grad_qkv.dtype.element_ty), mask=inside_k[:, None])
        places += HEADS * D
        tl.store(grad_projected + places, grad_v.to(grad_qkv.dtype.element_ty), mask=inside_k[:, None])
        # Not tl.where, with which Triton 3.6 selects other rows on sm_90 (16-bit numbers, d = 32, windows of 12).
        outside = ((columns < N) & ~inside_k).to(tl.float32)[:, None]
        padding_k += tl.sum(grad_k * outside, 0)
        padding_v += tl.sum(grad_v * outside, 0)
    if PLACES == BLOCK:
        rows = tl.arange(0, BLOCK)
        exists = (rows < N)[:, None] & (columns < N)[None, :]
        tl.store(grad_bias + rows[:, None] * N + columns[None, :], summed, mask=exists)
    tl.store(grad_padding + ((chunk * 3 + 1) * HEADS + head) * D + channel, padding_k)
    tl.store(grad_padding + ((chunk * 3 + 2) * HEADS + head) * D + channel, padding_v)


class TritonWindowAttention(torch.autograd.Function):
    """:func:`condattn.kernels.window_attention.window_attention` for tensors on a GPU."""

    @staticmethod
    def forward(ctx, qkv, padding, bias, grid, heads, scale, eps, detach):
        """Return the head outputs, (B, tokens, heads * d)."""
        batch, tokens, size = len(qkv), qkv.shape[1], qkv.shape[-1] // (3 * heads)
        has_padding = padding is not None
        padding = qkv.new_zeros(3 * heads * size) if padding is None else padding.contiguous()
        bias = bias.float().contiguous()
        out = qkv.new_empty(batch, tokens, heads * size)
        norms = torch.empty(batch, tokens, heads, dtype=torch.float32, device=qkv.device) if eps else out
        settings = _settings(qkv, grid, heads, size, eps)
        shape = (grid.height, grid.width, grid.rows, grid.columns)
        windows = batch * grid.rows * grid.columns
        arguments = qkv, padding, bias, out, norms, *shape, scale, eps or 0.0
        with torch.cuda.device_of(qkv):  # Triton launches on the current device
            _forward[(windows, heads)](*arguments, num_warps=forward_warps(settings["PLACES"]), **settings)
        ctx.save_for_backward(qkv, padding, bias, out, norms)
        ctx.shape, ctx.settings, ctx.windows, ctx.scale = shape, settings, windows, scale
        ctx.eps, ctx.detach, ctx.has_padding, ctx.heads = eps, detach, has_padding, heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Return the gradients with respect to ``qkv``, ``padding`` and ``bias``."""
        qkv, padding, bias, out, norms = ctx.saved_tensors
        programs = PROGRAMS * _multiprocessors(qkv.device)
        each = max(1, ctx.windows * ctx.heads // programs)
        chunks = -(-ctx.windows // each)
        grad_qkv = torch.empty_like(qkv)
        grad_padding = torch.zeros(chunks, len(padding), dtype=torch.float32, device=qkv.device)
        grad_bias = torch.empty(chunks, *bias.shape, dtype=torch.float32, device=qkv.device)
        with torch.cuda.device_of(qkv):
            _backward[(chunks, ctx.heads)](
                *(qkv, padding, bias, out, norms, gradient.contiguous(), grad_qkv, grad_padding, grad_bias),
                *(*ctx.shape, ctx.windows, each, ctx.scale, ctx.eps or 0.0),
                DETACH=ctx.detach,
                num_warps=BACKWARD_WARPS,
                **ctx.settings,
            )
        of_padding = grad_padding.sum(0).to(padding.dtype) if ctx.has_padding else None
        return grad_qkv, of_padding, grad_bias.sum(0), None, None, None, None, None


def _settings(qkv: Tensor, grid: Windows, heads: int, size: int, eps: float | None) -> dict:
    """Return the compile-time constants of the kernels."""
    places = _places(grid)
    return dict(
        SIZE=grid.size,
        SHIFT=grid.shift,
        HEADS=heads,
        D=size,
        PLACES=places,
        BLOCK=rows_at_a_time(places, size, qkv.element_size()),
        NORMALIZE=eps is not None,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        MASK=MASKED,
        num_stages=1,  # more stages take at least twice the shared memory
    )


def _places(grid: Windows) -> int:
    return max(16, triton.next_power_of_2(grid.size**2))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
