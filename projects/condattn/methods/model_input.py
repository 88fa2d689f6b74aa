"""Methods that change what a model, or a module in it, is given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..attention.site import AttentionSite, Place
from ..kernels.private import forward_pre_hooks
from ..layers.hooks import remove_methods
from .base import Method


class ModelInputMethod(Method):
    """A function of the first argument of a module's forward; by default of the conditioned model's.

    Subclasses implement :meth:`transform`, and :meth:`places` where the module is another.
    """

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """The input in place of ``x``, of the same shape."""

    @classmethod
    def places(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> Sequence[Place]:
        """The model itself."""
        return [Place("", model)]

    def check(self, place: Place) -> None:
        """Raise if another method changes the same input."""
        for hook in forward_pre_hooks(place.module).values():
            if isinstance(other := getattr(hook, "__self__", None), ModelInputMethod):
                raise ValueError(
                    f"{place}: its input is conditioned already, by {other}; two methods cannot change it: name one of "
                    "them"
                )

    def apply(self, place: Place) -> None:
        """Change the input from now on."""
        place.module.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """As a forward pre-hook: transform the first argument."""
        if args:
            return (self.transform(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.transform(kwargs[name])}

    @classmethod
    def applied_to(cls, place: Place) -> ModelInputMethod | None:
        """The method of this class that changes the input of ``place``, or None."""
        owners = (getattr(hook, "__self__", None) for hook in forward_pre_hooks(place.module).values())
        return next((method for method in owners if type(method) is cls), None)

    @classmethod
    def find(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> list[tuple[Place, Method]]:
        """The modules whose input is changed."""
        places = (Place(name, module) for name, module in model.named_modules())
        return [(place, method) for place in places if (method := cls.applied_to(place)) is not None]

    @classmethod
    def remove(cls, place: Place) -> None:
        """Leave the input as it is."""
        remove_methods(place.module, cls)
