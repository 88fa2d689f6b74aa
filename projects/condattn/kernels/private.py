"""Private interfaces of PyTorch: what has no public name, called here alone, each with the reason.

Tried with torch 2.5.1, 2.11.0 and 2.14.1. Where a later version has taken one away, the answer is that which leads to
upstream's own forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

Hooks = MutableMapping[int, Callable]


def is_watched_or_transformed() -> bool:
    """Whether ``torch.func`` transforms, dispatch modes (FLOP counters, fake tensors) or forward-mode derivatives run.

    An autograd function of our own would hide its operations from them, and nothing public tells of them.
    """
    transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
    level = getattr(torch.autograd.forward_ad, "_current_level", 0)
    return transforms() or modes() > 0 or level >= 0


def has_saved_tensors_hooks() -> bool:
    """Whether someone else says how tensors are saved for the backward, or that nobody may.

    Hooks of ours inside those of checkpointing would save what it means to compute again. Older versions hide the
    first.
    """
    find = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    is_enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: False)
    return not is_enabled() or (find is not None and find(True) is not None)


def gelu(x: Tensor, out: Tensor) -> Tensor:
    """GELU of ``x`` into ``out``, which ``torch.nn.functional.gelu`` cannot take, without another buffer."""
    return torch._C._nn.gelu(x, out=out)  # type: ignore[call-arg]  # not in its stub


def forward_pre_hooks(module: nn.Module) -> Hooks:
    """The forward pre-hooks of ``module``: handles cannot be found again in a copy of it."""
    return module._forward_pre_hooks


def forward_hooks(module: nn.Module) -> Hooks:
    """The forward hooks of ``module``, see :func:`forward_pre_hooks`."""
    return module._forward_hooks


def remove_forward_hook(module: nn.Module, number: int) -> None:
    """Remove the forward hook with this number, as its handle would."""
    module._forward_hooks.pop(number, None)
    module._forward_hooks_always_called.pop(number, None)


def has_backward_or_global_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has backward hooks, or all modules have hooks: a fast path would not call them."""
    every = nn.modules.module
    own = module._backward_hooks, module._backward_pre_hooks
    of_all = every._global_forward_hooks, every._global_forward_pre_hooks, every._global_backward_hooks
    return any((*own, *of_all))


def override_parameter(module: Any, name: str, value: Tensor | None) -> None:
    """Let ``value``, perhaps no ``nn.Parameter``, be what ``module`` has under the name of a parameter."""
    if name in module._parameters:
        module._parameters[name] = value
    else:  # a replica of nn.DataParallel has plain attributes
        object.__setattr__(module, name, value)


def forget_compiled() -> None:
    """Drop what ``torch.compile`` has made, which does not notice hooks that come or go; nothing if it was not used."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
