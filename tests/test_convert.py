"""Weights in every naming format load completely, and source and target models compute the same."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condattn.weights.files import BadFileError, weights_of
from condattn.weights.load import ConversionError, fit, load_pretrained, load_weights
from condattn.weights.names import FORMATS, recognize, translate

pytest.importorskip("timm")
pytest.importorskip("mmpretrain")

import timm
from mmengine.registry import MODELS, DefaultScope

import condattn.registry

SWIN = dict(embed_dims=12, depths=(2, 1, 2, 1), num_heads=(1, 2, 3, 3))
TIMM_SWIN = dict(embed_dim=12, depths=(2, 1, 2, 1), num_heads=(1, 2, 3, 3))
VIT = dict(embed_dims=24, num_layers=2, num_heads=3)
TIMM_VIT = dict(embed_dim=24, depth=2, num_heads=3)
IMAGE = torch.linspace(-9, 9, 2 * 3 * 224 * 224).sin().reshape(2, 3, 224, 224)


def randomized(model: nn.Module) -> nn.Module:
    """Put a model into evaluation mode, with random values in all weights, also those initialised to zeros or ones."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if value.ndim < 2 else nn.init.normal_(value, std=0.1)
    model.eval()
    return model


def build(scope, **settings):
    with DefaultScope.overwrite_default_scope(scope):
        return randomized(MODELS.build(settings))


def timm_swin():
    return randomized(timm.create_model("swin_tiny_patch4_window7_224", **TIMM_SWIN))


def mm_swin(scope, cls="SwinTransformer", **settings):
    model = build(scope, type=cls, **(dict(arch=SWIN) if scope == "mmpretrain" else SWIN), **settings)
    for name, value in model.state_dict().items():
        if re.match(r"norm\d", name):  # the norms before the outputs, which timm's model lacks
            value.fill_(name.endswith("weight"))
    return model


def timm_vit(name="vit_tiny_patch16_224"):
    return randomized(timm.create_model(name, **TIMM_VIT))


def mmseg_vit(cls="VisionTransformer", **settings):
    defaults = dict(img_size=224, patch_bias=True, final_norm=True, norm_cfg=dict(type="LN", eps=1e-6))
    return build("mmseg", type=cls, **{**VIT, **defaults, **settings})


def mmpretrain_vit(cls="VisionTransformer"):
    return build("mmpretrain", type=cls, arch={**VIT, "feedforward_channels": 96}, out_type="featmap")


def timm_maps(model):
    return model.double().forward_intermediates(IMAGE.double(), norm=False, output_fmt="NCHW", intermediates_only=True)


def run(model):
    """Compute the outputs in float64, where models that compute the same differ by less than 1e-5."""
    return model.double()(IMAGE.double())


def normed(maps):
    """Apply the norms before the outputs, which mmdet and mmseg have and timm lacks."""
    return [nn.functional.layer_norm(m.movedim(1, -1), (m.shape[1],)).movedim(-1, 1) for m in maps]


def official_swin(weights):
    """Rename timm's weights to the official names of the release, where a stage ends with its downsampling."""
    official = {}
    for name, value in weights.items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        official[name.replace("head.fc", "head")] = value
    for name in [name for name in official if name.endswith("relative_position_bias_table")]:
        official[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return official | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}


@torch.no_grad()
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
@pytest.mark.parametrize("names", [lambda w: w, official_swin], ids=["timm", "official"])
@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_swin(scope, names, entry, tmp_path):
    source = timm_swin()
    weights = names(source.state_dict())
    torch.save({entry: weights} if entry else weights, tmp_path / "swin.pth")
    target = mm_swin(scope, "ConditionedSwinTransformer", conditioning="none")
    report = load_pretrained(target, tmp_path / "swin.pth")
    assert {re.sub(r"\d", "", name) for name in report.missing} == {"norm.weight", "norm.bias"}
    assert {name.split(".")[0] for name in report.left_out} <= {"norm", "head", "layers"}
    used = len(source.state_dict()) - 4  # norm and classifier
    assert len(report.loaded) == used and not report.interpolated
    for ours, theirs in zip(run(target), normed(timm_maps(source)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["mmdet", "mmseg", "mmpretrain"])
def test_swin_of_openmmlab(scope, tmp_path):
    """Weights of OpenMMLab load into timm's model and into mmdet's."""
    source = mm_swin(scope)
    torch.save(dict(state_dict={f"backbone.{n}": v for n, v in source.state_dict().items()}), tmp_path / "swin.pth")
    same = mm_swin("mmdet", "ConditionedSwinTransformer", conditioning="none")
    load_pretrained(same, tmp_path / "swin.pth")
    target = timm_swin()
    load_pretrained(target, tmp_path / "swin.pth")
    for ours, theirs in zip(run(same), normed(timm_maps(target)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_swin_agrees_with_the_converter_of_mmdet():
    from mmdet.models.backbones.swin import swin_converter

    official = official_swin(timm_swin().state_dict())
    wanted = {name.removeprefix("backbone."): value for name, value in swin_converter(official).items()}
    source, target = recognize(official), recognize(wanted)
    assert (str(source), str(target)) == ("Swin of official", "Swin of mmdet and mmseg and mmpretrain")
    ours, _ = translate(official, source, target)
    assert ours.keys() == {name for name in wanted if "attn_mask" not in name and not name.startswith("norm")}
    assert all(torch.equal(ours[name], wanted[name]) for name in ours)


@torch.no_grad()
@pytest.mark.parametrize("wrap", ["", "module.", "backbone."], ids=["raw", "module", "backbone"])
@pytest.mark.parametrize("kind", ["timm", "MAE", "mmpretrain", "mmseg"])
def test_vit(kind, wrap, tmp_path):
    source = {"timm": timm_vit, "MAE": timm_vit, "mmpretrain": mmpretrain_vit, "mmseg": mmseg_vit}[kind]()
    weights = source.state_dict()
    if kind == "MAE":
        weights |= {"mask_token": torch.ones(1, 1, 8), "decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8)}
        weights |= {"decoder_pos_embed": torch.ones(1, 197, 8), "decoder_embed.weight": torch.ones(8, 24)}
    torch.save({"model": {wrap + name: value for name, value in weights.items()}}, tmp_path / "vit.pth")
    target = mmseg_vit("ConditionedVisionTransformer", conditioning="none")
    report = load_pretrained(target, tmp_path / "vit.pth")
    assert report.missing == []
    assert all(re.search(r"^head|decoder|mask_token", name) for name in report.left_out)
    assert len(report.loaded) == len(target.state_dict())
    if kind in ("timm", "MAE"):
        source.norm.eps = 1e-6
        wanted = source.double().forward_intermediates(IMAGE.double(), indices=1, norm=True, intermediates_only=True)[0]
    else:
        wanted = run(source)[0]
    torch.testing.assert_close(run(target)[0], wanted, rtol=0, atol=1e-5)


def test_vit_into_timm():
    source, target = mmseg_vit(), timm_vit()
    fitted, report = fit(source.state_dict(), target, "vit.pth")
    assert report.missing == ["head.weight", "head.bias"]
    target.load_state_dict(fitted, strict=False)
    wanted = target.double().forward_intermediates(IMAGE.double(), indices=1, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(run(source)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["deit_tiny_distilled_patch16_224", "mmpretrain"])
def test_distilled_deit_into_a_model_without_the_token(kind):
    source = mmpretrain_vit("DistilledVisionTransformer") if kind == "mmpretrain" else timm_vit(kind)
    target = mmseg_vit()
    fitted, report = fit(source.state_dict(), target, "deit.pth")
    assert "dist_token" in report.left_out
    positions = source.state_dict()["pos_embed"]
    assert torch.equal(fitted["pos_embed"], torch.cat([positions[:, :1], positions[:, 2:]], 1))


def official_xcit(weights):
    """Rename timm's weights to those of the release, with fused class attention and another position module."""
    official = {name.replace("pos_embed.", "pos_embeder."): value for name, value in weights.items()}
    for name in [name for name in official if re.search(r"cls_attn.*attn\.q\.", name)]:
        parts = [official.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        official[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return official


def official_davit(weights):
    """Rename timm's weights to the official names of the release."""
    official = {}
    for name, value in weights.items():
        name = re.sub(r"^stem", "stages.0.downsample", name).replace("downsample.conv", "downsample.proj")
        name = re.sub(r"stages\.(\d)\.downsample", r"patch_embeds.\1", name)
        name = re.sub(r"stages\.(\d)\.blocks", r"main_blocks.\1", name)
        name = re.sub(r"cpe([12])", lambda m: f"cpe.{int(m[1]) - 1}", name)
        official[name.replace("head.fc.", "head.").replace("head.norm.", "norms.")] = value
    return official


@torch.no_grad()
@pytest.mark.parametrize(
    "name, settings, official",
    [
        ("xcit_nano_12_p16_224", dict(depth=2, embed_dim=32, num_heads=2), official_xcit),
        ("davit_tiny", dict(depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)), official_davit),
    ],
)
def test_xcit_and_davit(name, settings, official, tmp_path):
    source = randomized(timm.create_model(name, **settings))
    weights = official(source.state_dict())
    assert str(recognize(weights)).endswith("of official")
    module = timm.models.xcit if "xcit" in name else timm.models.davit
    theirs = module.checkpoint_filter_fn(dict(weights), source)  # timm's conversion from the official names
    target = randomized(timm.create_model(name, **settings))
    fitted, report = fit(weights, target, "official.pth")
    assert (report.missing, report.left_out) == ([], [])
    assert fitted.keys() == theirs.keys() == target.state_dict().keys()
    assert all(torch.equal(fitted[key], theirs[key]) for key in theirs)
    torch.save({"model": weights}, tmp_path / "official.pth")
    backbone = MODELS.build(
        dict(
            type="ConditionedTimmBackbone",
            model_name=name,
            conditioning="none",
            checkpoint_path=str(tmp_path / "official.pth"),
            **settings,
        )
    )
    backbone.init_weights()
    backbone.eval()
    image = IMAGE[..., :64, :64]
    wanted = source.forward_intermediates(image, backbone.out_indices, norm=False, intermediates_only=True)
    for ours, map in zip(backbone(image), wanted, strict=True):
        assert torch.equal(ours, map)


@torch.no_grad()
def test_xcit_of_mmpretrain():
    settings = dict(embed_dims=32, depth=2, num_heads=2, mlp_ratio=4, layer_scale_init_value=1, tokens_norm=True)
    source = build("mmpretrain", type="XCiT", patch_size=16, out_type="cls_token", **settings)
    target = randomized(timm.create_model("xcit_tiny_12_p16_224", depth=2, embed_dim=32, num_heads=2))
    fitted, report = fit(source.state_dict(), target, "xcit.pth")
    assert (report.recognized, report.missing) == ("XCiT of mmpretrain", ["head.weight", "head.bias"])
    assert (len(fitted), report.left_out) == (len(source.state_dict()), [])
    target.load_state_dict(fitted, strict=False)
    wanted = target.forward_head(target.forward_features(IMAGE), pre_logits=True)
    torch.testing.assert_close(source(IMAGE)[0], wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_davit_of_mmpretrain():
    arch = dict(embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])
    source = build("mmpretrain", type="DaViT", arch=arch, out_indices=(3,), norm_cfg=dict(type="LN", eps=1e-5))
    for name, value in source.norm3.named_parameters():
        value.fill_(name == "weight")  # in front of the outputs, which timm's model has not
    settings = dict(depths=(1, 1, 2, 1), embed_dims=(8, 16, 32, 64), num_heads=(1, 2, 4, 8))
    target = randomized(timm.create_model("davit_tiny", **settings))
    fitted, report = fit(source.state_dict(), target, "davit.pth")
    assert report.recognized == "DaViT of mmpretrain"
    assert report.missing == ["head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"]
    assert report.left_out == ["norm3.weight", "norm3.bias"]
    target.load_state_dict(fitted, strict=False)
    # mmpretrain's stem begins one pixel in front of the image, timm's three pixels.
    image = nn.functional.pad(IMAGE.double()[..., 2:, 2:], (2, 0, 2, 0))
    moved = nn.functional.pad(image[..., 2:, 2:], (0, 2, 0, 2))
    maps = target.double().forward_intermediates(moved, norm=False, intermediates_only=True)
    torch.testing.assert_close(source.double()(image)[0], normed(maps)[-1], rtol=0, atol=1e-5)


def test_windows_and_images_of_another_size():
    swin = mm_swin("mmdet", window_size=8)
    fitted, report = fit(timm_swin().state_dict(), swin, "swin.pth")
    assert len(report.interpolated) == 6 and "from 169 x 1 to 225 x 1" in report.interpolated[0]
    vit = mmseg_vit(img_size=(128, 256))
    fitted, report = fit(timm_vit().state_dict(), vit, "vit.pth")
    assert fitted["pos_embed"].shape == (1, 1 + 8 * 16, 24)
    assert report.interpolated == ["pos_embed from 1 x 197 x 24 to 1 x 129 x 24"]


def test_interpolation_is_that_of_a_plane():
    """A linear table stays linear at every size, away from the border, but for small ripples of torch's kernel."""
    from condattn.weights.resize import resize_bias_table, resize_positions

    rows = torch.arange(13.0)[:, None].expand(13, 13).reshape(-1, 1)
    resized = resize_bias_table(rows, 23 * 23).reshape(23, 23)
    steps = resized.diff(dim=0)[4:-4]
    torch.testing.assert_close(steps, torch.full_like(steps, 13 / 23), rtol=0, atol=0.1)
    positions = torch.cat([torch.full((1, 1), 7.0), torch.arange(14.0).repeat(14)[:, None]])[None]
    resized = resize_positions(positions, 1 + 28 * 28)
    assert resized[0, 0, 0] == 7
    steps = resized[0, 1:, 0].reshape(28, 28).diff(dim=1)[:, 6:-6]
    torch.testing.assert_close(steps, torch.full_like(steps, 0.5), rtol=0, atol=0.1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_there_and_back_is_the_identity(data):
    """Converting to any other format of the family and back gives the same weights, for any depth and width."""
    source = data.draw(st.sampled_from(FORMATS))
    others = [one for one in FORMATS if one.family == source.family and one is not source]
    target = data.draw(st.sampled_from(others or [source]))
    width = 4 * data.draw(st.integers(1, 3))
    weights = {}
    for rule in source.rules:
        for template in rule.theirs:
            for _ in range(data.draw(st.integers(1, 3))):
                weights[fill(template, data)] = torch.randn(3 * width, 4 * width)
    translated, left_out = translate(weights, source, target)
    back, lost = translate(translated, target, source)
    assert lost == []
    assert translated and len(left_out) < len(weights)
    assert back.keys() == weights.keys() - set(left_out)
    assert all(torch.equal(back[name], weights[name]) for name in back)


def fill(template, data):
    def field(match):
        if match[1] == "p":
            return data.draw(st.sampled_from(["weight", "bias"]))
        if match[1] == "rest":
            return data.draw(st.sampled_from(["qkv.weight", "norm.bias", "3.gamma"]))
        return str(data.draw(st.integers(1, 30)))

    return re.sub(r"\{(\w+?)(?:[+-]\d+)?\}", field, template)


def test_prefixes_and_entries():
    tensor = torch.ones(1)
    whole = {"meta": {}, "state_dict": {"module.backbone.a": tensor, "module.head.b": tensor}}
    assert weights_of(whole)[:2] == ({"a": tensor}, ["head.b"])
    assert weights_of({"model_ema": {"x": tensor}, "epoch": 3}) == ({"x": tensor}, [], "the file (model_ema)")
    other = {"x": torch.zeros(1)}
    branches = {"a.backbone.x": tensor, "a.head.y": tensor, "backbone.x": other["x"]}
    for prefix in ("a", "a."):
        assert weights_of(branches, prefix=prefix)[0] == {"x": tensor}
    assert weights_of(branches)[0] == other
    with pytest.raises(BadFileError, match=r"the file has no weights with the prefix 'b\.'; it has a\.backbone\.x"):
        weights_of(branches, prefix="b")
    averaged = {"state_dict": other, "state_dict_ema": {"x": tensor}}  # as timm's training script writes it
    assert weights_of(averaged) == ({"x": tensor}, [], "the file (state_dict_ema)")
    swapped = {"state_dict": {"x": tensor}, "ema_state_dict": other}  # as mmengine's EMAHook writes it
    assert weights_of(swapped) == ({"x": tensor}, [], "the file (state_dict)")


@pytest.mark.parametrize("conditioning", ["sc", dict(type="SpectralCorrection", form="svd")], ids=["identity", "svd"])
def test_effective_weights_preserve_the_function(conditioning, tmp_path):
    source = timm_vit()
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    plain = mmseg_vit("ConditionedVisionTransformer", conditioning="none")
    load_pretrained(plain, tmp_path / "vit.pth")
    corrected = mmseg_vit("ConditionedVisionTransformer", conditioning=conditioning)
    load_pretrained(corrected, tmp_path / "vit.pth", load="effective")
    with torch.no_grad():
        torch.testing.assert_close(corrected(IMAGE)[0], plain(IMAGE)[0], rtol=0, atol=1e-4)
        load_pretrained(corrected, tmp_path / "vit.pth")
        assert not torch.allclose(corrected(IMAGE)[0], plain(IMAGE)[0], rtol=0, atol=1e-2)
    attention = corrected.layers[0].attn.attn
    assert torch.equal(attention.in_proj_weight, source.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match="load is 'folded'; expected 'raw' or 'effective'"):
        load_pretrained(corrected, tmp_path / "vit.pth", load="folded")


def test_effective_weights_of_a_layer_that_shares_its_weight_are_not_loaded():
    model = mmseg_vit("ConditionedVisionTransformer", conditioning="sc")
    first, second = (layer.attn.attn for layer in model.layers)
    second.in_proj_weight = first.in_proj_weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="in_proj_weight are one parameter"):
        load_weights(model, timm_vit().state_dict(), "a test", load="effective")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if name not in key}


def changed(name, change):
    return lambda weights: {key: change(value) if name in key else value for key, value in weights.items()}


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("layers.2.blocks.1."), "of another model: it has no stages.2.blocks.1.norm1.weight.*; it has layers"),
        (without("layers.1.downsample"), "of another model: it has no stages.0.downsample"),
        (changed("qkv.weight", lambda v: v[:-3]), r"stages.0.blocks.0.attn.w_msa.qkv.weight is 33 x 12 there, 36 x 12"),
        (changed("bias_table", lambda v: v.repeat(1, 2)), "relative_position_bias_table is 169 x 2 there, 169 x 1 in"),
        (changed("bias_table", lambda v: v[:-1]), "168 x 1 there, 169 x 1.*not both of square windows"),
        (changed("fc1.weight", lambda v: v * torch.nan), "damaged: stages.0.blocks.0.ffn.*not finite"),
        (changed("fc1.weight", lambda v: v / 0), "damaged: stages.0.blocks.0.ffn.*not finite"),
        (lambda w: w | {"layers.2.blocks.7.norm1.weight": torch.ones(48)}, "the model has no stages.2.blocks.7.norm1"),
        (lambda w: {"resnet.conv1.weight": torch.ones(3)}, "no weight of swin.pth has a place.*resnet.conv1.*patch_em"),
    ],
)
def test_weights_of_another_model(damage, message):
    target = mm_swin("mmdet")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ConversionError, match=message):
        fit(damage(timm_swin().state_dict()), target, "swin.pth")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize(
    "settings, names",
    [(dict(init_values=1e-5), r"blocks\.0\.ls1\.gamma"), (dict(qk_norm=True), r"blocks\.0\.attn\.q_norm\.weight")],
)
def test_weights_in_blocks_that_the_model_has_no_place_for(settings, names):
    """Without them, the blocks compute something else."""
    weights = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT, **settings).state_dict()
    with pytest.raises(ConversionError, match=rf"of another model: the model has no {names}"):
        load_weights(mmseg_vit(), weights, "w.pth")


def test_half_precision_is_loaded_as_it_is():
    source, target = timm_swin(), mm_swin("mmdet")
    fitted, _ = fit({name: value.half() for name, value in source.state_dict().items()}, target, "swin.pth")
    target.load_state_dict(fitted, strict=False)
    weight = target.stages[0].blocks[0].attn.w_msa.qkv.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, source.layers[0].blocks[0].attn.qkv.weight, rtol=1e-3, atol=1e-3)


def test_a_pretrained_backbone_from_its_config(tmp_path, caplog):
    source = timm_swin()
    torch.save(source.state_dict(), tmp_path / "swin.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "swin.pth"))
    with DefaultScope.overwrite_default_scope("mmdet"):
        target = MODELS.build(dict(type="ConditionedSwinTransformer", **SWIN, init_cfg=init_cfg))
        target.init_weights()
        weight = target.stages[0].blocks[0].attn.w_msa.qkv.weight
        assert torch.equal(weight, source.layers[0].blocks[0].attn.qkv.weight)
        wrong = MODELS.build(dict(type="ConditionedSwinTransformer", **SWIN, init_cfg=init_cfg | dict(mode="x")))
    with pytest.raises(ValueError, match="init_cfg of type 'Pretrained' has mode; its settings are checkpoint, load"):
        wrong.init_weights()


def test_a_grid_that_is_not_square_is_not_guessed():
    source = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT, img_size=(128, 256))
    with pytest.raises(ConversionError, match="pos_embed is 1 x 129 x 24 there, 1 x 197 x 24 .*cannot become"):
        fit(source.state_dict(), timm_vit(), "vit.pth")


def test_the_rows_of_a_class_token_stay_as_they_are():
    settings = dict(TIMM_VIT, depth=1)
    source = randomized(timm.create_model("beit_base_patch16_224", **settings, img_size=64))
    target = timm.create_model("beit_base_patch16_224", **settings, img_size=96)
    fitted, report = fit(source.state_dict(), target, "beit.pth")
    (name,) = [name for name in fitted if "bias_table" in name]
    assert len(report.interpolated) == 1 and len(fitted[name]) == 11 * 11 + 3
    assert torch.equal(fitted[name][-3:], source.state_dict()[name][-3:])


def test_weights_that_were_trained_with_conditioning(tmp_path):
    def vit(conditioning, **init_cfg):
        init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "pc.pth"), **init_cfg)
        with DefaultScope.overwrite_default_scope("mmseg"):
            return MODELS.build(
                dict(
                    type="ConditionedVisionTransformer",
                    img_size=224,
                    **VIT,
                    conditioning=conditioning,
                    init_cfg=init_cfg,
                )
            )

    model = vit("pc")
    record = {f"backbone.{name}": methods for name, methods in condattn.conditioning_of(model).items()}
    weights = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "meta": {"conditioning": record}}, tmp_path / "pc.pth")
    model.init_weights()
    with pytest.raises(ValueError, match=r"pc.pth is of a model with conditioning='pc'.*other_conditioning=True"):
        vit("none").init_weights()
    vit("none", other_conditioning=True).init_weights()
    for methods in record.values():
        methods[:] = [dict(type="SpectralCorrection")]
    torch.save({"state_dict": weights, "meta": {"conditioning": record}}, tmp_path / "pc.pth")
    with pytest.raises(ValueError, match="load='effective' is for weights that were not"):
        vit("sc", load="effective").init_weights()


def test_grids_that_are_not_square_are_known_from_the_model():
    from condattn.weights.resize import resize_positions

    with pytest.raises(ValueError, match="positions of 197 tokens cannot become those of 300"):
        resize_positions(torch.zeros(1, 197, 4), 300)
    assert math.prod(resize_positions(torch.zeros(1, 197, 4), 301, (15, 20)).shape) == 301 * 4
