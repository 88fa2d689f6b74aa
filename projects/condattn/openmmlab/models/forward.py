"""Run a model of OpenMMLab without a loss, for what happens inside it."""

from inspect import signature
from typing import Any

from torch import nn


def forward(model: nn.Module, data: dict[str, Any]) -> None:
    """Run ``model``, which is in evaluation mode, on a batch that its data preprocessor has prepared.

    The mode is 'tensor', in which there is neither a loss nor post-processing. mmseg's segmenters do not give their
    head the data samples in this mode, which mmdet's heads of mask classification need; these run in mode 'predict'.
    """
    head = getattr(model, "decode_head", None)
    needs_samples = head is not None and "batch_data_samples" in signature(head.forward).parameters
    model(**data, mode="predict" if needs_samples else "tensor")
