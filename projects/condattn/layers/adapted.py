"""Connect adapters (LoRA) to conditioned layers, so that their update is added to the layer as it is conditioned.

An adapter around an output projection W receives the normalised head outputs n(x), and the wrapped layer does not
normalise them again. Together they compute (W + BA) n(x), as they do when the adapter is merged. An adapter around an
input projection and the wrapped layer compute (W + BA + C) x.
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
from .hooks import PickledHook, remove_methods
from .turns import end_turn, take_turn

ADDITIVE = {"peft.tuners.lora.layer.LoraLayer": True, "mmpretrain.models.peft.lora.LoRALinear": True}
"""Adapters that compute the output of the wrapped layer for their own input, and add something to it."""


def is_conditioned(layer: nn.Module) -> bool:
    """Return whether a method is applied to ``layer`` itself."""
    return getattr(layer, "head_transform", None) is not None or bool(getattr(layer, "corrections", None))


def check_adapter(adapter: nn.Module, layer: nn.Module) -> None:
    """Raise an error if ``adapter`` is not supported around the conditioned ``layer``.

    Raises:
        ValueError: If ``adapter`` is not LoRA, or ``layer`` is of a subclass of
            :class:`.head_transform.HeadTransformLinear`.
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
    """Make ``adapter``, around a conditioned ``layer``, compute the same as after merging.

    Corrections that depend on the weights are fixed now, before anything is merged into the weights.

    Raises:
        ValueError: See :func:`check_adapter`.
    """
    check_adapter(adapter, layer)
    if isinstance(layer, CorrectedModule):
        layer.settle()
    if not any(isinstance(getattr(hook, "__self__", None), Connection) for hook in forward_pre_hooks(adapter).values()):
        connection = Connection()
        connection.keep(
            adapter.register_forward_pre_hook(connection.prepare),
            adapter.register_forward_hook(connection.finish, always_call=True),
        )


class Connection(PickledHook):
    """The hooks of an adapter around a conditioned layer."""

    def prepare(self, adapter: Any, args: tuple) -> tuple | None:
        """Transform the head outputs that reach an output projection; a forward pre-hook of its adapter.

        Raises:
            RuntimeError: If a variant of LoRA that depends on the weight (DoRA) is around a corrected layer.
        """
        layer: Any = inner(adapter)
        if isinstance(layer, CorrectedModule) and layer.corrections:
            if getattr(adapter, "lora_variant", None):
                variants = ", ".join(type(variant).__name__ for variant in adapter.lora_variant.values())
                raise RuntimeError(
                    f"a variant of LoRA ({variants}) is around a projection with a correction, whose weight W + C it "
                    "does not see; use plain LoRA, or leave the layer out of its targets"
                )
            layer.settle()
        transform = getattr(layer, "head_transform", None)
        if transform is None or isinstance(layer, nn.MultiheadAttention):
            return None
        if layer.is_prepared if is_compiling() else not take_turn(transform, adapter):
            return None  # by an adapter around this one
        layer.is_prepared = True
        return transform.transform(args[0]), *args[1:]

    def finish(self, adapter: nn.Module, args: tuple, output: object) -> None:
        """Reset the flag that the input of the wrapped layer is transformed already; a forward hook of the adapter."""
        layer: Any = inner(adapter)
        if getattr(layer, "is_prepared", False) and (is_compiling() or end_turn(layer.head_transform, adapter)):
            layer.is_prepared = False


def follow_all(model: nn.Module) -> None:
    """Call :func:`follow` on every adapter around a conditioned layer, and remove its hooks from other adapters."""
    for module in model.modules():
        if is_adapter(module):
            if is_conditioned(inner(module)):
                follow(module, inner(module))
            else:
                remove_methods(module, Connection)


def _registered(module: nn.Module, name: str, layer: Any) -> None:
    """Connect an adapter to its layer, or part them; PyTorch calls this before a module becomes an attribute."""
    if is_compiling() or layer is None:
        return  # slicing an nn.ModuleList while compiling registers modules too
    if not is_adapter(module):
        if getattr(layer, "is_prepared", False):  # taken out of an adapter whose last forward was interrupted
            layer.is_prepared = False
    elif name in INSIDE.values() and is_conditioned(inner(layer)):
        follow(module, inner(layer))


nn.modules.module.register_module_module_registration_hook(_registered)
