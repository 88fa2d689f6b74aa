"""The base class of methods that transform the input of a model, or of a module in it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..attention.site import AttentionSite, Place
from ..kernels.private import forward_pre_hooks
from ..layers.hooks import remove_hooks
from ..layers.input_transform import InputTransform
from .base import Method


class ModelInputMethod(Method):
    """Base class of methods that transform the first argument of a forward, by default that of the conditioned model.

    Subclasses implement :meth:`transform`, and override :meth:`places` to act on another module.
    """

    def transform(self, x: Tensor) -> Tensor:
        """Return the tensor in place of the input ``x``, of its shape; to be defined unless ``input_transform`` is."""
        raise NotImplementedError(f"{type(self).__name__} defines neither transform nor input_transform")

    def input_transform(self, place: Place) -> InputTransform:
        """The hook that applies :meth:`transform` at ``place``."""
        return InputTransform(self.transform, self)

    @classmethod
    def places(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> Sequence[Place]:
        """Return the model itself."""
        return [Place("", model)]

    def check(self, place: Place) -> None:
        """Raise a ``ValueError`` if another method transforms the same input."""
        if others := _transforms(place.module):
            raise ValueError(
                f"{place}: its input is conditioned already, by {others[0].method}; two methods cannot change it: name "
                "one of them"
            )

    def apply(self, place: Place) -> None:
        """Register the forward pre-hook that transforms the input."""
        transform = self.input_transform(place)
        transform.keep(place.module.register_forward_pre_hook(transform, with_kwargs=True))

    @classmethod
    def applied_to(cls, place: Place) -> ModelInputMethod | None:
        """Return the method of this class that transforms the input of ``place``, or None."""
        methods = (transform.method for transform in _transforms(place.module))
        return next((method for method in methods if type(method) is cls), None)

    @classmethod
    def find(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> list[tuple[Place, Method]]:
        """Return the modules whose input is transformed, each with its method."""
        places = [Place(name, module) for name, module in model.named_modules() if forward_pre_hooks(module)]
        return [(place, method) for place in places if (method := cls.applied_to(place)) is not None]

    @classmethod
    def remove(cls, place: Place) -> None:
        """Remove the forward pre-hook, so that the input is no longer transformed."""
        remove_hooks(place.module, lambda hook: isinstance(hook, InputTransform) and type(hook.method) is cls)


def _transforms(module: nn.Module) -> list[InputTransform]:
    return [hook for hook in forward_pre_hooks(module).values() if isinstance(hook, InputTransform)]
