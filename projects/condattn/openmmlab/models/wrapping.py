"""Find the model inside wrappers, and the part of it that is compiled."""

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from ..errors import UserError

COMPILED = ("backbone", "encoder", "network")
"""Names under which models have the part with their attention; the first that a model has is compiled."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of distributed training and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def compiled_part(model: nn.Module) -> nn.Module:
    """Return the part of ``model`` that is compiled: its backbone, its encoder of sequences or its network.

    Raises:
        UserError: If it has none of them.
    """
    model = unwrapped(model)
    for name in COMPILED:
        if isinstance(part := getattr(model, name, None), nn.Module):
            return part
    raise UserError(
        f"--compile expects a model with one of {', '.join(COMPILED)}, which it would compile, found a "
        f"{type(model).__name__} with {', '.join(name for name, _ in model.named_children())}; train without --compile"
    )
