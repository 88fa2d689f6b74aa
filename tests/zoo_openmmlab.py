"""Small backbones of mmdet, mmseg and mmpretrain, and single attention layers of mmcv."""

import functools

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

SWIN = dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 3))
VIT = dict(img_size=32, patch_size=8, embed_dims=24, num_layers=2, num_heads=3)
ARCH = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48)

# Scope and class -> settings; "img" is the height and width of the images.
BACKBONES = {
    "mmdet SwinTransformer": dict(SWIN, img=56),
    "mmdet PyramidVisionTransformer": dict(
        img=64, pretrain_img_size=64, embed_dims=12, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 3, 3]
    ),
    "mmdet PyramidVisionTransformerV2": dict(img=64, embed_dims=12, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 3, 3]),
    "mmseg SwinTransformer": dict(SWIN, img=56),
    "mmseg VisionTransformer": dict(VIT, img=32),
    "mmseg MixVisionTransformer": dict(img=64, embed_dims=12, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 3, 3]),
    "mmseg PCPVT": dict(
        img=64, embed_dims=[12, 24, 36, 48], num_heads=[1, 2, 3, 4], depths=[1, 1, 1, 1], mlp_ratios=[2, 2, 2, 2]
    ),
    "mmseg SVT": dict(img=64, embed_dims=[12, 24, 36], num_heads=[1, 2, 3], depths=[2, 2, 2], mlp_ratios=[2, 2, 2]),
    "mmseg BEiT": dict(VIT, img=32, init_values=0.1),
    "mmseg MAE": dict(VIT, img=32, init_values=0.1),
    "mmpretrain SwinTransformer": dict(img=56, img_size=56, pad_small_map=True, arch=dict(SWIN)),
    "mmpretrain SwinTransformerV2": dict(
        img=64,
        img_size=64,
        window_size=[8, 8, 4, 2],
        arch=dict(embed_dims=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 3, 3], extra_norm_every_n_blocks=0),
    ),
    "mmpretrain VisionTransformer": dict(img=32, img_size=32, patch_size=8, arch=ARCH),
    "mmpretrain DistilledVisionTransformer": dict(img=32, img_size=32, patch_size=8, arch=ARCH, out_type="cls_token"),
    "mmpretrain XCiT": dict(
        img=64, patch_size=16, embed_dims=24, depth=2, num_heads=3, mlp_ratio=2, layer_scale_init_value=1.0
    ),
    "mmpretrain DaViT": dict(
        img=64,
        window_size=2,
        qkv_bias=False,
        arch=dict(embed_dims=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 3], feedforward_channels=[24] * 4),
    ),
    "mmpretrain MViT": dict(
        img=64,
        img_size=64,
        arch=dict(embed_dims=24, num_layers=4, num_heads=1, downscale_indices=[1, 2, 3]),
    ),
    "mmpretrain ViTEVA02": dict(
        img=28, img_size=28, patch_size=14, arch=dict(ARCH, feedforward_channels=48), final_norm=False
    ),
    "mmpretrain BEiTViT": dict(img=32, img_size=32, patch_size=8, arch=ARCH, layer_scale_init_value=0.1),
    "mmpretrain LeViT": dict(img=64, img_size=64, arch="128s"),
    "mmpretrain EfficientFormer": dict(img=224, arch="l1"),
    "mmpretrain TinyViT": dict(img=224, arch="5m"),
    "mmpretrain HiViT": dict(img=64, img_size=64, arch="tiny"),
    "mmpretrain ViTSAM": dict(
        img=32, img_size=32, patch_size=8, window_size=2, arch=dict(ARCH, global_attn_indexes=[1])
    ),
    "mmpretrain EdgeNeXt": dict(img=64, arch="xxsmall"),
    "mmpretrain SVT": dict(img=64, arch="small"),
    "mmpretrain PCPVT": dict(img=64, arch="small"),
    "mmpretrain T2T_ViT": dict(
        img=64, img_size=64, embed_dims=24, num_layers=2, layer_cfgs=dict(num_heads=3, feedforward_channels=48)
    ),
    "mmpretrain TNT": dict(img=224, arch="s"),
    "mmpretrain MobileViT": dict(img=64, arch="xx_small"),
    "mmpretrain Conformer": dict(img=224, arch="tiny"),
}


class Deformable(nn.Module):
    """mmcv's deformable attention as a model; adds the shapes of the levels to its arguments."""

    def __init__(self):
        super().__init__()
        from mmcv.ops import MultiScaleDeformableAttention

        self.attention = MultiScaleDeformableAttention(24, 3, num_levels=2, num_points=2, batch_first=True)
        nn.init.normal_(self.attention.attention_weights.weight)

    def forward(self, x):
        shapes = torch.tensor([[4, 4], [2, 2]])
        points = torch.linspace(0.1, 0.9, 20, dtype=x.dtype).reshape(1, 20, 1, 1).expand(len(x), 20, 2, 2)
        levels = torch.tensor([0, 16])
        return self.attention(x, value=x, reference_points=points, spatial_shapes=shapes, level_start_index=levels)


def conditional():
    from mmdet.models.layers.transformer.utils import ConditionalAttention

    return ConditionalAttention(24, 3)


def cross():
    from mmpretrain.models.utils.attention import CrossMultiheadAttention

    return CrossMultiheadAttention(24, 3, qkv_bias=True)


def prompt():
    from mmpretrain.models.utils.attention import PromptMultiheadAttention

    return PromptMultiheadAttention(24, 3)


def non_local(dimensions=2, **settings):
    import mmcv.cnn

    return getattr(mmcv.cnn, f"NonLocal{dimensions}d")(24, reduction=2, zeros_init=False, **settings)


def disentangled():
    from mmseg.models.decode_heads.dnl_head import DisentangledNonLocal2d

    return DisentangledNonLocal2d(24, reduction=2, zeros_init=False, temperature=1.0)


def interlaced():
    from mmseg.models.decode_heads.isa_head import SelfAttentionBlock

    return SelfAttentionBlock(24, 12, None, dict(type="BN"), dict(type="ReLU"))


def object_context():
    from mmseg.models.decode_heads.ocr_head import ObjectAttentionBlock

    return ObjectAttentionBlock(24, 12, 1, None, dict(type="BN"), dict(type="ReLU"))


def asymmetric():
    from mmseg.models.decode_heads.ann_head import SelfAttentionBlock

    return SelfAttentionBlock(24, 24, 12, 24, True, 1, (1, 2), None, dict(type="BN"), dict(type="ReLU"))


def position():
    from mmseg.models.decode_heads.da_head import PAM

    return PAM(24, 12)


def as_map(x):
    """Reshape tokens (2, 20, 24) to a feature map (2, 24, 4, 5)."""
    return x.mT.unflatten(-1, (4, 5))


def on_map(module, x):
    return module(as_map(x)).flatten(1)


# Layers that none of the backbones has: constructor, and how to call them with tokens (2, 20, 24).
LAYERS = {
    "mmcv MultiScaleDeformableAttention": (Deformable, lambda m, x: m(x)),
    "mmdet ConditionalAttention": (conditional, lambda m, x: m(x, x, query_pos=x.flip(1), key_pos=x.flip(1))),
    "mmcv NonLocal2d": (non_local, on_map),
    "mmcv NonLocal1d": (functools.partial(non_local, 1), lambda m, x: m(x.mT).flatten(1)),
    "mmcv NonLocal3d": (functools.partial(non_local, 3), lambda m, x: m(as_map(x)[:, :, None]).flatten(1)),
    "mmcv NonLocal2d, gaussian": (functools.partial(non_local, mode="gaussian", sub_sample=True), on_map),
    "mmseg DNL": (disentangled, on_map),
    "mmseg ISA": (interlaced, on_map),
    "mmseg ANN": (asymmetric, lambda m, x: m(as_map(x), as_map(x.flip(1))).flatten(1)),
    "mmseg OCR": (object_context, lambda m, x: m(as_map(x), as_map(x.flip(1))[..., :3]).flatten(1)),
    "mmseg PAM": (position, on_map),
    "mmpretrain CrossMultiheadAttention": (cross, lambda m, x: m(x, x[:, 5:], x[:, 5:])),
    "mmpretrain PromptMultiheadAttention": (
        prompt,
        lambda m, x: m(x[:, :9], x[:, 9:], torch.arange(19).expand(len(x), 19)),
    ),
}


def flat(outputs) -> torch.Tensor:
    """Concatenate all tensors of nested outputs."""
    if isinstance(outputs, torch.Tensor):
        return outputs.flatten(1)
    return torch.cat([flat(output) for output in outputs], dim=1)


def build(name: str):
    """Build a backbone, and a function that runs it."""
    if name in LAYERS:
        make, call = LAYERS[name]
        return make(), functools.partial(call, x=torch.randn(2, 20, 24, dtype=torch.float64))
    settings = dict(BACKBONES[name])
    side = settings.pop("img")
    scope, cls = name.split()
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(dict(type=cls, **settings))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # mmpretrain creates position encodings in float32
            module.register_forward_pre_hook(lambda m, x: x[0].to(m.weight.dtype))
    return model, functools.partial(run, image=torch.randn(2, 3, side, side, dtype=torch.float64))


def run(model, image):
    return flat(model(image))


NAMES = [*BACKBONES, *LAYERS]
