"""Triton kernels, compared with their references in Triton's interpreter; run with TRITON_INTERPRET=1."""

from contextlib import contextmanager

import pytest
import torch
from test_kernels import CPU, inputs

from condattn.kernels import row_norm_triton, window_attention_triton
from condattn.kernels.row_norm import normalize_rows_reference, smallest_divisor
from condattn.kernels.row_norm_triton import divide, divide_backward
from condattn.kernels.window_attention import window_attention_reference
from condattn.kernels.window_attention_triton import TritonWindowAttention
from condattn.kernels.windows import Windows

CASES = {
    "whole windows": (8, 8, 4, 0, 16, None),
    "shifted": (6, 8, 4, 2, 16, None),
    "padded": (9, 8, 7, 3, 32, (1e-6, False)),
    "larger than the map": (5, 5, 7, 3, 32, (1e-6, True)),
    "some rows at a time": (13, 14, 12, 6, 32, (1e-6, False)),
    "heads of 64": (7, 6, 7, 3, 64, None),
}


@pytest.mark.parametrize("case, dtype", [*((case, torch.float32) for case in CASES), ("padded", torch.float16)])
def test_the_kernel_of_windows(case, dtype):
    torch.manual_seed(0)
    height, width, size, shift, d, normalize = CASES[case]
    grid = Windows(height, width, size, shift, CPU)
    arguments = [t.detach().to(dtype).requires_grad_() for t in inputs(height, width, size, 2, d=d)]
    exact = [t.detach().double().requires_grad_() for t in arguments]
    eps, detach = normalize or (None, False)
    got = TritonWindowAttention.apply(*arguments, grid, 2, d**-0.5, eps, detach)
    want = window_attention_reference(*exact, grid, 2, d**-0.5)
    if normalize:
        want = normalize_rows_reference(want.unflatten(-1, (2, -1)), *normalize).flatten(-2)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got.double(), want, atol=tolerance * want.abs().max().item(), rtol=0)
    gradient = torch.randn_like(want)
    pairs = (got, arguments), (want, exact)
    grads = (torch.autograd.grad(y, x, gradient.to(y.dtype), allow_unused=True) for y, x in pairs)
    for one, other in zip(*grads, strict=True):
        other = torch.zeros_like(one, dtype=torch.float64) if other is None else other  # no padding
        torch.testing.assert_close(one.double(), other, atol=tolerance * max(1.0, other.abs().max().item()), rtol=0)


@pytest.mark.parametrize("detach", [False, True])
def test_the_kernel_of_rows(detach):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 24)
    x[0, 0], x[0, 1] = 0.0, 1e-9
    y, norm = divide(x, 1e-6)
    x.requires_grad_()
    want, gradient = normalize_rows_reference(x, 1e-6, detach), torch.randn_like(x)
    torch.testing.assert_close(y, want, atol=1e-6, rtol=1e-5)
    got = divide_backward(gradient, None if detach else y, norm, 1e-6)
    torch.testing.assert_close(got, *torch.autograd.grad(want, x, gradient), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_short_rows_in_float16(detach):
    """With the smallest divisor of float16, no gradient overflows."""
    x = torch.zeros(2, 16, dtype=torch.float16)
    x[1, 0] = 1e-6
    eps = smallest_divisor(x, 1e-6)
    y, norm = divide(x, eps)
    torch.testing.assert_close(y, normalize_rows_reference(x, 1e-6, detach))
    gradient = divide_backward(torch.ones_like(x), None if detach else y, norm, eps)
    assert torch.equal(gradient, torch.full_like(x, 2**14))


@pytest.mark.parametrize("detach", [False, True])
def test_windows_of_zeros_in_float16(detach):
    qkv, padding, bias = (torch.zeros_like(t, dtype=torch.float16).requires_grad_() for t in inputs(4, 4, 4, 1, d=16))
    grid = Windows(4, 4, 4, 0, CPU)
    got = TritonWindowAttention.apply(qkv, padding, bias, grid, 2, 0.25, smallest_divisor(qkv, 1e-6), detach)
    (gradient,) = torch.autograd.grad(got.sum(), qkv)
    assert not got.any() and not gradient[..., :64].any()
    assert torch.equal(gradient[..., 64:], torch.full_like(got, 2**14))


class Launches:
    """Takes the place of a kernel, and notes the tensor on whose device each launch is, the last of ``current``."""

    def __init__(self, current):
        self.current, self.found = current, []

    def __getitem__(self, grid):
        return lambda *arguments, **settings: self.found.append(self.current[-1])


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton's own choice is the current device, which may be another GPU."""
    current = [None]

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launches = []
    for module in (row_norm_triton, window_attention_triton):
        for name in ("_forward", "_backward"):
            launches.append(Launches(current))
            monkeypatch.setattr(module, name, launches[-1])
    x, gradient = torch.randn(3, 16), torch.randn(3, 16)
    y, norm = divide(x, 1e-6)
    divide_backward(gradient, y, norm, 1e-6)
    qkv, padding, bias = (t.detach().float().requires_grad_() for t in inputs(4, 4, 4, 1, d=16))
    TritonWindowAttention.apply(qkv, padding, bias, Windows(4, 4, 4, 0, CPU), 2, 0.25, None, False).sum().backward()
    found = [tensor.data_ptr() for one in launches for tensor in one.found]
    assert found == [tensor.data_ptr() for tensor in (x, gradient, qkv, qkv)]
