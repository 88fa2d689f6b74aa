"""Choose between fast paths and their reference implementations."""

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
"""Oldest version of Triton to use. 3.1 (of torch 2.5) does not compile the kernels; versions between are untested."""
_lock, _plain = Lock(), 0


@contextmanager
def plain() -> Iterator[None]:
    """Use the reference implementations of everything, in all threads, while the context is active."""
    global _plain
    with _lock:
        _plain += 1
    try:
        yield
    finally:
        with _lock:
            _plain -= 1


def is_plain() -> bool:
    """Return whether to use PyTorch's own operations: in :func:`plain`, or if operations are fused or transformed."""
    return is_compiling() or is_upstream()


def is_upstream() -> bool:
    """Return whether to use upstream's own forward: in :func:`plain`, or if operations are observed or transformed."""
    return _plain > 0 or (not is_compiling() and (torch.jit.is_tracing() or is_watched_or_transformed()))


def is_compiling() -> bool:
    """Return whether ``torch.compile`` or ``torch.export``, which fuse plain operations themselves, is tracing."""
    return torch.compiler.is_compiling()


def is_ordinary(weight: Tensor) -> bool:
    """Return whether ``weight`` is a plain tensor; subclasses (quantised, distributed) support fewer operations."""
    return type(weight) in (Tensor, nn.Parameter)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts ``x`` before a linear layer; None if it does not cast."""
    kind = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return a context with autocast to ``dtype`` on the device of ``x``; with None, autocast is off."""
    if not _has_autocast(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, dtype, enabled=dtype is not None)


def _has_autocast(kind: str) -> bool:
    """Return whether a kind of devices has autocast; ``torch.compile`` cannot trace the question, and those have."""
    return is_compiling() or torch.amp.is_autocast_available(kind)


@cache
def triton_module(name: str) -> ModuleType | None:
    """Import a module of this package that uses Triton; return None if no supported version of Triton is installed."""
    try:
        found = tuple(int(part) for part in version("triton").split(".")[:2])
        return import_module(f".{name}", __package__) if found >= OLDEST_TRITON else None
    except (ImportError, ValueError):
        return None
