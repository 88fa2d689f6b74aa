"""Adapters (LoRA) around conditioned layers: what they add is added to the layer as it is conditioned.

Around an output projection W an adapter is given the normalised head outputs n(x), and the layer in it does not
normalise them again, so that both compute (W + BA) n(x), as they do when the adapter is merged. Around an input
projection it is (W + BA + C) x.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attention.adapters import INSIDE, inner, is_adapter
from ..attention.classes import look_up, qualified_name
from ..kernels.private import forward_pre_hooks
from ..kernels.switch import is_compiling
from .correction import CorrectedModule
from .head_transform import HeadTransformLinear
from .hooks import remove_hooks

ADDITIVE = {"peft.tuners.lora.layer.LoraLayer": True, "mmpretrain.models.peft.lora.LoRALinear": True}
"""Adapters that compute what their layer computes of their own input, plus something."""


def is_conditioned(layer: nn.Module) -> bool:
    """Whether a method is applied to ``layer`` itself."""
    return getattr(layer, "head_transform", None) is not None or bool(getattr(layer, "corrections", None))


def check_adapter(adapter: nn.Module, layer: nn.Module) -> None:
    """Raise unless ``adapter`` can be around a conditioned ``layer``.

    Raises:
        ValueError: If it is no LoRA, or the layer has more than a preconditioner and corrections.
    """
    problem = None
    if not look_up(ADDITIVE, type(adapter)):
        problem = "adapters other than LoRA"
    elif isinstance(layer, HeadTransformLinear) and type(layer) is not HeadTransformLinear:
        problem = f"adapters around a {type(layer).__name__}"
    if problem:
        raise ValueError(
            f"{qualified_name(type(adapter))} is around a layer of conditioned attention; {problem} are not supported: "
            "leave the layer out of the adapter's targets, or its site out of the conditioning"
        )


def follow(adapter: nn.Module, layer: nn.Module) -> None:
    """See to it that ``adapter``, around a conditioned ``layer``, computes what it would if it were merged.

    Corrections that are made of the weights are fixed now, before anything is merged into them.

    Raises:
        ValueError: As :func:`check_adapter`.
    """
    check_adapter(adapter, layer)
    if isinstance(layer, CorrectedModule):
        layer.settle()
    if prepare not in forward_pre_hooks(adapter).values():
        adapter.register_forward_pre_hook(prepare)
        adapter.register_forward_hook(finish, always_call=True)


def prepare(adapter: Any, args: tuple) -> tuple | None:
    """As a forward pre-hook of an adapter: normalise the head outputs that an output projection is given.

    Raises:
        RuntimeError: If a variant of LoRA that is a function of the weight (DoRA) is around a corrected layer.
    """
    layer: Any = inner(adapter)
    if isinstance(layer, CorrectedModule) and layer.corrections:
        if getattr(adapter, "lora_variant", None):
            raise RuntimeError(
                f"a variant of LoRA ({', '.join(type(v).__name__ for v in adapter.lora_variant.values())}) is around a "
                "projection with a correction, whose weight W + C it does not see; use plain LoRA, or leave the "
                "layer out of its targets"
            )
        layer.settle()
    transform = getattr(layer, "head_transform", None)
    if transform is None or isinstance(layer, nn.MultiheadAttention) or layer.is_prepared:
        return None
    layer.is_prepared = True
    return transform.transform(args[0]), *args[1:]


def finish(adapter: nn.Module, args: tuple, output: object) -> None:
    """As a forward hook of an adapter: what the layer in it is given next is not normalised."""
    layer: Any = inner(adapter)
    if getattr(layer, "is_prepared", False):
        layer.is_prepared = False


def follow_all(model: nn.Module) -> None:
    """:func:`follow` every adapter in ``model`` that is around a conditioned layer, and leave the others."""
    for module in model.modules():
        if is_adapter(module):
            if is_conditioned(inner(module)):
                follow(module, inner(module))
            else:
                remove_hooks(module, (prepare, finish).__contains__)


def _registered(module: nn.Module, name: str, layer: nn.Module | None) -> None:
    """Called by PyTorch before a module becomes an attribute of another."""
    if is_compiling() or layer is None or name not in INSIDE.values() or not is_adapter(module):
        return  # slices of nn.ModuleList are made while a model is compiled
    if is_conditioned(inner(layer)):
        follow(module, inner(layer))


nn.modules.module.register_module_module_registration_hook(_registered)
