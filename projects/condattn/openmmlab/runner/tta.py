"""Test-time augmentation for configurations of mmdet and mmseg."""

import copy

from mmengine.config import Config, ConfigDict
from torch import nn

from ..data_check.settings import leaves
from ..errors import UserError
from ..models.settings import setting_path

_MODELS = {
    "mmdet": {
        "type": "DetTTAModel",
        "tta_cfg": {"nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100},
    },
    "mmseg": {"type": "SegTTAModel"},
}
_MASK_HEADS = ("mask_head", "panoptic_head")


def add_tta(cfg: Config, model: nn.Module) -> None:
    """Change ``cfg`` to test with augmented copies of each image, by its ``tta_model`` and ``tta_pipeline``.

    The default of ``tta_model`` is the toolbox's own model; that of ``tta_pipeline`` is the test pipeline with a
    horizontal flip.

    Args:
        cfg: The configuration, changed in place.
        model: The model of ``cfg``.

    Raises:
        UserError: If ``model`` predicts masks of instances or panoptic segments, which mmdet cannot merge.
    """
    heads = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _MASK_HEADS]
    if cfg.default_scope == "mmdet" and heads:
        part, _, head = heads[0].rpartition(".")
        setting = f"{setting_path(cfg.model, part)}.{head}"
        alone = f", or its boxes alone: --cfg-options {setting}=None test_evaluator.metric=bbox"
        raise UserError(
            "--tta: mmdet merges boxes of augmented images, not masks, and this model predicts masks; test "
            f"without --tta{alone if part.endswith('roi_head') else ''}"
        )
    if (preprocessor := cfg.pop("data_preprocessor", None)) is not None:  # else mmengine gives it to the outer model
        cfg.model.setdefault("data_preprocessor", preprocessor)
    datasets = list(leaves(cfg.test_dataloader.dataset))  # the same data set may occur twice
    pipelines = [cfg.get("tta_pipeline") or _flip_pipeline(dataset.pipeline) for dataset in datasets]
    for dataset, pipeline in zip(datasets, pipelines, strict=True):
        dataset.pipeline = pipeline
    cfg.model = ConfigDict(**(cfg.get("tta_model") or _MODELS[cfg.default_scope]), module=cfg.model)


def _flip_pipeline(pipeline: list) -> list:
    *transforms, pack = copy.deepcopy(pipeline)
    if "meta_keys" in pack:
        pack["meta_keys"] = tuple(dict.fromkeys((*pack["meta_keys"], "flip", "flip_direction")))
    # The unflipped view comes first: the merged prediction takes its annotations.
    flips = [{"type": "RandomFlip", "prob": prob} for prob in (0.0, 1.0)]
    return [*transforms, {"type": "TestTimeAug", "transforms": [flips, [pack]]}]
