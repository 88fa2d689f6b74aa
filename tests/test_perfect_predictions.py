"""The ground truth, evaluated as if it were predicted, scores all points: data, pipelines and metrics fit together."""

import pytest
import torch
from runs import DEMO

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, DefaultScope
from mmengine.structures import InstanceData

from condattn.openmmlab.runner.launch import load_config


def evaluated(config, scenes, predict):
    """Scores of what ``predict`` makes of the samples of the validation data, whose ground truth they have."""
    cfg = load_config(str(DEMO / config))
    cfg.val_dataloader.dataset.data_root = str(scenes)
    if "ann_file" in cfg.val_evaluator:
        cfg.val_evaluator.ann_file = str(scenes / "annotations" / "instances_validation.json")
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset, evaluator = DATASETS.build(cfg.val_dataloader.dataset), Evaluator(cfg.val_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    for item in dataset:
        evaluator.process([predict(item["data_samples"])])
    return evaluator.evaluate(len(dataset))


def test_the_ground_truth_as_a_prediction_has_all_points(scenes):
    """Classes, boxes and masks mean the same to data set, pipeline and evaluator."""

    def instances(sample):
        truth = sample.gt_instances  # of the image before it is resized, in which predictions are too
        masks = torch.from_numpy(truth.masks.masks).bool()
        boxes, scores = truth.bboxes.tensor, torch.ones(len(truth.labels))
        sample.pred_instances = InstanceData(bboxes=boxes, labels=truth.labels, scores=scores, masks=masks)
        return sample

    def labels(sample):
        sample.pred_sem_seg = sample.gt_sem_seg
        return sample

    scores = evaluated("mask_rcnn_swin_pc.py", scenes, instances)
    assert scores["coco/bbox_mAP"] == pytest.approx(1, abs=0.01)
    assert scores["coco/segm_mAP"] > 0.9
    assert evaluated("upernet_swin_pc.py", scenes, labels)["mIoU"] == 100
