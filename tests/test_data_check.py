"""The check of data: what cannot work is refused, what follows from the rest is repaired, and what is lost is said."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIGS, DEMO, TOOLS, error_lines, run

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.datasets import CocoDataset  # noqa: F401 (registers)
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from condattn.openmmlab.data_check import check_data
from condattn.openmmlab.data_check import coco as coco_check
from condattn.openmmlab.data_check.check import AS_ANNOTATED, _kind, adapt, find
from condattn.openmmlab.data_check.images import find_missing
from condattn.openmmlab.data_check.label_maps import MapUse, to_classes
from condattn.openmmlab.data_check.paths import leaves
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
    with pytest.raises(SystemExit) as exit_:
        check_data(coco.cfg, "train")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == ""


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
