"""Whether fast paths are taken, or their plain twins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

import torch

OLDEST_TRITON = (3, 6)
"""Triton 3.1 (of torch 2.5) does not take the kernels; none between has been tried."""
_allowed = True


@contextmanager
def plain() -> Iterator[None]:
    """Everything by its plain twin while the context lasts, in all threads."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def is_plain() -> bool:
    """Whether the plain twin is wanted: by :func:`plain`, or by what watches or transforms plain operations."""
    return (
        not _allowed
        or is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing, which fuse plain operations themselves."""
    return torch.compiler.is_compiling()


@cache
def triton_module(name: str) -> ModuleType | None:
    """A module of this package that is written in Triton; None where there is no Triton that it is known to run in."""
    try:
        found = tuple(int(part) for part in version("triton").split(".")[:2])
        return import_module(f".{name}", __package__) if found >= OLDEST_TRITON else None
    except (ImportError, ValueError):
        return None
