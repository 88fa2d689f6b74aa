"""Every fast path, compared with its plain reference: values, gradients, precision, and bad input."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from condattn.kernels import feed_forward as module
from condattn.kernels import window_attention as attention
from condattn.kernels.feed_forward import feed_forward, feed_forward_reference
from condattn.kernels.row_norm import normalize_rows, normalize_rows_reference, normalized_linear
from condattn.kernels.switch import is_plain, plain, triton_module
from condattn.kernels.windows import Windows

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(triton_module("row_norm_triton") is None, reason="no Triton, or an older one")


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def inputs(height, width, size, batch, heads=2, d=3, dtype=torch.float64):
    qkv, padding = random(batch, height * width, 3 * heads * d, dtype=dtype), random(3 * heads * d, dtype=dtype)
    return qkv, padding, random(heads, size**2, size**2, dtype=dtype)


def mlp(inside, hidden, outside, bias=True):
    """Random weights and biases of a feed-forward network."""
    layers = random(hidden, inside), random(hidden), random(outside, hidden), random(outside)
    return layers if bias else (layers[0], None, layers[2], None)


def same(fast, reference, arguments, atol=1e-12, rtol=0.0):
    """Check that two functions of the same tensors have equal values and gradients."""
    got, want = fast(*arguments), reference(*arguments)
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol)
    gradient = torch.randn_like(want)
    wanted = [a for a in arguments if a is not None]
    grads = (torch.autograd.grad(y, wanted, gradient, allow_unused=True) for y in (got, want))
    for x, one, other in zip(wanted, *grads, strict=True):
        one, other = (torch.zeros_like(x) if grad is None else grad for grad in (one, other))
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(2, 4), st.integers(0, 3), st.integers(1, 3),
    st.booleans(), st.sampled_from([None, (1e-6, False), (1e-6, True)]),
)  # fmt: skip
def test_windows_of_any_map(size, window, shift, batch, padded, normalize):
    """Odd sizes, windows larger than the map, batches, and padding of zeros."""
    torch.manual_seed(0)
    grid = Windows(*size, window, min(shift, window - 1), CPU)
    qkv, padding, bias = inputs(*size, window, batch)
    rest = (grid, 2, 0.6)

    def reference(qkv, padding, bias):
        x = attention.window_attention_reference(qkv, padding, bias, *rest)
        return normalize_rows_reference(x.unflatten(-1, (2, -1)), *normalize).flatten(-2) if normalize else x

    fast = lambda *given: attention.window_attention(*given, *rest, normalize)  # noqa: E731
    same(fast, reference, (qkv, padding if padded else None, bias))
    fused, plain_reference = (
        functools.partial(f, grid=grid, heads=2, scale=0.6)
        for f in (attention.window_attention_fused, attention.window_attention_reference)
    )
    same(fused, plain_reference, (qkv, padding if padded else None, bias))


def test_window_attention_by_hand():
    """Compute shifted-window attention token by token, with the regions and masks of the Swin paper."""
    torch.manual_seed(0)
    height, width, size, shift, scale = 5, 6, 3, 1, 0.7
    qkv, padding, bias = (t.detach() for t in inputs(height, width, size, 1, heads=1, d=2))
    got = attention.window_attention(qkv, padding, bias, Windows(height, width, size, shift, CPU), 1, scale)[0]
    rows, columns = 6, 6
    for y in range(height):
        for x in range(width):
            top, left = ((y - shift) % rows) // size * size, ((x - shift) % columns) // size * size
            logits, values = [], []
            place = ((y - shift) % rows - top) * size + (x - shift) % columns - left
            for number in range(size * size):
                v, u = top + number // size, left + number % size
                yy, xx = (v + shift) % rows, (u + shift) % columns
                other = qkv[0, yy * width + xx] if yy < height and xx < width else padding
                part = lambda place, last: (place >= last - size) + (place >= last - shift)  # noqa: E731
                mine = part((y - shift) % rows, rows), part((x - shift) % columns, columns)
                masked = mine != (part(v, rows), part(u, columns))
                logit = scale * qkv[0, y * width + x, :2] @ other[2:4] + bias[0, place, number]
                logits.append(logit - 100.0 * masked)
                values.append(other[4:])
            want = torch.stack(logits).softmax(0) @ torch.stack(values)
            torch.testing.assert_close(got[y * width + x], want, atol=1e-12, rtol=0)


def test_no_map_is_kept():
    grid, kept = Windows(9, 10, 4, 2, CPU), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        attention.window_attention(*inputs(9, 10, 4, 2), grid, 2, 0.6)
    assert kept and sorted(shape for shape in kept if shape[-2:] == (16, 16)) == [(2, 16, 16)]  # the bias


def test_fused_attention_after_inference():
    """Indices that were made in inference mode work in training; without gradients PyTorch uses another kernel."""
    grid, (qkv, padding, bias) = Windows(9, 11, 4, 1, CPU), inputs(9, 11, 4, 2)
    want = attention.window_attention_reference(qkv, padding, bias, grid, 2, 0.6)
    with torch.inference_mode():
        got = attention.window_attention_fused(qkv, padding, bias, grid, 2, 0.6)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    attention.window_attention_fused(qkv, padding, bias, grid, 2, 0.6).sum().backward()


@pytest.mark.parametrize("shift", [0, 2])
def test_summands_of_fused_attention_are_aligned_and_not_copied(shift, monkeypatch):
    seen = []
    fused = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda q, k, v, added, **rest: seen.append(added) or
        fused(q, k, v, added, **rest)
    )  # fmt: skip
    attention.window_attention_fused(*inputs(9, 10, 4, 3), Windows(9, 10, 4, shift, CPU), 2, 0.6)
    (added,) = seen
    assert added.stride(0) == 0 and added.stride(-1) == 1
    assert all(stride % attention.ALIGNMENT == 0 for stride in added.stride()[:-1])


def test_gradcheck():
    torch.manual_seed(0)
    grid = Windows(3, 4, 2, 1, CPU)
    for normalize in (None, (1e-6, False)):
        function = functools.partial(attention.window_attention, grid=grid, heads=2, scale=0.6, normalize=normalize)
        assert torch.autograd.gradcheck(function, inputs(3, 4, 2, 2))
    assert torch.autograd.gradcheck(lambda x: normalize_rows(x, 1e-6, False), (random(3, 5),))
    linear = functools.partial(normalized_linear, bias=None, heads=2, eps=1e-6, detach=False)
    assert torch.autograd.gradcheck(linear, (random(3, 6), random(4, 6)))
    assert torch.autograd.gradcheck(feed_forward, (random(2, 3, 5), *mlp(5, 7, 4)))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("dim", [-1, -2, 1])
def test_row_norm(detach, dim):
    torch.manual_seed(0)
    x = random(2, 3, 4, 5)
    with torch.no_grad():
        x[0] = 0.0
        x[1, 0] *= 1e-9  # shorter than eps
    fast, reference = (
        functools.partial(f, eps=1e-6, detach=detach, dim=dim) for f in (normalize_rows, normalize_rows_reference)
    )
    same(fast, reference, (x,), atol=1e-9, rtol=1e-9)
    (gradient,) = torch.autograd.grad(fast(x).sum(), x)
    assert gradient.isfinite().all()


def linear_of_rows(x, weight, bias, heads, eps, detach):
    return F.linear(normalize_rows_reference(x.unflatten(-1, (heads, -1)), eps, detach).flatten(-2), weight, bias)


@pytest.mark.parametrize("detach", [False, True])
def test_normalized_linear(detach):
    torch.manual_seed(0)
    fast, reference = (
        functools.partial(f, heads=2, eps=1e-6, detach=detach) for f in (normalized_linear, linear_of_rows)
    )
    x, weight, bias = random(2, 3, 6), random(4, 6), random(4)
    with torch.no_grad():
        x[0, 0] = 0.0
        x[1, 0] *= 1e-9  # shorter than eps
    same(fast, reference, (x, weight, bias), atol=1e-9, rtol=1e-9)
    same(fast, reference, (random(2, 6, 3).mT, weight, None))
    same(fast, reference, (random(6), weight, bias))
    assert not any(g.any() for g in torch.autograd.grad(fast(x[:0], weight, bias).sum(), (weight, bias)))
    directions = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    x = random(2, 3, 6)
    grads = (torch.autograd.grad(f(x, weight, bias), x, directions, is_grads_batched=True) for f in (fast, reference))
    torch.testing.assert_close(*(grad for (grad,) in grads), atol=1e-12, rtol=0)
    for frozen in range(3):
        tensors = [t.detach() if i == frozen else t for i, t in enumerate((random(3, 6), weight, bias))]
        wanted = [t for t in tensors if t.requires_grad]
        grads = (torch.autograd.grad(f(*tensors).sum(), wanted) for f in (fast, reference))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_normalized_linear_under_autocast(given):
    """The precision is that of a row norm followed by a linear layer."""
    torch.manual_seed(0)
    dtype = torch.float64 if given == torch.float64 else torch.float32
    tensors = random(5, 8, dtype=given), random(4, 8, dtype=dtype), random(4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = normalized_linear(*tensors, 2, 1e-6, False), linear_of_rows(*tensors, 2, 1e-6, False)
    assert got.dtype == want.dtype and torch.equal(got, want)
    gradient = torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad(y, tensors, gradient) for y in (got, want)), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0.016)


def test_a_projection_keeps_what_attention_keeps():
    x, weight, kept = random(5, 6), random(4, 6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        normalized_linear(x, weight, None, 2, 1e-6, False)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """The error against float64 is no larger than that of the plain reference, up to one rounding."""
    torch.manual_seed(0)
    grid = Windows(9, 10, 4, 2, CPU)
    single = inputs(9, 10, 4, 2, d=8, dtype=torch.float32)
    half = [t.detach().to(dtype).requires_grad_() for t in single]
    exact = [t.detach().double().requires_grad_() for t in half]
    gradient = torch.randn(2, 90, 16, dtype=torch.float64)

    def run(function, arguments):
        y = function(*arguments, grid, 2, 0.35)
        return [y, *torch.autograd.grad(y, arguments, gradient.to(y.dtype))]

    truth = run(attention.window_attention_reference, exact)
    reference = run(attention.window_attention_reference, half)
    for fast in (attention.window_attention, attention.window_attention_fused):
        for got, eager, want in zip(run(fast, half), reference, truth, strict=True):
            error, own = ((x.double() - want).abs().max().item() for x in (got, eager))
            assert error <= 1.5 * own + torch.finfo(dtype).eps * want.abs().max().item()


@pytest.mark.parametrize("part", [2**20, 14], ids=["whole", "in parts"])
def test_feed_forward(part, monkeypatch):
    monkeypatch.setattr(module, "PART", part)
    monkeypatch.setattr(module, "LEAST", 1)
    torch.manual_seed(0)
    same(feed_forward, feed_forward_reference, (random(2, 3, 5), *mlp(5, 7, 4)))
    same(feed_forward, feed_forward_reference, (random(6, 5).T.contiguous().T, *mlp(5, 7, 4, bias=False)))
    x, layers = random(5, 5), mlp(5, 7, 4)
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(x, *layers), feed_forward_reference(x, *layers), atol=1e-12, rtol=0)
    assert feed_forward(x[:0], *layers).shape == (0, 4)
    assert not any(g.any() for g in torch.autograd.grad(feed_forward(x[:0], *layers).sum(), layers))
    for frozen in range(5):
        tensors = [t.detach() if i == frozen else t for i, t in enumerate((x, *layers))]
        wanted = [t for t in tensors if t.requires_grad]
        grads = (torch.autograd.grad(f(*tensors).sum(), wanted) for f in (feed_forward, feed_forward_reference))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_switch():
    """Inside ``plain``, the reference runs, which can be differentiated twice."""
    qkv, padding, bias = inputs(4, 4, 2, 1)
    arguments = (qkv, padding, bias, Windows(4, 4, 2, 1, CPU), 2, 0.5)
    with plain():
        (gradient,) = torch.autograd.grad(attention.window_attention(*arguments).square().sum(), qkv, create_graph=True)
        gradient.square().sum().backward()
    assert qkv.grad.isfinite().all()
    (gradient,) = torch.autograd.grad(attention.window_attention(*arguments).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
    _, tangent = torch.func.jvp(lambda q: attention.window_attention(q, *arguments[1:]), (qkv,), (qkv,))
    assert tangent.isfinite().all()


def test_the_switch_may_be_nested():
    """The end of an inner context, also by an error, does not end the outer one."""
    assert not is_plain()
    with plain():
        with pytest.raises(KeyError), plain():
            raise KeyError
        assert is_plain()
        with plain():
            assert is_plain()
        assert is_plain()
    assert not is_plain()


def test_maps_of_another_size():
    qkv, padding, bias = inputs(4, 4, 2, 1)
    with pytest.raises(ValueError, match="expected 4 x 5 tokens, found 16"):
        attention.window_attention(qkv, padding, bias, Windows(4, 5, 2, 1, CPU), 2, 0.5)
    empty = attention.window_attention(qkv[:0], padding, bias, Windows(4, 4, 2, 1, CPU), 2, 0.5)
    assert empty.shape == (0, 16, 6)


@needs_triton
def test_the_kernels_in_the_interpreter():
    """Run tests/triton_cases.py in a new process: the interpreter has to be chosen before Triton is imported."""
    cases = Path(__file__).with_name("triton_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def assert_near(got, arguments, want, exact):
    """Compare values and gradients of a kernel with those in double precision."""
    tolerance = 1e-5 if got.dtype == torch.float32 else 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, atol=tolerance * want.abs().max().item(), rtol=0)
    gradient = torch.randn_like(want)
    grads = (torch.autograd.grad(y, x, gradient.to(y.dtype)) for y, x in ((got, arguments), (want, exact)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.double(), other, atol=4 * tolerance * other.abs().max().item(), rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 7, 8, 12, 16])
@pytest.mark.parametrize("d", [16, 32, 64, 128])
def test_the_kernels_on_a_gpu(size, d, dtype):
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    grid = Windows(33, 50, size, size // 2, device)
    arguments = [t.detach().to(device, dtype).requires_grad_() for t in inputs(33, 50, size, 2, heads=3, d=d)]
    if not triton_module("window_attention_triton").supports(arguments[0], grid, 3):
        pytest.skip("this GPU has too little shared memory")
    exact = [t.detach().double().requires_grad_() for t in arguments]
    got = attention.window_attention(*arguments, grid, 3, d**-0.5, (1e-6, False))
    assert "Triton" in type(got.grad_fn).__name__
    want = attention.window_attention_reference(*exact, grid, 3, d**-0.5)
    want = normalize_rows_reference(want.unflatten(-1, (3, -1)), 1e-6, False).flatten(-2)
    assert_near(got, arguments, want, exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("detach", [False, True])
def test_normalized_linear_on_a_gpu(detach, dtype):
    torch.manual_seed(0)
    arguments = [t.detach().to("cuda", dtype).requires_grad_() for t in (random(2, 50, 96), random(64, 96), random(64))]
    exact = [t.detach().double().requires_grad_() for t in arguments]
    got, want = (f(*t, 3, 1e-6, detach) for f, t in ((normalized_linear, arguments), (linear_of_rows, exact)))
    assert_near(got, arguments, want, exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [7, 12])
def test_fused_attention_on_a_gpu(size):
    """Only memory-efficient attention supports a bias of the logits with a gradient."""
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    grid = Windows(33, 50, size, size // 2, device)
    arguments = [t.detach().to(device).requires_grad_() for t in inputs(33, 50, size, 2, 3, 32, torch.float32)]
    rest = dict(grid=grid, heads=3, scale=32**-0.5)

    def fused(*given):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
            return attention.window_attention_fused(*given, **rest)

    same(fused, functools.partial(attention.window_attention_reference, **rest), arguments, atol=1e-3, rtol=1e-3)


def compile_for_a_gpu(function, constants, warps, architecture=90, **pointers):
    """Compile for a GPU architecture without a device, and return the bytes of shared memory.

    A compiler may reject what the interpreter accepts.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    names = function.arg_names
    kinds = {name: f"*{pointers[name]}" for name in pointers} | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("scale", "eps"), "fp32")
    signature = {name: kinds.get(name, "i32") for name in names}
    source = triton.compiler.ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
    options = dict(num_warps=warps, num_stages=1)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).metadata.shared


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@needs_triton
@pytest.mark.parametrize(
    "size, places, d, dtype, architecture",
    [
        (7, 64, 32, "bf16", 90), (7, 64, 64, "bf16", 90), (12, 256, 32, "bf16", 90), (12, 256, 64, "bf16", 80),
        slow(7, 64, 32, "fp32", 90), slow(7, 64, 64, "fp32", 90), slow(12, 256, 32, "fp32", 90),
        slow(12, 256, 64, "fp32", 90), slow(12, 256, 128, "bf16", 80), slow(10, 128, 64, "fp32", 80),
        slow(10, 128, 128, "fp32", 80),
    ],
)  # fmt: skip
def test_the_kernel_of_windows_compiles_for_a_gpu(size, places, d, dtype, architecture):
    """The kernel compiles, and uses no more shared memory than estimated."""
    kernel = triton_module("window_attention_triton")
    bytes_each = 2 if dtype == "bf16" else 4
    constants = dict(
        SIZE=size, SHIFT=3, HEADS=3, D=d, PLACES=places, NORMALIZE=True, MASK=-100.0,
        BLOCK=kernel.rows_at_a_time(places, d, bytes_each), PRECISION="tf32" if dtype == "bf16" else "ieee",
    )  # fmt: skip
    tensors = dict.fromkeys(("qkv", "padding", "out"), dtype) | dict(bias="fp32", norms="fp32")
    forward = compile_for_a_gpu(kernel._forward, constants, kernel.forward_warps(places), architecture, **tensors)
    tensors |= dict(grad_out=dtype, grad_qkv=dtype, grad_padding="fp32", grad_bias="fp32")
    constants["DETACH"] = False
    backward = compile_for_a_gpu(kernel._backward, constants, kernel.BACKWARD_WARPS, architecture, **tensors)
    assert max(forward, backward) <= kernel.shared_memory(places, d, bytes_each)


@needs_triton
def test_images_whose_offsets_do_not_fit_into_32_bits_are_left_to_pytorch(monkeypatch):
    kernel, gpu = triton_module("window_attention_triton"), SimpleNamespace(shared_memory_per_block_optin=2**18)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for width, fits in ((1926, True), (1932, False)):  # 576 channels of Swin-L
        qkv = torch.empty(4, 1932 * width, 576, dtype=torch.float16, device="meta")
        assert kernel.supports(qkv, Windows(1932, width, 12, 6, CPU), 6) == fits


@needs_triton
def test_another_image_size_compiles_no_other_kernel():
    """Triton specialises whole numbers that are 1 or can be divided by 16, unless told otherwise."""
    for name, sizes in dict(
        row_norm_triton={"ROWS"}, window_attention_triton={"HEIGHT", "WIDTH", "ROWS", "COLUMNS", "WINDOWS", "EACH"}
    ).items():
        module = triton_module(name)
        for kernel in (module._forward, module._backward):
            given = [one for one in kernel.params if one.name.isupper() and not one.is_constexpr]
            assert {one.name for one in given} <= sizes and all(one.do_not_specialize for one in given)


@needs_triton
def test_the_kernel_of_rows_compiles_for_a_gpu():
    kernel, constants = triton_module("row_norm_triton"), dict(D=32, COLUMNS=32, BLOCK=128)
    assert compile_for_a_gpu(kernel._forward, constants, 4, x="bf16", y="bf16", norms="fp32") < 2**16
    tensors = dict(y="bf16", norms="fp32", grad_y="bf16", grad_x="bf16")
    assert compile_for_a_gpu(kernel._backward, {**constants, "DETACH": False}, 4, **tensors) < 2**16
