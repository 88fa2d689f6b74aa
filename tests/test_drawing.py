"""Names and colours of classes, from data sets and checkpoints of several versions of the toolboxes, can be drawn."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmdet.visualization.palette import get_palette
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

from condattn.openmmlab.drawing import drawn_meta
from condattn.openmmlab.hooks.drawn_classes import DrawnClassesHook
from condattn.openmmlab.runner.inference import _drawn_classes

NAMES = [str(i) for i in range(90)]
RED = (255, 0, 0)
SHORT = dict(classes=NAMES, palette=[RED] * 80)
"""More classes than COCO has, with as many colours as COCO has."""
IMAGE = np.zeros((32, 32, 3), np.uint8)


def test_more_classes_than_colours_are_drawn_as_objects():
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = SHORT
    box = InstanceData(bboxes=torch.tensor([[2.0, 2, 20, 20]]), labels=torch.tensor([85]), scores=torch.ones(1))
    sample = DetDataSample(pred_instances=box)
    with pytest.raises(AssertionError):
        visualizer.add_datasample("a", IMAGE, sample)
    DrawnClassesHook().before_run(SimpleNamespace(visualizer=visualizer))
    visualizer.add_datasample("a", IMAGE, sample)
    assert visualizer.get_image().any()


@pytest.mark.parametrize("meta", [SHORT, dict(classes=NAMES), dict(classes=NAMES, palette=None)])
def test_more_classes_than_colours_are_drawn_as_a_label_map(meta, tmp_path):
    visualizer = SegLocalVisualizer()
    visualizer.dataset_meta = drawn_meta(meta)
    sample = SegDataSample(pred_sem_seg=PixelData(data=torch.full((1, 32, 32), 85)))
    visualizer.add_datasample("a", IMAGE, sample, out_file=str(tmp_path / "a.png"))
    assert visualizer.get_image().any()


def test_random_colours_are_those_of_mmdet():
    assert drawn_meta(SHORT)["palette"] == get_palette("random", 90)


@pytest.mark.parametrize("palette", [[RED] * 90, [RED] * 100, "coco", RED])
def test_colours_that_suffice_are_kept(palette):
    """mmdet takes a tuple for the one colour of all classes, and a text for the name of a palette."""
    assert drawn_meta(dict(classes=NAMES, palette=palette))["palette"] == palette


def test_a_visualizer_without_classes_is_left_alone():
    for meta in (None, {}):
        visualizer = SimpleNamespace(dataset_meta=meta)
        DrawnClassesHook().before_run(SimpleNamespace(visualizer=visualizer))
        assert visualizer.dataset_meta == meta


@pytest.mark.parametrize(
    "meta, classes",
    [
        (dict(dataset_meta=dict(classes=("a",), palette=[RED])), ("a",)),
        (dict(dataset_meta=dict(CLASSES=("a",), PALETTE=[RED])), ("a",)),
        (dict(dataset_meta=[dict(classes=("a",), palette=[RED]), dict(classes=("b",))]), ("a",)),
        (dict(CLASSES=("a",), PALETTE=[RED], epoch=1), ("a",)),
        (dict(dataset_meta=dict(name="scenes")), ("of the config",)),
        (dict(dataset_meta=[]), ("of the config",)),
        ({}, ("of the config",)),
    ],
)
def test_names_and_colours_of_a_checkpoint(meta, classes):
    init_default_scope("mmdet")
    metainfo = dict(classes=("of the config",), palette=[RED])
    cfg = Config(dict(test_dataloader=dict(dataset=dict(type="CocoDataset", metainfo=metainfo))))
    drawn = _drawn_classes(cfg, meta)
    assert (drawn["classes"], drawn["palette"]) == (classes, [RED])
