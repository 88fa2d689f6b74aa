"""Rules for OpenMMLab: the attention of mmcv, mmdet, mmseg and mmpretrain.

mmcv's ``MultiheadAttention`` (the DETR family, mmseg's ViT) and the spatial-reduction attention of PVT, MiT and Twins
wrap ``nn.MultiheadAttention`` and need no rule.
"""

from typing import Any

from torch import nn

from ..builders import into, read_by, split_each_head, whole
from ..rules import register_exception, register_rule
from .common import cross_covariance, davit_channels, fused, linear, q_and_kv, separate

for name in (
    *("mmdet.models.backbones.swin.WindowMSA", "mmseg.models.backbones.swin.WindowMSA"),
    *("mmseg.models.backbones.twins.LocallyGroupedSelfAttention", "mmpretrain.models.utils.attention.WindowMSA"),
    *("mmpretrain.models.utils.attention.MultiheadAttention", "mmpretrain.models.backbones.hivit.Attention"),
    *("mmpretrain.models.backbones.davit.DaViTWindowMSA", "mmpretrain.models.backbones.vit_sam.Attention"),
    *(
        "mmpretrain.models.backbones.mvit.MultiScaleAttention",
        "mmpretrain.models.backbones.vit_eva02.AttentionWithRoPE",
    ),
    "mmpretrain.models.backbones.twins.LocallyGroupedSelfAttention",
):
    register_rule(name, fused)


register_rule("mmpretrain.models.backbones.twins.GlobalSubsampledAttention", q_and_kv)
register_rule("mmpretrain.models.utils.attention.PromptMultiheadAttention", q_and_kv)


register_rule("mmpretrain.models.backbones.xcit.ClassAttntion", separate)
register_rule("mmpretrain.models.utils.attention.CrossMultiheadAttention", lambda m: _read(m, separate(m)))


def _read(module: Any, described: dict[str, Any]) -> dict[str, Any]:
    """Mark q, k and v as read by the host, whose forward uses their weights itself because it builds the bias."""
    return described | read_by(module, {name: described[name] for name in "qkv"})


def _beit(module: Any) -> dict[str, Any]:
    return _read(module, fused(module)) if module.bias == "qv_bias" else fused(module)


register_rule("mmseg.models.backbones.beit.BEiTAttention", _beit)
register_rule("mmpretrain.models.utils.attention.BEiTAttention", _beit)
register_rule("mmpretrain.models.utils.attention.WindowMSAV2", lambda m: _read(m, fused(m)))


register_rule("mmpretrain.models.backbones.xcit.XCA", cross_covariance)
register_rule("mmpretrain.models.utils.attention.ChannelMultiheadAttention", cross_covariance)
register_rule("mmpretrain.models.backbones.davit.ChannelAttention", davit_channels)


def _sized_heads(module: Any) -> dict[str, Any]:
    """Describe LeViT and its relatives: a head's rows of q, k and v are adjacent, and values are wider than keys."""
    each = split_each_head(linear(module.qkv), module.num_heads, q=module.key_dim, k=module.key_dim, v=module.d)
    return dict(num_heads=module.num_heads, out=_levit_out(module), **each)


def _levit_downsample(module: Any) -> dict[str, Any]:
    each = split_each_head(linear(module.kv), module.num_heads, k=module.key_dim, v=module.d)
    return dict(num_heads=module.num_heads, out=_levit_out(module), q=whole(linear(module.q[1])), **each)


def _levit_out(module: Any):
    """Describe the head outputs of LeViT, whose output projection may follow an activation."""
    projection = module.proj
    return into(projection, linear(projection[1]) if isinstance(projection, nn.Sequential) else None)


register_rule("mmpretrain.models.backbones.levit.Attention", _sized_heads)
register_rule("mmpretrain.models.backbones.levit.AttentionSubsample", _levit_downsample)
register_rule("mmpretrain.models.backbones.efficientformer.AttentionWithBias", _sized_heads)
register_rule("mmpretrain.models.utils.attention.LeAttention", _sized_heads)


def _deformable(module: Any) -> dict[str, Any]:
    reason = "its weights come from the queries alone"
    return dict(num_heads=module.num_heads, v=whole(module.value_proj), out=into(module.output_proj), obstacle=reason)


def _conditional(module: Any) -> dict[str, Any]:
    """Describe Conditional DETR: content and position have separate projections; q and k are those of the content."""
    q, k, v = (whole(layer) for layer in (module.qcontent_proj, module.kcontent_proj, module.v_proj))
    return dict(num_heads=module.num_heads, q=q, k=k, v=v, out=into(module.out_proj))


def _non_local(module: Any) -> dict[str, Any]:
    """Describe non-local attention: one head between the pixels of a map, whose layers may be followed by pooling."""
    projections: dict[str, Any] = dict(v=whole(_conv(module.g, 0)))
    if module.mode == "gaussian":
        projections["obstacle"] = "it attends without q and k"
    else:
        projections |= dict(q=whole(_conv(module.theta, 0)), k=whole(_conv(module.phi, 0)))
    return dict(num_heads=1, out=into(module.conv_out.conv), **projections)


def _self_attention_block(module: Any) -> dict[str, Any]:
    """Describe the attention of OCRNet, ANN, ISA and DANet, which has one head.

    Each projection is a sequence of one or more convolutions. The last one computes q, k or v.
    """
    q, k, v = (whole(_conv(getattr(module, f"{name}_project"), -1)) for name in ("query", "key", "value"))
    projections = dict(q=q, v=v) if module.share_key_query else dict(q=q, k=k, v=v)
    output = module.out_project or getattr(module, "output_project", None) or getattr(module, "gamma", None)
    return dict(num_heads=1, out=into(_conv(output, 0), axis=1), **projections)


def _conv(layer: Any, index: int) -> nn.Module:
    layer = layer[index] if isinstance(layer, nn.Sequential) else layer
    return getattr(layer, "conv", layer)


register_rule("mmcv.cnn.bricks.non_local._NonLocalNd", _non_local)
register_rule("mmseg.models.utils.self_attention_block.SelfAttentionBlock", _self_attention_block)
register_rule("mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttention", _deformable)
register_rule("mmdet.models.layers.transformer.utils.ConditionalAttention", _conditional)

for name, reason in {
    "mmdet.models.layers.se_layer.ChannelAttention": "it weighs channels, without queries and keys",
    "mmdet.models.backbones.resnest.SplitAttentionConv2d": "it weighs the branches of a convolution",
    "mmseg.models.backbones.resnest.SplitAttentionConv2d": "it weighs the branches of a convolution",
    "mmpretrain.models.backbones.resnest.SplitAttentionConv2d": "it weighs the branches of a convolution",
    "mmseg.models.backbones.bisenetv1.AttentionRefinementModule": "it weighs channels, without queries and keys",
    "mmseg.models.backbones.mscan.MSCAAttention": "it is convolutions",
    "mmseg.models.backbones.mscan.MSCASpatialAttention": "it is convolutions",
    "mmpretrain.models.backbones.van.SpatialAttention": "it is convolutions",
}.items():
    register_exception(name, reason)

for name, reason in {
    "mmcv.cnn.bricks.generalized_attention.GeneralizedAttention": "its terms are switched on and off one by one",
    "mmcv.ops.cc_attention.CrissCrossAttention": "it has neither heads nor an output projection",
    "mmdet.models.dense_heads.clr_head.utils.roi_gather.ROIGather": "its output layer is one number for each query",
    "mmseg.models.decode_heads.da_head.CAM": "it attends between channels, without projections",
    "mmdet.models.utils.vlfuse_helper.BiMultiHeadAttention": "it attends in two directions with one map",
    "mmseg.models.decode_heads.san_head.RecWithAttnbias": "it uses the weights of its layers without running them",
}.items():
    register_exception(name, reason, attends=True)
