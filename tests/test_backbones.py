"""The registered backbones against upstream's, with every option that affects attention."""

import importlib

import numpy as np
import pytest
import torch
from backbones import SMALL, VIT, build
from torch import nn

import condattn
import condattn.registry
from condattn import SpectralCorrection
from condattn.openmmlab.models.base import ConditionedBackbone

SCOPES = ["mmdet", "mmseg"]


def swins(scope, conditioning, fast=True, **settings):
    """Build upstream's backbone and the conditioned one, with the same weights, in float64."""
    pair = (
        build(scope, "SwinTransformer", **SMALL, **settings),
        build(scope, "ConditionedSwinTransformer", conditioning=conditioning, fast_attention=fast, **SMALL, **settings),
    )
    for parameter in pair[0].parameters():
        nn.init.normal_(parameter, std=0.2)
    pair[1].load_state_dict(pair[0].state_dict())
    for backbone in pair:
        backbone.double()
        backbone.train()
    return pair


def results(backbone, shape, dtype=torch.float64):
    torch.manual_seed(1)
    image = torch.randn(*shape, dtype=dtype)
    maps = backbone(image)
    backbone.zero_grad()
    sum(m.square().sum() for m in maps).backward()
    return maps, {name: p.grad for name, p in backbone.named_parameters()}


def assert_same(got, want, **tolerance):
    for g, w in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(g, w, **tolerance)
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], **tolerance)


EQUAL = dict(rtol=0, atol=0)
CLOSE = dict(rtol=1e-10, atol=1e-10)
SHAPES = [(1, 3, 31, 31), (3, 3, 31, 31), (1, 3, 112, 137), (2, 3, 64, 64)]


def normalise_before(projection, heads):
    """Precondition the input of upstream's projection by a hook, with an independent formula."""

    def rows_over_norm(module, inputs):
        parts = inputs[0].unflatten(-1, (heads, -1))
        return (parts * parts.pow(2).sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()).flatten(-2)

    projection.register_forward_pre_hook(rows_over_norm)


def precondition(swin):
    for stage in swin.stages:
        for block in stage.blocks:
            normalise_before(block.attn.w_msa.proj, block.attn.w_msa.num_heads)


def correct(swin, strength):
    """Add the scaled identity to upstream's weights; the gradient for W equals that for W + C."""
    for stage in swin.stages:
        for block in stage.blocks:
            weight = block.attn.w_msa.qkv.weight
            size = weight.shape[1]
            weight.data += strength * torch.eye(size, dtype=weight.dtype).repeat(3, 1)


@pytest.mark.parametrize("scope", SCOPES)
class TestSwin:
    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    def test_none_is_upstream_bit_for_bit(self, scope, mode):
        upstream, ours = swins(scope, "none", fast=False)
        upstream.train(mode), ours.train(mode)
        assert list(ours.state_dict()) == list(upstream.state_dict())
        assert_same(results(ours, (2, 3, 45, 61)), results(upstream, (2, 3, 45, 61)), **EQUAL)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_preconditioned(self, scope, shape):
        upstream, ours = swins(scope, "pc")
        precondition(upstream)
        assert_same(results(ours, shape), results(upstream, shape), **CLOSE)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_corrected(self, scope, shape):
        upstream, ours = swins(scope, SpectralCorrection(0.75))
        correct(upstream, 0.75)
        assert_same(results(ours, shape), results(upstream, shape), **CLOSE)

    def test_both_in_eval(self, scope):
        upstream, ours = swins(scope, ["pc", SpectralCorrection(0.75)])
        correct(upstream, 0.75), precondition(upstream)
        upstream.eval(), ours.eval()
        assert_same(results(ours, (1, 3, 50, 70)), results(upstream, (1, 3, 50, 70)), **CLOSE)

    @pytest.mark.parametrize("conditioning", ["pc", dict(type="SpectralCorrection", form="svd")], ids=str)
    def test_activation_checkpointing(self, scope, conditioning):
        plain = swins(scope, conditioning)[1]
        checkpointed = swins(scope, conditioning, with_cp=True)[1]
        checkpointed.load_state_dict(plain.state_dict())
        plain.load_state_dict(plain.state_dict())
        assert_same(results(checkpointed, (2, 3, 45, 61)), results(plain, (2, 3, 45, 61)), **CLOSE)

    def test_frozen_stages(self, scope):
        upstream, ours = swins(scope, "pc", frozen_stages=2)
        precondition(upstream)
        assert_same(results(ours, (1, 3, 64, 64)), results(upstream, (1, 3, 64, 64)), **CLOSE)
        site = condattn.find_sites(ours)[0].module
        assert not site.training and site.proj.weight.grad is None
        assert ours.stages[3].blocks[0].attn.w_msa.proj.weight.grad is not None

    @pytest.mark.parametrize("conditioning", ["pc", SpectralCorrection(1.0)], ids=str)
    def test_autocast(self, scope, conditioning):
        """The difference between bf16 and float32 is no larger than with upstream's backbone."""
        errors = []
        for backbone in swins(scope, conditioning):
            backbone.float()
            want, _ = results(backbone, (1, 3, 64, 64), torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                got, gradients = results(backbone, (1, 3, 64, 64), torch.float32)
            assert all(g.isfinite().all() for g in gradients.values())
            errors.append(max((g - w).abs().max() / w.abs().max() for g, w in zip(got, want, strict=True)).item())
        assert errors[1] <= 2 * errors[0] + 0.01

    def test_train_returns_self(self, scope):
        ours = swins(scope, "pc")[1]
        assert ours.train() is ours and ours.training
        assert ours.eval() is ours and not ours.training

    def test_initialisation_is_upstreams_and_keeps_the_correction(self, scope):
        upstream, ours = swins(scope, SpectralCorrection(3.0, relative=True))
        for backbone in (upstream, ours):
            torch.manual_seed(5)
            backbone.init_weights()
        state = ours.state_dict()
        for name, tensor in upstream.state_dict().items():
            assert torch.equal(state[name], tensor)
        results(ours, (1, 3, 32, 32))
        for site in condattn.find_sites(ours):
            effective = site.module.qkv.effective_weight().detach()
            norm = np.linalg.norm(site.q.weight.detach().numpy(), 2)
            added = effective[site.q.rows[0]] - site.q.weight.detach()
            np.testing.assert_allclose(added.numpy(), 3.0 * norm * np.eye(len(added)), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("conditioning", ["pc", "sc"])
    def test_vanilla_checkpoint_loads_with_no_key_renamed(self, scope, conditioning, tmp_path):
        upstream = swins(scope, "none")[0]
        prefixed = {f"backbone.{name}": tensor for name, tensor in upstream.state_dict().items()}
        torch.save(dict(state_dict=prefixed), tmp_path / "vanilla.pth")
        init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "vanilla.pth"))
        settings = dict(**SMALL, conditioning=conditioning, init_cfg=init_cfg)
        ours = build(scope, "ConditionedSwinTransformer", **settings)
        ours.init_weights()
        for name, tensor in ours.double().state_dict().items():
            torch.testing.assert_close(tensor, upstream.state_dict()[name], rtol=1e-6, atol=1e-6)

    def test_constants_come_from_the_loaded_weights(self, scope, tmp_path):
        upstream = swins(scope, "none")[0].float()
        prefixed = {f"backbone.{name}": tensor for name, tensor in upstream.state_dict().items()}
        torch.save(dict(state_dict=prefixed), tmp_path / "vanilla.pth")
        init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "vanilla.pth"))
        conditioning = SpectralCorrection(3.0, relative=True)
        ours = build(scope, "ConditionedSwinTransformer", **SMALL, conditioning=conditioning, init_cfg=init_cfg)
        ours.init_weights()
        results(ours, (1, 3, 32, 32), torch.float32)
        for site in condattn.find_sites(ours):
            constants = site.module.qkv.weight_correction.chunk(3)
            for weight, constant in zip(site.module.qkv.weight.chunk(3), constants, strict=True):
                norm = np.linalg.norm(weight.detach().numpy(), 2)
                torch.testing.assert_close(constant, torch.full_like(constant, 3 * norm), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
    def test_fold(self, scope, dtype, tolerance):
        ours = swins(scope, SpectralCorrection(1.0))[1].to(dtype)
        upstream = build(scope, "SwinTransformer", **SMALL).to(dtype)
        want = results(ours, (1, 3, 45, 61), dtype)[0]
        assert condattn.fold(ours) == 8
        upstream.load_state_dict(ours.state_dict())
        for got, w in zip(results(upstream, (1, 3, 45, 61), dtype)[0], want, strict=True):
            torch.testing.assert_close(got, w, rtol=0, atol=tolerance)


class TestVisionTransformer:
    def pair(self, conditioning, **settings):
        upstream = build("mmseg", "VisionTransformer", **VIT, **settings)
        ours = build("mmseg", "ConditionedVisionTransformer", conditioning=conditioning, **VIT, **settings)
        for parameter in upstream.parameters():
            nn.init.normal_(parameter, std=0.2)
        ours.load_state_dict(upstream.state_dict())
        return upstream.double(), ours.double()

    def test_none_is_upstream_bit_for_bit(self):
        upstream, ours = self.pair("none")
        assert list(ours.state_dict()) == list(upstream.state_dict())
        assert_same(results(ours, (2, 3, 40, 32)), results(upstream, (2, 3, 40, 32)), **EQUAL)

    @pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 40, 56), (1, 3, 31, 37)], ids=str)
    @pytest.mark.parametrize("with_cp", [False, True], ids=["", "checkpointing"])
    def test_corrected(self, shape, with_cp):
        """The conditioned class with weights W computes the same as upstream's with weights W + C."""
        upstream, ours = self.pair(SpectralCorrection(0.5), with_cp=with_cp)
        for layer in upstream.layers:
            layer.attn.attn.in_proj_weight.data += 0.5 * torch.eye(24, dtype=torch.float64).repeat(3, 1)
        assert_same(results(ours, shape), results(upstream, shape), **CLOSE)

    def test_preconditioned(self):
        """Compare with the formula of the block, with the attention computed by hand."""
        upstream, ours = self.pair("pc")
        for layer in upstream.layers:
            layer.attn.attn.forward = by_hand(layer.attn.attn)
        assert_same(results(ours, (2, 3, 40, 56)), results(upstream, (2, 3, 40, 56)), **CLOSE)

    def test_eval_agrees_with_train(self):
        ours = self.pair("sc+pc")[1]
        for t, e in zip(results(ours.train(), (1, 3, 32, 32))[0], results(ours.eval(), (1, 3, 32, 32))[0], strict=True):
            torch.testing.assert_close(e, t, **CLOSE)
        assert ours.train() is ours

    def test_it_answers_in_mmdet_as_well(self):
        backbone = build("mmdet", "ConditionedVisionTransformer", **VIT)
        assert len(condattn.find_sites(backbone)) == 3


def by_hand(attention):
    """The preconditioned forward of mmcv's inner module, which works with (tokens, batch, channels)."""

    def forward(query, key, value, **_):
        q, k, v = (
            (x @ w.T + b).unflatten(-1, (attention.num_heads, -1)).permute(1, 2, 0, 3)
            for x, w, b in zip(
                (query, key, value), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
            )
        )
        heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        heads = heads / heads.pow(2).sum(-1, keepdim=True).sqrt()
        return attention.out_proj(heads.permute(2, 0, 1, 3).flatten(-2)), None

    return forward


class TestTimm:
    def pair(self, conditioning):
        timm = pytest.importorskip("timm")
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).double())
        condattn.condition(models[1], conditioning)
        return models

    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    def test_preconditioned(self, mode):
        upstream, ours = self.pair("pc")
        upstream.train(mode), ours.train(mode)
        for block in upstream.blocks:
            normalise_before(block.attn.proj, block.attn.num_heads)
        assert_same(results(ours, (2, 3, 32, 32)), results(upstream, (2, 3, 32, 32)), **CLOSE)

    def test_corrected(self):
        upstream, ours = self.pair("sc(strength=10.0)")
        for block in upstream.blocks:
            weight = block.attn.qkv.weight
            weight.data += 10.0 * torch.eye(weight.shape[1], dtype=weight.dtype).repeat(3, 1)
        assert_same(results(ours, (2, 3, 32, 32)), results(upstream, (2, 3, 32, 32)), **CLOSE)


class TestFactory:
    def test_conditions_what_it_builds(self):
        model = build("mmdet", "Conditioned", module=dict(type="SwinTransformer", **SMALL), conditioning="sc")
        assert type(model) is importlib.import_module("mmdet.models.backbones.swin").SwinTransformer
        assert all(m["type"] == "SpectralCorrection" for (m,) in condattn.conditioning_of(model).values())

    def test_patterns(self):
        module = dict(type="SwinTransformer", **SMALL)
        model = build("mmseg", "Conditioned", module=module, include=["stages.3"], exclude="stages.3.blocks.1")
        assert [n for n, m in condattn.conditioning_of(model).items() if m] == ["stages.3.blocks.0.attn.w_msa"]

    def test_takes_a_module(self):
        module = nn.MultiheadAttention(8, 2)
        assert build("mmdet", "Conditioned", module=module, conditioning="pc") is module

    def test_takes_the_settings_of_the_module_beside_its_type(self):
        model = build("mmdet", "Conditioned", module="SwinTransformer", **SMALL, conditioning="pc", include="stages.3")
        assert len([n for n, m in condattn.conditioning_of(model).items() if m]) == 2 and len(model.stages) == 4
        module = dict(type="SwinTransformer", **SMALL)
        model = build("mmdet", "Conditioned", module=module, depths=(1, 1, 1, 1))
        assert len(condattn.conditioning_of(model)) == 4
        with pytest.raises(ValueError, match="has depths beside a module that is built already"):
            build("mmdet", "Conditioned", module=nn.MultiheadAttention(8, 2), depths=3)

    def test_hands_the_data_preprocessor_on(self):
        """mmengine's runner passes the data preprocessor to the model, wherever the config defines it."""
        given = dict(type="SegDataPreProcessor", size=(32, 32), mean=[1.0] * 3, std=[1.0] * 3)
        head = dict(type="FCNHead", in_channels=96, in_index=3, channels=8, num_classes=2)
        backbone = dict(type="SwinTransformer", **SMALL)
        segmenter = dict(type="EncoderDecoder", backbone=backbone, decode_head=head)
        model = build("mmseg", "Conditioned", module=segmenter, data_preprocessor=given)
        assert model.data_preprocessor.mean.unique().item() == 1.0
        own = dict(segmenter, data_preprocessor=dict(given, mean=[2.0] * 3))
        model = build("mmseg", "Conditioned", module=own, data_preprocessor=given)
        assert model.data_preprocessor.mean.unique().item() == 2.0

    def test_part_of_a_whole_detector(self):
        attention = dict(embed_dims=32, num_heads=4)
        layer = dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=32, feedforward_channels=64))
        decoder = dict(num_layers=2, return_intermediate=True, layer_cfg=dict(**layer, cross_attn_cfg=attention))
        detr = dict(
            type="DETR",
            num_queries=5,
            backbone=dict(type="SwinTransformer", **SMALL, out_indices=(3,)),
            neck=dict(
                type="ChannelMapper",
                in_channels=[96],
                out_channels=32,
                kernel_size=1,
                num_outs=1,
                norm_cfg=None,
                act_cfg=None,
            ),
            encoder=dict(num_layers=1, layer_cfg=layer),
            decoder=decoder,
            positional_encoding=dict(num_feats=16, normalize=True),
            bbox_head=dict(type="DETRHead", num_classes=3, embed_dims=32),
        )
        model = build("mmdet", "Conditioned", module=detr, include=["decoder"])
        names = [n for n, m in condattn.conditioning_of(model).items() if m]
        assert names == [f"decoder.layers.{i}.{a}_attn.attn" for i in (0, 1) for a in ("self", "cross")]
        assert len(condattn.find_sites(model)) == 4 + 1 + 8


def test_the_face_is_the_scopes_own_class():
    for scope in SCOPES:
        upstream = importlib.import_module(f"{scope}.models.backbones.swin").SwinTransformer
        assert isinstance(build(scope, "ConditionedSwinTransformer", **SMALL), upstream)
    assert isinstance(build(None, "ConditionedSwinTransformer", **SMALL), ConditionedBackbone)


def test_unknown_conditioning_names_the_known():
    with pytest.raises(ValueError, match="unknown conditioning 'pcc'. Known: 'pc'"):
        build("mmdet", "ConditionedSwinTransformer", conditioning="pcc", **SMALL)
