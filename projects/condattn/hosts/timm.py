"""timm: the attention of ``vision_transformer`` and of the many models that use the same class."""

from typing import Any

from torch import nn

from ..sites import register_rule, thirds, whole


def _attention(module: nn.Module) -> dict[str, Any]:
    direct = isinstance(getattr(module, "norm", None), nn.Identity | None) and getattr(module, "gate", None) is None
    out = whole(module.proj) if direct else None
    return dict(num_heads=module.num_heads, out=out, **thirds(module.qkv))


register_rule("timm.layers.attention.Attention", _attention)
register_rule("timm.models.vision_transformer.Attention", _attention)
