"""What the conditioned faces of upstream backbones share."""

from mmengine.logging import print_log

from ..condition import condition
from ..methods.base import Conditioning


class ConditionedBackbone:
    """Mixin in front of an upstream backbone class: the same arguments, and ``conditioning``.

    Args:
        conditioning: How the attention is conditioned; see :func:`condattn.condition`. ``'none'`` is the upstream
            backbone, bit for bit. Default: ``'pc'``.
        **kwargs: The upstream class's arguments.

    Raises:
        ValueError: If the conditioning is unknown or invalid.
    """

    def __init__(self, *args, conditioning: Conditioning = "pc", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        report = condition(self, conditioning)
        print_log(f"{type(self).__name__}: {report}", logger="current")

    def train(self, mode: bool = True):
        """Set the training mode and return self, as ``nn.Module`` does and upstream's backbones do not."""
        super().train(mode)
        return self
