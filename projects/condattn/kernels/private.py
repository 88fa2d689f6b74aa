"""Wrappers of private interfaces of PyTorch, which have no public equivalent and are used only here, with reasons.

Tested with torch 2.5.1, 2.11.0 and 2.14.1. If a later version removes an interface, its wrapper returns the answer that
selects upstream's own forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Hooks = MutableMapping[int, Callable]


def is_watched_or_transformed() -> bool:
    """Return whether ``torch.func``, dispatch modes (FLOP counters, fake tensors) or forward-mode AD are active.

    A custom autograd function would hide its operations from them. No public function tells whether they are active.
    """
    transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
    level = getattr(torch.autograd.forward_ad, "_current_level", 0)
    return transforms() or modes() > 0 or level >= 0


def require(condition: Tensor, message: str) -> None:
    """Raise an error unless ``condition``, a tensor with one element, is true, without waiting for a GPU.

    Raises:
        ValueError: With ``message``, on the CPU.
        RuntimeError: With ``message``, in compiled models; on a GPU, where its next result is waited for.
    """
    if not condition.is_cuda and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    elif check := getattr(torch, "_assert_async", None):
        check(condition, message)


def mark_static(tensor: Tensor) -> None:
    """Tell ``torch.compile`` that the sizes of ``tensor`` never change; it assumes so of parameters and buffers alone.

    ``torch._dynamo.mark_static`` does the same, but its import takes seconds.
    """
    tensor._dynamo_static_indices = set(range(tensor.dim()))  # type: ignore[attr-defined]


def has_saved_tensors_hooks() -> bool:
    """Return whether saved-tensor hooks are active already, or are disabled.

    Hooks of ours inside those of activation checkpointing would save tensors that it means to recompute. Older versions
    of PyTorch do not tell whether hooks are active.
    """
    find = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    is_enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: False)
    return not is_enabled() or (find is not None and find(True) is not None)


def gelu(x: Tensor, out: Tensor) -> Tensor:
    """Compute GELU of ``x`` into ``out`` without another buffer; ``torch.nn.functional.gelu`` has no such argument."""
    return torch._C._nn.gelu(x, out=out)  # type: ignore[call-arg]  # not in its stub


def forward_pre_hooks(module: nn.Module) -> Hooks:
    """Return the forward pre-hooks of ``module``; handles cannot be found again in a copy of a module."""
    return module._forward_pre_hooks


def forward_hooks(module: nn.Module) -> Hooks:
    """Return the forward hooks of ``module``; see :func:`forward_pre_hooks`."""
    return module._forward_hooks


def store_forward_hooks_in_order(module: nn.Module) -> None:
    """Store the forward hooks of ``module`` in the order in which they are called.

    A hook that is registered with ``prepend=True`` is called first, but stored last, and ``torch.compile`` (2.11) takes
    them in the order in which they are stored, so that it fails with an internal error.
    """
    hooks = list(module._forward_hooks.items())
    module._forward_hooks.clear()
    module._forward_hooks.update(hooks)


def remove_forward_hook(module: nn.Module, number: int) -> None:
    """Remove the forward hook with this number, as its handle would."""
    module._forward_hooks.pop(number, None)
    module._forward_hooks_always_called.pop(number, None)


def remove_forward_pre_hook(module: nn.Module, number: int) -> None:
    """Remove the forward pre-hook with this number, as its handle would."""
    module._forward_pre_hooks.pop(number, None)
    module._forward_pre_hooks_with_kwargs.pop(number, None)


def reserve_hook(number: int) -> None:
    """Give no hook this number from now on.

    PyTorch numbers hooks from 0 in each process. In a process that loads a pickled module, another hook would get the
    number of one that the module has, and replace it.
    """
    RemovableHandle.next_id = max(RemovableHandle.next_id, number + 1)


def has_backward_or_global_hooks(module: nn.Module) -> bool:
    """Return whether ``module`` has backward hooks, or global hooks exist: fast paths do not call them."""
    every = nn.modules.module
    own = module._backward_hooks, module._backward_pre_hooks
    forward = every._global_forward_hooks, every._global_forward_pre_hooks
    backward = every._global_backward_hooks, every._global_backward_pre_hooks
    return any((*own, *forward, *backward))


def override_parameter(module: Any, name: str, value: Tensor | None) -> None:
    """Replace the parameter ``name`` of ``module`` by ``value``, which need not be an ``nn.Parameter``."""
    if name in module._parameters:
        module._parameters[name] = value
    else:  # a replica of nn.DataParallel has plain attributes
        object.__setattr__(module, name, value)


def forget_compiled() -> None:
    """Clear the caches of ``torch.compile``, if it was used.

    It does not notice hooks that are added or removed.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
