"""timm's model families: one small model of each, or several if a family has several kinds of attention."""

import functools
import importlib

import timm
import torch


class Gated(timm.layers.Attention):
    """Attention with a gate after the heads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, gated=True, **kwargs)


# Module of timm.models -> a small model and its settings; "img" is the height and width of its images.
FAMILIES = {
    "beit": ("beit_base_patch16_224", dict(img_size=32, depth=2, embed_dim=48, num_heads=3)),
    "byoanet": ("halonet26t", dict(img=256)),
    "byobnet": ("resnet50_clip", dict(img=64)),
    "cait": ("cait_xxs24_224", dict(img_size=32, depth=2)),
    "coat": ("coat_lite_tiny", dict(img_size=64)),
    "convit": ("convit_tiny", dict(img_size=64)),
    "cpubone": ("cpubone_nano", dict(img=64)),
    "crossvit": ("crossvit_tiny_240", dict(img=240)),
    "csatv2": ("csatv2", dict(img=512)),
    "davit": ("davit_tiny", dict(img=64, depths=(1, 1, 1, 1))),
    "deepseek_vit": ("deepseek_vit_412m", dict(img_size=42, depth=2, embed_dim=48, num_heads=3)),
    "deit": ("deit_tiny_distilled_patch16_224", dict(img_size=32, depth=2)),
    "edgenext": ("edgenext_xx_small", dict(img=64)),
    "efficientformer": ("efficientformer_l1", dict(img=224)),
    "efficientformer_v2": ("efficientformerv2_s0", dict(img=224)),
    "efficientvit_mit": ("efficientvit_b0", dict(img=64)),
    "efficientvit_msra": ("efficientvit_m0", dict(img_size=64)),
    "beit: without biases": (
        "beit_base_patch16_224",
        dict(img_size=32, depth=2, embed_dim=48, num_heads=3, qkv_bias=False),
    ),
    "eva: unfused": ("eva02_base_patch14_224", dict(img_size=28, depth=2, embed_dim=48, num_heads=3)),
    "eva": ("eva02_tiny_patch14_224", dict(img_size=28, depth=2)),
    "fastvit": ("fastvit_sa12", dict(img=64)),
    "gcvit": ("gcvit_xxtiny", dict(img=224)),
    "gemma4_vit": (
        "gemma4_vit_167m",
        dict(img_size=48, depth=2, embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=64),
    ),
    "hiera": ("hiera_tiny_224", dict(img_size=64)),
    "hieradet_sam2": ("sam2_hiera_tiny", dict(img=64)),
    "iformer": ("iformer_t", dict(img=64)),
    "levit": ("levit_128s", dict(img_size=64)),
    "lowformer": ("lowformer_b0", dict(img=64)),
    "maxxvit": ("maxvit_rmlp_pico_rw_256", dict(img_size=64)),
    "metaformer": ("caformer_s18", dict(img=64)),
    "mobilenetv3": ("mobilenetv4_hybrid_medium", dict(img=64)),
    "mobilenetv5": ("mobilenetv5_base", dict(img=64)),
    "mobilevit": ("mobilevit_xxs", dict(img=64)),
    "mvitv2": ("mvitv2_tiny", dict(img_size=64)),
    "naflexvit": ("naflexvit_base_patch16_gap", dict(img=32, depth=2, embed_dim=48, num_heads=3)),
    "nest": ("nest_tiny_jx", dict(img_size=64)),
    "nextvit": ("nextvit_small", dict(img=64)),
    "pit": ("pit_ti_224", dict(img_size=64)),
    "pvt_v2": ("pvt_v2_b0", dict(img=64)),
    "qwen3_vit": ("qwen3_vit_88m", dict(img_size=64, depth=2, embed_dim=48, num_heads=3)),
    "shvit": ("shvit_s1", dict(img=64)),
    "swin_transformer": ("swin_tiny_patch4_window7_224", dict(img_size=56, depths=(2, 2, 2, 2))),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", dict(img_size=64, depths=(2, 2, 2, 2))),
    "swin_transformer_v2: without biases": (
        "swinv2_tiny_window8_256",
        dict(img_size=64, depths=(2, 2, 2, 2), qkv_bias=False),
    ),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_ns_224", dict(img_size=64)),
    "tiny_vit": ("tiny_vit_5m_224", dict(img=64)),
    "tnt": ("tnt_s_patch16_224", dict(img_size=32, depth=2)),
    "twins": ("twins_svt_small", dict(img_size=64)),
    "visformer": ("visformer_tiny", dict(img_size=64)),
    "vision_transformer": ("vit_tiny_patch16_224", dict(img_size=32, depth=2)),
    "vision_transformer: differential": ("vit_tiny_patch16_224", dict(img_size=32, depth=2, attn_layer="diff")),
    "vision_transformer: gated": (
        "vit_tiny_patch16_224",
        dict(img_size=32, depth=2, attn_layer=Gated),
    ),
    "vision_transformer: latent pool": (
        "vit_base_patch16_siglip_224",
        dict(img_size=32, depth=2, embed_dim=48, num_heads=3),
    ),
    "vision_transformer: parallel": ("vit_tiny_patch16_224", dict(img_size=32, depth=2, block_fn="ParallelScaling")),
    "vision_transformer: differential and parallel": (
        "vit_tiny_patch16_224",
        dict(img_size=32, depth=2, block_fn="DiffParallelScaling"),
    ),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", dict(img_size=64, depth=2)),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", dict(img_size=32, depth=2)),
    "vision_transformer_sam": ("samvit_base_patch16_224", dict(img_size=64, depth=3, embed_dim=48, num_heads=3)),
    "vitamin": ("vitamin_small_224", dict(img_size=64)),
    "volo": ("volo_d1_224", dict(img_size=64)),
    "xcit": ("xcit_nano_12_p16_224", dict(img=64, depth=2)),
}


# Layers that no model has by default: module of timm, class, its arguments, shape of the input.
LAYERS = {
    "Attention2d": ("layers.attention2d", (48,), dict(num_heads=3), (2, 48, 4, 4)),
    "head first Attention2d": ("layers.attention2d", (48,), dict(num_heads=3, head_first=True), (2, 48, 4, 4)),
    "AttentionPoolPrr": ("layers.attention_pool", (48,), dict(num_heads=3, pool_type="avg"), (2, 9, 48)),
    "RotAttentionPool2d": ("layers.attention_pool2d", (48,), dict(ref_feat_size=4, num_heads=3), (2, 48, 4, 4)),
    "BottleneckAttn": ("layers.bottleneck_attn", (48,), dict(feat_size=(4, 4), num_heads=3), (2, 48, 4, 4)),
    "NonLocalAttn": ("layers.non_local_attn", (48,), {}, (2, 48, 4, 4)),
    "ChannelAttentionV2": ("models.davit", (48, 3), {}, (2, 9, 48)),
    "MaxViT Attention2d": ("models.maxxvit", (48,), dict(dim_head=16), (2, 48, 4, 4)),
}
NAMES = [*FAMILIES, *LAYERS]


def build(name: str):
    """Build a model without fused attention, and a function that runs it."""
    if name in LAYERS:
        module, arguments, settings, shape = LAYERS[name]
        model = getattr(importlib.import_module(f"timm.{module}"), name.split()[-1])(*arguments, **settings)
        return unfused(model), functools.partial(run, image=torch.randn(shape, dtype=torch.float64))
    model_name, settings = FAMILIES[name]
    settings = dict(settings)
    side = settings.pop("img", None) or settings["img_size"]
    if "block_fn" in settings:
        settings["block_fn"] = getattr(timm.models.vision_transformer, f"{settings['block_fn']}Block")
    model = unfused(timm.create_model(model_name, **settings))
    return model, functools.partial(run, image=torch.randn(2, 3, side, side, dtype=torch.float64))


def unfused(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def run(model, image):
    return model(image)
