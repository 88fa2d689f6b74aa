"""Recognise adapters (LoRA): modules that wrap a layer and add a low-rank product to its output."""

from __future__ import annotations

from torch import nn

from .classes import look_up

INSIDE = {
    "peft.tuners.tuners_utils.BaseTunerLayer": "base_layer",
    "mmpretrain.models.peft.lora.LoRALinear": "original_layer",
}
"""Adapter classes -> name of the attribute that holds the wrapped layer."""

COPYING = {"peft.utils.other.AuxiliaryTrainingWrapper": True}
"""Wrapper classes that train a copy of the wrapped layer, and are removed with their hooks when PEFT unloads them."""


def is_adapter(module: nn.Module) -> bool:
    """Return whether ``module`` is an adapter around a layer."""
    return look_up(INSIDE, type(module)) is not None


def is_copying(module: nn.Module) -> bool:
    """Return whether ``module`` trains a copy of a layer (``modules_to_save`` of PEFT)."""
    return look_up(COPYING, type(module)) is not None


def inner(layer: nn.Module) -> nn.Module:
    """Return the layer inside all adapters, or ``layer`` itself if it is not an adapter."""
    while (name := look_up(INSIDE, type(layer))) is not None:
        layer = getattr(layer, name)
    return layer


def is_at_work(layer: nn.Module) -> bool:
    """Return whether ``layer`` is an adapter that changes outputs, and is not merged into the layer that it wraps."""
    if not is_adapter(layer):
        return False
    idle = getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False)
    return not idle and bool(getattr(layer, "active_adapters", True))
