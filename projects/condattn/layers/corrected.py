"""Layers with W + C in place of their weight W."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .class_swap import ConditionedLayer, restore_class
from .correction import CorrectedModule


class SpectralLayer(ConditionedLayer, CorrectedModule):
    """Mixin of the layers that are an input projection with the weight W + C."""

    spectral: object
    """The settings of the method, which put the layer here."""

    def fold(self) -> None:
        """Merge C into the weight and become the plain layer again."""
        self.merge_corrections()
        self.release()

    def release(self) -> None:
        """Become the plain layer again, once the corrections are gone."""
        del self.spectral
        restore_class(self)

    def extra_repr(self) -> str:
        """The settings, behind those of the plain layer."""
        return f"{super().extra_repr()}, {self.spectral}"


class SpectralLinear(SpectralLayer, nn.Linear):
    """An input projection with the weight W + C. Shape: as ``nn.Linear``."""

    host = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Project with the effective weight."""
        return F.linear(input, self.effective_weight(), self.bias)


class SpectralConv2d(SpectralLayer, nn.Conv2d):
    """A 1 x 1 convolution with the weight W + C. Shape: as ``nn.Conv2d``."""

    host = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """Project every pixel with the effective weight."""
        return self._conv_forward(input, self.effective_weight(), self.bias)
