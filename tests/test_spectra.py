"""Spectra of attention: against numpy on small cases, the theorems, and the models that they are measured of."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import jacrev

import condattn
from condattn.spectra import measure
from condattn.spectra.advice import find_warnings
from condattn.spectra.bound import head_bound
from condattn.spectra.capture import capture
from condattn.spectra.extremes import jacobian_extremes, kronecker_extremes
from condattn.spectra.jacobian import HeadFunction, head_jacobians, unchanging
from condattn.spectra.kronecker import RowKronecker
from condattn.spectra.report import write_report
from condattn.spectra.weights import effective_heads

EVERYTHING = ("weights", "map", "outputs", "entropy", "jacobian")
SVD = dict(type="SpectralCorrection", form="svd")


def attention(dim=12, heads=3, **settings):
    torch.manual_seed(0)
    return nn.MultiheadAttention(dim, heads, **dict(batch_first=True) | settings).double().eval()


def by_hand(model, queries, keys, bias=None):
    """Map and head outputs of nn.MultiheadAttention, one image and head at a time, in numpy."""
    weights, biases = (p.detach().numpy() for p in (model.in_proj_weight, model.in_proj_bias))
    (wq, wk, wv), (bq, bk, bv) = np.split(weights, 3), np.split(biases, 3)
    d = model.head_dim
    maps, outputs = [], []
    for x, y in zip(queries.numpy(), keys.numpy(), strict=True):
        for h in range(model.num_heads):
            part = slice(h * d, (h + 1) * d)
            q, k, v = x @ wq[part].T + bq[part], y @ wk[part].T + bk[part], y @ wv[part].T + bv[part]
            logits = q @ k.T / math.sqrt(d) + (0 if bias is None else bias)
            weight = np.exp(logits - logits.max(1, keepdims=True))
            weight /= weight.sum(1, keepdims=True)
            maps.append(weight)
            outputs.append(weight @ v)
    return maps, outputs


def values(measurement, matrix):
    (one,) = [one for one in measurement.spectra if one.matrix == matrix]
    return one.values.flatten(0, 1).numpy()


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("mask", [False, True], ids=["", "masked"])
def test_maps_and_outputs_against_numpy(cross, mask):
    model, x = attention(), torch.randn(2, 5, 12).double()
    y = torch.randn(2, 7, 12).double() if cross else x
    bias = torch.zeros(5, y.shape[1]).double()
    if mask:
        bias[:, 3:] = -torch.inf
    measurement = measure(model, [dict(query=x, key=y, value=y, attn_mask=bias)])
    maps, outputs = by_hand(model, x, y, bias.numpy())
    close = dict(rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(values(measurement, "map"), [np.linalg.svd(m, compute_uv=False) for m in maps], **close)
    np.testing.assert_allclose(
        values(measurement, "A(X)"), [np.linalg.svd(m, compute_uv=False) for m in outputs], **close
    )
    rows = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in outputs]
    np.testing.assert_allclose(
        values(measurement, "C A(X)"), [np.linalg.svd(m, compute_uv=False) for m in rows], **close
    )
    (entropy,) = measurement.entropies
    wanted = [-(m * np.log(np.where(m > 0, m, 1))).sum(1).mean() for m in maps]
    np.testing.assert_allclose(entropy.values.flatten(), wanted, **close)
    np.testing.assert_allclose(entropy.relative.flatten(), np.array(wanted) / math.log(y.shape[1]), **close)


@pytest.mark.parametrize("conditioning", ["none", "sc", SVD])
def test_weights_against_numpy(conditioning):
    model = attention()
    plain = [part.reshape(3, 4, 12) for part in np.split(model.in_proj_weight.detach().numpy().copy(), 3)]
    condattn.condition(model, conditioning)
    measurement = measure(model, quantities=["weights"])
    (site,) = condattn.find_sites(model)
    corrected = effective_heads(site, "q").detach().numpy()
    for name, heads in zip("QKV", plain, strict=True):
        wanted = [np.linalg.svd(head, compute_uv=False) for head in heads]
        np.testing.assert_allclose(values(measurement, f"W_{name}"), wanted, rtol=1e-10)
    matrices = {one.matrix for one in measurement.spectra}
    if conditioning == "none":
        assert matrices == {"W_Q", "W_K", "W_V"}
        return
    assert "W_Q + C" in matrices
    wanted = [np.linalg.svd(head, compute_uv=False) for head in corrected]
    np.testing.assert_allclose(values(measurement, "W_Q + C"), wanted, rtol=1e-10)
    for row in measurement.rows():
        assert row["used"] == row["quantity"].endswith("+ C")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([(4, 1), (8, 2), (12, 3)]), st.floats(-3, 3))
def test_the_exact_form_bounds_condition_numbers_by_two(seed, size, scale):
    """Thm 3.5, per head."""
    torch.manual_seed(seed)
    model = nn.MultiheadAttention(*size).double()
    with torch.no_grad():
        model.in_proj_weight.mul_(10**scale)
    condattn.condition(model, dict(SVD, layout="per_head"))
    for one in measure(model, quantities=["weights"]).spectra:
        assert not one.matrix.endswith("+ C") or one.kappa.max() <= 2 + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(1.01, 20.0))
def test_the_identity_form_has_its_guarantee(seed, strength):
    """lambda > |W| gives kappa(W + lambda I) <= (lambda + |W|) / (lambda - |W|)."""
    torch.manual_seed(seed)
    model = nn.MultiheadAttention(8, 2).double()
    condattn.condition(model, dict(type="SpectralCorrection", strength=strength, relative=True, layout="per_head"))
    for one in measure(model, quantities=["weights"]).spectra:
        assert not one.matrix.endswith("+ C") or one.kappa.max() <= (strength + 1) / (strength - 1) + 1e-9


def explicit(model, x, head, name, conditioned):
    """The Jacobian of one head's output, from the formula, by torch.func.jacrev."""
    d = model.head_dim
    weights = dict(zip("qkv", model.in_proj_weight.detach().chunk(3), strict=True))
    biases = dict(zip("qkv", model.in_proj_bias.detach().chunk(3), strict=True))
    part = slice(head * d, (head + 1) * d)

    def output(weight):
        made = {n: x @ (weight if n == name else weights[n][part]).T + biases[n][part] for n in "qkv"}
        heads = (made["q"] @ made["k"].T / math.sqrt(d)).softmax(-1) @ made["v"]
        return heads / heads.norm(dim=-1, keepdim=True) if conditioned else heads

    return jacrev(output)(weights[name][part]).reshape(len(x) * d, -1).numpy()


@pytest.mark.parametrize("conditioning", ["none", "pc"])
def test_jacobians_against_the_explicit_matrix(conditioning):
    model, x = attention(), torch.randn(2, 5, 12).double()
    condattn.condition(model, conditioning)
    measurement = measure(model, lambda: model(x, x, x), ["jacobian", "map"])
    assert len(measurement.jacobians) == 3 * 3 * (2 if conditioning == "pc" else 1)
    for one in measurement.jacobians:
        matrix = explicit(model, x[0], one.head, one.weight[-1].lower(), one.output == "C A(X)")
        wanted = np.linalg.svd(matrix, compute_uv=False)
        wanted = wanted[wanted > 1e-10 * wanted[0]]
        assert one.extremes.size == matrix.shape and one.extremes.rank == len(wanted)
        assert one.extremes.sigma_max == pytest.approx(wanted[0], rel=1e-6)
        assert one.extremes.sigma_min == pytest.approx(wanted[-1], rel=1e-6)
    part, weight = slice(4, 8), model.in_proj_weight.detach().chunk(3)
    bound = measurement.bounds["", 1]
    kappas = [np.linalg.cond(w[part].numpy()) for w in weight]
    np.testing.assert_allclose([bound.w_q, bound.w_k, bound.w_v], kappas)
    maps, _ = by_hand(model, x, x)
    derivatives = np.concatenate([np.linalg.svd(np.diag(p) - np.outer(p, p), compute_uv=False)[:4] for p in maps[1]])
    wanted = [np.linalg.cond(x[0].numpy()), np.linalg.cond(maps[1]), derivatives.max() / derivatives.min()]
    np.testing.assert_allclose([bound.tokens, bound.map, bound.softmax_derivative], wanted)
    q, k, v = kappas
    assert bound.value == pytest.approx(wanted[0] ** 3 * wanted[2] * v * (q + k) + wanted[0] * wanted[1])


def host(name):
    """A model of plain softmax attention, and its input."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    if name == "ViT":
        return timm.create_model("test_vit", img_size=64), torch.randn(1, 3, 64, 64)
    if name == "Swin":
        sizes = dict(embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, img_size=32)
        return timm.create_model("swin_tiny_patch4_window7_224", **sizes), torch.randn(1, 3, 32, 32)
    model = nn.Sequential(attention(batch_first=name != "sequence first"))
    if name == "keys with positions, other tokens":
        model.forward = lambda x: model[0](x[:, :4], x[:, 4:] + 1, x[:, 4:])
    else:
        model.forward = lambda x: model[0](x, x, x)
    return model, torch.randn(2, 9, 12).double()


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(
    "name", ["self-attention", "sequence first", "keys with positions, other tokens", "ViT", "Swin"]
)
def test_the_structure_gives_what_derivatives_give(name, detach, monkeypatch):
    """Row by row a Kronecker product: whole, by factors of its Gram matrix, and by products with it."""
    model, x = host(name)
    weights = dict(type="SpectralCorrection", strength=0.3)
    condattn.condition(model, [weights, dict(type="RowPreconditioner", detach=detach)])
    sites = [site.name for site in condattn.find_sites(model)][-1:]
    made = []

    def note(*arguments):
        made.append(arguments)
        return kronecker_extremes(*arguments)

    monkeypatch.setattr("condattn.spectra.jacobian.kronecker_extremes", note)
    structured = measure(model, x, ["jacobian"], sites, max_heads=1).jacobians
    monkeypatch.setattr("condattn.spectra.jacobian.row_kronecker", lambda *_: None)
    derived = measure(model, x, ["jacobian"], sites, max_heads=1).jacobians
    assert len(structured) == len(derived) == len(made) == 6
    for one, other, arguments in zip(structured, derived, made, strict=True):
        got, wanted = one.extremes, other.extremes
        assert (got.size, got.rank) == (wanted.size, wanted.rank)
        assert got.sigma_max == pytest.approx(wanted.sigma_max, rel=1e-5)
        assert got.sigma_min == pytest.approx(wanted.sigma_min, rel=1e-3 if x.dtype == torch.float32 else 1e-5)
        by_factors = kronecker_extremes(*arguments, whole=0)
        assert by_factors.sigma_max == pytest.approx(got.sigma_max, rel=1e-5)
        assert by_factors.sigma_min == pytest.approx(got.sigma_min, rel=1e-3)
        assert by_factors.residual < 1e-2


@pytest.mark.parametrize("sizes", [(9, 4, 4, 12), (40, 4, 4, 6)])
def test_row_by_row_kronecker_products(sizes):
    """Wide and tall; all ways to find the extremes, against the matrix."""
    torch.manual_seed(0)
    n, d, a, b = sizes
    left, right = torch.eye(d, a) + 0.2 * torch.randn(n, d, a), torch.linalg.qr(torch.randn(b, b))[0].repeat(9, 1)[:n]
    jacobian = RowKronecker(left.double(), right.double() + 0.1 * torch.randn(n, b))
    matrix = jacrev(jacobian)(torch.zeros(a, b).double()).reshape(n * d, a * b)
    wanted = torch.linalg.svdvals(matrix)
    for how in ({}, dict(whole=0), dict(whole=0, dense=0)):
        found = kronecker_extremes(jacobian, **how)
        assert found.size == matrix.shape and found.residual < 1e-2
        assert found.sigma_max == pytest.approx(wanted[0].item(), rel=1e-5)
        assert found.sigma_min == pytest.approx(wanted[-1].item(), rel=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(-1, 1), st.integers(2, 5))
def test_the_bound_is_above_the_truth(seed, scale, size):
    """Thm 3.4, where X and the weights are square."""
    torch.manual_seed(seed)
    model = nn.MultiheadAttention(size, 1, batch_first=True, bias=False).double()
    with torch.no_grad():
        model.in_proj_weight.mul_(10**scale)
    x = torch.randn(1, size, size).double()
    measurement = measure(model, lambda: model(x, x, x), ["jacobian"])
    assume(measurement.bounds)  # or attention is saturated
    (bound,) = measurement.bounds.values()
    for one in measurement.jacobians:
        assert one.extremes.kappa <= bound.value * (1 + 1e-6)


def test_grouped_queries_and_calls_with_a_cache(monkeypatch):
    """Keys and values of each group; and the map of the tokens that are there, however often the call is repeated."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=8)
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=9)).eval()
    measurement = measure(model, [dict(input_ids=torch.arange(6)[None])], EVERYTHING)
    (entropy,) = measurement.entropies
    assert entropy.keys == 6 and len(measurement.jacobians) == 12
    assert not measurement.bounds  # queries and keys are rotated
    for one in measurement.jacobians:
        assert one.plain == (one.weight == "W_V")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", lambda q, k, *_: (q, k))
    measurement = measure(model, [dict(input_ids=torch.arange(6)[None])], EVERYTHING)
    assert len(measurement.bounds) == 4 and all(one.plain for one in measurement.jacobians)
    weights = {one.matrix: one.kappa for one in measurement.spectra if one.matrix in ("W_K", "W_V")}
    for (_, head), bound in measurement.bounds.items():
        assert bound.w_k == pytest.approx(weights["W_K"][0, head // 2].item())
        assert bound.w_v == pytest.approx(weights["W_V"][0, head // 2].item())
    monkeypatch.setattr("condattn.spectra.jacobian.row_kronecker", lambda *_: None)
    derived = measure(model, [dict(input_ids=torch.arange(6)[None])], ["jacobian"]).jacobians
    for one, other in zip(measurement.jacobians, derived, strict=True):
        assert one.extremes.kappa == pytest.approx(other.extremes.kappa, rel=1e-3)


def test_what_queries_that_are_normalised_are_not_bounded_by():
    """Thm 3.4 knows no norm of queries and keys; and keys may be more than there are tokens."""
    timm = pytest.importorskip("timm")
    model = timm.layers.Attention(12, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm).double()
    measurement = measure(model, torch.randn(1, 5, 12).double(), ["jacobian"])
    assert len(measurement.jacobians) == 6 and not measurement.bounds
    model, x = attention(add_bias_kv=True), torch.randn(1, 5, 12).double()
    measurement = measure(model, lambda: model(x, x, x), ["jacobian"])
    assert len(measurement.jacobians) == 9 and not measurement.bounds


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_tokens_of_modules_that_read_their_weights_themselves(name):
    timm = pytest.importorskip("timm")
    sizes = dict(embed_dim=24, depth=1, num_heads=2, img_size=32)
    if "swin" in name:
        sizes = dict(embed_dim=24, depths=(1,), num_heads=(2,), window_size=4, img_size=32)
    model, seen = timm.create_model(name, **sizes).eval(), []
    (site,) = condattn.find_sites(model)
    nn.init.normal_(site.module.q_bias)
    with capture([site], lambda _, one: seen.append(one)):
        model(torch.randn(1, 3, 32, 32))
    assert seen[0].sources.keys() == {"q", "k", "v"}
    if "beit" in name:
        found, failed = head_jacobians(site, seen[0], 1)
        assert not failed and all(one.plain for one in found)


def test_saturated_attention_has_no_derivative_but_rounding():
    model, x = attention(), torch.randn(1, 5, 12).double()
    with torch.no_grad():
        model.in_proj_weight[:24] *= 30
    measurement = measure(model, lambda: model(x, x, x), ["jacobian"])
    assert {one.weight for one in measurement.jacobians} >= {"W_V"}
    reasons = [reason for (_, name), reason in measurement.left_out.items() if name.startswith("d")]
    assert reasons and all("attention is saturated" in reason for reason in reasons)


def test_rounding_of_what_went_in_is_no_singular_value():
    """Behind a LayerNorm the tokens are orthogonal to one direction, but for the rounding of float32."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", img_size=160), torch.randn(1, 3, 160, 160)  # more tokens than channels
    bounds = []
    for m, image in ((model, x), (copy.deepcopy(model).double(), x.double())):
        site = condattn.find_sites(m.eval())[1]
        with capture([site], lambda site, seen: bounds.append(head_bound(site, seen, 0))):
            m(image)
    assert bounds[0].tokens == pytest.approx(bounds[1].tokens, rel=1e-2)
    assert bounds[0].value == pytest.approx(bounds[1].value, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype):
    model = nn.MultiheadAttention(64, 2).to(dtype)
    kappa = [one.kappa for one in measure(model, quantities=["weights"]).spectra]
    wanted = [one.kappa for one in measure(model.double(), quantities=["weights"]).spectra]
    assert all(torch.equal(a, b) for a, b in zip(kappa, wanted, strict=True))


def test_a_smallest_value_that_is_not_found_is_none(monkeypatch):
    monkeypatch.setattr("condattn.spectra.extremes.STEPS", 3)
    matrix = torch.diag(torch.logspace(0, -6, 60).double())
    found = jacobian_extremes(lambda w: matrix @ w, torch.zeros(60).double(), whole=0)
    assert found.sigma_max == pytest.approx(1.0) and found.residual > 0.1 and math.isnan(found.kappa)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_products_alone_find_the_extremes_too(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(*shape).double(), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(3.0, 0.5, 30).double()) @ vh
    found = jacobian_extremes(lambda w: matrix @ w, torch.zeros(shape[1]).double(), whole=0)
    assert found.sigma_max == pytest.approx(3.0, rel=1e-5) and found.sigma_min == pytest.approx(0.5, rel=1e-4)
    assert found.residual < 1e-4 and found.rank is None


def test_directions_that_cannot_change_are_left_out():
    """They span the left null space of a preconditioned Jacobian, which products alone would find first."""
    model, x = attention(8, 2), torch.randn(1, 4, 8).double()
    condattn.condition(model, "pc")
    (site,) = condattn.find_sites(model)
    function = HeadFunction(site, (x, x, x), {}, "v", 1, 0, True)
    null = unchanging(function(function.block))
    jacobian = jacrev(function)(function.block).reshape(16, -1)
    torch.testing.assert_close(null @ null.T, torch.eye(4).double())
    torch.testing.assert_close(null @ jacobian, torch.zeros(4, 32).double())
    assert jacobian_extremes(function, function.block).rank == 12

    u, _ = torch.linalg.qr(torch.randn(40, 40).double())
    matrix = u[:, :32] @ torch.diag(torch.linspace(3.0, 0.5, 32).double()) @ torch.randn(32, 60).double().svd()[2].T
    found = jacobian_extremes(lambda w: matrix @ w, torch.zeros(60).double(), u[:, 32:].T, whole=0)
    assert found.sigma_min == pytest.approx(0.5, rel=1e-3) and found.residual < 0.01


MODELS = {"ViT": "test_vit", "XCiT": "xcit_nano_12_p16_224"}


@pytest.mark.parametrize("name", ["ViT", "XCiT", "Swin of timm", "Swin of mmdet", "cross attention"])
def test_every_quantity(name):
    """Shifted windows and all; the Jacobians of the second site, small enough to be whole."""
    timm = pytest.importorskip("timm")
    x = torch.randn(1, 3, 64, 64)
    if name == "Swin of timm":
        sizes = dict(embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, img_size=32)
        model, x = timm.create_model("swin_tiny_patch4_window7_224", **sizes), x[..., :32, :32]
    elif name == "Swin of mmdet":
        pytest.importorskip("mmdet")
        from mmengine.registry import MODELS as registry

        settings = dict(embed_dims=8, depths=(2, 2), num_heads=(2, 2), strides=(4, 2), out_indices=(1,), window_size=4)
        model = registry.build(dict(type="mmdet.SwinTransformer", **settings))
        x = x[..., :40, :36]  # padded to whole windows
    elif name == "cross attention":
        layer = nn.TransformerDecoderLayer(12, 2, 24, batch_first=True)
        model = nn.Sequential()
        model.layer = layer
        model.forward = lambda x: layer(x.flatten(2)[:, :2, :12].repeat(1, 2, 1), x.flatten(2)[:, :3, 12:24])
    else:
        sizes = dict(img_size=64, num_classes=0)
        model = timm.create_model(MODELS[name], **sizes)
    weak = dict(type="SpectralCorrection", strength=0.3)
    condattn.condition(model, [weak, "pc"] if name != "cross attention" else "pc")
    model.train()
    sites = [site.name for site in condattn.find_sites(model)][1:2]
    measurement = measure(model, x, EVERYTHING, sites, max_heads=1)
    assert set(measurement.left_out) <= {(sites[0], "bound")}
    assert ((sites[0], "bound") in measurement.left_out) == (name in ("XCiT", "cross attention"))
    matrices = {one.matrix for one in measurement.spectra}
    assert {"W_Q", "W_K", "W_V", "map", "A(X)", "C A(X)"} <= matrices
    assert len(measurement.jacobians) == 6 and len(measurement.entropies) == 1
    for row in measurement.rows():
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert numbers and all(math.isfinite(number) for number in numbers), row
    assert model.training


def test_one_token_and_matrices_of_zeros(tmp_path):
    model, x = attention(), torch.randn(1, 1, 12).double()
    measurement = measure(model, lambda: model(x, x, x), EVERYTHING)
    assert values(measurement, "map").tolist() == [[1.0]] * 3
    write_report({"": measurement}, tmp_path, "one token")
    with torch.no_grad():
        model.in_proj_weight.zero_(), model.in_proj_bias.zero_()
    measurement = measure(model, lambda: model(x, x, x), EVERYTHING)
    write_report({"": measurement}, tmp_path, "zeros")
    assert not any(value == -math.inf for row in measurement.rows() for value in row.values())
    outputs = next(one for one in measurement.spectra if one.matrix == "A(X)")
    assert outputs.singular.all() and outputs.kappa.isnan().all() and (outputs.rank == 0).all()
    assert measurement.entropies[0].relative.isnan().all()


def test_bad_input():
    model, x = attention(), torch.randn(1, 4, 12).double()
    with pytest.raises(ValueError, match="unknown quantity 'colour'; known are weights"):
        measure(model, x, ["colour"])
    with pytest.raises(ValueError, match="depend on the input; give inputs"):
        measure(model)
    with pytest.raises(ValueError, match="has no attention site"):
        measure(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match="no attention site is called 'nowhere'"):
        measure(model, x, sites=["nowhere"])
    with pytest.raises(ValueError, match="no input reached an attention site"):
        measure(model, lambda: None)
    with torch.no_grad():
        model.in_proj_weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="W_Q has values that are not finite"):
        measure(model, quantities=["weights"])
    with pytest.raises(ValueError, match="the attention map has values that are not finite"):
        measure(model, lambda: model(x, x, x), ["map"])


@pytest.mark.parametrize("conditioning", ["pc", SVD])
def test_nothing_of_the_model_changes(conditioning):
    timm = pytest.importorskip("timm")
    model = timm.create_model("levit_128s", num_classes=3)  # caches biases in evaluation mode
    condattn.condition(model, conditioning, exclude=["*downsample*"])
    model.train()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 224, 224)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    measure(model, x, ["weights", "map", "outputs", "entropy"])
    measure(model, x, ["jacobian"], [condattn.find_sites(model)[-1].name], max_heads=1)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(module.training for module in model.modules())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
        if not hasattr(module, "head_norm")
    )
    model.eval()
    with torch.no_grad():
        assert model(x).dtype == torch.float32


def test_warnings():
    timm = pytest.importorskip("timm")
    model, x = timm.create_model("test_vit", img_size=64), torch.randn(1, 3, 64, 64)
    assert find_warnings({"": measure(model, x)}) == []
    condattn.condition(model, "sc")
    (line,) = find_warnings({"sc": measure(model, x)})
    assert line.startswith("sc: attention is saturated") and "blocks.0.attn, blocks.1.attn" in line
    model = timm.create_model("test_vit", img_size=64)
    condattn.condition(model, dict(type="SpectralCorrection", strength=1e-4))
    (line,) = find_warnings({"": measure(model, x)})
    assert line.startswith("the spectral correction is too small to matter at blocks.0.attn")
    model = attention(8, 1)
    condattn.condition(model, "pc")
    with torch.no_grad():  # each token attends to its like, A(X) = X
        model.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        model.in_proj_weight[:16] *= 40
        model.in_proj_bias.zero_()
    x = torch.zeros(1, 5, 8).double()
    x[0, 0, 0], x[0, 1:, 1] = 1.0, 0.5  # orthonormal columns, whose rows have two norms
    measured = measure(model, lambda: model(x, x, x), ["outputs"])
    kappa = {one.matrix: one.kappa.item() for one in measured.spectra}
    assert kappa == pytest.approx({"A(X)": 1.0, "C A(X)": 2.0})
    (line,) = find_warnings({"": measured})
    assert line.startswith("the preconditioner raises the condition number")
