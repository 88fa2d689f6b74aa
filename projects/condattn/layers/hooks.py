"""Hooks that can be pickled, and removed without their handles, which cannot be found again in a copy of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..kernels.private import (
    forward_hooks,
    forward_pre_hooks,
    remove_forward_hook,
    remove_forward_pre_hook,
    reserve_hook,
)


class PickledHook:
    """Mixin for objects that are hooks, or whose methods are.

    In a process that loads a module with such hooks, other hooks do not replace them.
    """

    numbers: tuple[int, ...] = ()

    def keep(self, *handles: RemovableHandle) -> None:
        """Remember the numbers of the hooks."""
        self.numbers = (*self.numbers, *(handle.id for handle in handles))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for number in self.numbers:
            reserve_hook(number)


def remove_hooks(module: nn.Module, is_one: Callable[[Callable], bool]) -> None:
    """Remove the forward hooks and forward pre-hooks of ``module`` for which ``is_one`` is true.

    No handles are needed, so that this works for copies of a module as well.
    """
    before = forward_pre_hooks(module)
    for number in [number for number, hook in before.items() if is_one(hook)]:
        remove_forward_pre_hook(module, number)
    for number in [number for number, hook in forward_hooks(module).items() if is_one(hook)]:
        remove_forward_hook(module, number)


def remove_methods(module: nn.Module, cls: type) -> None:
    """Remove the hooks of ``module`` that are bound methods of instances of ``cls``."""
    remove_hooks(module, lambda hook: isinstance(getattr(hook, "__self__", None), cls))
