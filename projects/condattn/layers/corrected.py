"""Layers that use W + C in place of their weight W."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .class_swap import ConditionedLayer, restore_class
from .correction import CorrectedModule


class CorrectedLayer(ConditionedLayer, CorrectedModule):
    """Mixin for layers that are an input projection with the weight W + C."""

    def release(self) -> None:
        """Restore the original class of the layer if it has no more corrections."""
        if not self.corrections:
            restore_class(self)

    def extra_repr(self) -> str:
        """Return the settings of the plain layer, followed by those of the methods."""
        return ", ".join([super().extra_repr(), *map(str, self.corrected_by)])


class CorrectedLinear(CorrectedLayer, nn.Linear):
    """An input projection with the weight W + C. Shape: as ``nn.Linear``."""

    host = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Project with the effective weight."""
        return F.linear(input, self.effective_weight(), self.bias)


class CorrectedConv2d(CorrectedLayer, nn.Conv2d):
    """A 1 x 1 convolution with the weight W + C. Shape: as ``nn.Conv2d``."""

    host = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """Project every pixel with the effective weight."""
        return self._conv_forward(input, self.effective_weight(), self.bias)
