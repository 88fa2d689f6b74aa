"""Override parameters of a layer during the forward of a module that reads them without calling the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.adapters import inner, is_at_work
from ..kernels.private import forward_hooks, override_parameter, store_forward_hooks_in_order
from ..kernels.switch import is_compiling, is_plain
from .class_swap import restore_parameters
from .hooks import PickledHook, remove_hooks
from .turns import end_turn, take_turn


class ParameterOverride(PickledHook, ABC):
    """Base class of forward hooks of a reader module that replace parameters of a layer in it during its forward.

    Args:
        reader: The module that uses the parameters. Its replicas (``nn.DataParallel``) inherit the hooks.
        owner: The layer in ``reader``; adapters may wrap it.
    """

    def __init__(self, reader: nn.Module, owner: nn.Module) -> None:
        self.path = path_in(reader, owner)
        self.keep(
            reader.register_forward_pre_hook(self.begin),
            # Before the hooks of others, which expect the output of the whole forward.
            reader.register_forward_hook(self.end, prepend=True, always_call=True),
        )
        store_forward_hooks_in_order(reader)

    @abstractmethod
    def parameters(self, layer: nn.Module, owner: Any) -> Mapping[str, Tensor | None]:
        """Return the replacements of parameters of ``owner``; ``layer`` is the owner, or an adapter around it."""

    def begin(self, reader: nn.Module, args: tuple) -> None:
        """Replace the parameters; a forward pre-hook of the reader. Other threads wait until they are restored.

        Raises:
            RuntimeError: If the layer is parametrized, so that its parameters are computed.
        """
        layer = reader.get_submodule(self.path)
        owner: Any = inner(layer)
        if nn.utils.parametrize.is_parametrized(owner):
            raise RuntimeError(
                f"{self.path} of a {type(reader).__name__} was parametrized after it was conditioned; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if not is_compiling() and take_turn(owner, self):
            restore_parameters(owner)  # an interrupted forward has not done so
        others = self.parameters(layer, owner)
        owner.overridden = {
            **{name: getattr(owner, name) for name in others},
            **(getattr(owner, "overridden", None) or {}),
        }
        for name, other in others.items():
            override_parameter(owner, name, other)

    def end(self, reader: nn.Module, args: tuple, output: Any) -> Any:
        """Restore the parameters; a forward hook of the reader."""
        owner: Any = inner(reader.get_submodule(self.path))
        try:
            restore_parameters(owner)
            return self.finish(reader, output)
        finally:
            if not is_compiling():
                end_turn(owner, self)

    def finish(self, reader: nn.Module, output: Any) -> Any:
        """Return what replaces the reader's output, with the parameters restored; None leaves it as it is."""
        return None

    @classmethod
    def detach(cls, reader: nn.Module, owner: nn.Module | None = None, parameter: str | None = None) -> None:
        """Remove the overrides of this class from ``reader``: all, those of one layer, or those of one parameter."""
        for override in _overrides(reader, cls):
            layer = inner(reader.get_submodule(override.path))
            if owner in (None, layer) and parameter in (None, getattr(override, "parameter", None)):
                restore_parameters(layer)
                layer.__dict__.pop("overridden", None)
                remove_hooks(reader, (override.begin, override.end).__contains__)


def path_in(reader: nn.Module, owner: nn.Module) -> str:
    """Return the name in ``reader`` of a layer, or of the outermost adapter around it.

    Raises:
        ValueError: If the layer is not in ``reader``.
    """
    path = next((path for path, module in reader.named_modules() if inner(module) is owner), None)
    if path is None:
        raise ValueError(
            f"a rule says that a {type(reader).__name__} reads parameters of a {type(owner).__name__}, which is not in "
            "it; name the module in the rule that contains the layer"
        )
    return path


def _overrides(reader: nn.Module, cls: type[ParameterOverride]) -> list[ParameterOverride]:
    """Return the overrides of class ``cls`` that are registered on ``reader``."""
    owners = (getattr(hook, "__self__", None) for hook in forward_hooks(reader).values())
    return [owner for owner in owners if isinstance(owner, cls)]


class CorrectedWeightOverride(ParameterOverride):
    """Replaces the weight W of a corrected layer by W + C.

    Args:
        reader: The module that uses the weight.
        owner: The corrected layer.
        parameter: Name of its weight.
    """

    def __init__(self, reader: nn.Module, owner: nn.Module, parameter: str) -> None:
        super().__init__(reader, owner)
        self.reader = type(reader).__name__
        self.parameter = parameter

    def parameters(self, layer: nn.Module, owner: Any) -> Mapping[str, Tensor | None]:
        """Return W + C as the replacement of the weight.

        Raises:
            RuntimeError: If an adapter around the layer is active, because the reader does not call it either.
        """
        if is_at_work(layer):
            raise RuntimeError(
                f"an adapter is around {self.path} of {self.reader}, which uses the weight of {self.path} without "
                "calling it, so that the adapter has no effect; merge it, or leave the layer out of its targets"
            )
        return {self.parameter: owner.effective_weight(self.parameter)}


class Identity(Tensor):
    """A placeholder for the identity matrix as a linear weight: ``F.linear`` returns its input, without a product."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Return the input of ``F.linear``, and give access to attributes.

        Raises:
            RuntimeError: For any other function.
        """
        if function is F.linear:
            return args[0]
        if function.__name__ == "__get__":  # attributes such as the shape
            return super().__torch_function__(function, types, args, kwargs)
        raise RuntimeError(
            f"{function.__name__} was given the weight of a preconditioned projection that a rule says to be read by "
            "F.linear alone; leave the reader out of the rule, and name a module that is called"
        )


class PostponedProjection(ParameterOverride):
    """Postpones a linear layer, whose weight a module reads, to the end of the module's forward, where it is called.

    Until then the module uses the identity as the weight. Since the layer is called, its hooks, norms and adapters
    receive its input.
    """

    def parameters(self, layer: nn.Module, owner: Any) -> Mapping[str, Tensor | None]:
        """Return the identity as the weight, and no bias."""
        weight = owner.weight.detach()
        if is_plain():  # compilers and transforms do not know the subclass Identity
            return {"weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device), "bias": None}
        return {"weight": weight.as_subclass(Identity), "bias": None}

    def finish(self, reader: nn.Module, output: Any) -> Any:
        """Call the layer on the reader's output; None if the forward failed."""
        return None if output is None else reader.get_submodule(self.path)(output)
