"""Rules for torchvision: Swin v1 and v2, and MaxViT. Its ViT uses ``nn.MultiheadAttention``."""

from typing import Any

from ..builders import into, read_by, thirds
from ..rules import register_rule


def _shifted_window(module: Any) -> dict[str, Any]:
    """Describe Swin v1, and its subclass v2: one function computes all, with the weights of both layers."""
    projections = read_by(module, thirds(module.qkv))
    if module.dropout:
        reason = "its forward has dropout behind an output projection that it computes itself"
        return dict(num_heads=module.num_heads, obstacle=reason, **projections)
    return dict(num_heads=module.num_heads, out=into(module.proj, reader=module), **projections)


register_rule("torchvision.models.swin_transformer.ShiftedWindowAttention", _shifted_window)
register_rule(
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
    lambda m: dict(num_heads=m.n_heads, out=into(m.merge), **thirds(m.to_qkv)),
)
