"""The data check: label maps."""

import re
import shutil

import numpy as np
import pytest
from data_sets import HEIGHT, WIDTH, picture
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.datasets import CocoDataset  # noqa: F401 (registers)
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations

from condattn.openmmlab.data_check import label_maps as label_maps_check
from condattn.openmmlab.data_check.label_maps import MapUse, check_label_maps, to_classes


def test_label_maps_that_fit(label_maps):
    label_maps.label(0, np.full((HEIGHT, WIDTH), 1), mode="P")
    findings = label_maps.check()
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
def test_a_label_map_that_cannot_work(label_maps, values, mode, message, loader):
    label_maps.label(0, values, mode)
    (error,) = label_maps.check(loader).errors
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2, 255, 0), "0 and 255 alone.*'cat' has no pixel"),
        (FULL * 0, "every labelled pixel is 'background'"),
        (FULL * 255, "every pixel of the label maps is ignored"),
    ],
)
def test_label_maps_that_teach_nothing(label_maps, values, message):
    for i in range(6):
        label_maps.label(i, values)
    (error,) = label_maps.check().errors
    assert re.search(message, error), error


def test_classes_without_pixels_and_maps_without_labels(label_maps):
    for i in range(6):
        label_maps.label(i, (np.arange(HEIGHT * WIDTH) % 2).reshape(HEIGHT, WIDTH))
    label_maps.label(5, FULL * 255)
    assert label_maps.check().errors == []
    absent, ignored = label_maps.check().warnings
    assert "no pixel of class 'dog'" in absent
    assert "1 label map is ignored in every pixel" in ignored and "5.png" in ignored


def test_missing_label_maps(label_maps):
    (label_maps.folder / "labels" / "2.png").unlink()
    (error,) = label_maps.check().errors
    assert "1 of 6 images have no label map" in error and "2.png" in error


def test_half_of_a_label_map(label_maps):
    rng = np.random.default_rng(0)
    label_maps.label(0, rng.integers(0, 3, (HEIGHT, WIDTH)))
    path = label_maps.folder / "labels" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    (error,) = label_maps.check().errors
    assert "0.png is damaged or cut short" in error


def test_another_suffix(label_maps):
    """mmseg silently ignores images with another suffix, including the same one in upper case."""
    for i in range(3):
        shutil.move(label_maps.folder / "images" / f"{i}.jpg", label_maps.folder / "images" / f"{i}.JPG")
    findings = label_maps.check()
    assert findings.summary.startswith("3 of 3 images")
    assert any("3 images have another suffix" in warning and "0.JPG" in warning for warning in findings.warnings)
    label_maps.dataset.img_suffix = ".png"
    (error,) = label_maps.check().errors
    assert "no image with the suffix .png" in error and "set img_suffix" in error


def test_testing_without_label_maps(label_maps):
    """Missing label maps are an error, unless nothing is evaluated and nothing loads them."""
    dataset = label_maps.cfg.test_dataloader.dataset
    del dataset.data_prefix["seg_map_path"]
    (error,) = label_maps.check("test").errors
    assert "which the evaluation needs" in error
    label_maps.cfg.test_evaluator.format_only = True
    (error,) = label_maps.check("test").errors
    assert "which LoadAnnotations needs" in error
    dataset.pipeline.pop()
    assert label_maps.check("test").errors == []


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
    use = MapUse([], [], 0, "", "", "", "", classes, 255, reduce_zero_label, dataset.label_map, True)
    np.testing.assert_array_equal(to_classes(np.arange(256), use), expected)


def test_other_loaders_of_label_maps(label_maps):
    label_maps.label(0, FULL, "RGB")
    label_maps.dataset.pipeline[1] = dict(type="LoadAnnotations", imdecode_backend="cv2")
    assert label_maps.check().errors == []


def test_negative_values_of_label_maps(label_maps):
    values = np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2, -1, 1).astype(np.int32)
    Image.fromarray(values).save(label_maps.folder / "labels" / "0.tif")
    (label_maps.folder / "labels" / "0.tif").rename(label_maps.folder / "labels" / "0.png")
    (error,) = label_maps.check().errors
    assert "1 label map has values that no class has, such as -1" in error


def test_what_a_label_map_leaves_out_is_ignored(label_maps):
    """Classes that are not selected become 255, whatever ``ignore_index`` is."""
    use = dict(
        images=[], maps=[], total=6, folder="", suffix=".jpg", map_suffix=".png", map_folder="", reduce_zero_label=False
    )
    images = [str(label_maps.folder / "images" / f"{i}.jpg") for i in range(6)]
    maps = [str(label_maps.folder / "labels" / f"{i}.png") for i in range(6)]
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


def test_label_maps_without_names_of_classes(label_maps):
    label_maps.dataset.metainfo = None
    findings = label_maps.check()
    assert findings.errors == []
    assert "metainfo has no classes" in findings.warnings[0]


def test_no_label_map_is_there(label_maps):
    label_maps.dataset.seg_map_suffix = "_ids.png"
    (error,) = label_maps.check().errors
    assert "6 of 6 images have no label map" in error and "labels has 0.png, 1.png, 2.png and 3 more" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [("0\n\n1\n", "1 line is blank: line 2"), ("0.jpg\n1.jpg\n", "2 names have the suffix .jpg, such as 0.jpg")],
)
def test_lists_of_images(label_maps, text, message):
    (label_maps.folder / "split.txt").write_text(text)
    label_maps.dataset.ann_file = "split.txt"
    (error,) = label_maps.check().errors
    assert message in error


def test_a_list_that_is_no_text(label_maps):
    (label_maps.folder / "split.txt").write_bytes(b"\xff\xfe\n")
    label_maps.dataset.ann_file = "split.txt"
    (error,) = label_maps.check().errors
    assert error.startswith("the images cannot be listed")


def test_training_without_label_maps(label_maps):
    del label_maps.dataset.data_prefix["seg_map_path"]
    assert "which training needs" in label_maps.check().errors[0]


def test_images_with_the_suffix_of_the_label_maps(label_maps):
    """Images that are left out because of their suffix are named, and label maps without an image too."""
    for i in range(3):
        picture().save(label_maps.folder / "images" / f"other{i}.png")
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(label_maps.folder / "labels" / f"other{i}.png")
    for folder in ("images", "labels"):  # hidden files, such as those of macOS, are none
        (label_maps.folder / folder / "._0.png").write_text("hidden")
    findings = label_maps.check()
    assert findings.errors == []
    assert re.search("3 images have another suffix than .jpg in .*: other0.png", findings.warnings[0])
    assert "3 label maps have no image: other0.png" in findings.warnings[1]


def test_label_maps_beside_their_images(label_maps):
    for path in (label_maps.folder / "labels").iterdir():
        shutil.move(path, label_maps.folder / "images")
    label_maps.dataset.data_prefix.seg_map_path = "images"
    findings = label_maps.check()
    assert (findings.errors, findings.warnings) == ([], [])


def test_label_maps_that_are_too_large_for_pillow(label_maps, monkeypatch):
    monkeypatch.setattr(label_maps_check, "PIXELS", 100)
    (error,) = label_maps.check().errors
    assert "has more than 100 pixels, the most that Pillow loads in training; cut it into tiles" in error
