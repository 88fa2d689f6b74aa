"""``nn.MultiheadAttention`` in all its variants, and the fast paths around it."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import condattn
from condattn import SpectralCorrection
from condattn.layers.head_norm import HeadNorm

# A correction of zero, with which the conditioned class must compute the same as PyTorch's class.
NOTHING = SpectralCorrection(0.0)


def pair(conditioning=NOTHING, **kwargs):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 3, **kwargs).double().eval()
    conditioned = nn.MultiheadAttention(12, 3, **kwargs).double().eval()
    conditioned.load_state_dict(plain.state_dict())
    condattn.condition(conditioned, conditioning)
    return plain, conditioned


VARIANTS = {
    "plain": {},
    "batch-first": dict(batch_first=True),
    "no-bias": dict(bias=False),
    "bias-kv": dict(add_bias_kv=True),
    "zero-attention": dict(add_zero_attn=True),
    "both-extra-tokens": dict(add_bias_kv=True, add_zero_attn=True, batch_first=True),
    "other-widths": dict(kdim=7, vdim=5),
}
EXTRA_TOKENS = ("bias-kv", "zero-attention", "both-extra-tokens")


@pytest.mark.parametrize("need_weights, average", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per-head", "padding", "both", "causal", "causal+padding"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("conditioning", ["pc", NOTHING], ids=["pc-without-its-norm", "sc-of-size-zero"])
def test_same_as_pytorch(monkeypatch, conditioning, variant, batched, masks, need_weights, average):
    monkeypatch.setattr(HeadNorm, "project", lambda norm, rows, weight, bias: F.linear(rows, weight, bias))
    kwargs = VARIANTS[variant]
    plain, conditioned = pair(conditioning, **kwargs)
    batch, target, source = 2, 4, 4 if masks in ("causal", "causal+padding") else 6
    query = torch.randn(target, batch, 12).double()
    key = torch.randn(source, batch, kwargs.get("kdim", 12)).double()
    value = torch.randn(source, batch, kwargs.get("vdim", 12)).double()
    padding = torch.tensor([[False] * (source - 2) + [True] * 2, [False] * source])
    if not batched:
        query, key, value, padding, batch = query[:, 0], key[:, 0], value[:, 0], padding[0], 1
    elif kwargs.get("batch_first"):
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    mask = torch.rand(target, source) < 0.3
    mask[:, 0] = False
    arguments = dict(need_weights=need_weights, average_attn_weights=average)
    if masks in ("causal", "causal+padding"):
        if masks == "causal" and variant in EXTRA_TOKENS:
            need_weights = arguments["need_weights"] = True  # otherwise PyTorch drops the mask in these cases
        arguments |= dict(attn_mask=torch.ones(4, 4, dtype=torch.bool).triu(1), is_causal=True)
    if masks in ("bool", "both"):
        arguments["attn_mask"] = mask
    if masks == "float":
        arguments["attn_mask"] = torch.randn(target, source).double()
    if masks == "per-head":
        arguments["attn_mask"] = torch.randn(batch * 3, target, source).double()
    if masks in ("padding", "both", "causal+padding"):
        arguments["key_padding_mask"] = padding

    want, want_weights = plain(query, key, value, **arguments)
    got, got_weights = conditioned(query, key, value, **arguments)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(got_weights, want_weights, rtol=0, atol=1e-12)
    else:
        assert got_weights is None


@pytest.mark.parametrize("variant", EXTRA_TOKENS)
def test_each_query_sees_the_extra_tokens_behind_a_causal_mask(variant):
    """With and without weights, where PyTorch's class drops the mask in the second case."""
    _, conditioned = pair("pc", **VARIANTS[variant])
    x = torch.randn(4, 4, 12).double()  # as many samples as tokens, for either order of them
    causal = dict(attn_mask=torch.ones(4, 4, dtype=torch.bool).triu(1), is_causal=True)
    got, want = (conditioned(x, x, x, need_weights=need_weights, **causal)[0] for need_weights in (False, True))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conditioning", ["pc", NOTHING], ids=["pc", "sc"])
def test_causal_hint_needs_its_mask(conditioning):
    _, conditioned = pair(conditioning)
    x = torch.randn(4, 2, 12).double()
    with pytest.raises(RuntimeError, match="attn_mask"):
        conditioned(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    "name, mask, expected",
    [
        ("attn_mask", torch.zeros(4, 1), r"\(4, 4\) or \(6, 4, 4\)"),
        ("attn_mask", torch.zeros(2, 4, 4), r"\(4, 4\) or \(6, 4, 4\), found torch.float32 of the shape \(2, 4, 4\)"),
        ("attn_mask", torch.zeros(4, 4, dtype=torch.uint8), "booleans or floats .* found torch.uint8"),
        ("key_padding_mask", torch.zeros(2, 3, dtype=torch.bool), r"\(2, 4\), found torch.bool of the shape \(2, 3\)"),
        ("key_padding_mask", torch.zeros(2, 5), r"\(2, 4\)"),
    ],
)
def test_bad_masks(name, mask, expected):
    _, conditioned = pair("pc")
    x = torch.randn(4, 2, 12).double()
    with pytest.raises(ValueError, match=f"{name}: expected .*{expected}"):
        conditioned(x, x, x, **{name: mask})


def test_nested_sequences_in_plain_self_attention_only():
    _, conditioned = pair("pc", batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(5, 12)], dtype=torch.float64)
    memory = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(5, 12)], dtype=torch.float64)
    for arguments in ((x, memory, memory), (x, x, x, torch.zeros(2, 5))):
        with pytest.raises(ValueError, match="batch-first self-attention without masks; pad them"):
            conditioned(*arguments)


@pytest.mark.parametrize("need_weights", [False, True])
def test_half_precision_does_not_overflow_where_pytorchs_does_not(need_weights):
    """The logits fit into float16 only after the division by sqrt(d)."""
    plain, conditioned = nn.MultiheadAttention(64, 1), nn.MultiheadAttention(64, 1)
    for module in (plain, conditioned):
        module.load_state_dict(plain.state_dict())
        nn.init.eye_(module.in_proj_weight[:64].data), nn.init.eye_(module.in_proj_weight[64:128].data)
    condattn.condition(conditioned, "pc")
    x = torch.full((3, 1, 64), 60.0)
    for module in (plain.half(), conditioned.half()):
        assert module(x.half(), x.half(), x.half(), need_weights=need_weights)[0].isfinite().all()


def test_dropout_acts_in_training_only():
    module = nn.MultiheadAttention(12, 3, dropout=0.5)
    condattn.condition(module, "pc")
    x = torch.randn(4, 2, 12)
    for need_weights in (True, False):
        module.train()
        assert not torch.equal(
            module(x, x, x, need_weights=need_weights)[0], module(x, x, x, need_weights=need_weights)[0]
        )
        module.eval()
        assert torch.equal(module(x, x, x, need_weights=need_weights)[0], module(x, x, x, need_weights=need_weights)[0])


def encoder(conditioning, nested=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    condattn.condition(model, conditioning)
    return model


@pytest.mark.parametrize("conditioning", ["pc", "sc", "sc+pc"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_inference_fast_path_does_not_skip_the_conditioning(conditioning, nested, padded):
    """In eval mode, the fast path of nn.TransformerEncoder(Layer) would read in_proj_weight itself."""
    model = encoder(conditioning, nested)
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2]) if padded else None
    real = ~padding if padded else torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = model.train()(x, src_key_padding_mask=padding)[real]
        evaluated = model.eval()(x, src_key_padding_mask=padding)[real]
        unconditioned = encoder("none", nested).eval()(x, src_key_padding_mask=padding)[real]
    torch.testing.assert_close(evaluated, trained, rtol=1e-4, atol=1e-5)
    assert (evaluated - unconditioned).abs().max() > 1e-2


def test_encoder_built_from_a_conditioned_layer():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    condattn.condition(layer, "pc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=1e-4, atol=1e-5)
    assert len(condattn.find_sites(model)) == 2


def test_decoder_layer_conditions_self_and_cross_attention():
    layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    report = condattn.condition(layer, "pc")
    assert report.conditioned == ("self_attn", "multihead_attn")
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x, memory), layer.train()(x, memory), rtol=1e-4, atol=1e-5)
