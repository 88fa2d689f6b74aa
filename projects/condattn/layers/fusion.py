"""Refuse to fuse batch norm into a corrected layer: the functions that do so read W, so that C would be lost."""

from collections.abc import Collection
from typing import NoReturn

from torch import nn


def refuse_fusion() -> NoReturn:
    """Raise an error; replaces the method ``fuse`` of modules that contain a corrected layer.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "batch norm cannot be fused into a layer whose weight is corrected (W + C); call condattn.fold(model) before"
    )


def forbid_fusion(module: nn.Module, layers: Collection[nn.Module]) -> None:
    """Let ``fuse`` raise an error, in those modules of an attention ``module`` that contain one of ``layers``.

    ``reparameterize_model`` of timm and ``switch_to_deploy`` of mmpretrain replace modules by what their ``fuse``
    returns.
    """
    for part in module.modules():
        if callable(getattr(part, "fuse", None)) and any(layer in layers for layer in part.modules()):
            vars(part)["fuse"] = refuse_fusion


def allow_fusion(module: nn.Module) -> None:
    """Undo :func:`forbid_fusion` in all modules of ``module``."""
    for part in module.modules():
        if vars(part).get("fuse") is refuse_fusion:
            del part.fuse
