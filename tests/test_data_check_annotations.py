"""The data check: annotation files, boxes and masks."""

import copy
import json
import random
import re

import numpy as np
import pytest
import torch
from data_sets import HEIGHT, WIDTH, picture

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.datasets import CocoDataset  # noqa: F401 (registers)
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from condattn.openmmlab.data_check.masks import count_runs


def test_what_is_used_is_said(coco):
    for image in coco.content["images"][:3]:
        image["width"], image["height"] = 20, 15
        picture(0, 20, 15).save(coco.folder / "images" / image["file_name"])
    coco.content["annotations"][0]["bbox"] = [1, 1, 10, 10]
    coco.write()
    findings = coco.check()
    assert findings.errors == []
    assert findings.summary == "3 of 6 images, 6 of 12 objects (cat 4, dog 2); 3 images smaller than 32 pixels left out"
    assert [(entry.name, entry.count, entry.images) for entry in findings.classes] == [("cat", 4, 3), ("dog", 2, 2)]


def test_the_summary_counts_as_mmdet_does(coco):
    """Cases: crowds, ignored objects, empty boxes, other categories, images without objects, ``indices``."""
    objects = coco.content["annotations"]
    objects[0]["iscrowd"] = 1
    objects[1]["ignore"] = 1
    objects[2]["bbox"] = [3, 3, 0.5, 10]
    objects[3]["bbox"] = [500, 3, 10, 10]
    coco.content["categories"].append(dict(id=9, name="bird"))
    objects[4]["category_id"] = objects[5]["category_id"] = 9
    coco.cfg.train_dataloader.dataset.indices = 4
    coco.write()
    findings = coco.check()
    dataset = DATASETS.build(coco.cfg.train_dataloader.dataset)
    kept = [instance for i in range(len(dataset)) for instance in dataset.get_data_info(i)["instances"]]
    objects = sum(not instance["ignore_flag"] for instance in kept)
    assert findings.summary.startswith(f"{len(dataset)} of 6 images, {objects} of 12 objects")
    for part in ("1 image without objects", "1 image left out by 'indices'", "1 crowd "):
        assert part in findings.summary
    warnings = " ".join(findings.warnings)
    for part in ("bird 2; left out", "2 objects are smaller than a pixel, or outside", "1 object is marked 'ignore'"):
        assert part in warnings


def _each(key: str, value, entries: str = "annotations"):
    def change(content: dict) -> None:
        for entry in content[entries]:
            entry.pop(key) if value is None else entry.update({key: value(entry) if callable(value) else value})

    return change


def _first(key: str, value, entries: str = "annotations", number: int = 0):
    def change(content: dict) -> None:
        entry = content[entries][number]
        entry.pop(key) if value is None else entry.update({key: value})

    return change


def _corners(entry: dict) -> list[float]:
    x, y, w, h = entry["bbox"]
    return [x, y, x + w, y + h]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "a list of objects named 'categories'"),
        (lambda c: c.update(images={}), "a list of objects named 'images'"),
        (lambda c: c["categories"].append(dict(id=8, name="cat")), "category 'cat' stands there 2 times"),
        (_first("id", 7, "categories"), "two categories have the id 7"),
        (_first("name", None, "categories"), "1 of 2 categories have no 'name'"),
        (_each("id", None, "categories"), "2 of 2 categories have no 'id'"),
        (_first("segmentation", None), "1 of 12 objects have no segmentation, such as annotation 1"),
        (_each("segmentation", []), "12 of 12 objects have no segmentation"),
        (_each("segmentation", [[1, 2, 3, 4]]), "12 objects have no polygon of three points or more: .*; draw them"),
        (_first("segmentation", dict(size=[48, 32], counts=[1, 2])), "annotation 1: expected polygons, or run lengths"),
        (_first("bbox", None, number=4), "1 of 12 annotations have no 'bbox': annotation 5"),
        (_first("bbox", [1, 2, 3]), "annotation 1: expected a bbox of 4 numbers"),
        (_first("bbox", [1, 2, 3, "x"]), "annotation 1: expected a bbox of 4 numbers"),
        (_first("bbox", [1, 2, 3, float("nan")]), "annotation 1: its bbox is not finite"),
        (_first("width", None, "images", 2), "1 of 6 images have no 'width': image 3"),
        (_first("width", 0, "images"), "image 1 has no size"),
        (_first("file_name", None, "images"), "have no 'file_name'"),
        (_first("id", None, "images"), "have no 'id'"),
        (_first("id", 2, "images"), "several images have the id 2: '1.jpg', '2.jpg'"),
        (
            _first("category_id", 12),
            "1 annotation has a category_id that no category has, such as 12 of annotation 1",
        ),
        (_first("category_id", "x"), "expected a number for 'category_id', found 'x'"),
        (
            _each("bbox", lambda entry: [value / 100 for value in entry["bbox"]]),
            "all boxes lie within 0..1, such as .* of annotation 1; expected pixels",
        ),
        (_each("bbox", _corners), "the boxes are \\(x1, y1, x2, y2\\), it seems"),
        (lambda c: c.update(annotations=[]), "no annotation in the file"),
        (_each("category_id", 3), None),
        (_each("iscrowd", 1), "no object of the classes 'cat', 'dog' is left of 12"),
        (_each("width", 20, "images"), "none of the 6 images is left; 6 images smaller than 32 pixels left out"),
        (lambda c: c.update(images=[]), "the list of images is empty"),
        (
            _first("width", 63, "images"),
            "1 image is not as large as the annotation says .*1.jpg is 64 x 48, its annotation 63 x 48",
        ),
    ],
)
def test_annotations_that_cannot_work(coco, change, message):
    change(coco.content)
    coco.write()
    errors = coco.check().errors
    if message is None:
        assert errors == []
    else:
        (error,) = errors
        assert re.search(message, error), error
        assert "\n" not in error


def test_corners_without_polygons(coco):
    """Boxes in corner format are recognised because they reach beyond their images."""
    for entry in coco.content["annotations"]:
        entry["bbox"] = _corners(entry)
        del entry["segmentation"]
    for loader in ("train", "val"):
        coco.cfg[f"{loader}_dataloader"].dataset.pipeline.pop()
    coco.write()
    (error,) = coco.check().errors
    assert "x1, y1, x2, y2" in error


def test_boxes_that_reach_beyond(coco):
    """Such a box is clipped; it is not taken for corners if its polygon confirms it."""
    coco.content["annotations"][11]["bbox"] = [40, 12, 40, 16]
    coco.write()
    findings = coco.check()
    assert findings.errors == []
    assert any("1 box reaches beyond its image: annotation 12" in warning for warning in findings.warnings)


def test_objects_without_an_image(coco):
    coco.content["annotations"][0]["image_id"] = 99
    coco.write()
    assert any("an image that is not in the file, such as image 99" in warning for warning in coco.check().warnings)


def test_a_class_without_an_object(coco):
    coco.content["annotations"] = [entry for entry in coco.content["annotations"] if entry["category_id"] == 3]
    coco.write()
    assert "no object of class 'dog'" in coco.check().warnings


def average_precision(path: str) -> float:
    """Average precision of predictions that equal the annotations."""
    truth = COCO(path)
    results = truth.loadRes([dict(entry, score=1.0) for entry in copy.deepcopy(truth.dataset["annotations"])])
    evaluation = COCOeval(truth, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def test_the_annotation_0_counts(coco):
    """pycocotools treats a match with an annotation of id 0 as no match."""
    coco.content["annotations"] = coco.content["annotations"][:1]
    coco.content["annotations"][0]["id"] = 0
    coco.content["categories"] = coco.content["categories"][:1]
    coco.write()
    coco.cfg.val_dataloader.dataset.metainfo.classes = ("cat",)
    assert average_precision(str(coco.folder / "annotations.json")) == 0
    content = coco.repaired("val")
    assert [entry["id"] for entry in content["annotations"]] == [1]
    assert coco.cfg.val_evaluator.ann_file == coco.cfg.val_dataloader.dataset.ann_file
    assert average_precision(coco.cfg.val_evaluator.ann_file) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_each("area", None), "the area of 12 objects was filled in"),
        (_each("iscrowd", None), "iscrowd of 12 objects was set to 0"),
        (_each("id", None), "numbered anew from 1 \\(some had none"),
        (_each("id", 5), "numbered anew from 1 \\(two had the same"),
        (_each("id", lambda entry: entry["id"] - 1), "numbered anew from 1 \\(pycocotools counts"),
        (_each("bbox", lambda entry: [str(value) for value in entry["bbox"]]), "numbers written as text"),
        (_each("category_id", lambda entry: str(entry["category_id"])), "numbers written as text"),
        (_each("area", lambda entry: str(entry["area"])), "areas written as text"),
        (_each("id", lambda entry: str(entry["id"]), "images"), "numbers written as text"),
        (_each("image_id", lambda entry: str(entry["image_id"])), "numbers written as text"),
        (_each("width", str(WIDTH), "images"), "numbers written as text"),
    ],
)
def test_repairs(coco, change, said):
    """mmdet reads the same from the repaired copy as from correct annotations."""
    sound = DATASETS.build({**coco.cfg.train_dataloader.dataset, "pipeline": []})
    expected = [sound.get_data_info(i)["instances"] for i in range(len(sound))]
    sizes = [(sound.get_data_info(i)["width"], sound.get_data_info(i)["img_id"]) for i in range(len(sound))]
    change(coco.content)
    coco.write()
    findings = coco.check()
    assert any(re.search(said, warning) for warning in findings.warnings), findings
    content = coco.repaired()
    assert all({"id", "area", "iscrowd"} <= set(entry) for entry in content["annotations"])
    assert len({entry["id"] for entry in content["annotations"]}) == 12
    dataset = DATASETS.build({**coco.cfg.train_dataloader.dataset, "pipeline": []})
    assert [dataset.get_data_info(i)["instances"] for i in range(len(dataset))] == expected
    assert [(dataset.get_data_info(i)["width"], dataset.get_data_info(i)["img_id"]) for i in range(6)] == sizes
    assert average_precision(findings.ann_file) == pytest.approx(1)


def test_names_as_ids_of_images(coco):
    """Ids that are no numbers are kept; mmdet and its metric accept them."""
    for image in coco.content["images"]:
        image["id"] = f"scene_{image['id']}"
    for entry in coco.content["annotations"]:
        entry["image_id"] = f"scene_{entry['image_id']}"
    coco.write()
    findings = coco.check()
    assert (findings.errors, findings.ann_file) == ([], "")
    dataset = DATASETS.build({**coco.cfg.val_dataloader.dataset, "pipeline": []})
    evaluator = Evaluator([dict(type="CocoMetric", metric="bbox", ann_file=str(coco.folder / "annotations.json"))])
    evaluator.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        boxes = np.array([instance["bbox"] for instance in info["instances"]], np.float32)
        labels = np.array([instance["bbox_label"] for instance in info["instances"]])
        prediction = dict(
            bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(labels), scores=torch.ones(len(labels))
        )
        evaluator.process(
            [dict(img_id=info["img_id"], ori_shape=(HEIGHT, WIDTH), pred_instances=prediction)], data_batch=None
        )
    assert evaluator.evaluate(len(dataset))["coco/bbox_mAP"] == pytest.approx(1)


def _squares(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


RUNS = dict(size=[HEIGHT, WIDTH], counts=[10, 20, HEIGHT * WIDTH - 30])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[3, 2, float("nan"), 2, 23, 18]], "polygon that is not finite.*annotation 4"),
        ([[3, 2, None, 2, 23, 18]], "annotation 4: expected a list of polygons"),
        ([["3", "2", "23", "2", "23", "18"]], "annotation 4: expected a list of polygons.* of numbers in pixels"),
        ([[[3, 2], [23, 2], [23, 18]]], r"annotation 4: expected a list of polygons, \[\[x1, y1.*found \[\[\[3, 2\]"),
        ([3, 2, 23, 2, 23, 18], "annotation 4: expected a list of polygons"),
        ([[3000, 2000, 23000, 2000, 23000, 18000]], "lies further outside its image.*annotation 4"),
        ("[[3, 2, 23, 2, 23, 18]]", "annotation 4: expected polygons"),
        (dict(RUNS, counts=[10, 20]), "annotation 4: .* with the sum 3072.*found counts with the sum 30"),
        (dict(RUNS, counts=[10, -20, 3082]), "annotation 4: .*run lengths|run lengths.*annotation 4"),
        (dict(RUNS, counts=["10", "20", "3042"]), "run lengths that cannot be decoded, such as annotation 4"),
        (dict(RUNS, counts="abc"), "run lengths that cannot be decoded, such as annotation 4"),
        (dict(RUNS, counts={}), "run lengths that cannot be decoded, such as annotation 4"),
        (dict(RUNS, size=[WIDTH, HEIGHT]), r"image's size \[48, 64\] \(height, width\), found the size \[64, 48\]"),
        (dict(RUNS, size=5), "found the size 5"),
    ],
)
def test_segmentations_that_cannot_work(coco, segmentation, message):
    coco.content["annotations"][3]["segmentation"] = segmentation
    coco.write()
    (error,) = coco.check().errors
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda box: _squares([value / 64 for value in box]),
            "all polygons lie within 0..1",
        ),
        (lambda box: _squares([box[0] + 20, *box[1:]]), "polygons of 12 of 12 objects lie beside the boxes"),
        (lambda box: [[-40, 5, -30, 5, -30, 9]], "polygons of 12 of 12 objects lie beside"),
        (lambda box: dict(RUNS, counts=[HEIGHT * WIDTH]), "no object has a pixel in its mask"),
    ],
)
def test_all_segmentations_are_wrong(coco, change, message):
    for entry in coco.content["annotations"]:
        entry["segmentation"] = change(entry["bbox"])
    coco.write()
    (error,) = coco.check().errors
    assert message in error


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (_squares([0.1, 0.1, 0.5, 0.5]), "1 object has its polygon beside its box: annotation 4"),
        (dict(RUNS, counts=[HEIGHT * WIDTH]), "1 object has no pixel in the mask: annotation 4"),
        ([[12, 8, 32, 8, 12, 8]], "1 object has no pixel in the mask: annotation 4"),
    ],
)
def test_some_masks_are_lost(coco, segmentation, message):
    coco.content["annotations"][3]["segmentation"] = segmentation
    coco.write()
    findings = coco.check()
    assert findings.errors == []
    assert any(message in warning for warning in findings.warnings), findings.warnings


def test_run_lengths_are_counted_as_pycocotools_counts_them():
    """Compressed masks, counted together, some of them damaged, with uncompressed ones between them."""
    rng = np.random.default_rng(0)
    drawn = [
        np.asfortranarray(rng.random((h, w)) < share, np.uint8)
        for h, w, share in [
            (1, 1, 0),
            (1, 1, 1),
            (7, 9, 0.5),
            (300, 500, 0.5),
            (480, 640, 0),
            (480, 640, 1),
            (2000, 1500, 1e-5),
        ]
    ]
    texts = [masks.encode(image)["counts"].decode() for image in drawn]
    totals, pixels = count_runs([*texts, "~", "P", texts[3][:-3], [2, 3, 4], None, ""])
    assert totals[:7].tolist() == [image.size for image in drawn]
    assert pixels[:7].tolist() == [int(image.sum()) for image in drawn]
    assert (totals[7], totals[8], totals[10], pixels[10], totals[11], totals[12]) == (-1, -1, 9, 3, -1, -1)
    assert totals[9] != drawn[3].size


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        (dict(ignore=1), True),
        (dict(bbox=[1, 1, 0, 0]), True),
        (dict(category_id=9), True),
        (dict(iscrowd=1), False),
    ],
)
def test_masks_that_are_not_loaded_may_be_missing(coco, change, warned):
    coco.content["categories"].append(dict(id=9, name="bird"))
    del coco.content["annotations"][0]["segmentation"]
    coco.content["annotations"][0].update(change)
    coco.write()
    errors = coco.check().errors
    assert errors == [] if warned else "no segmentation, such as annotation 1" in errors[0]


def test_corners_some_of_which_are_degenerate(coco):
    """The polygons show that boxes are corners, even if some boxes could not be corners."""
    for entry in coco.content["annotations"]:
        entry["bbox"] = _corners(entry)
    coco.content["annotations"][2]["bbox"] = [50, 40, 20, 10]
    coco.write()
    (error,) = coco.check().errors
    assert "x1, y1, x2, y2" in error


def test_flags_written_as_text(coco):
    for entry in coco.content["annotations"]:
        entry["iscrowd"], entry["ignore"] = "0", "0"
    coco.content["annotations"][0]["iscrowd"] = "1"
    coco.content["annotations"][1]["ignore"] = "1"
    coco.write()
    assert "10 of 12 objects" in coco.check().summary
    assert [entry["iscrowd"] for entry in coco.repaired()["annotations"]] == [1] + 11 * [0]


def test_flags_that_are_none(coco):
    coco.content["annotations"][0]["iscrowd"] = "no"
    coco.write()
    assert "annotation 1: expected 0 or 1 for 'iscrowd', found 'no'" in coco.check().errors[0]


def test_areas_of_nothing_are_filled_in(coco):
    coco.content["annotations"][0]["area"] = 0
    coco.content["annotations"][1].update(area=0, segmentation=RUNS)
    coco.write()
    areas = [entry["area"] for entry in coco.repaired()["annotations"]]
    assert areas == [320, 20] + 10 * [320]


def test_why_nothing_is_left(coco):
    for entry in coco.content["annotations"][:4]:
        entry["iscrowd"] = 1
    for entry in coco.content["annotations"][4:8]:
        entry["ignore"] = 1
    for entry in coco.content["annotations"][8:]:
        entry["bbox"] = [500, 500, 9, 9]
    coco.write()
    (error,) = coco.check().errors
    for part in ("4 crowds", "4 marked 'ignore'", "4 smaller than a pixel"):
        assert part in error


VALUES = (
    *(None, "x", "", "3", [], [1], [[1]], {}, {"a": 1}, 10**400, 10**20, -(10**20), 1e308, -1, 0, 0.5, True),
    *(float("nan"), float("inf"), "nan", "1e999", [None] * 4, [10**400] * 4, [1e308] * 4, [[]], [["a"] * 6]),
    *([[None] * 6], [[1, 2, 3, 4, 5, [6]]], [[10**400] * 6], dict(RUNS, counts="abc"), dict(RUNS, counts=[1, "x"])),
    *(dict(counts={}, size=5), dict(counts=None, size="ab"), "a\\b", "\0", "..", "/", "\ud800", "a" * 5000, "a\nb"),
)


def _places(node, place: tuple = ()):
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*place, key)
        if isinstance(child, dict | list):
            yield from _places(child, (*place, key))


def test_no_content_raises_anything(coco):
    """mmdet can read whatever the check accepts, including masks."""
    rng, path = random.Random(0), coco.folder / "changed.json"
    leaf = {**coco.cfg.train_dataloader.dataset, "ann_file": path.name}
    coco.cfg.train_dataloader.dataset = leaf
    coco.content["annotations"][0].update(iscrowd=1, segmentation=RUNS)
    places, refused = list(_places(coco.content)), 0
    for _ in range(200):
        content = copy.deepcopy(coco.content)
        for place in rng.sample(places, rng.choice([1, 1, 2, 3])):
            node = content
            try:
                for key in place[:-1]:
                    node = node[key]
                node[place[-1]] = rng.choice(VALUES)
            except (KeyError, IndexError, TypeError):  # an earlier change has removed the entry
                continue
        path.write_text(json.dumps(content))
        findings = coco.check()
        lines = [findings.summary, *findings.errors, *findings.warnings]
        assert not any("\n" in line or len(line) > 2000 for line in lines), lines
        refused += bool(findings.errors)
        if not findings.errors:
            dataset = DATASETS.build({**leaf, "ann_file": findings.ann_file or str(path)})
            for i in range(len(dataset)):
                assert len(dataset[i]["gt_masks"]) == len(dataset[i]["gt_bboxes_labels"])
    assert 50 < refused < 200


def test_nested_without_end(coco):
    (coco.folder / "annotations.json").write_text("[" * 100000)
    (error,) = coco.check().errors
    assert "is no JSON file" in error


@pytest.mark.parametrize(("encoding", "name"), [("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16")])
def test_other_encodings(coco, encoding, name):
    (coco.folder / "annotations.json").write_text(json.dumps(coco.content), encoding=encoding)
    assert f"its encoding {name} was made plain UTF-8" in coco.check().warnings[0]
    assert coco.repaired() == coco.content


@pytest.mark.parametrize(("image_id", "written"), [("000001", "'000001'"), ("1 ", "'1 '"), (1, "1")])
def test_ids_that_differ_in_form(coco, image_id, written):
    if image_id == 1:
        for image in coco.content["images"]:
            image["id"] = f"{image['id']:06}"
    else:
        coco.content["annotations"][0]["image_id"] = image_id
    coco.write()
    (error,) = coco.check().errors
    assert f"annotation 1: its image_id is {written}, and the image's id is" in error
