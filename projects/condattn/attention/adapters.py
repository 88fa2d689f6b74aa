"""Adapters (LoRA): modules around a layer that add a product of two small matrices to what it computes."""

from __future__ import annotations

from torch import nn

from .classes import look_up

INSIDE = {
    "peft.tuners.tuners_utils.BaseTunerLayer": "base_layer",
    "mmpretrain.models.peft.lora.LoRALinear": "original_layer",
}
"""Classes of adapters -> the name under which they hold the layer that they are around."""

COPYING = {"peft.utils.other.AuxiliaryTrainingWrapper": True}
"""Classes that train a copy of the layer that they are around, and are taken away with their hooks in the end."""


def is_adapter(module: nn.Module) -> bool:
    """Whether ``module`` is an adapter around a layer."""
    return look_up(INSIDE, type(module)) is not None


def is_copying(module: nn.Module) -> bool:
    """Whether ``module`` trains a copy of a layer (``modules_to_save`` of PEFT)."""
    return look_up(COPYING, type(module)) is not None


def inner(layer: nn.Module) -> nn.Module:
    """The layer inside all adapters; ``layer`` itself if it is none."""
    while (name := look_up(INSIDE, type(layer))) is not None:
        layer = getattr(layer, name)
    return layer


def is_at_work(layer: nn.Module) -> bool:
    """Whether ``layer`` is an adapter that changes outputs and is not merged into the weights of the layer in it."""
    if not is_adapter(layer):
        return False
    idle = getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False)
    return not idle and bool(getattr(layer, "active_adapters", True))
