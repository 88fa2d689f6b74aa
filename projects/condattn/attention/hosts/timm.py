"""Rules for timm: every attention class whose heads have separate outputs.

If another module is between the heads and the output projection, the head outputs are taken before that module. Two
classes count a residual as part of a head's output, as their papers do: the pooled queries of MViT v2 and the local
values of EfficientFormer v2.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from ..builders import halves, into, read_by, split, split_each_head, thirds, whole
from ..rules import register_exception, register_rule
from .common import cross_covariance, davit_channels, fused, linear, q_and_kv, separate

for name in (
    *("models.convit.MHSA", "models.fastvit.Attention", "models.metaformer.Attention"),
    *("models.hieradet_sam2.MultiScaleAttention", "models.mvitv2.MultiScaleAttention", "models.volo.Attention"),
    *("models.vision_transformer_relpos.RelPosAttention", "models.vision_transformer_sam.Attention"),
    "models.vision_transformer.Attention",  # up to timm 1.0.15
    *("models.swin_transformer.WindowAttention", "models.swin_transformer_v2_cr.WindowMultiHeadAttention"),
    *("models.twins.LocallyGroupedAttn", "models.visformer.Attention", "models.coat.FactorAttnConvRelPosEnc"),
    *("models.cait.TalkingHeadAttn", "models.davit.WindowAttention"),
):
    register_rule(f"timm.{name}", fused)


for name in ("cait.ClassAttn", "nextvit.EfficientAttention"):
    register_rule(f"timm.models.{name}", separate)


for name in ("pvt_v2.Attention", "twins.GlobalSubSampleAttn", "volo.ClassAttention"):
    register_rule(f"timm.models.{name}", q_and_kv)


def _qk_and_v(module: Any) -> dict[str, Any]:
    projections = dict(v=whole(module.v), **halves(module.qk, "q", "k"))
    return dict(num_heads=module.num_heads, out=into(module.proj), **projections)


for name in ("convit.GPSA", "tnt.Attention"):
    register_rule(f"timm.models.{name}", _qk_and_v)


for name in ("xcit.XCA", "edgenext.CrossCovarianceAttn", "davit.ChannelAttentionV2"):
    register_rule(f"timm.models.{name}", cross_covariance)
register_rule("timm.models.davit.ChannelAttention", davit_channels)


def _read_by_host(module: Any) -> dict[str, Any]:
    return dict(num_heads=module.num_heads, out=into(module.proj), **read_by(module, thirds(module.qkv)))


for name in ("beit.Attention", "swin_transformer_v2.WindowAttention"):
    register_rule(f"timm.models.{name}", _read_by_host)


def _normed(module: Any) -> dict[str, Any]:
    """Describe attention with fused or separate q, k and v, and an optional norm and gate after the heads."""
    if module.qkv is None:
        groups = getattr(module, "num_kv_heads", module.num_heads)
        k, v = (whole(layer, num_heads=groups) for layer in (module.k_proj, module.v_proj))
        projections = dict(q=whole(module.q_proj), k=k, v=v)
    else:
        projections = thirds(module.qkv)
        projections = read_by(module, projections) if getattr(module, "q_bias", None) is not None else projections
    direct = type(module.norm) is nn.Identity and getattr(module, "gate", None) is None
    out = into(module.proj) if direct else into(module.norm, module.proj)
    return dict(num_heads=module.num_heads, out=out, **projections)


for name in ("layers.attention.Attention", "layers.attention.AttentionRope", "models.eva.EvaAttention"):
    register_rule(f"timm.{name}", _normed)


def _differential(module: Any) -> dict[str, Any]:
    """Describe differential attention: a head applies the difference of two attention maps to one set of values."""
    parts = thirds(module.qkv) if hasattr(module, "qkv") else split(module.in_proj, "weight", **_in_split(module))
    parts |= {name: replace(parts[name], num_heads=2 * module.num_heads) for name in "qk"}
    projection = module.proj if hasattr(module, "proj") else module.out_proj
    return dict(num_heads=module.num_heads, out=into(module.sub_norm, projection, num_heads=1), **parts)


def _in_split(module: Any) -> dict[str, int]:
    return dict(zip(("mlp", "q", "k", "v"), module.in_split, strict=True))


def _parallel(module: Any) -> dict[str, Any]:
    """Describe attention beside a feed-forward network, with one layer for the inputs of both.

    Earlier versions of timm have no ``out_proj``, and a buffer ``qkv_bias`` if the forward reads the weight itself.
    """
    if getattr(module, "out_proj", None) is None:
        out = into(module.attn_out_proj)
    else:
        out = into(module.out_proj, channels=slice(0, module.in_split[1]))
    projections = split(module.in_proj, "weight", **_in_split(module))
    projections = read_by(module, projections) if getattr(module, "qkv_bias", None) is not None else projections
    return dict(num_heads=module.num_heads, out=out, **projections)


register_rule("timm.layers.diff_attention.DiffAttention", _differential)
register_rule("timm.models.vision_transformer.DiffParallelScalingBlock", _differential)
register_rule("timm.models.vision_transformer.ParallelScalingBlock", _parallel)


def _pool(module: Any) -> dict[str, Any]:
    """Describe attention pooling, in which dropout always follows the heads, and the output projection is optional."""
    projections = thirds(module.qkv) if module.qkv is not None else {n: whole(getattr(module, n)) for n in "qkv"}
    return dict(num_heads=module.num_heads, out=into(module.drop, module.proj), **projections)


def _latent_pool(module: Any) -> dict[str, Any]:
    q = None if isinstance(module.q, nn.Identity) else whole(module.q)
    return dict(num_heads=module.num_heads, out=into(module.proj), q=q, **halves(module.kv, "k", "v"))


register_rule("timm.layers.attention_pool2d.AttentionPool2d", _pool)
register_rule("timm.layers.attention_pool2d.RotAttentionPool2d", _pool)
register_rule("timm.layers.attention_pool.AttentionPoolLatent", _latent_pool)
register_rule(
    "timm.layers.attention_pool.AttentionPoolPrr",
    lambda m: dict(num_heads=m.num_heads, out=into(m.post_norm), obstacle="it attends without projections"),
)


def _sized_heads(module: Any) -> dict[str, Any]:
    """Describe LeViT and its relatives: a head's rows of q, k and v are adjacent, and values are wider than keys."""
    sizes = dict(q=module.key_dim, k=module.key_dim, v=module.val_dim)
    return dict(
        num_heads=module.num_heads, out=into(module.proj), **split_each_head(module.qkv, module.num_heads, **sizes)
    )


def _levit(module: Any) -> dict[str, Any]:
    sizes = dict(q=module.key_dim, k=module.key_dim, v=module.val_dim)
    projections = split_each_head(linear(module.qkv), module.num_heads, **sizes)
    return dict(num_heads=module.num_heads, out=into(module.proj, linear(module.proj.ln)), **projections)


def _levit_downsample(module: Any) -> dict[str, Any]:
    kv = split_each_head(linear(module.kv), module.num_heads, k=module.key_dim, v=module.val_dim)
    out = into(module.proj, linear(module.proj.ln))
    return dict(num_heads=module.num_heads, out=out, q=whole(linear(module.q.ln)), **kv)


register_rule("timm.models.efficientformer.Attention", _sized_heads)
register_rule("timm.models.tiny_vit.Attention", _sized_heads)
register_rule("timm.models.levit.Attention", _levit)
register_rule("timm.models.levit.AttentionDownsample", _levit_downsample)


def _head_first(module: Any) -> dict[str, Any]:
    sizes = dict.fromkeys("qkv", module.dim_head)
    each = split_each_head(module.qkv, module.num_heads, **sizes) if module.head_first else thirds(module.qkv)
    return dict(num_heads=module.num_heads, out=into(module.proj), **each)


for name in ("layers.attention2d.Attention2d", "models.maxxvit.AttentionCl", "models.maxxvit.Attention2d"):
    register_rule(f"timm.{name}", _head_first)


def _conv_attention(module: Any) -> dict[str, Any]:
    projection = module.upsampling if isinstance(module.o_proj, nn.Identity) else module.o_proj
    each = split_each_head(module.pwise, module.num_heads, **dict.fromkeys("qkv", module.head_dim))
    return dict(num_heads=module.num_heads, out=into(module.o_proj, projection, axis=1), **each)


register_rule("timm.models.cpubone.ConvAttention", _conv_attention)
register_rule("timm.models.lowformer.ConvAttention", _conv_attention)


def _efficientformer_v2(module: Any) -> dict[str, Any]:
    q = module.q.conv if hasattr(module.q, "conv") else module.q.proj.conv
    first = getattr(module, "upsample", None) or module.act
    projections = dict(q=whole(q), k=whole(module.k.conv), v=whole(module.v.conv))
    return dict(num_heads=module.num_heads, out=into(first, module.proj.conv), **projections)


register_rule("timm.models.efficientformer_v2.Attention2d", _efficientformer_v2)
register_rule("timm.models.efficientformer_v2.Attention2dDownsample", _efficientformer_v2)


def _multi_query(module: Any) -> dict[str, Any]:
    k, v = (whole(layer.proj, num_heads=1) for layer in (module.key, module.value))
    out = into(module.output[0], module.output.proj)
    return dict(num_heads=module.num_heads, out=out, q=whole(module.query.proj), k=k, v=v)


def _gemma4(module: Any) -> dict[str, Any]:
    k, v = (whole(layer.linear, num_heads=module.num_kv_heads) for layer in (module.k_proj, module.v_proj))
    out = into(module.o_proj, module.o_proj.linear)
    return dict(num_heads=module.num_heads, out=out, q=whole(module.q_proj.linear), k=k, v=v)


def _global_context(module: Any) -> dict[str, Any]:
    if not module.use_global:
        return fused(module)
    projections = halves(module.qkv, "k", "v")
    return dict(num_heads=module.num_heads, out=into(module.proj), obstacle="its queries are global", **projections)


def _bottleneck(module: Any) -> dict[str, Any]:
    projections = split(module.qkv, q=module.dim_out_qk, k=module.dim_out_qk, v=module.dim_out_v)
    return dict(num_heads=module.num_heads, out=into(module.pool, axis=1), **projections)


def _halo(module: Any) -> dict[str, Any]:
    kv = split_each_head(module.kv, module.num_heads, k=module.dim_head_qk, v=module.dim_head_v)
    return dict(num_heads=module.num_heads, out=into(module.pool, axis=1), q=whole(module.q), **kv)


def _linear_attention(module: Any) -> dict[str, Any]:
    """Describe EfficientViT: ReLU attention at several scales, whose heads lie side by side."""
    projection, each = module.proj.conv, dict.fromkeys("qkv", module.dim)
    heads = module.qkv.conv.out_channels // (3 * module.dim)
    parts = split_each_head(module.qkv.conv, heads, **each)
    parts = {name: replace(part, num_heads=heads) for name, part in parts.items()}
    return dict(num_heads=projection.in_channels // module.dim, out=into(module.proj, projection), **parts)


def _single_head(module: Any) -> dict[str, Any]:
    """Describe SHViT: one head uses some of the channels; the other channels bypass it to the output projection."""
    out = into(module.proj, module.proj[1].c, channels=slice(0, module.pdim))
    return dict(num_heads=1, out=out, **split(module.qkv.c, q=module.qk_dim, k=module.qk_dim, v=module.pdim))


def _modulated(module: Any) -> dict[str, Any]:
    """Describe iFormer: one head, whose output the forward itself multiplies by a gate."""
    projections = dict(q=whole(module.q.c), k=whole(module.k.c), **halves(module.v_gate.c, "v", "gate"))
    return dict(num_heads=1, obstacle="a gate multiplies its head output before any module receives it", **projections)


def _cascaded(module: Any) -> dict[str, Any]:
    heads = len(module.qkvs)
    return dict(num_heads=heads, out=into(module.proj, axis=1), obstacle="each of its heads has a layer of its own")


register_rule("timm.layers.attention2d.MultiQueryAttention2d", _multi_query)
register_rule("timm.layers.bottleneck_attn.BottleneckAttn", _bottleneck)
register_rule("timm.layers.halo_attn.HaloAttn", _halo)
register_rule("timm.models.gemma4_vit.Gemma4Attention", _gemma4)
register_rule("timm.models.gcvit.WindowAttentionGlobal", _global_context)
register_rule("timm.models.efficientvit_mit.LiteMLA", _linear_attention)
register_rule("timm.models.shvit.SHSA", _single_head)
register_rule("timm.models.iformer.SHMA", _modulated)
register_rule("timm.models.efficientvit_msra.CascadedGroupAttention", _cascaded)
register_rule(
    "timm.models.crossvit.CrossAttention",
    lambda m: dict(num_heads=m.num_heads, out=into(m.proj), q=whole(m.wq), k=whole(m.wk), v=whole(m.wv)),
)
register_rule(
    "timm.models.hiera.MaskUnitAttention", lambda m: dict(num_heads=m.heads, out=into(m.proj), **thirds(m.qkv))
)
register_rule(
    "timm.models.nest.Attention",
    lambda m: dict(num_heads=m.num_heads, out=into(m.proj, interleaved=True), **thirds(m.qkv)),
)
register_rule(
    "timm.layers.non_local_attn.NonLocalAttn",
    lambda m: dict(num_heads=1, out=into(m.z), q=whole(m.t), k=whole(m.p), v=whole(m.g)),
)
register_rule(
    "timm.models.volo.OutlookAttention",
    lambda m: dict(num_heads=m.num_heads, out=into(m.proj), v=whole(m.v), obstacle="it attends without q and k"),
)

for name in ("cbam.ChannelAttn", "cbam.SpatialAttn", "cbam.LightSpatialAttn", "split_attn.SplitAttn"):
    register_exception(f"timm.layers.{name}", "it weighs channels or pixels, without queries and keys")
for name in ("CoordAttn", "SimpleCoordAttn", "EfficientLocalAttn", "StripAttn"):
    register_exception(f"timm.layers.coord_attn.{name}", "it weighs rows and columns, without queries and keys")
for name, reason in {
    "layers.selective_kernel.SelectiveKernelAttn": "it weighs the branches of a convolution",
    "layers.non_local_attn.BilinearAttnTransform": "it transforms a map by rows and columns, without values",
    "layers.non_local_attn.BatNonLocalAttn": "it transforms a map by rows and columns, without values",
    "layers.attention2d.MultiQueryAttentionV2": "its weights are no matrices, and no model uses it",
    "models.mvitv2.MultiScaleAttentionPoolFirst": "no model uses it, and its forward fails",
    "models.nextvit.ConvAttention": "it is a grouped convolution",
    "models.byobnet.SelfAttnBlock": "its lambda layer makes no map of attention between tokens",
}.items():
    register_exception(f"timm.{name}", reason)

for name, reason in {
    "csatv2.SpatialAttention": "it attends between single numbers, without an output projection",
    "mobilevit.LinearSelfAttention": "separable attention has one context vector for all tokens, and no heads",
    "swiftformer.EfficientAdditiveAttention": "additive attention pools the queries, and has no heads",
}.items():
    register_exception(f"timm.models.{name}", reason, attends=True)
for name in ("SimPool1d", "SimPool2d"):
    reason = "it pools with attention, without a projection of the values or the output"
    register_exception(f"timm.layers.other_pool.{name}", reason, attends=True)
