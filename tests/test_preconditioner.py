"""Edge cases of the row normalisation: zero rows, tiny and huge values, half precision."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import condattn
from condattn import RowPreconditioner
from condattn.attention.builders import into
from condattn.attention.site import AttentionSite
from condattn.kernels.row_norm import normalize_rows, normalize_rows_reference
from condattn.layers.head_transform import HeadTransformLinear


@pytest.mark.parametrize("detach", [False, True])
def test_zero_rows_give_zero_and_finite_gradients(detach):
    x = torch.randn(5, 4)
    x[2] = 0
    x.requires_grad_()
    y = normalize_rows(x, 1e-6, detach)
    y.square().sum().backward()
    assert torch.equal(y[2], torch.zeros(4))
    assert x.grad.isfinite().all()


def test_rows_below_eps_are_divided_by_eps():
    x = torch.full((1, 4), 1e-9, dtype=torch.float64)
    torch.testing.assert_close(normalize_rows(x, 1e-6, False), x / 1e-6)


@pytest.mark.parametrize("dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 1e18)], ids=str)
def test_half_precision_neither_overflows_nor_loses_small_rows(dtype, largest):
    y = normalize_rows(torch.tensor([[largest] * 64, [1e-5] * 64]).to(dtype), 1e-6, False)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), torch.full((2, 64), 0.125), rtol=1e-2, atol=0)


@pytest.mark.parametrize("function", [normalize_rows, normalize_rows_reference])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("length", [0.0, 1e-6, 1e-5])
def test_short_rows_have_finite_gradients_in_float16(length, detach, function):
    """They are divided by 2^-14, and so is their gradient."""
    x = torch.zeros(2, 8, dtype=torch.float16)
    x[:, 0] = length
    x.requires_grad_()
    y = function(x, 1e-6, detach)
    y.sum().backward()
    torch.testing.assert_close(y.double(), x.double() * 2**14, rtol=1e-3, atol=0)
    assert torch.equal(x.grad, torch.full_like(x, 2**14))


def test_short_rows_in_float16_when_compiled():
    x = torch.zeros(2, 8, dtype=torch.float16, requires_grad=True)
    compiled = torch.compile(lambda x: normalize_rows(x, 1e-6, False), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2**14))


@pytest.mark.parametrize("conditioning", ["pc", "sc+pc"])
def test_a_query_that_sees_no_key_under_autocast_to_float16(conditioning):
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    condattn.condition(module, conditioning)
    x = torch.randn(2, 9, 32, requires_grad=True)
    masked = torch.zeros(9, 9, dtype=torch.bool)
    masked[3] = True
    with torch.autocast("cpu", torch.float16):
        output = module(x, x, x, need_weights=False, attn_mask=masked)[0]
    output.float().mean().backward()
    assert output.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *module.parameters()))


def test_gradient_is_that_of_the_forward_unless_detached():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: normalize_rows(t, 1e-6, False), x)
    (gradient,) = torch.autograd.grad(normalize_rows(x, 1e-6, True).sum(), x)
    torch.testing.assert_close(gradient, (1 / x.norm(dim=-1, keepdim=True)).expand_as(x))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 8), st.floats(1e-3, 1e3), st.integers(0, 2**31 - 1))
def test_output_rows_have_unit_norm_and_ignore_the_scale(heads, size, scale, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(heads * size, heads * size, bias=False).double()
    nn.init.eye_(layer.weight)
    RowPreconditioner().apply(AttentionSite("", layer, heads, out=into(layer)))
    assert type(layer) is HeadTransformLinear
    x = torch.randn(7, heads * size, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y.unflatten(-1, (heads, size)).norm(dim=-1), torch.ones(7, heads).double())
    torch.testing.assert_close(layer(scale * x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norm_of_half_precision_is_taken_in_float32(dtype):
    x = torch.randn(50, 64).to(dtype)
    assert torch.equal(normalize_rows(x, 1e-6, False), normalize_rows(x.float(), 1e-6, False).to(dtype))


def test_autocast():
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    condattn.condition(module, "pc")
    x = torch.randn(2, 9, 32)
    want = module(x, x, x, need_weights=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, x, x, need_weights=False)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="eps is .*expected a positive finite number"):
        RowPreconditioner(eps=eps)


def test_a_flag_that_is_none():
    with pytest.raises(ValueError, match="RowPreconditioner: detach is 'no'; expected True or False"):
        RowPreconditioner(detach="no")


def test_a_vit_of_timm_keeps_no_more_for_its_backward():
    timm = pytest.importorskip("timm")

    def kept(conditioning):
        model, sizes = timm.create_model("test_vit"), {}
        condattn.condition(model, conditioning)

        def note(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = model(torch.randn(2, 3, 160, 160))
        assert outputs.requires_grad
        return sum(sizes.values())

    assert kept("pc") == kept("none")


def test_rows_of_cross_covariance_attention():
    """A row is either the channels of a head for one token, or one channel over all tokens."""
    timm = pytest.importorskip("timm")
    module = timm.models.xcit.XCA(12, 3)
    received = []
    module.proj.register_forward_pre_hook(lambda m, args: received.append(args[0]))
    x = torch.randn(2, 5, 12)
    module(x)
    for rows, along in (("channels", -1), ("tokens", 1)):
        conditioned = copy.deepcopy(module)
        condattn.condition(conditioned, RowPreconditioner(cross_covariance=rows))
        heads = received[0].reshape(2, 5, 3, 4)
        want = module.proj((heads / heads.norm(dim=along, keepdim=True)).reshape(2, 5, 12))
        torch.testing.assert_close(conditioned(x), want)
    with pytest.raises(ValueError, match="cross_covariance is 'rows'; expected 'channels' or 'tokens'"):
        RowPreconditioner(cross_covariance="rows")


@pytest.mark.parametrize("host", ["torch", "timm"])
def test_rows_of_attention_between_tokens_are_channels_whatever_is_set_for_other_attention(host):
    if host == "timm":
        module = pytest.importorskip("timm").layers.Attention(12, 3)
    else:
        layer = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
        module = layer.train()  # without the inference fast path
    outputs, x = [], torch.randn(2, 5, 12)
    for method in ("pc", RowPreconditioner(cross_covariance="tokens")):
        conditioned = copy.deepcopy(module)
        condattn.condition(conditioned, method)
        outputs.append(conditioned(x))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], module(x))
