"""Hooks of modules that are methods of our own objects."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..kernels.private import forward_hooks, forward_pre_hooks, remove_forward_hook


def remove_hooks(module: nn.Module, is_one: Callable[[Callable], bool]) -> None:
    """Remove the forward hooks and forward pre-hooks of ``module`` that ``is_one`` accepts, wherever it was copied."""
    before = forward_pre_hooks(module)
    for number in [number for number, hook in before.items() if is_one(hook)]:
        del before[number]
    for number in [number for number, hook in forward_hooks(module).items() if is_one(hook)]:
        remove_forward_hook(module, number)


def remove_methods(module: nn.Module, cls: type) -> None:
    """Remove the hooks of ``module`` that are methods of instances of ``cls``."""
    remove_hooks(module, lambda hook: isinstance(getattr(hook, "__self__", None), cls))
