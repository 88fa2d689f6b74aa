"""``fold``: the function stays, and the layers become the host library's own again; subtracting corrections."""

import copy

import pytest
import torch
from computed_weights import COMPUTED
from small_transformer import SITES, output, transformer
from torch import nn

import condattn
from condattn import RowPreconditioner, SpectralCorrection
from condattn.layers.correction import subtract_corrections
from condattn.weights.load import load_weights


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("conditioning", ["sc", "sc+pc", SpectralCorrection(form="svd")], ids=str)
def test_fold_computes_the_same(conditioning, dtype, tolerance, training):
    model = transformer().to(dtype).train(training)
    condattn.condition(model, conditioning)
    want = output(model, dtype)
    assert condattn.fold(model) == len(SITES)
    torch.testing.assert_close(output(model, dtype), want, rtol=0, atol=tolerance)
    assert condattn.fold(model) == 0


def test_a_folded_model_takes_the_fused_inference_kernel():
    """torch's encoder layers use this kernel only without gradients, and it rounds differently."""
    model = transformer()
    condattn.condition(model, SpectralCorrection(1.0))
    with torch.no_grad():
        want = output(model)
        condattn.fold(model)
        torch.testing.assert_close(output(model), want, rtol=0, atol=1e-5)


def test_folded_correction_is_the_vanilla_model():
    model, vanilla = transformer(), transformer()
    condattn.condition(model, SpectralCorrection(2.0, relative=True))
    assert set(model.state_dict()) > set(vanilla.state_dict())
    parameters = dict(model.named_parameters())
    want = output(model)
    condattn.fold(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in vanilla.named_modules()]
    assert list(model.state_dict()) == list(vanilla.state_dict())
    assert list(dict(model.named_buffers())) == list(dict(vanilla.named_buffers()))
    assert all(p is parameters[n] for n, p in model.named_parameters())
    vanilla.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(vanilla), want, rtol=0, atol=1e-6)


def subtract_all(model):
    return subtract_corrections(model, model.state_dict())


def test_corrections_are_subtracted_from_the_named_weights_alone():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    before = [module.in_proj_weight.clone() for module in model]
    condattn.condition(model, "sc")
    assert subtract_corrections(model, ["1.in_proj_weight", "0.out_proj.weight"]) == 1
    assert torch.equal(model[0].in_proj_weight, before[0])
    torch.testing.assert_close(model[1].in_proj_weight, before[1] - torch.eye(8).repeat(3, 1))


def test_effective_weights_that_are_not_in_the_file():
    """They keep their values, and so do the corrected weights."""
    plain = nn.ModuleDict(dict(old=nn.MultiheadAttention(8, 2), new=nn.MultiheadAttention(8, 2)))
    model = copy.deepcopy(plain)
    condattn.condition(model, "sc")
    part = {name: value for name, value in plain.state_dict().items() if name.startswith("old")}
    for _ in range(2):
        load_weights(model, part, "a part", load="effective")
        torch.testing.assert_close(model["old"].effective_weight("in_proj_weight"), plain["old"].in_proj_weight)
        assert torch.equal(model["new"].in_proj_weight, plain["new"].in_proj_weight)


@pytest.mark.parametrize("write", [condattn.fold, subtract_all])
def test_a_weight_that_another_layer_uses_too_is_not_written(write):
    """Neither that of a layer without a correction, nor that of another corrected layer."""
    model = nn.ModuleDict({name: nn.MultiheadAttention(8, 2) for name in "abc"})
    condattn.condition(model, "sc", include=["a", "c"])
    for other in "bc":
        model[other].in_proj_weight = model["a"].in_proj_weight
        before = model["a"].in_proj_weight.clone()
        with pytest.raises(ValueError, match=rf"a.in_proj_weight and {other}.in_proj_weight are one parameter"):
            write(model)
        assert torch.equal(model["a"].in_proj_weight, before)
        model[other].in_proj_weight = nn.Parameter(before.clone())
    assert write(model) == 2


@pytest.mark.parametrize("write", [condattn.fold, subtract_all])
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_weight_that_is_computed_is_not_written(compute, write):
    timm = pytest.importorskip("timm")
    model = nn.ModuleList(timm.layers.Attention(8, 2) for _ in range(2))
    condattn.condition(model, "sc(strength=2.0, relative=True)")
    compute(model[1].qkv)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot be (written|merged).* make it a parameter with|remove_parametriz"):
        write(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_fold_keeps_the_preconditioner():
    model = transformer()
    condattn.condition(model, "sc+pc")
    condattn.fold(model)
    assert set(map(str, condattn.conditioning_of(model).values())) == {str([RowPreconditioner().to_dict()])}
