"""Any timm model as a backbone, and the pyramid for single-scale ones."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import condattn

pytest.importorskip("timm")

import timm

import condattn.registry
from condattn.models.pyramid import SimpleFeaturePyramid
from condattn.models.timm import ConditionedTimmBackbone

PYRAMIDS = ["swin_tiny_patch4_window7_224", "davit_tiny", "pvt_v2_b0", "caformer_s18", "twins_svt_small"]
COLUMNS = ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "xcit_nano_12_p16_224"]


def build(name, **settings):
    torch.manual_seed(0)
    return ConditionedTimmBackbone(name, **settings)


@pytest.mark.parametrize("size", [(64, 96), (57, 83)], ids=str)
@pytest.mark.parametrize("name", [*PYRAMIDS, *COLUMNS])
def test_images_of_any_size(name, size):
    backbone = build(name).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, *size))
    assert len(maps) == len(backbone.strides) == (4 if name in PYRAMIDS else 1)
    for m, channels, stride in zip(maps, backbone.out_channels, backbone.strides, strict=True):
        assert m.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("name", [*PYRAMIDS, *COLUMNS])
def test_every_parameter_learns(name):
    """Distributed training fails on a parameter without gradient."""
    backbone = build(name, out_indices=None if name in PYRAMIDS else (3, 5, 7, 11)).train()
    sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "xcit_nano_12_p16_224"])
def test_none_is_timms_own_model(name):
    backbone = build(name, conditioning="none", out_indices=(1, 3)).eval()
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = model.forward_intermediates(image, indices=(1, 3), output_fmt="NCHW", intermediates_only=True)
        for got, w in zip(backbone(image), want, strict=True):
            assert torch.equal(got, w)


def test_conditioning_and_its_patterns():
    backbone = MODELS.build(
        dict(
            type="ConditionedTimmBackbone",
            model_name="vit_tiny_patch16_224",
            conditioning="sc+pc",
            exclude=["blocks.0"],
        )
    )
    told = condattn.conditioning_of(backbone)
    assert [len(methods) for methods in told.values()] == [0] + [2] * 11


def test_frozen_stages():
    backbone = build("swin_tiny_patch4_window7_224", frozen_stages=1, drop_path_rate=0.5).train()
    still = ("model.patch_embed", "model.layers.0")
    assert all(p.requires_grad != n.startswith(still) for n, p in backbone.named_parameters())
    assert all(m.training != n.startswith(still) for n, m in backbone.named_modules() if isinstance(m, nn.LayerNorm))
    assert all(p.requires_grad for p in build("swin_tiny_patch4_window7_224").parameters())


def test_checkpointing_changes_no_gradient():
    gradients = []
    for with_cp in (False, True):
        backbone = build("vit_tiny_patch16_224", with_cp=with_cp).train()
        torch.manual_seed(1)
        backbone(torch.randn(1, 3, 32, 32))[0].square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_weights(tmp_path):
    """Of a whole model in a file, with its head; mmengine asks for them before the training."""
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = build("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "weights.pth"))
    nn.init.zeros_(backbone.model.blocks[3].attn.qkv.weight)
    backbone.init_weights()
    assert torch.equal(backbone.model.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)
    with pytest.raises(RuntimeError, match="no weights for vit_tiny_patch16_224: .*nowhere.*pretrained=False"):
        build("vit_tiny_patch16_224", checkpoint_path="nowhere.pth").init_weights()
    random = build("vit_tiny_patch16_224")
    before = random.model.blocks[3].attn.qkv.weight.clone()
    random.init_weights()
    assert torch.equal(random.model.blocks[3].attn.qkv.weight, before)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(model_name="vit_tiny_patch_16"), "timm has no model vit_tiny_patch_16; it has .*vit"),
        (dict(model_name="pvt_v2_b0", out_indices=(0, 4)), r"out_indices is \[0, 4\]; pvt_v2_b0 has 4 features"),
        (dict(model_name="resnet18"), "has no attention site"),
        (dict(model_name="pvt_v2_b0", sails=3), "timm's pvt_v2_b0: .*sails"),
        (dict(model_name="pvt_v2_b0", conditioning="cp"), "unknown conditioning 'cp'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ConditionedTimmBackbone(**settings)


def test_simple_feature_pyramid():
    neck = MODELS.build(dict(type="SimpleFeaturePyramid", in_channels=32, out_channels=16, num_outs=5))
    maps = neck([torch.randn(2, 8, 4, 4), torch.randn(2, 32, 8, 12)])
    assert [m.shape for m in maps] == [(2, 16, s, s * 3 // 2) for s in (32, 16, 8, 4, 2)]
    sum(m.mean() for m in maps).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_pyramid_normalises_the_channels_of_each_pixel():
    neck = SimpleFeaturePyramid(8, 8, num_outs=1, scales=(1,))
    (out,) = neck([torch.randn(1, 8, 3, 3)])
    torch.testing.assert_close(out.mean(1), torch.zeros(1, 3, 3), rtol=0, atol=1e-5)
    assert isinstance(neck.levels[0][0], nn.Identity)


@pytest.mark.parametrize("settings, part", [(dict(scales=(3,)), "scale is 3"), (dict(num_outs=2), "num_outs is 2")])
def test_bad_pyramid(settings, part):
    with pytest.raises(ValueError, match=part):
        SimpleFeaturePyramid(8, **settings)
