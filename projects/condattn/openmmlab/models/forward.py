"""Run a model of OpenMMLab without a loss, for what happens inside it."""

from typing import Any

from torch import nn


def learner(model: nn.Module) -> nn.Module:
    """The part of ``model`` that learns by gradients: the student of mmdet's semi-supervised models, else ``model``."""
    student = getattr(model, "student", None)
    return student if isinstance(student, nn.Module) else model


def supervised(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The part of a batch that is for :func:`learner`.

    Batches of semi-supervised models have branches: the supervised one is taken, or the first with an image. An image
    that a branch does not have is None there.
    """
    if learner(model) is model or not isinstance(batch["inputs"], dict):
        return batch
    branches = {name: [value is not None for value in values] for name, values in batch["inputs"].items()}
    branch = next(name for name in ("sup", *branches) if any(branches.get(name, ())))
    return {key: [value for value in values[branch] if value is not None] for key, values in batch.items()}


def prepare(model: nn.Module, batch: dict[str, Any], training: bool) -> dict[str, Any]:
    """Prepare the part of a batch that is for :func:`learner` by the data preprocessor of ``model``."""
    preprocessor = model.data_preprocessor
    if learner(model) is not model:
        preprocessor = getattr(preprocessor, "data_preprocessor", preprocessor)
    return preprocessor(supervised(model, batch), training=training)


def forward(model: nn.Module, data: dict[str, Any]) -> None:
    """Run the :func:`learner` of ``model``, which is in evaluation mode, on a batch that :func:`prepare` has prepared.

    Nothing is post-processed where that can be avoided: the mode is 'tensor', which mmdet's detectors that read text do
    not support; these run in mode 'predict'. Some heads of mmseg do not support it either; its segmenters have a method
    that all heads support.
    """
    model = learner(model)
    if hasattr(model, "encode_decode"):
        model.encode_decode(data["inputs"], [sample.metainfo for sample in data["data_samples"]])
    else:
        model(**data, mode="predict" if hasattr(model, "language_model") else "tensor")
