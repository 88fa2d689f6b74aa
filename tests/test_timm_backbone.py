"""Any timm model as a backbone, and the pyramid for single-scale ones."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import condattn

pytest.importorskip("timm")

import timm

import condattn.registry
from condattn.openmmlab.models.image_size import ImageSizes, map_size
from condattn.openmmlab.models.pyramid import SimpleFeaturePyramid
from condattn.openmmlab.models.timm import ConditionedTimmBackbone

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


@pytest.mark.parametrize("name, unit", [("maxvit_pico_rw_256", 256), ("eva02_tiny_patch14_224", 14)])
def test_windows_of_a_fixed_grid_see_padded_images(name, unit):
    backbone = build(name).eval()
    assert backbone.image_sizes == ImageSizes((unit, unit))
    image = torch.zeros(1, 3, 40, 300)
    with torch.no_grad():
        maps = backbone(image)
    assert [m.shape[-2:] for m in maps] == [map_size((40, 300), stride) for stride in backbone.strides]


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "hiera_tiny_224", "levit_128s", "gcvit_xxtiny"])
def test_models_of_one_size_take_smaller_images(name):
    settings = dict(depth=1, img_size=(64, 96)) if "beit" in name else {}
    backbone = build(name, **settings).eval()
    height, width = backbone.image_sizes.unit
    assert backbone.image_sizes.fixed and (height, width) == ((64, 96) if "beit" in name else (224, 224))
    image = torch.randn(1, 3, 50, 70)
    padded = nn.functional.pad(image, (0, width - 70, 0, height - 50))
    with torch.no_grad():
        for small, whole in zip(backbone(image), backbone(padded), strict=True):
            assert torch.equal(small, whole[..., : small.shape[-2], : small.shape[-1]])
    with pytest.raises(ValueError, match=rf"an image of 300 x 70 pixels; this model takes {height} x {width} and less"):
        backbone(torch.zeros(1, 3, 300, 70))


@pytest.mark.parametrize("name", [*PYRAMIDS, *COLUMNS])
def test_every_parameter_learns(name):
    """Every parameter gets a gradient; distributed training would fail otherwise."""
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


@pytest.mark.parametrize(
    "name, stages, still",
    [
        ("swin_tiny_patch4_window7_224", 1, ("model.patch_embed", "model.layers.0")),
        (
            "vit_tiny_patch16_224",
            2,
            ("model.patch_embed", "model.cls", "model.pos", "model.blocks.0", "model.blocks.1."),
        ),
    ],
)
def test_frozen_stages(name, stages, still):
    """In frozen stages, weights are fixed and dropout is off; all other stages train."""
    backbone = build(name, frozen_stages=stages, drop_path_rate=0.5, proj_drop_rate=0.5).train()
    assert all(p.requires_grad != n.startswith(still) for n, p in backbone.named_parameters())
    last = max(n for n, _ in backbone.named_modules() if n.startswith(still) and n.count(".") == 2)
    seen = []
    dict(backbone.named_modules())[last].register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    image = torch.randn(2, 3, 64, 64)
    one, two = backbone(image)[-1], backbone(image)[-1]
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(one, two)
    assert all(p.requires_grad for p in build(name).parameters())


def test_checkpointing_changes_no_gradient():
    gradients, calls = [], []
    for with_cp in (False, True):
        backbone = build("vit_tiny_patch16_224", with_cp=with_cp).train()
        backbone.model.blocks[0].register_forward_pre_hook(lambda *_, with_cp=with_cp: calls.append(with_cp))
        torch.manual_seed(1)
        backbone(torch.randn(1, 3, 32, 32))[0].square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert calls == [False, True, True]  # computed again in the backward pass
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_weights(tmp_path):
    """The file has the weights of a whole model with its head; mmengine loads them before the training."""
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = build("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "weights.pth"))
    nn.init.zeros_(backbone.model.blocks[3].attn.qkv.weight)
    backbone.init_weights()
    assert torch.equal(backbone.model.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.pth"):
        build("vit_tiny_patch16_224", checkpoint_path="nowhere.pth").init_weights()
    random = build("vit_tiny_patch16_224")
    before = random.model.blocks[3].attn.qkv.weight.clone()
    random.init_weights()
    assert torch.equal(random.model.blocks[3].attn.qkv.weight, before)


def test_settings_of_the_weights_that_are_named_elsewhere(tmp_path):
    """An ``init_cfg`` without a type completes ``pretrained`` and ``checkpoint_path``; another replaces the first."""
    name, file = "vit_tiny_patch16_224", str(tmp_path / "weights.pth")
    effective = dict(load="effective")
    download = build(name, conditioning="sc", pretrained=True, init_cfg=effective)
    assert download.init_cfg == dict(type="Pretrained", checkpoint=f"timm:{name}", load="effective")
    assert build(name, pretrained=True).init_cfg == dict(type="Pretrained", checkpoint=f"timm:{name}")
    other = dict(type="Pretrained", checkpoint=file)
    assert build(name, pretrained=True, init_cfg=other).init_cfg == other
    model = timm.create_model(name)
    torch.save(model.state_dict(), file)
    backbone = build(name, conditioning="sc", checkpoint_path=file, init_cfg=effective)
    backbone.init_weights()
    qkv, wanted = backbone.model.blocks[0].attn.qkv, model.blocks[0].attn.qkv.weight
    torch.testing.assert_close(qkv.effective_weight(), wanted)
    assert not torch.allclose(qkv.weight, wanted)
    with pytest.raises(ValueError, match="checkpoint_path is .*, and init_cfg initialises the weights as well"):
        build(name, checkpoint_path=file, init_cfg=other)
    with pytest.raises(ValueError, match="init_cfg is {'load': 'effective'}, without a type; add type='Pretrained'"):
        build(name, init_cfg=effective)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(model_name="vit_tiny_patch16_224.no"),
            "vit_tiny_patch16_224 has no weights with the tag no; it has augreg",
        ),
        (dict(model_name="vit_tiny_patch16_224", pretrained_cfg="no"), "no weights with the tag no; it has augreg"),
        (dict(model_name="hf-hub:somebody/vit"), "'hf-hub:somebody/vit'; expected a model of timm itself"),
        (dict(model_name="local-dir:/tmp"), "'local-dir:/tmp'; expected a model of timm itself"),
        (dict(model_name="pvt_v2_b0", features_only=True), "features_only: .* leave the setting out"),
        (dict(model_name="pvt_v2_b0", out_indices=4), r"out_indices is \[4\]; pvt_v2_b0 has 4 features"),
        (dict(model_name="pvt_v2_b0", out_indices=()), r"out_indices is \[\]; pvt_v2_b0 has 4 features"),
        (dict(model_name="pvt_v2_b0", out_indices=("3",)), r"out_indices is \['3'\]; pvt_v2_b0 has 4 features"),
        (dict(model_name="pvt_v2_b0", frozen_stages="all"), "frozen_stages is all; pvt_v2_b0 has 4 stages"),
        (dict(model_name="vit_tiny_patch16_224", embed_dim=7), "vit_tiny_patch16_224: dim should be divisible"),
        (dict(model_name="vit_tiny_patch_16"), "timm has no model vit_tiny_patch_16; it has .*vit"),
        (dict(model_name="pvt_v2_b0", out_indices=(0, 4)), r"out_indices is \[0, 4\]; pvt_v2_b0 has 4 features"),
        (dict(model_name="pvt_v2_b0", out_indices=(1, 1)), r"out_indices is \[1, 1\].* ascending"),
        (dict(model_name="pvt_v2_b0", out_indices=(3, 0)), r"out_indices is \[3, 0\].* ascending"),
        (dict(model_name="pvt_v2_b0", frozen_stages=5), "frozen_stages is 5; pvt_v2_b0 has 4 stages"),
        (dict(model_name="caformer_s18", frozen_stages=0), "MetaFormer does not say what its stages are"),
        (dict(model_name="twins_svt_small", with_cp=True), "twins_svt_small has no activation checkpointing"),
        (dict(model_name="crossvit_tiny_240"), "crossvit_tiny_240 gives no feature maps .* its maps are of"),
        (dict(model_name="resnet18"), "has no attention site"),
        (dict(model_name="pvt_v2_b0", sails=3), "timm's pvt_v2_b0: .*sails"),
        (dict(model_name="pvt_v2_b0", conditioning="cp"), "unknown conditioning 'cp'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ConditionedTimmBackbone(**settings)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "pvt_v2_b0"])
def test_images_of_other_channels(name, channels, tmp_path):
    model = timm.create_model(name, in_chans=channels)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    path = str(tmp_path / "weights.pth")
    backbone = build(name, in_chans=channels, conditioning="none", checkpoint_path=path).eval()
    backbone.init_weights()
    image = torch.randn(1, channels, 64, 64)
    want = timm.create_model(name, in_chans=channels, **({"dynamic_img_size": True} if "vit" in name else {}))
    want.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = want.eval().forward_intermediates(image, norm=False, output_fmt="NCHW", intermediates_only=True)
        assert torch.equal(backbone(image)[-1], maps[-1])
    with pytest.raises(ValueError, match=f"x 3 x .* there, .* x {channels} x .* in the model"):
        torch.save(timm.create_model(name).state_dict(), path)
        backbone.init_weights()


def test_a_number_for_out_indices():
    backbone = build("pvt_v2_b0", out_indices=-1)
    assert (backbone.out_indices, backbone.out_channels, backbone.strides) == ([3], [256], [32])


def test_weights_that_cannot_be_downloaded(monkeypatch):
    """The error is an OSError, as in timm."""
    backbone = build("vit_tiny_patch16_224", pretrained=True)

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match="cannot be downloaded: ConnectionError no network"):
        backbone.init_weights()


@pytest.mark.parametrize("prefix", ["timm/", "hf_hub:timm/", "hf-hub:timm/"])
def test_names_of_the_hub(prefix, monkeypatch):
    """Names with a hub prefix refer to models of timm's registry, and to their weights."""
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **settings):
        asked.append((name, pretrained))
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    build(f"{prefix}vit_tiny_patch16_224.augreg_in21k", pretrained=True).init_weights()
    assert {name for name, _ in asked} == {"vit_tiny_patch16_224.augreg_in21k"} and asked[-1][1]


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


def test_settings_of_weights_of_timm():
    backbone = build("test_vit", init_cfg=dict(type="Pretrained", checkpoint="timm:test_vit", unsafe=True))
    with pytest.raises(ValueError, match="init_cfg has unsafe; with weights of timm its settings are checkpoint and"):
        backbone.init_weights()
