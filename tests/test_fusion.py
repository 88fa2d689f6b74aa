"""Batch norm that is fused into layers of conditioned attention: refused, or exact after ``fold``."""

import copy
import pickle

import pytest
import torch
from torch import nn

import condattn

MODELS = ("levit_128s", "levit_conv_128s", "shvit_s1", "iformer_t")
MESSAGE = r"batch norm cannot be fused .* call condattn.fold\(model\) before"


def randomized(model):
    """Random statistics and weights of batch norm, without which fusing would change nothing."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    model.eval()
    return model


def compute(model, images):
    with torch.no_grad():
        outputs = model(images)
    return outputs[-1] if isinstance(outputs, tuple) else outputs


def with_own_fuse(model):
    return [name for name, module in model.named_modules() if "fuse" in vars(module)]


def set_again(layer):
    bias = layer.bias
    del layer.bias
    layer.bias = bias


def parametrize(layer):
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    nn.utils.parametrize.remove_parametrizations(layer, "bias")


def prune(layer):
    nn.utils.prune.l1_unstructured(layer, "bias", 0.0)
    nn.utils.prune.remove(layer, "bias")


@pytest.mark.parametrize("change", [set_again, parametrize, prune])
def test_a_bias_that_is_taken_away_and_set_again_is_no_fused_one(change):
    timm = pytest.importorskip("timm")
    model, x = timm.layers.Attention(8, 2, qkv_bias=True), torch.randn(1, 3, 8)
    condattn.condition(model, "sc")
    want = model(x)
    change(model.qkv)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("name", MODELS)
def test_reparameterized_models_of_timm(name):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"this release of timm has no {name}")
    from timm.models import reparameterize_model

    plain = randomized(timm.create_model(name, num_classes=4))
    images = torch.randn(1, *plain.default_cfg["input_size"])
    model = copy.deepcopy(plain)
    condattn.condition(model, "sc")
    want = compute(model, images)
    with pytest.raises(RuntimeError, match=MESSAGE):
        reparameterize_model(model)
    torch.testing.assert_close(compute(model, images), want)

    folded = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    condattn.fold(folded)
    torch.testing.assert_close(compute(reparameterize_model(folded), images), want, rtol=1e-4, atol=1e-4)
    assert with_own_fuse(model) and not with_own_fuse(folded)
    condattn.remove(model)
    assert not with_own_fuse(model)
    torch.testing.assert_close(
        compute(reparameterize_model(model), images), compute(plain, images), rtol=1e-4, atol=1e-4
    )


def test_preconditioned_attention_stays_in_a_reparameterized_model():
    timm = pytest.importorskip("timm")
    from timm.models import reparameterize_model

    model, images = randomized(timm.create_model("levit_128s", num_classes=4)), torch.randn(1, 3, 224, 224)
    plain = compute(model, images)
    condattn.condition(model, "pc")
    want = compute(model, images)
    assert not torch.allclose(want, plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(compute(reparameterize_model(model), images), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("library", ["timm", "mmpretrain"])
def test_a_fused_model_is_conditioned_as_others_are(library):
    pytest.importorskip(library)
    model = randomized(levit() if library == "mmpretrain" else timm_levit())
    images = torch.randn(1, 3, 224, 224)
    before = {site.name: len(site.projections) for site in condattn.find_sites(model)}
    fused = deployed(model, library)
    plain = compute(fused, images)
    assert {site.name: len(site.projections) for site in condattn.find_sites(fused)} == before
    condattn.condition(fused, "sc+pc")
    assert not torch.allclose(compute(fused, images), plain, rtol=1e-2, atol=1e-2)


def timm_levit():
    import timm

    return timm.create_model("levit_128s", num_classes=4)


def levit():
    from mmpretrain.models.backbones.levit import LeViT

    return LeViT("128s")


def deployed(model, library):
    if library == "mmpretrain":
        model.switch_to_deploy()
        return model
    from timm.models import reparameterize_model

    return reparameterize_model(model)


def test_levit_of_mmpretrain():
    pytest.importorskip("mmpretrain")
    model, images = randomized(levit()), torch.randn(1, 3, 224, 224)
    condattn.condition(model, "sc")
    want = compute(model, images)
    with pytest.raises(RuntimeError, match=MESSAGE):
        copy.deepcopy(model).switch_to_deploy()
    condattn.fold(model)
    model.switch_to_deploy()
    torch.testing.assert_close(compute(model, images), want, rtol=1e-4, atol=1e-4)


def test_convolutions_of_mmcv():
    """``fuse_conv_bn`` writes to the convolutions themselves."""
    pytest.importorskip("mmseg")
    from mmcv.cnn import fuse_conv_bn
    from mmseg.models.decode_heads.isa_head import SelfAttentionBlock

    model = randomized(SelfAttentionBlock(24, 12, None, dict(type="BN"), dict(type="ReLU")))
    images = torch.randn(2, 24, 3, 3)
    condattn.condition(model, "sc")
    want = compute(model, images)
    with pytest.raises(RuntimeError, match=MESSAGE):
        fuse_conv_bn(copy.deepcopy(model))
    condattn.fold(model)
    torch.testing.assert_close(compute(fuse_conv_bn(model), images), want, rtol=1e-4, atol=1e-4)
