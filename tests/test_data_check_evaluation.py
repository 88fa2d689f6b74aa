"""The data check: what an evaluation makes of annotations, which is not what a training makes of them."""

import copy
import json
from pathlib import Path

import pytest
from data_sets import HEIGHT, WIDTH
from runs import error_lines

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.datasets import CocoDataset  # noqa: F401 (registers)
from mmengine.registry import DATASETS
from pycocotools.coco import COCO

from condattn.openmmlab.data_check.check import find

SHORT = [
    [[1, 1, 9, 9]],
    [[1, 1]],
    [[]],
    [[1, 1, 9, 1, 9, 9, 5]],
]
"""Segmentations without a polygon of three points."""


def _draw(path):
    """Draw the mask of every object as pycocotools does in an evaluation."""
    api = COCO(str(path))
    return [api.annToRLE(entry) for entry in api.loadAnns(api.getAnnIds())]


@pytest.mark.parametrize("polygons", SHORT)
def test_objects_without_a_polygon(coco, polygons):
    """A training leaves such an object out; an evaluation would fail, or draw another mask."""
    coco.content["annotations"][0]["segmentation"] = polygons
    coco.write()
    findings = coco.check()
    assert findings.errors == [] and "annotation 1; not trained" in findings.warnings[0]
    (error,) = coco.check("val").errors
    assert "1 object has no polygon of three points or more: annotation 1; draw them with three points" in error


@pytest.mark.parametrize("polygons", SHORT)
def test_short_polygons_beside_others(coco, polygons):
    """They are left out of the copy that an evaluation reads."""
    whole = copy.deepcopy(coco.content["annotations"][0]["segmentation"])
    coco.content["annotations"][0]["segmentation"] = polygons + whole
    coco.write()
    (entry,) = (one for one in find(coco.cfg, "val") if one.label == "val")
    assert entry.findings.errors == []
    assert "beside others of 1 object, were left out" in entry.findings.warnings[0]
    copied = json.loads(Path(entry.findings.ann_file).read_text())
    assert copied["annotations"][0]["segmentation"] == whole
    assert len(_draw(entry.findings.ann_file)) == 12


def test_short_polygons_among_run_lengths(coco):
    """One polygon that cannot be drawn is not all of the masks."""
    runs = dict(size=[HEIGHT, WIDTH], counts=[100, 50, HEIGHT * WIDTH - 150])
    for entry in coco.content["annotations"]:
        entry["segmentation"] = runs
    coco.content["annotations"][0]["segmentation"] = [[1, 1, 9, 9]]
    coco.write()
    findings = coco.check()
    assert findings.errors == [] and "annotation 1; not trained" in findings.warnings[0]


def test_objects_that_an_evaluation_counts_as_misses(coco):
    coco.content["annotations"][0]["ignore"] = 1
    coco.write()
    assert coco.check().warnings[-1].endswith("annotation 1; left out")
    assert "left out here, but pycocotools counts them as misses" in coco.check("val").warnings[0]


def test_categories_in_another_order(coco):
    """mmdet numbers labels in the order of the file, which the copy has from ``classes``."""
    coco.content["categories"].reverse()
    coco.content["categories"].insert(0, dict(id=9, name="horse"))
    coco.write()
    copied = coco.repaired()
    assert [category["name"] for category in copied["categories"]] == ["cat", "dog", "horse"]
    dataset = DATASETS.build(coco.cfg.train_dataloader.dataset)
    assert dataset.cat2label == {3: 0, 7: 1}


def test_copies_of_one_file_for_different_classes(coco):
    """The first one has another order of categories, and so other labels."""
    coco.content["categories"] = [dict(id=9, name="horse"), *reversed(coco.content["categories"])]
    coco.write()
    for classes in (("cat", "dog"), ("dog", "horse", "cat")):
        coco.cfg.train_dataloader.dataset.update(ann_file="annotations.json", metainfo=dict(classes=classes))
        names = [category["name"] for category in coco.repaired()["categories"]]
        assert names[: len(classes)] == list(classes)


def test_ids_of_images_of_two_kinds(coco):
    coco.content["images"][0]["id"] = "a"
    coco.content["annotations"] = [one for one in coco.content["annotations"] if one["image_id"] != 1]
    coco.write()
    (error,) = coco.check("val").errors
    assert "such as 2, and some a text, such as 'a'; write all of them as numbers, or all as text" in error


def test_duplicates(coco):
    coco.content["annotations"].append({**coco.content["annotations"][4], "id": 13})
    coco.content["images"].append({**coco.content["images"][0], "id": 7})
    coco.write()
    warnings = coco.check().warnings
    assert any("1 image file is listed several times" in warning and "1.jpg" in warning for warning in warnings)
    assert any("1 object has the image, category and box of another one: annotation" in text for text in warnings)


def test_an_evaluation_on_the_training_data(coco):
    (findings,) = (entry.findings for entry in find(coco.cfg, "val"))
    assert "these are the training data" in findings.warnings[-1]
    coco.cfg.val_dataloader.dataset.indices = [0, 1]
    coco.cfg.train_dataloader.dataset.indices = [2, 3, 4]
    (findings,) = (entry.findings for entry in find(coco.cfg, "val"))
    assert not any("training data" in warning for warning in findings.warnings)


def test_boxes_that_fill_their_images(coco):
    """Boxes that overshoot a little are not taken for (x1, y1, x2, y2), of which they have the order."""
    coco.cfg.train_dataloader.dataset.pipeline.pop()
    for i, entry in enumerate(coco.content["annotations"]):
        entry["bbox"] = [1, 1, WIDTH + 2 + i % 2, HEIGHT - 4]
        del entry["segmentation"]
    coco.write()
    findings = coco.check()
    assert findings.errors == [] and "12 boxes reach beyond their images" in findings.warnings[0]


def test_names_of_classes_that_look_like_formulas(coco, tmp_path, call):
    """Matplotlib reads text between dollar signs as a formula."""
    coco.content["categories"][0]["name"] = "$\\bad$"
    coco.write()
    coco.cfg.train_dataloader.dataset.metainfo.classes = ("$\\bad$", "dog")
    for name in ("val_dataloader", "val_evaluator"):
        coco.cfg.pop(name)
    config = tmp_path / "config.py"
    config.write_text(coco.cfg.pretty_text)
    status, _, errors = call("dataset/check", config, "--out", "page")
    assert not status, error_lines(errors)
    assert len(list((tmp_path / "page").glob("*.png"))) >= 4
