"""Whether fast paths are taken, or their references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.metadata import version
from threading import Lock
from types import ModuleType

import torch
from torch import Tensor, nn

from .private import is_watched_or_transformed

OLDEST_TRITON = (3, 6)
"""Triton 3.1 (of torch 2.5) does not take the kernels; none between has been tried."""
_lock, _plain = Lock(), 0


@contextmanager
def plain() -> Iterator[None]:
    """Everything by its reference while the context lasts, in all threads."""
    global _plain
    with _lock:
        _plain += 1
    try:
        yield
    finally:
        with _lock:
            _plain -= 1


def is_plain() -> bool:
    """Whether PyTorch's own operations are wanted: by :func:`plain`, or by what fuses or transforms them."""
    return is_compiling() or is_upstream()


def is_upstream() -> bool:
    """Whether upstream's own forward is wanted: by :func:`plain`, or by what watches or transforms its operations."""
    return _plain > 0 or (not is_compiling() and (torch.jit.is_tracing() or is_watched_or_transformed()))


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing, which fuse plain operations themselves."""
    return torch.compiler.is_compiling()


def is_ordinary(weight: Tensor) -> bool:
    """Whether it is a tensor of PyTorch's own class; others (quantised, distributed) know some operations only."""
    return type(weight) in (Tensor, nn.Parameter)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of ``x`` in front of a linear layer; None if it leaves it."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to ``dtype`` for the device of ``x``; None: no autocast."""
    if not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, dtype, enabled=dtype is not None)


@cache
def triton_module(name: str) -> ModuleType | None:
    """A module of this package that is written in Triton; None where there is no Triton that it is known to run in."""
    try:
        found = tuple(int(part) for part in version("triton").split(".")[:2])
        return import_module(f".{name}", __package__) if found >= OLDEST_TRITON else None
    except (ImportError, ValueError):
        return None
