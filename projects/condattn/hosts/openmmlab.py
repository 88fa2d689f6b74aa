"""OpenMMLab: the window attention of mmdet's and mmseg's Swin.

mmcv's ``MultiheadAttention`` (mmseg's ViT, mmdet's DETR family) wraps ``nn.MultiheadAttention`` and needs no rule.
"""

from typing import Any

from torch import nn

from ..sites import register_rule, thirds, whole


def _window_msa(module: nn.Module) -> dict[str, Any]:
    return dict(num_heads=module.num_heads, out=whole(module.proj), **thirds(module.qkv))


register_rule("mmdet.models.backbones.swin.WindowMSA", _window_msa)
register_rule("mmseg.models.backbones.swin.WindowMSA", _window_msa)
