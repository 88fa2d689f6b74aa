"""PyTorch: ``nn.MultiheadAttention``, and with it everything that wraps it (mmcv's ``MultiheadAttention``)."""

from typing import Any

from torch import nn

from ..sites import Projection, register_rule, thirds


def _multihead_attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    if module.in_proj_weight is not None:
        projections = thirds(module, "in_proj_weight")
    else:
        rows = slice(0, module.embed_dim)
        projections = {name: Projection(module, f"{name}_proj_weight", rows) for name in "qkv"}
    out = Projection(module, "out_proj.weight", slice(0, module.embed_dim))
    return dict(num_heads=module.num_heads, out=out, **projections)


register_rule("torch.nn.modules.activation.MultiheadAttention", _multihead_attention)
