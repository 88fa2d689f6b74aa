"""Small data sets with files and configurations that tests can damage."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.datasets import CocoDataset  # noqa: F401 (registers)
from mmengine.config import Config
from mmengine.registry import init_default_scope

from condattn.openmmlab.data_check.check import adapt, find

WIDTH, HEIGHT = 64, 48


EXIF_ORIENTATION = 0x0112


def picture(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def rotated(path: Path, orientation: int = 6, **size: int) -> None:
    """Write an image with an EXIF orientation in its header."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    picture(**size).save(path, exif=exif)


class Coco:
    """A small data set in COCO's format, and a configuration for it."""

    def __init__(self, folder: Path) -> None:
        init_default_scope("mmdet")
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
        """Write the current annotations to the annotation file."""
        (self.folder / "annotations.json").write_text(json.dumps(self.content))

    def check(self, loader: str = "train"):
        """The findings of a loader."""
        init_default_scope("mmdet")
        (entry,) = find(self.cfg, loader)
        return entry.findings

    def repaired(self, loader: str = "train") -> dict:
        """The content of the repaired copy of the annotations, after the configuration was adapted to it."""
        (entry,) = find(self.cfg, loader)
        assert not entry.findings.errors
        adapt(self.cfg, entry)
        assert entry.settings["ann_file"] == entry.findings.ann_file != ""
        return json.loads(Path(entry.findings.ann_file).read_text())


class LabelMaps:
    """A small data set of images and label maps, and a configuration for it."""

    def __init__(self, folder: Path) -> None:
        init_default_scope("mmseg")
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
