"""Hooks of modules that are methods of our own objects."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def remove_hooks(module: nn.Module, is_one: Callable[[Callable], bool]) -> None:
    """Remove the forward hooks and forward pre-hooks of ``module`` that ``is_one`` accepts, wherever it was copied."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if is_one(hook)]:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)


def remove_methods(module: nn.Module, cls: type) -> None:
    """Remove the hooks of ``module`` that are methods of instances of ``cls``."""
    remove_hooks(module, lambda hook: isinstance(getattr(hook, "__self__", None), cls))
