"""Override the parameters of a layer while another module runs, which reads them without calling the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.adapters import inner, is_at_work
from ..kernels.private import forward_hooks, override_parameter
from ..kernels.switch import is_plain
from .hooks import remove_hooks


class ParameterOverride(ABC):
    """Forward hooks of a module that reads parameters of a layer in it: they override these during its forward.

    Args:
        reader: The module that uses the parameters. A replica of it (``nn.DataParallel``) takes the hooks over.
        owner: The layer, in ``reader``; perhaps inside adapters.
    """

    def __init__(self, reader: nn.Module, owner: nn.Module) -> None:
        self.path = next(path for path, module in reader.named_modules() if inner(module) is owner)
        reader.register_forward_pre_hook(self.begin)
        reader.register_forward_hook(self.end, always_call=True)

    @abstractmethod
    def parameters(self, layer: nn.Module, owner: Any) -> Mapping[str, Tensor | None]:
        """What takes the place of the parameters of ``owner``; ``layer`` is the owner, or an adapter around it."""

    def begin(self, reader: nn.Module, args: tuple) -> None:
        """Put other tensors in the place of the parameters."""
        layer = reader.get_submodule(self.path)
        owner: Any = inner(layer)
        others = self.parameters(layer, owner)
        owner.overridden = {
            **(getattr(owner, "overridden", None) or {}),
            **{name: getattr(owner, name) for name in others},
        }
        for name, other in others.items():
            override_parameter(owner, name, other)

    def end(self, reader: nn.Module, args: tuple, output: Any) -> Any:
        """Restore the parameters."""
        owner: Any = inner(reader.get_submodule(self.path))
        for name, parameter in (getattr(owner, "overridden", None) or {}).items():
            override_parameter(owner, name, parameter)
        owner.overridden = None

    @classmethod
    def detach(cls, reader: nn.Module, owner: nn.Module | None = None, parameter: str | None = None) -> None:
        """Remove the overrides of this class from ``reader``; or those of one layer, or of one parameter of it."""
        for override in _overrides(reader, cls):
            layer = inner(reader.get_submodule(override.path))
            if owner in (None, layer) and parameter in (None, getattr(override, "parameter", None)):
                layer.__dict__.pop("overridden", None)
                remove_hooks(reader, (override.begin, override.end).__contains__)


def _overrides(reader: nn.Module, cls: type[ParameterOverride]) -> list[ParameterOverride]:
    """The overrides of a class that ``reader`` has."""
    owners = (getattr(hook, "__self__", None) for hook in forward_hooks(reader).values())
    return [owner for owner in owners if isinstance(owner, cls)]


class CorrectedWeightOverride(ParameterOverride):
    """Puts W + C in the place of the weight W of a corrected layer.

    Args:
        reader: The module that uses the weight.
        owner: The corrected layer.
        parameter: Its weight.
    """

    def __init__(self, reader: nn.Module, owner: nn.Module, parameter: str) -> None:
        super().__init__(reader, owner)
        self.reader = type(reader).__name__
        self.parameter = parameter

    def parameters(self, layer: nn.Module, owner: Any) -> Mapping[str, Tensor | None]:
        """W + C.

        Raises:
            RuntimeError: If an adapter around the layer is at work, which the reader does not call either.
        """
        if is_at_work(layer):
            raise RuntimeError(
                f"an adapter is around {self.path} of {self.reader}, which uses the weight of {self.path} without "
                "calling it, so that the adapter has no effect; merge it, or leave the layer out of its targets"
            )
        return {self.parameter: owner.effective_weight(self.parameter)}


class Identity(Tensor):
    """The identity as the weight of a linear layer: the product with it is the input itself, without computing it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """What PyTorch's functions do with it.

        Raises:
            RuntimeError: For a product that is not ``F.linear``.
        """
        if function is F.linear:
            return args[0]
        if function.__name__ == "__get__":  # its shape and the like
            return super().__torch_function__(function, types, args, kwargs)
        raise RuntimeError(
            f"{function.__name__} was given the weight of a preconditioned projection that a rule says to be read by "
            "F.linear alone; leave the reader out of the rule, and name a module that is called"
        )


class PostponedProjection(ParameterOverride):
    """Postpones a linear layer that a module computes itself to the end of the module's forward, and calls it there.

    The module has the identity in its place meanwhile. Hooks, norms and adapters of the layer see its input.
    """

    def parameters(self, layer: nn.Module, owner: Any) -> Mapping[str, Tensor | None]:
        """The identity as the weight, and no bias."""
        weight = owner.weight.detach()
        if is_plain():  # for what does not know our class
            return {"weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device), "bias": None}
        return {"weight": weight.as_subclass(Identity), "bias": None}

    def end(self, reader: nn.Module, args: tuple, output: Any) -> Any:
        """Put the parameters in their places again, and call the layer."""
        super().end(reader, args, output)
        return None if output is None else reader.get_submodule(self.path)(output)
