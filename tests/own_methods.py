"""Four methods as a user would write them, one of each kind; configurations import this module."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from condattn import register_method
from condattn.methods import HeadOutputMethod, HeadTransform, InitialWeightsMethod, ModelInputMethod, WeightMethod


@register_method
@dataclass(frozen=True)
class Scaled(WeightMethod):
    """Add the initial weight times (factor - 1) to the weight."""

    alias: ClassVar[str] = "scaled"
    factor: float = 0.5
    targets: tuple[str, ...] = ("q",)

    def constant(self, weight: Tensor, target: str, num_heads: int) -> Tensor:
        return (self.factor - 1) * weight


class Shrink(HeadTransform):
    """Divide each row by a power of its norm."""

    def transform_heads(self, x: Tensor, heads: int, channels: int) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=channels, keepdim=True).clamp_min(1e-6) ** self.method.power


@register_method
@dataclass(frozen=True)
class Shrunk(HeadOutputMethod):
    """Shrink the rows of the head outputs."""

    alias: ClassVar[str] = "shrunk"
    power: float = 0.5

    def head_transform(self, site):
        return Shrink(site, self)


@register_method
@dataclass(frozen=True)
class Centred(ModelInputMethod):
    """Subtract part of the mean over the second axis (tokens or channels) from the model's input."""

    alias: ClassVar[str] = "centred"
    part: float = 1.0

    def transform(self, x: Tensor) -> Tensor:
        return x - self.part * x.mean(1, keepdim=True)


@register_method
@dataclass(frozen=True)
class OrthogonalValues(InitialWeightsMethod):
    """Initialise the value projection as an orthogonal matrix."""

    alias: ClassVar[str] = "orthogonal"
    gain: float = 1.0

    def set_weights(self, site) -> None:
        site.v.set_weight(nn.init.orthogonal_(torch.empty(site.v.weight.shape, device="cpu"), self.gain))
