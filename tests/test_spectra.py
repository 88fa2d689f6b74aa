"""Spectra of attention: comparison with numpy on small cases, the theorems, and many kinds of models."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import condattn
from condattn.spectra import measure
from condattn.spectra.advice import find_warnings
from condattn.spectra.report import write_report
from condattn.spectra.weights import effective_heads

EVERYTHING = ("weights", "map", "outputs", "entropy", "jacobian")
SVD = dict(type="SpectralCorrection", form="svd")


def attention(dim=12, heads=3, **settings):
    torch.manual_seed(0)
    return nn.MultiheadAttention(dim, heads, **dict(batch_first=True) | settings).double().eval()


def by_hand(model, queries, keys, bias=None, logs=None):
    """Attention map and head outputs of nn.MultiheadAttention in numpy, one image and head at a time.

    The logits are added to ``logs``, if it is given.
    """
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
            if logs is not None:
                logs.append(logits)
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
    logits = []
    maps, outputs = by_hand(model, x, y, bias.numpy(), logits)
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
    keys = 3 if mask else y.shape[1]
    np.testing.assert_allclose(entropy.relative.flatten(), np.array(wanted) / math.log(keys), **close)
    np.testing.assert_allclose(entropy.largest_logit.flatten(), [one.max() for one in logits], **close)


def test_limits_of_a_measurement():
    """Samples are spread evenly; maps that are too large are left out, and named."""
    model, x = attention(), torch.randn(5, 6, 12).double()
    every, few = (measure(model, [dict(query=x, key=x, value=x)], ["map"], max_samples=n) for n in (5, 3))
    torch.testing.assert_close(few.spectra[0].values, every.spectra[0].values[[0, 1, 3]])
    small = measure(model, [dict(query=x, key=x, value=x)], ["map", "outputs"], max_tokens=5)
    assert {one.matrix for one in small.spectra} == {"A(X)", "C A(X)"} and small.left_out


def test_rows_of_the_table():
    """Median and largest condition number over the samples, of each head."""
    model, x = attention(), torch.randn(5, 6, 12).double()
    _, outputs = by_hand(model, x, x)
    kappas = np.array([np.linalg.cond(m) for m in outputs]).reshape(5, 3)
    rows = measure(model, [dict(query=x, key=x, value=x)], ["outputs"]).rows()
    for head in range(3):
        (row,) = [row for row in rows if row["quantity"] == "A(X)" and row["head"] == head]
        assert row["kappa"] == pytest.approx(np.median(kappas[:, head]))
        assert row["kappa_max"] == pytest.approx(kappas[:, head].max())
        assert (row["samples"], row["singular"]) == (5, 0)


@pytest.mark.parametrize("conditioning", ["none", "sc", SVD])
def test_weights_against_numpy(conditioning):
    model = attention()
    plain = [part.reshape(3, 4, 12) for part in np.split(model.in_proj_weight.detach().numpy().copy(), 3)]
    condattn.condition(model, conditioning)
    measurement = measure(model, quantities=["weights"])
    for name, heads in zip("QKV", plain, strict=True):
        wanted = [np.linalg.svd(head, compute_uv=False) for head in heads]
        np.testing.assert_allclose(values(measurement, f"W_{name}"), wanted, rtol=1e-10)
    matrices = {one.matrix for one in measurement.spectra}
    if conditioning == "none":
        assert matrices == {"W_Q", "W_K", "W_V"}
        return
    assert "W_Q + C" in matrices
    assert repr(measurement).startswith("Measurement(1 site: 6 matrices, 0 entropies, 0 Jacobians; 0 left out")
    for name, heads in zip("QKV", plain, strict=True):
        u, s, vh = np.linalg.svd(heads.reshape(12, 12))
        correction = np.eye(12) if conditioning == "sc" else s[0] * u @ vh
        corrected = (heads.reshape(12, 12) + correction).reshape(3, 4, 12)
        wanted = [np.linalg.svd(head, compute_uv=False) for head in corrected]
        np.testing.assert_allclose(values(measurement, f"W_{name} + C"), wanted, rtol=1e-9)
    for row in measurement.rows():
        assert row["used"] == row["quantity"].endswith("+ C")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([(4, 1), (8, 2), (12, 3)]), st.floats(-3, 3))
def test_the_exact_form_bounds_condition_numbers_by_two(seed, size, scale):
    """Thm 3.5, for each head."""
    torch.manual_seed(seed)
    model = nn.MultiheadAttention(*size).double()
    with torch.no_grad():
        model.in_proj_weight.mul_(10**scale)
    condattn.condition(model, dict(SVD, layout="per_head"))
    corrected = [one for one in measure(model, quantities=["weights"]).spectra if one.matrix.endswith("+ C")]
    assert len(corrected) == 3
    assert all(one.kappa.max() <= 2 + 1e-9 for one in corrected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(1.01, 20.0))
def test_the_identity_form_has_its_guarantee(seed, strength):
    """lambda > |W| gives kappa(W + lambda I) <= (lambda + |W|) / (lambda - |W|)."""
    torch.manual_seed(seed)
    model = nn.MultiheadAttention(8, 2).double()
    condattn.condition(model, dict(type="SpectralCorrection", strength=strength, relative=True, layout="per_head"))
    corrected = [one for one in measure(model, quantities=["weights"]).spectra if one.matrix.endswith("+ C")]
    assert len(corrected) == 3
    assert all(one.kappa.max() <= (strength + 1) / (strength - 1) + 1e-9 for one in corrected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype):
    model = nn.MultiheadAttention(64, 2).to(dtype)
    kappa = [one.kappa for one in measure(model, quantities=["weights"]).spectra]
    wanted = [one.kappa for one in measure(model.double(), quantities=["weights"]).spectra]
    assert all(torch.equal(a, b) for a, b in zip(kappa, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["sc", dict(type="SpectralCorrection", strength=3.0, relative=True), SVD])
def test_corrections_in_half_precision(method, dtype):
    """W + C is that of the derivatives, which are taken in float64."""
    pytest.importorskip("scipy")
    model, x = attention(bias=False).to(dtype), torch.randn(2, 5, 12).to(dtype)
    condattn.condition(model, method)
    model(x, x, x)
    measurement = measure(model, lambda: model(x, x, x), ["jacobian"])
    assert not measurement.left_out and len(measurement.bounds) == 3
    assert all(one.plain for one in measurement.jacobians)
    (site,) = condattn.find_sites(model)
    exact = copy.deepcopy(model).double().effective_weight("in_proj_weight")
    for name, part in zip("qkv", exact.chunk(3), strict=True):
        assert torch.equal(effective_heads(site, name), part.unflatten(0, (3, 4)))


@pytest.mark.parametrize("conditioning, used", [("none", "A(X)"), ("pc", "C A(X)")])
def test_which_derivatives_are_those_of_the_model(conditioning, used):
    """Of the preconditioned one, those of A(X) are measured for comparison."""
    pytest.importorskip("scipy")
    model, x = attention(), torch.randn(1, 4, 12).double()
    condattn.condition(model, conditioning)
    rows = measure(model, lambda: model(x, x, x), ["jacobian"], max_heads=1).rows()
    found = {row["quantity"]: row["used"] for row in rows if row["quantity"].startswith("d")}
    outputs = ["A(X)"] if conditioning == "none" else ["A(X)", "C A(X)"]
    assert found == {f"d{output}/dW_{name}": output == used for output in outputs for name in "QKV"}


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="this torch compiles in any case")
@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiled_models_run_as_they_are_written(compiled_before):
    """Compiled in one graph, they could not be watched; they are compiled as before afterwards."""
    timm = pytest.importorskip("timm")
    model, image, graphs = timm.create_model("test_vit", img_size=32).eval(), torch.randn(1, 3, 32, 32), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    if compiled_before:
        compiled(image)
    found, wanted = (measure(one, image, ["map", "outputs", "entropy"]) for one in (compiled, model))
    assert len(graphs) == compiled_before and not found.left_out and found.rows()
    for row, want in zip(found.rows(), wanted.rows(), strict=True):
        assert row == want | dict(site=f"_orig_mod.{want['site']}")
    compiled(image)
    assert graphs


MODELS = {"ViT": "test_vit", "XCiT": "xcit_nano_12_p16_224"}


@pytest.mark.parametrize("name", ["ViT", "XCiT", "Swin of timm", "Swin of mmdet", "cross attention"])
def test_every_quantity(name):
    """All quantities in shifted windows; Jacobians of the second site, small enough to be formed as matrices."""
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
        x = x[..., :40, :36]  # is padded to whole windows
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
    model = timm.create_model("levit_128s", num_classes=3)  # caches attention biases in evaluation mode
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
        if not hasattr(module, "head_transform")
    )
    model.eval()
    with torch.no_grad():
        assert model(x).dtype == torch.float32


def test_warnings():
    timm = pytest.importorskip("timm")
    model, x = timm.create_model("test_vit", img_size=64), torch.randn(1, 3, 64, 64)
    assert find_warnings({"": measure(model, x)}) == []
    condattn.condition(model, "sc(strength=10.0)")
    (line,) = find_warnings({"sc": measure(model, x)})
    assert line.startswith("sc: attention is saturated") and "blocks.0.attn, blocks.1.attn" in line
    model = timm.create_model("test_vit", img_size=64)
    condattn.condition(model, dict(type="SpectralCorrection", strength=1e-4))
    (line,) = find_warnings({"": measure(model, x)})
    assert line.startswith("the correction of the weights is too small to matter at blocks.0.attn")
    model = attention(8, 1)
    condattn.condition(model, "pc")
    with torch.no_grad():  # each token attends to equal tokens, A(X) = X
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
    assert find_warnings({"": measured}, trained=False) == []


def test_measurements_without_scipy(monkeypatch):
    """They need it for Jacobians alone."""
    measure = condattn.spectra.measure
    monkeypatch.setattr(sys.modules[measure.__module__], "HAS_SCIPY", False)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    assert measure(model, quantities=["weights"]).rows()
    with pytest.raises(ModuleNotFoundError, match="needs numpy and scipy: pip install"):
        measure(model, torch.rand(1, 4, 8), quantities=["jacobian"])
