"""The check of data: what cannot work is refused, what follows from the rest is repaired, and what is lost is said."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIGS, DEMO, TOOLS, error_lines, run

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset  # noqa: F401 (registers)
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from condattn.openmmlab.data_check import check as check_module
from condattn.openmmlab.data_check import check_data
from condattn.openmmlab.data_check import coco as coco_check
from condattn.openmmlab.data_check.check import AS_ANNOTATED, _kind, adapt, find
from condattn.openmmlab.data_check.images import find_missing
from condattn.openmmlab.data_check.label_maps import MapUse, check_label_maps, to_classes
from condattn.openmmlab.data_check.paths import leaves, named_paths
from condattn.openmmlab.data_check.runs import count_runs
from condattn.openmmlab.data_check.sampling import sample
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.launch import load_config

WIDTH, HEIGHT = 64, 48
EXIF_ORIENTATION = 0x0112


def picture(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def rotated(path: Path, orientation: int = 6, **size: int) -> None:
    """Write an image whose header asks for a rotation."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    picture(**size).save(path, exif=exif)


class Coco:
    """A small data set in COCO's format, and a configuration of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()
        images = [dict(id=i, file_name=f"{i}.jpg", width=WIDTH, height=HEIGHT) for i in range(1, 7)]
        for i in range(1, 7):
            picture(i).save(folder / "images" / f"{i}.jpg")
        objects = []
        for number in range(1, 13):
            x, y, w, h = 3 * number, 2 * number, 20, 16
            objects.append(
                dict(
                    id=number,
                    image_id=(number - 1) // 2 + 1,
                    category_id=3 if number % 3 else 7,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                )
            )
        self.content = dict(
            images=images, annotations=objects, categories=[dict(id=3, name="cat"), dict(id=7, name="dog")]
        )
        dataset = dict(
            type="CocoDataset",
            data_root=str(folder),
            ann_file="annotations.json",
            data_prefix=dict(img="images/"),
            metainfo=dict(classes=("cat", "dog")),
            pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=True)],
        )
        filters = dict(filter_empty_gt=True, min_size=32)
        evaluator = dict(type="CocoMetric", metric=["bbox", "segm"], ann_file=str(folder / "annotations.json"))
        self.cfg = Config(
            dict(
                default_scope="mmdet",
                train_dataloader=dict(dataset=dict(**dataset, filter_cfg=filters)),
                val_dataloader=dict(dataset=dict(**copy.deepcopy(dataset), test_mode=True)),
                val_evaluator=evaluator,
            )
        )
        self.write()

    def write(self) -> None:
        """Write the annotations as they stand."""
        (self.folder / "annotations.json").write_text(json.dumps(self.content))

    def check(self, loader: str = "train"):
        """The findings of a loader."""
        init_default_scope("mmdet")
        (entry,) = find(self.cfg, loader)
        return entry.findings

    def repaired(self, loader: str = "train") -> dict:
        """The content of the repaired copy, after the configuration was adapted to it."""
        (entry,) = find(self.cfg, loader)
        assert not entry.findings.errors
        adapt(self.cfg, entry)
        assert entry.settings["ann_file"] == entry.findings.ann_file != ""
        return json.loads(Path(entry.findings.ann_file).read_text())


@pytest.fixture
def coco(tmp_path) -> Coco:
    init_default_scope("mmdet")
    return Coco(tmp_path)


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
    """Crowds, ignored objects, empty boxes, other categories, images without objects, indices."""
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
        (_each("segmentation", [[1, 2, 3, 4]]), "no object has a polygon of three points"),
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
    """Are told by boxes that reach beyond their images."""
    for entry in coco.content["annotations"]:
        entry["bbox"] = _corners(entry)
        del entry["segmentation"]
    for loader in ("train", "val"):
        coco.cfg[f"{loader}_dataloader"].dataset.pipeline.pop()
    coco.write()
    (error,) = coco.check().errors
    assert "x1, y1, x2, y2" in error


def test_boxes_that_reach_beyond(coco):
    """Are cut; with polygons that confirm them they are no corners."""
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
    """Of predictions that are the annotations themselves."""
    truth = COCO(path)
    results = truth.loadRes([dict(entry, score=1.0) for entry in copy.deepcopy(truth.dataset["annotations"])])
    evaluation = COCOeval(truth, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def test_the_annotation_0_counts(coco):
    """pycocotools takes a match with the id 0 for none."""
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
    """What mmdet reads of the copy is what it reads of sound annotations."""
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


def test_names_of_images_with_backslashes(coco):
    (coco.folder / "images" / "a").mkdir()
    for image in coco.content["images"]:
        shutil.move(coco.folder / "images" / image["file_name"], coco.folder / "images" / "a")
        image["file_name"] = f"a\\{image['file_name']}"
    coco.write()
    assert coco.repaired()["images"][0]["file_name"] == "a/1.jpg"


def test_names_as_ids_of_images(coco):
    """Text that is no number stays; mmdet and its metric take it."""
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


def test_images_that_cannot_be_read(coco):
    images = coco.folder / "images"
    (images / "1.jpg").unlink()
    (images / "2.jpg").unlink()
    picture().save(images / "2.JPG", "JPEG")
    (images / "3.jpg").write_bytes(b"")
    whole = (images / "4.jpg").read_bytes()
    (images / "4.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "5.jpg").write_text("<html>404</html>")
    missing, unreadable = coco.check().errors
    assert "2 of 6 images are missing" in missing and "1.jpg" in missing and "2.jpg" in missing
    assert "3 images cannot be read" in unreadable
    for part in ("3.jpg is empty", "4.jpg is damaged or cut short", "5.jpg is no image; it begins with b'<html>"):
        assert part in unreadable


def test_another_case_of_the_suffix_is_named(coco):
    for i in range(1, 7):
        shutil.move(coco.folder / "images" / f"{i}.jpg", coco.folder / "images" / f"{i}.JPG")
    (error,) = coco.check().errors
    assert "6 of 6 images are missing" in error
    assert "the folder has 1.JPG" in error


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp"])
def test_half_of_an_image(coco, suffix):
    path = coco.folder / "images" / f"half{suffix}"
    picture().save(path)
    coco.content["images"][0]["file_name"] = path.name
    coco.write()
    assert coco.check().errors == []
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    (error,) = coco.check().errors
    assert f"half{suffix} is damaged or cut short" in error


@pytest.mark.parametrize("as_stored", [True, False])
def test_rotation_in_the_header(coco, as_stored):
    """Whichever orientation the annotation has is loaded."""
    rotated(coco.folder / "images" / "1.jpg")
    if not as_stored:
        coco.content["images"][0].update(width=HEIGHT, height=WIDTH)
        coco.write()
    (entry,) = find(coco.cfg, "train")
    assert entry.findings.errors == []
    assert entry.findings.as_annotated == as_stored
    assert any("rotated by its EXIF header" in warning for warning in entry.findings.warnings) == as_stored
    adapt(coco.cfg, entry)
    assert (entry.settings["pipeline"][0]["type"] == AS_ANNOTATED) == as_stored
    sample = DATASETS.build({**coco.cfg.train_dataloader.dataset, "pipeline": entry.settings["pipeline"][:1]})[0]
    expected = (HEIGHT, WIDTH) if as_stored else (WIDTH, HEIGHT)
    assert sample["img"].shape[:2] == sample["img_shape"] == sample["ori_shape"] == expected


def test_rotations_that_sizes_do_not_tell(coco):
    rotated(coco.folder / "images" / "1.jpg", orientation=3)
    coco.content["images"][1].update(width=50, height=50)
    rotated(coco.folder / "images" / "2.jpg", width=50, height=50)
    coco.write()
    (warning,) = (warning for warning in coco.check().warnings if "EXIF" in warning)
    assert "2 images are turned or mirrored" in warning and "1.jpg" in warning and "2.jpg" in warning


@pytest.mark.parametrize(("brightest", "refused"), [(4095, True), (65535, False)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits(coco, brightest, refused, suffix):
    pixels = np.linspace(0, brightest, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(pixels).save(coco.folder / "images" / f"deep{suffix}")
    coco.content["images"][0]["file_name"] = f"deep{suffix}"
    coco.write()
    findings = coco.check()
    if refused:
        assert "no value above 4095" in findings.errors[0]
    else:
        assert findings.errors == []
        assert "16 bits" in findings.warnings[0]


def test_classes_in_a_string(coco):
    coco.cfg.train_dataloader.dataset.metainfo.classes = "cat"
    (error,) = coco.check().errors
    assert "write classes = ('cat',)" in error


def test_a_data_set_that_nobody_has_registered(coco):
    coco.cfg.train_dataloader.dataset.type = "CocoDatasett"
    (error,) = coco.check().errors
    assert "no data set CocoDatasett is registered" in error


def test_heads_with_another_number_of_classes(coco):
    coco.cfg.model = dict(rpn_head=dict(num_classes=1), roi_head=dict(bbox_head=[dict(num_classes=80)]))
    (error,) = coco.check().errors
    assert error.startswith("model.roi_head.bbox_head.0.num_classes is 80, but the data have 2 classes ('cat', 'dog')")


def test_findings_are_remembered_until_a_file_changes(coco, monkeypatch):
    first = coco.check()
    monkeypatch.setattr(coco_check, "read_annotations", lambda path: pytest.fail("the file was read again"))
    assert coco.check() == first
    monkeypatch.undo()
    (coco.folder / "images" / "1.jpg").write_bytes(b"")
    assert len(coco.check().errors) == 1
    picture().save(coco.folder / "images" / "1.jpg")
    (coco.folder / "images" / "2.jpg").unlink()
    assert "1 of 6 images are missing" in coco.check().errors[0]


def test_a_cache_that_cannot_be_written(coco, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert coco.check().errors == []


class Segmentation:
    """A small data set of images and label maps, and a configuration of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("images", "labels"):
            (folder / name).mkdir()
        for i in range(6):
            picture(i).save(folder / "images" / f"{i}.jpg")
            self.label(i, np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3)
        dataset = dict(
            type="BaseSegDataset",
            data_root=str(folder),
            data_prefix=dict(img_path="images", seg_map_path="labels"),
            metainfo=dict(classes=("background", "cat", "dog")),
            pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")],
        )
        self.cfg = Config(
            dict(
                default_scope="mmseg",
                train_dataloader=dict(dataset=dataset),
                test_dataloader=dict(dataset=copy.deepcopy(dataset)),
                test_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            )
        )

    @property
    def dataset(self):
        """Settings of the training data."""
        return self.cfg.train_dataloader.dataset

    def label(self, number: int, values: np.ndarray, mode: str | None = None) -> None:
        """Write a label map."""
        image = Image.fromarray(np.asarray(values).astype(np.uint16 if np.max(values) > 255 else np.uint8))
        (image.convert(mode) if mode else image).save(self.folder / "labels" / f"{number}.png")

    def check(self, loader: str = "train"):
        """The findings of a loader."""
        (entry,) = find(self.cfg, loader)
        return entry.findings


@pytest.fixture
def segmentation(tmp_path) -> Segmentation:
    init_default_scope("mmseg")
    return Segmentation(tmp_path)


def test_label_maps_that_fit(segmentation):
    segmentation.label(0, np.full((HEIGHT, WIDTH), 1), mode="P")
    findings = segmentation.check()
    assert (findings.errors, findings.warnings) == ([], [])
    assert findings.summary.startswith("6 of 6 images, 3 classes (cat ")
    assert sum(entry.count for entry in findings.classes) == 6 * HEIGHT * WIDTH
    assert findings.classes[1].count == 5 * HEIGHT * WIDTH // 3 + HEIGHT * WIDTH


FULL = np.ones((HEIGHT, WIDTH), int)


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        (FULL * 3, None, "values that no class has, such as 3 in .*0.png; expected 0 to 2 for 3 classes"),
        (FULL * 300, None, "values that no class has, such as 300"),
        (FULL, "RGB", "0.png has 3 channels \\(RGB\\); expected one"),
        (FULL, "RGBA", "has 4 channels"),
        (FULL, "LA", "has 2 channels"),
        (FULL[:, :20], None, "0.jpg is 64 x 48, its label map 20 x 48"),
    ],
)
@pytest.mark.parametrize("loader", ["train", "test"])
def test_a_label_map_that_cannot_work(segmentation, values, mode, message, loader):
    segmentation.label(0, values, mode)
    (error,) = segmentation.check(loader).errors
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2, 255, 0), "0 and 255 alone.*'cat' has no pixel"),
        (FULL * 0, "every labelled pixel is 'background'"),
        (FULL * 255, "every pixel of the label maps is ignored"),
    ],
)
def test_label_maps_that_teach_nothing(segmentation, values, message):
    for i in range(6):
        segmentation.label(i, values)
    (error,) = segmentation.check().errors
    assert re.search(message, error), error


def test_classes_without_pixels_and_maps_without_labels(segmentation):
    for i in range(6):
        segmentation.label(i, (np.arange(HEIGHT * WIDTH) % 2).reshape(HEIGHT, WIDTH))
    segmentation.label(5, FULL * 255)
    assert segmentation.check().errors == []
    absent, ignored = segmentation.check().warnings
    assert "no pixel of class 'dog'" in absent
    assert "1 label map is ignored in every pixel" in ignored and "5.png" in ignored


def test_missing_label_maps(segmentation):
    (segmentation.folder / "labels" / "2.png").unlink()
    (error,) = segmentation.check().errors
    assert "1 of 6 images have no label map" in error and "2.png" in error


def test_half_of_a_label_map(segmentation):
    rng = np.random.default_rng(0)
    segmentation.label(0, rng.integers(0, 3, (HEIGHT, WIDTH)))
    path = segmentation.folder / "labels" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    (error,) = segmentation.check().errors
    assert "0.png is damaged or cut short" in error


def test_another_suffix(segmentation):
    """Images of another suffix, upper case included, are left out by mmseg without a word."""
    for i in range(3):
        shutil.move(segmentation.folder / "images" / f"{i}.jpg", segmentation.folder / "images" / f"{i}.JPG")
    findings = segmentation.check()
    assert findings.summary.startswith("3 of 3 images")
    assert any("3 images have another suffix" in warning and "0.JPG" in warning for warning in findings.warnings)
    segmentation.dataset.img_suffix = ".png"
    (error,) = segmentation.check().errors
    assert "no image with the suffix .png" in error and "set img_suffix" in error


def test_classes_of_segmentation_in_a_string(segmentation):
    segmentation.dataset.metainfo.classes = "cat"
    (error,) = segmentation.check().errors
    assert "write classes = ('cat',)" in error


def test_one_class_with_a_softmax(segmentation):
    segmentation.dataset.metainfo.classes = ("cat",)
    head = dict(num_classes=1, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False))
    segmentation.cfg.model = dict(decode_head=head)
    (error,) = segmentation.check().errors
    assert "one class, 'cat', and a softmax" in error


def test_fewer_classes_in_the_head(segmentation):
    segmentation.cfg.model = dict(decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=3))
    (error,) = segmentation.check().errors
    assert error.startswith("model.decode_head.num_classes is 2, but the data have 3 classes")


def test_testing_without_label_maps(segmentation):
    """Is refused, unless nothing is evaluated and nothing loads them."""
    dataset = segmentation.cfg.test_dataloader.dataset
    del dataset.data_prefix["seg_map_path"]
    (error,) = segmentation.check("test").errors
    assert "which the evaluation needs" in error
    segmentation.cfg.test_evaluator.format_only = True
    (error,) = segmentation.check("test").errors
    assert "which LoadAnnotations needs" in error
    dataset.pipeline.pop()
    assert segmentation.check("test").errors == []


@pytest.mark.parametrize("as_stored", [True, False])
def test_rotation_of_images_with_label_maps(segmentation, as_stored):
    rotated(segmentation.folder / "images" / "0.jpg")
    if not as_stored:
        segmentation.label(0, FULL.T)
    (entry,) = find(segmentation.cfg, "train")
    assert (entry.findings.errors, entry.findings.as_annotated) == ([], as_stored)
    adapt(segmentation.cfg, entry)
    sample = DATASETS.build(segmentation.dataset)[0]
    assert sample["img"].shape[:2] == sample["gt_seg_map"].shape == ((HEIGHT, WIDTH) if as_stored else (WIDTH, HEIGHT))


@pytest.mark.parametrize("reduce_zero_label", [True, False])
@pytest.mark.parametrize("classes", [("a", "b", "c"), ("c", "a")])
def test_values_become_the_classes_that_mmseg_makes_of_them(tmp_path, reduce_zero_label, classes):
    class Known(BaseSegDataset):
        METAINFO = dict(classes=("a", "b", "c"), palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2]])  # noqa: RUF012

    dataset = Known(
        data_prefix=dict(img_path=str(tmp_path), seg_map_path=str(tmp_path)),
        metainfo=dict(classes=classes),
        reduce_zero_label=reduce_zero_label,
        lazy_init=True,
    )
    Image.fromarray(np.arange(256, dtype=np.uint8)[None]).save(tmp_path / "all.png")
    results = dict(
        seg_map_path=str(tmp_path / "all.png"),
        reduce_zero_label=reduce_zero_label,
        label_map=dataset.label_map,
        seg_fields=[],
    )
    expected = LoadAnnotations()(results)["gt_seg_map"].ravel()
    use = MapUse([], [], 0, "", "", "", classes, 255, reduce_zero_label, dataset.label_map, True)
    np.testing.assert_array_equal(to_classes(np.arange(256), use), expected)


def test_a_sample_has_both_ends():
    assert sample(range(100), read_all=False, number=5) == [0, 25, 50, 74, 99]
    assert sample(range(100), read_all=True, number=5) == list(range(100))
    assert sample([3, 4], read_all=False, number=5) == [3, 4]


def test_missing_files_of_missing_folders(tmp_path):
    assert find_missing([str(tmp_path / "no" / "a.jpg")]) == [str(tmp_path / "no" / "a.jpg")]


def test_every_error_is_printed(coco, capsys):
    """The last one by the exception, which the tools print."""
    (coco.folder / "images" / "1.jpg").unlink()
    (coco.folder / "images" / "2.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="train: 1 image cannot be read"):
        check_data(coco.cfg, "train")
    captured = capsys.readouterr()
    assert "error: train: 1 of 6 images are missing" in captured.err
    assert captured.out.startswith("train: 6 of 6 images, 12 of 12 objects (cat 8, dog 4)")


def test_the_other_processes_end_with_the_first(coco, capsys, monkeypatch):
    (coco.folder / "images" / "1.jpg").unlink()
    coco.cfg.launcher = "pytorch"
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    slept = []
    monkeypatch.setattr(check_module.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(check_module.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as exit_:
        check_data(coco.cfg, "train")
    assert exit_.value.code == 2
    assert sum(slept) >= check_module.PATIENCE
    coco.cfg.train_dataloader.dataset.ann_file = "missing.json"
    slept.clear()
    with pytest.raises(SystemExit):
        check_data(coco.cfg, "train")
    assert sum(slept) >= check_module.PATIENCE
    assert capsys.readouterr().err == ""


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
    """Texts of many masks at once, some of them damaged, and lists of numbers between them."""
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
    """Polygons tell, whatever part of the boxes could be corners."""
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


def test_images_alone_where_nothing_is_evaluated(coco):
    """A list for a submission has no annotations."""
    coco.cfg.val_evaluator.format_only = True
    del coco.content["annotations"]
    coco.write()
    findings = coco.check("val")
    assert (findings.errors, findings.summary[:13]) == ([], "6 of 6 images")
    assert "a list of objects named 'annotations'" in coco.check("train").errors[0]


def test_negatives_beside_other_data(coco):
    """A data set without objects is an error by itself, and none in a loader that has objects elsewhere."""
    leaf = coco.cfg.train_dataloader.dataset
    del leaf["filter_cfg"]
    negatives = {**copy.deepcopy(leaf), "ann_file": "negatives.json"}
    (coco.folder / "negatives.json").write_text(json.dumps({**coco.content, "annotations": []}))
    coco.cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[leaf, negatives])
    assert [entry.findings.errors for entry in find(coco.cfg, "train")] == [[], []]
    coco.cfg.train_dataloader.dataset = negatives
    assert "no annotation in the file" in coco.check().errors[0]


def test_one_class_in_each_data_set(segmentation):
    """Is enough where they have different ones."""
    for i in range(6):
        segmentation.label(i, FULL * (i >= 3))
    halves = [{**copy.deepcopy(segmentation.dataset), "indices": list(half)} for half in ((0, 1, 2), (3, 4, 5), (0, 1))]
    for chosen, wrong in ((halves[:2], 0), (halves[::2], 2), (halves[:1], 1)):
        segmentation.cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=chosen)
        entries = find(segmentation.cfg, "train")
        assert sum(bool(entry.findings.errors) for entry in entries) == wrong


def test_remote_data_are_left_alone(coco):
    coco.cfg.train_dataloader.dataset.data_root = "s3://bucket/data"
    assert next(named_paths(coco.cfg.train_dataloader.dataset)) == "s3://bucket/data/annotations.json"
    findings = coco.check()
    assert (findings.errors, "not read by this check" in findings.summary) == ([], True)


@pytest.mark.parametrize(
    "model",
    [
        dict(language_model=dict(type="BertModel"), bbox_head=dict(num_classes=80)),
        dict(bbox_head=dict(type="GroundingDINOHead", num_classes=256)),
        dict(bbox_head=dict(type="ATSSVLFusionHead", num_classes=80)),
    ],
)
def test_open_vocabularies(coco, model):
    coco.cfg.model = model
    assert coco.check().errors == []


def test_auxiliary_heads(segmentation):
    """One for edges has two classes by design; others with another number are doubtful."""
    decode = dict(num_classes=3)
    segmentation.cfg.model = dict(decode_head=decode, auxiliary_head=[dict(type="STDCHead", num_classes=2)])
    findings = segmentation.check()
    assert (findings.errors, findings.warnings) == ([], [])
    segmentation.cfg.model.auxiliary_head.append(dict(type="FCNHead", num_classes=2))
    findings = segmentation.check()
    assert findings.errors == []
    assert "model.auxiliary_head.1.num_classes is 2" in findings.warnings[0]


def test_heads_are_compared_once(coco):
    coco.cfg.model = dict(bbox_head=dict(num_classes=80))
    errors = [error for entry in find(coco.cfg, "train", "val") for error in entry.findings.errors]
    assert len(errors) == 1


def test_other_loaders_of_images(coco):
    """Their files need not be images; they must be there."""
    (coco.folder / "images" / "1.jpg").write_text("raw")
    assert "cannot be read" in coco.check().errors[0]
    coco.cfg.train_dataloader.dataset.pipeline[0] = dict(type="LoadMultiChannelImageFromFiles")
    assert coco.check().errors == []
    (coco.folder / "images" / "1.jpg").unlink()
    assert "1 of 6 images are missing" in coco.check().errors[0]


def test_other_loaders_of_label_maps(segmentation):
    segmentation.label(0, FULL, "RGB")
    segmentation.dataset.pipeline[1] = dict(type="LoadAnnotations", imdecode_backend="cv2")
    assert segmentation.check().errors == []


def test_images_of_every_size(coco, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert coco.check().errors == []
    assert Image.MAX_IMAGE_PIXELS == 100


def test_transforms_that_are_classes(coco):
    """As configurations in pure Python name them."""
    coco.cfg.train_dataloader.dataset.pipeline[0]["type"] = LoadImageFromFile
    rotated(coco.folder / "images" / "1.jpg")
    (entry,) = find(coco.cfg, "train")
    assert entry.findings.as_annotated
    adapt(coco.cfg, entry)
    assert entry.settings["pipeline"][0]["type"] == AS_ANNOTATED


def test_transforms_of_label_maps_that_are_classes(segmentation):
    dataset = segmentation.cfg.test_dataloader.dataset
    dataset.pipeline[1]["type"] = LoadAnnotations
    del dataset.data_prefix["seg_map_path"]
    segmentation.cfg.test_evaluator.format_only = True
    assert "which LoadAnnotations needs" in segmentation.check("test").errors[0]


def test_links_to_nowhere_and_folders(coco):
    for i, make in ((1, lambda path: path.symlink_to("nowhere.jpg")), (2, Path.mkdir)):
        path = coco.folder / "images" / f"{i}.jpg"
        path.unlink()
        make(path)
    (error,) = coco.check().errors
    assert "1.jpg is a link to nowhere.jpg, which is not there" in error and "2.jpg is a folder" in error


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
    """What is accepted, mmdet reads, masks included."""
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
            except (KeyError, IndexError, TypeError):  # another change has taken the place away
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("ann_file"), "has no ann_file"),
        (lambda d: d.update(ann_file=None), "has no ann_file"),
        (lambda d: d.update(ann_file="images"), "is a folder; name the annotation file"),
        (lambda d: d.update(data_prefix=None), "data_prefix: expected dict"),
        (lambda d: d.update(data_prefix="images"), "data_prefix: expected dict"),
        (lambda d: d.update(metainfo="cat"), "metainfo: expected dict"),
        (lambda d: d.metainfo.update(classes=[]), "classes is empty; name the classes"),
        (lambda d: d.metainfo.update(classes=["cat", "cat"]), "classes has 'cat' 2 times"),
        (lambda d: d.metainfo.update(classes=[1, 2]), "classes: expected names"),
        (lambda d: d.filter_cfg.update(min_size="32"), "filter_cfg.min_size: expected a number of pixels, found '32'"),
        (lambda d: d.update(indices="3"), "indices: expected a whole number"),
        (lambda d: d.update(indices=[0, 99]), "indices has 99, and 6 images are there"),
        (lambda d: d.update(backend_args="local"), "backend_args: expected dict"),
        (lambda d: d.update(data_root=5), "data_root: expected the path"),
    ],
)
def test_slips_in_a_configuration(coco, change, message):
    change(coco.cfg.train_dataloader.dataset)
    (error,) = coco.check().errors
    assert message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loader: loader.dataset.pop("type"), "train_dataloader.dataset has no type"),
        (lambda loader: loader.update(dataset=[loader.dataset]), "train_dataloader.dataset is a list"),
        (
            lambda loader: loader.update(dataset=dict(type="ConcatDataset", datasets=[])),
            "train_dataloader.dataset.datasets is empty",
        ),
        (lambda loader: loader.update(dataset=None), "train_dataloader.dataset: expected the settings of a data set"),
    ],
)
def test_loaders_without_a_data_set(coco, change, message):
    change(coco.cfg.train_dataloader)
    with pytest.raises(UserError, match=message):
        coco.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.data_prefix.pop("img_path"), "data_prefix has no img_path"),
        (lambda d: d.update(metainfo=None), "classes. should be specified when testing"),
        (lambda d: d.update(img_suffix=5), "the images cannot be listed"),
        (lambda d: d.update(indices=[7]), "indices has 7, and 6 images are there"),
        (lambda d: d.metainfo.update(classes=["a", "b", "a"]), "classes has 'a' 2 times"),
    ],
)
def test_slips_in_a_segmentation(segmentation, change, message):
    dataset = segmentation.cfg.test_dataloader.dataset
    dataset.test_mode = True
    change(dataset)
    (error,) = segmentation.check("test").errors
    assert re.search(message, error), error


@pytest.mark.parametrize("orientation", [0, 9])
def test_orientations_that_are_none(coco, orientation):
    """OpenCV takes them for upright."""
    rotated(coco.folder / "images" / "1.jpg", orientation)
    findings = coco.check()
    assert (findings.errors, findings.warnings) == ([], [])


def test_orientations_in_text(coco):
    entry = EXIF_ORIENTATION.to_bytes(2, "big") + b"\0\2\0\0\0\2" + b"6\0\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1" + entry + b"\0\0\0\0"
    picture().save(coco.folder / "images" / "1.jpg", exif=exif)
    with Image.open(coco.folder / "images" / "1.jpg") as image:
        assert image.getexif()[EXIF_ORIENTATION] == "6"
    findings = coco.check()
    assert (findings.errors, findings.warnings) == ([], [])


def test_rotated_tiffs_that_opencv_cannot_read(coco):
    rotated(coco.folder / "images" / "turned.tif", 6)
    coco.content["images"][0]["file_name"] = "turned.tif"
    coco.write()
    (error,) = coco.check().errors
    assert "turned.tif cannot be decoded by OpenCV" in error and "orientation 6" in error
    rotated(coco.folder / "images" / "turned.tif", 3)
    findings = coco.check()
    assert findings.errors == [] and "turned.tif" in findings.warnings[0]


def test_a_repaired_copy_is_written_once(coco, monkeypatch):
    coco.content["annotations"][0]["id"] = 0
    coco.write()
    copied = Path(coco.check().ann_file)
    state = copied.stat().st_mtime_ns
    coco.cfg.train_dataloader.dataset.indices = 5
    assert coco.check().ann_file == str(copied)
    assert copied.stat().st_mtime_ns == state


@pytest.mark.parametrize(("encoding", "name"), [("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16")])
def test_other_encodings(coco, encoding, name):
    (coco.folder / "annotations.json").write_text(json.dumps(coco.content), encoding=encoding)
    assert f"its encoding {name} was made plain UTF-8" in coco.check().warnings[0]
    assert coco.repaired() == coco.content


def test_a_cache_folder_that_cannot_take_copies(coco, monkeypatch, tmp_path):
    """The temporary folder takes them; without one it is an error in one line."""
    coco.content["annotations"][0]["id"] = 0
    coco.write()
    home = tmp_path / "home"
    (home / "condattn").mkdir(parents=True)
    (home / "condattn" / "annotations").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert Path(coco.check().ann_file).is_relative_to(tmp_path / "temporary")
    monkeypatch.setattr("tempfile.tempdir", str(home / "condattn" / "annotations"))
    coco.content["annotations"][1]["area"] = 5
    coco.write()
    (error,) = coco.check().errors
    assert "set XDG_CACHE_HOME to a folder that can be written" in error


def test_a_relative_cache_folder(coco, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    coco.content["annotations"][0]["id"] = 0
    coco.write()
    assert Path(coco.check().ann_file).is_relative_to(tmp_path / "relative")


def test_relative_paths_are_of_their_folder(coco, monkeypatch, tmp_path):
    """The same configuration below another folder is other data."""
    coco.cfg.train_dataloader.dataset.data_root = "."
    monkeypatch.chdir(coco.folder)
    assert coco.check().errors == []
    other = tmp_path / "other"
    shutil.copytree(coco.folder / "images", other / "images")
    shutil.copy2(coco.folder / "annotations.json", other)
    (other / "images" / "1.jpg").unlink()
    monkeypatch.chdir(other)
    assert "1 of 6 images are missing" in coco.check().errors[0]


def _metric_entries(coco) -> list:
    init_default_scope("mmdet")
    return find(coco.cfg, "val")


@pytest.mark.parametrize("nested", [False, True])
def test_an_annotation_file_of_the_evaluator(coco, nested):
    other = coco.folder / "other.json"
    if nested:
        metric = coco.cfg.val_evaluator
        coco.cfg.val_evaluator = dict(type="MultiDatasetsEvaluator", metrics=[metric], dataset_prefixes=["own"])
    metric = coco.cfg.val_evaluator.metrics[0] if nested else coco.cfg.val_evaluator
    metric["ann_file"] = str(other)
    content = copy.deepcopy(coco.content)
    content["annotations"][0]["id"] = 0
    other.write_text(json.dumps(content))
    data, evaluation = _metric_entries(coco)
    assert (data.findings.errors, evaluation.label, evaluation.findings.errors) == ([], "val_evaluator", [])
    adapt(coco.cfg, evaluation)
    assert json.loads(Path(metric["ann_file"]).read_text())["annotations"][0]["id"] == 1
    metric["ann_file"] = str(other)
    content["images"][0]["id"] = 77
    other.write_text(json.dumps(content))
    assert "1 image is not in the data that are evaluated" in _metric_entries(coco)[1].findings.errors[0]
    content["categories"][0]["name"] = "horse"
    other.write_text(json.dumps(content))
    assert "no category 'cat'" in _metric_entries(coco)[1].findings.errors[0]


def test_sixteen_bits_file_by_file(coco):
    """One bright file does not excuse dark ones; one dark file among bright ones is named."""
    for number in range(3):
        pixels = np.full((HEIGHT, WIDTH), 65535 if number == 0 else 4095, np.uint16)
        Image.fromarray(pixels).save(coco.folder / "images" / f"deep{number}.png")
        coco.content["images"][number]["file_name"] = f"deep{number}.png"
    coco.write()
    (error,) = coco.check().errors
    assert "2 images have 16 bits" in error and "deep1.png (4095)" in error
    Image.fromarray(np.full((HEIGHT, WIDTH), 65535, np.uint16)).save(coco.folder / "images" / "deep1.png")
    findings = coco.check()
    assert findings.errors == []
    assert "leaves 1 nearly black" in findings.warnings[0] and "deep2.png" in findings.warnings[0]


def test_negative_values_of_label_maps(segmentation):
    values = np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2, -1, 1).astype(np.int32)
    Image.fromarray(values).save(segmentation.folder / "labels" / "0.tif")
    (segmentation.folder / "labels" / "0.tif").rename(segmentation.folder / "labels" / "0.png")
    (error,) = segmentation.check().errors
    assert "1 label map has values that no class has, such as -1" in error


def test_what_a_label_map_leaves_out_is_ignored(segmentation):
    """Whatever ignore_index is, classes that are not chosen become 255."""
    use = dict(images=[], maps=[], total=6, folder="", suffix=".jpg", map_suffix=".png", reduce_zero_label=False)
    images = [str(segmentation.folder / "images" / f"{i}.jpg") for i in range(6)]
    maps = [str(segmentation.folder / "labels" / f"{i}.png") for i in range(6)]
    use = MapUse(
        **{**use, "images": images, "maps": maps},
        classes=["a", "b"],
        ignore_index=254,
        label_map={0: 0, 1: 255, 2: 1},
        training=True,
    )
    findings, _ = check_label_maps(use)
    assert findings.errors == []
    assert [entry.count for entry in findings.classes] == [6 * HEIGHT * WIDTH // 3] * 2


def test_files_that_accompany_an_image(segmentation):
    """Those of Cityscapes beside the images are no images of another suffix; a photograph is."""
    for i in range(6):
        shutil.move(segmentation.folder / "images" / f"{i}.jpg", segmentation.folder / "images" / f"a_{i}_rgb.jpg")
        shutil.move(segmentation.folder / "labels" / f"{i}.png", segmentation.folder / "labels" / f"a_{i}_ids.png")
        picture().save(segmentation.folder / "images" / f"a_{i}_color.png")
    segmentation.dataset.update(img_suffix="_rgb.jpg", seg_map_suffix="_ids.png")
    findings = segmentation.check()
    assert (findings.errors, findings.warnings) == ([], [])
    picture().save(segmentation.folder / "images" / "b.png")
    assert "1 image has another suffix than _rgb.jpg" in segmentation.check().warnings[0]


def test_a_folder_that_changes_below(segmentation):
    """Sub-folders that were searched are part of what the findings depend on."""
    (segmentation.folder / "images" / "below").mkdir()
    assert segmentation.check().warnings == []
    picture().save(segmentation.folder / "images" / "below" / "new.png")
    segmentation.dataset.seg_map_suffix = ".PNG"
    for path in list((segmentation.folder / "labels").iterdir()):
        path.rename(path.with_suffix(".PNG"))
    assert "new.png" in segmentation.check().warnings[0]


def test_label_maps_without_names_of_classes(segmentation):
    segmentation.dataset.metainfo = None
    findings = segmentation.check()
    assert findings.errors == []
    assert "metainfo has no classes" in findings.warnings[0]


def test_no_label_map_is_there(segmentation):
    segmentation.dataset.seg_map_suffix = "_ids.png"
    (error,) = segmentation.check().errors
    assert "6 of 6 images have no label map" in error and "labels has 0.png, 1.png, 2.png and 3 more" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [("0\n\n1\n", "1 line is blank: line 2"), ("0.jpg\n1.jpg\n", "2 names have the suffix .jpg, such as 0.jpg")],
)
def test_lists_of_images(segmentation, text, message):
    (segmentation.folder / "split.txt").write_text(text)
    segmentation.dataset.ann_file = "split.txt"
    (error,) = segmentation.check().errors
    assert message in error


def test_a_list_that_is_no_text(segmentation):
    (segmentation.folder / "split.txt").write_bytes(b"\xff\xfe\n")
    segmentation.dataset.ann_file = "split.txt"
    (error,) = segmentation.check().errors
    assert error.startswith("the images cannot be listed")


def test_images_of_bad_label_maps_are_checked(segmentation):
    segmentation.label(0, FULL, "RGB")
    (segmentation.folder / "images" / "0.jpg").write_bytes(b"")
    maps, images = segmentation.check().errors
    assert "0.png has 3 channels" in maps and "0.jpg is empty" in images


def test_training_without_label_maps(segmentation):
    del segmentation.dataset.data_prefix["seg_map_path"]
    assert "which training needs" in segmentation.check().errors[0]


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


def test_long_lists_of_classes_are_shortened(coco):
    coco.content["categories"] = [dict(id=i, name=f"c{i}") for i in range(90)]
    coco.write()
    (error,) = coco.check().errors
    assert "'c9' and 80 more" in error


def test_two_data_sets_have_pictures_of_their_own(coco, tmp_path, call):
    """On the page, with one that is not there yet beside them, and the errors are printed first."""
    leaf = {key: value for key, value in coco.cfg.train_dataloader.dataset.items() if key != "filter_cfg"}
    second = tmp_path / "second"
    second.mkdir()
    Coco(second)
    both = [leaf, {**copy.deepcopy(leaf), "data_root": str(second)}]
    coco.cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=both)
    config = tmp_path / "config.py"
    config.write_text(coco.cfg.pretty_text)
    status, _, _ = call("dataset/check", config, "--out", "page")
    assert not status
    names = {path.name for path in (tmp_path / "page").glob("train_*.png")}
    assert any(name.startswith("train_1_") for name in names) and any(name.startswith("train_2_") for name in names)
    (tmp_path / "file").write_text("")
    status, _, errors = call("dataset/check", config, "--out", "file")
    assert status == 2 and "--out: expected a folder" in error_lines(errors)[0]


@pytest.mark.parametrize("damage", ["image", "folder"])
def test_several_processes_print_one_error(coco, tmp_path, damage):
    """The first process says what is wrong, and the launcher ends the others."""
    shutil.rmtree(coco.folder / "images") if damage == "folder" else (coco.folder / "images" / "1.jpg").unlink()
    config, script = tmp_path / "config.py", tmp_path / "check.py"
    config.write_text(coco.cfg.pretty_text)
    script.write_text(
        "from mmdet.utils import register_all_modules\n"
        "from mmengine.config import Config\n"
        "from condattn.openmmlab.data_check import check_data\n"
        "from condattn.openmmlab.errors import run_tool\n"
        "register_all_modules()\n"
        f"cfg = Config.fromfile({str(config)!r})\n"
        "cfg.launcher = 'pytorch'\n"
        "run_tool(lambda: check_data(cfg, 'train'))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    (error,) = error_lines(result.stderr)
    assert ("no data at" if damage == "folder" else "1 of 6 images are missing") in error


def test_the_tool(coco, tmp_path, call):
    """Prints, and writes a page with pictures."""
    config = tmp_path / "config.py"
    config.write_text(coco.cfg.pretty_text)
    (tmp_path / "annotations.json").write_text(json.dumps(coco.content))
    status, output, _ = call("dataset/check", config, "--out", "page")
    assert not status
    assert "train: 6 of 6 images, 12 of 12 objects (cat 8, dog 4)" in output
    page = (tmp_path / "page" / "index.html").read_text()
    for picture_ in tmp_path.joinpath("page").glob("*.png"):
        assert picture_.name in page
    assert len(list(tmp_path.joinpath("page").glob("*.png"))) >= 4
    assert "<td>cat</td>" in page
    (coco.folder / "images" / "1.jpg").unlink()
    status, _, errors = call("dataset/check", config, "--images")
    assert status == 2
    assert len(error_lines(errors)) == 2


def test_the_tool_on_label_maps(segmentation, tmp_path, call):
    config = tmp_path / "config.py"
    config.write_text(segmentation.cfg.pretty_text)
    status, output, _ = call("dataset/check", config, "--out", "page")
    assert not status
    assert "test: 6 of 6 images, 3 classes" in output
    assert "<td>dog</td>" in (tmp_path / "page" / "index.html").read_text()


def test_a_training_on_repaired_data(coco, tmp_path):
    """Areas are missing, an id is 0, an image is rotated in its header; training and evaluation run."""
    for entry in coco.content["annotations"]:
        del entry["area"], entry["iscrowd"]
        entry["id"] -= 1
    rotated(coco.folder / "images" / "1.jpg")
    coco.write()
    config = tmp_path / "config.py"
    dataset = dict(coco.cfg.train_dataloader.dataset)
    for key in ("pipeline", "filter_cfg"):
        dataset.pop(key)
    dataset = {"_delete_": True, **dataset}
    config.write_text(
        f"""
_base_ = {str(DEMO / "_base_" / "mask_rcnn_digit_scenes.py")!r}
model = dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)))
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict({dataset!r}, pipeline=pipeline)
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dataset, **loader)
val_dataloader = dict(dataset=dict(dataset, test_mode=True), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={str(coco.folder / "annotations.json")!r})
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
"""
    )
    result = run(TOOLS / "train.py", config, "--work-dir", tmp_path / "work", cwd=tmp_path)
    assert "numbered anew from 1" in result.stderr
    assert "rotated by its EXIF header" in result.stderr
    assert "coco/bbox_mAP" in result.stdout


def test_every_configuration_can_be_checked():
    """Their data are not here; what is known of them is that the check knows their kinds."""
    for name in ("mask_rcnn_swin_pc.py", "upernet_swin_pc.py", "own_data/coco.py", "own_data/png_labels.py"):
        cfg = load_config(str(CONFIGS / name))
        for loader in ("train", "val", "test"):
            assert all(_kind(leaf) for leaf in leaves(cfg[f"{loader}_dataloader"].dataset)), name
