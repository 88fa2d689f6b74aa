"""Jacobians of heads and the bound of Thm 3.4, compared with explicit matrices, with autograd, and with each other."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_spectra import EVERYTHING, attention, by_hand
from torch import nn
from torch.func import jacrev

import condattn
from condattn.spectra import measure
from condattn.spectra.bound import head_bound
from condattn.spectra.capture import capture
from condattn.spectra.extremes import jacobian_extremes, kronecker_extremes
from condattn.spectra.jacobian import HeadFunction, head_jacobians, unchanging
from condattn.spectra.kronecker import RowKronecker


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
    """Build a model with plain softmax attention, and its input."""
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
    """The row-wise Kronecker structure agrees with autograd: as a matrix, by its Gram matrix, and by products."""
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
    """Wide and tall matrices; all ways to find the extreme singular values, compared with the explicit matrix."""
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
    """The bound of Thm 3.4 holds where X and the weights are square."""
    torch.manual_seed(seed)
    model = nn.MultiheadAttention(size, 1, batch_first=True, bias=False).double()
    with torch.no_grad():
        model.in_proj_weight.mul_(10**scale)
    x = torch.randn(1, size, size).double()
    measurement = measure(model, lambda: model(x, x, x), ["jacobian"])
    assume(measurement.bounds)  # there is no bound if attention is saturated
    (bound,) = measurement.bounds.values()
    for one in measurement.jacobians:
        assert one.extremes.kappa <= bound.value * (1 + 1e-6)


def test_grouped_queries_and_calls_with_a_cache(monkeypatch):
    """Keys and values belong to groups of heads, and repeated calls do not add tokens to the map."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=8)
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=9)).eval()
    measurement = measure(model, [dict(input_ids=torch.arange(6)[None])], EVERYTHING)
    (entropy,) = measurement.entropies
    assert entropy.keys == 6 and len(measurement.jacobians) == 12
    assert not measurement.bounds  # no bound, because queries and keys are rotated
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
    """Thm 3.4 does not cover normalised queries and keys; there may also be more keys than tokens."""
    timm = pytest.importorskip("timm")
    model = timm.layers.Attention(12, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm).double()
    measurement = measure(model, torch.randn(1, 5, 12).double(), ["jacobian"])
    assert len(measurement.jacobians) == 6 and not measurement.bounds
    assert "not that of the attention that Thm 3.4 is of" in measurement.left_out["", "bound"]
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
    """After a LayerNorm, the tokens are orthogonal to one direction, up to the rounding of float32."""
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


@pytest.mark.parametrize("small", [1, 4])
def test_values_below_the_tolerance_count_as_zero(small):
    """Also by products alone, where a value above it is found beside one below it, and none beside several."""
    values = torch.cat([torch.linspace(1, 0.2, 60 - small), torch.full((small,), 0.01)]).double()
    matrix = torch.linalg.qr(torch.randn(60, 60).double())[0] * values
    whole, products = (
        jacobian_extremes(lambda w: matrix @ w, torch.zeros(60).double(), whole=size, tolerance=0.05)
        for size in (2048, 0)
    )
    assert whole.kappa == pytest.approx(5.0)
    if small == 1:
        assert products.kappa == pytest.approx(5.0, rel=1e-3)
    else:
        assert math.isnan(products.sigma_min) and math.isnan(products.kappa) and products.residual == math.inf


def test_directions_that_cannot_change_are_left_out():
    """They span the left null space of a preconditioned Jacobian; an iteration with products would find them first."""
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
