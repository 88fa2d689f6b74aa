"""Condition any registered module from a config."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from ..condition import condition
from ..methods.base import Conditioning


@MODELS.register_module()
def Conditioned(
    module: Mapping[str, Any] | nn.Module,
    conditioning: Conditioning = "pc",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> nn.Module:
    """Build ``module`` in the current scope and condition its attention: whole detectors, or any part.

    Config::

        model = dict(_delete_=True, type='Conditioned', module={{_base_.model}}, conditioning='pc', include=['decoder'])

    Args:
        module: Config of the module (or a module).
        conditioning: See :func:`condattn.condition`.
        include: Glob patterns of the module names to condition; default: every attention site.
        exclude: Glob patterns of module names to leave out.

    Returns:
        The module itself, conditioned in place.

    Raises:
        ValueError: As :func:`condattn.condition`.
    """
    if not isinstance(module, nn.Module):
        module = MODELS.build(module)
    report = condition(module, conditioning, include, exclude)
    print_log(f"{type(module).__name__}: {report}", logger="current")
    return module
