"""Methods that change what a model, or a module in it, is given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from ..attention.site import AttentionSite, Place
from ..kernels.private import forward_pre_hooks
from ..layers.hooks import remove_hooks
from ..layers.input_transform import InputTransform
from .base import Method


class ModelInputMethod(Method):
    """A function of the first argument of a module's forward; by default of the conditioned model's.

    Subclasses implement :meth:`transform`, and :meth:`places` where the module is another.
    """

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """The input in place of ``x``, of the same shape."""

    def input_transform(self, place: Place) -> InputTransform:
        """The hook that applies :meth:`transform` at ``place``."""
        return InputTransform(self.transform, self)

    @classmethod
    def places(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> Sequence[Place]:
        """The model itself."""
        return [Place("", model)]

    def check(self, place: Place) -> None:
        """Raise if another method changes the same input."""
        if others := _transforms(place.module):
            raise ValueError(
                f"{place}: its input is conditioned already, by {others[0].method}; two methods cannot change it: name "
                "one of them"
            )

    def apply(self, place: Place) -> None:
        """Change the input from now on."""
        place.module.register_forward_pre_hook(self.input_transform(place), with_kwargs=True)

    @classmethod
    def applied_to(cls, place: Place) -> ModelInputMethod | None:
        """The method of this class that changes the input of ``place``, or None."""
        methods = (transform.method for transform in _transforms(place.module))
        return next((method for method in methods if type(method) is cls), None)

    @classmethod
    def find(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> list[tuple[Place, Method]]:
        """The modules whose input is changed."""
        places = (Place(name, module) for name, module in model.named_modules())
        return [(place, method) for place in places if (method := cls.applied_to(place)) is not None]

    @classmethod
    def remove(cls, place: Place) -> None:
        """Leave the input as it is."""
        remove_hooks(place.module, lambda hook: isinstance(hook, InputTransform) and type(hook.method) is cls)


def _transforms(module: nn.Module) -> list[InputTransform]:
    return [hook for hook in forward_pre_hooks(module).values() if isinstance(hook, InputTransform)]
