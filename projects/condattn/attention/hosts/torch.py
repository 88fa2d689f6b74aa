"""The rule for PyTorch's ``nn.MultiheadAttention``, and so for every module that wraps it (as mmcv's does)."""

from typing import Any

from torch import nn

from ..builders import into, thirds, whole
from ..rules import register_rule


def _multihead_attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    if module.in_proj_weight is not None:
        projections = thirds(module, "in_proj_weight")
    else:
        projections = {name: whole(module, f"{name}_proj_weight") for name in "qkv"}
    return dict(num_heads=module.num_heads, out=into(module, module.out_proj), **projections)


register_rule("torch.nn.modules.activation.MultiheadAttention", _multihead_attention)
