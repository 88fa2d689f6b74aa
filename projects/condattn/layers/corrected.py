"""Layers that use W + C in place of their weight W."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .class_swap import ConditionedLayer, restore_class
from .correction import CorrectedModule
from .fusion import refuse_fusion


class CorrectedLayer(ConditionedLayer, CorrectedModule):
    """Mixin for layers that are an input projection with the weight W + C."""

    def release(self) -> None:
        """Restore the original class of the layer if it has no more corrections."""
        if not self.corrections:
            restore_class(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, also one that is assigned.

        Raises:
            RuntimeError: If it is a bias and the layer has none, as where batch norm is fused into it
                (``mmcv.cnn.fuse_conv_bn``). A bias that was deleted (by pruning, or FSDP) may be set again.
        """
        if name == "bias" and param is not None and self.corrections and self._parameters.get("bias", param) is None:
            refuse_fusion()
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """Return the settings of the plain layer, followed by those of the methods."""
        return ", ".join([super().extra_repr(), *map(str, self.corrected_by)])


class CorrectedLinear(CorrectedLayer, nn.Linear):
    """An input projection with the weight W + C. Shape: as ``nn.Linear``."""

    host = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Project with the effective weight."""
        return F.linear(input, self.effective_weight(), self.bias)


class CorrectedConvolution(CorrectedLayer):
    """Mixin for convolutions of size 1 with the weight W + C."""

    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Project every position with the effective weight."""
        return self._conv_forward(input, self.effective_weight(), self.bias)


class CorrectedConv1d(CorrectedConvolution, nn.Conv1d):
    """A convolution of size 1 with the weight W + C. Shape: as ``nn.Conv1d``."""

    host = nn.Conv1d


class CorrectedConv2d(CorrectedConvolution, nn.Conv2d):
    """A 1 x 1 convolution with the weight W + C. Shape: as ``nn.Conv2d``."""

    host = nn.Conv2d


class CorrectedConv3d(CorrectedConvolution, nn.Conv3d):
    """A 1 x 1 x 1 convolution with the weight W + C. Shape: as ``nn.Conv3d``."""

    host = nn.Conv3d


CONVOLUTIONS = (CorrectedConv1d, CorrectedConv2d, CorrectedConv3d)
