"""The data check: images."""

import re
import shutil
from pathlib import Path

import mmcv
import numpy as np
import pytest
from data_sets import EXIF_ORIENTATION, HEIGHT, WIDTH, picture, rotated
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.datasets import CocoDataset  # noqa: F401 (registers)
from mmengine.registry import DATASETS, TRANSFORMS

from condattn.openmmlab.data_check.check import AS_ANNOTATED, adapt, find
from condattn.openmmlab.data_check.images import find_missing, walk


def test_names_of_images_with_backslashes(coco):
    (coco.folder / "images" / "a").mkdir()
    for image in coco.content["images"]:
        shutil.move(coco.folder / "images" / image["file_name"], coco.folder / "images" / "a")
        image["file_name"] = f"a\\{image['file_name']}"
    coco.write()
    assert coco.repaired()["images"][0]["file_name"] == "a/1.jpg"


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
    """Images are loaded in the orientation of the annotation."""
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


FULL = np.ones((HEIGHT, WIDTH), int)


@pytest.mark.parametrize("as_stored", [True, False])
def test_rotation_of_images_with_label_maps(label_maps, as_stored):
    rotated(label_maps.folder / "images" / "0.jpg")
    if not as_stored:
        label_maps.label(0, FULL.T)
    (entry,) = find(label_maps.cfg, "train")
    assert (entry.findings.errors, entry.findings.as_annotated) == ([], as_stored)
    adapt(label_maps.cfg, entry)
    sample = DATASETS.build(label_maps.dataset)[0]
    assert sample["img"].shape[:2] == sample["gt_seg_map"].shape == ((HEIGHT, WIDTH) if as_stored else (WIDTH, HEIGHT))


def test_missing_files_of_missing_folders(tmp_path):
    assert find_missing([str(tmp_path / "no" / "a.jpg")]) == [str(tmp_path / "no" / "a.jpg")]


def test_images_alone_where_nothing_is_evaluated(coco):
    """The image list of a submission to a test server has no annotations."""
    coco.cfg.val_evaluator.format_only = True
    del coco.content["annotations"]
    coco.write()
    findings = coco.check("val")
    assert (findings.errors, findings.summary[:13]) == ([], "6 of 6 images")
    assert "a list of objects named 'annotations'" in coco.check("train").errors[0]


def test_other_loaders_of_images(coco):
    """With another loader, files need not be images, but they must exist."""
    (coco.folder / "images" / "1.jpg").write_text("raw")
    assert "cannot be read" in coco.check().errors[0]
    coco.cfg.train_dataloader.dataset.pipeline[0] = dict(type="LoadMultiChannelImageFromFiles")
    assert coco.check().errors == []
    (coco.folder / "images" / "1.jpg").unlink()
    assert "1 of 6 images are missing" in coco.check().errors[0]


def test_images_of_every_size(coco, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert coco.check().errors == []
    assert Image.MAX_IMAGE_PIXELS == 100


def test_links_to_nowhere_and_folders(coco):
    for i, make in ((1, lambda path: path.symlink_to("nowhere.jpg")), (2, Path.mkdir)):
        path = coco.folder / "images" / f"{i}.jpg"
        path.unlink()
        make(path)
    (error,) = coco.check().errors
    assert "1.jpg is a link to nowhere.jpg, which is not there" in error and "2.jpg is a folder" in error


@pytest.mark.parametrize("orientation", [0, 9])
def test_orientations_that_are_none(coco, orientation):
    """OpenCV treats images with an invalid orientation as upright."""
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


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("name", ["exif.jpg", "exif.png", "exif.tif", "exif.webp", "xmp.jpg"])
def test_orientations_as_they_are_loaded(coco, name, upright):
    """The check accepts exactly the sizes of annotations with which the image is loaded to that size."""
    path = coco.folder / "images" / name
    if name == "xmp.jpg":
        picture().save(path, xmp=XMP)
        with Image.open(path) as image:
            assert image.getexif()[EXIF_ORIENTATION] == 6
    else:
        rotated(path)
    size = (HEIGHT, WIDTH) if upright else (WIDTH, HEIGHT)
    coco.content["images"][0].update(file_name=name, width=size[0], height=size[1])
    coco.write()
    (entry,) = find(coco.cfg, "train")
    adapt(coco.cfg, entry)
    loader = TRANSFORMS.build(entry.settings["pipeline"][0])
    loaded = loader(dict(img_path=str(path), width=size[0], height=size[1]))["img"]
    assert (loaded.shape[1::-1] == size) == (not any("not as large" in error for error in entry.findings.errors))
    if not upright and not name.endswith("tif"):  # OpenCV always applies the orientation of a TIFF
        assert entry.findings.errors == [] and any(name in warning for warning in entry.findings.warnings)


def test_rotated_tiffs(coco):
    rotated(coco.folder / "images" / "turned.tif", 3)
    coco.content["images"][0]["file_name"] = "turned.tif"
    coco.write()
    findings = coco.check()
    assert findings.errors == [] and "turned.tif" in findings.warnings[0]


@pytest.mark.parametrize("name", ["a.tga", "a.pcx", "float.tif"])
def test_images_that_opencv_cannot_read(coco, name):
    path = coco.folder / "images" / name
    (picture().convert("F") if name == "float.tif" else picture()).save(path)
    coco.content["images"][0]["file_name"] = name
    coco.write()
    (error,) = coco.check().errors
    assert "cannot be decoded by OpenCV, which loads images in training" in error
    assert mmcv.imfrombytes(path.read_bytes()) is None


def test_files_that_may_not_be_read(coco, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("condattn.openmmlab.data_check.images.Image.open", refuse)
    (error,) = coco.check().errors
    assert "may not be read (change its permissions)" in error
    monkeypatch.undo()
    assert coco.check().errors == []  # an error is not cached


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("caf\u00e9.jpg", "the folder has cafe\u0301.jpg.*other Unicode characters"),
        ("a%20b.jpg", "the folder has a b.jpg"),
        ("images/1.jpg", "they are in .*images: take the folder out of file_name"),
    ],
)
def test_hints_for_missing_images(coco, name, hint):
    picture().save(coco.folder / "images" / "cafe\u0301.jpg")
    picture().save(coco.folder / "images" / "a b.jpg")
    coco.content["images"][0]["file_name"] = name
    coco.write()
    (error,) = coco.check().errors
    assert re.search(hint, error), error


def test_linked_folders(tmp_path):
    """Linked folders are searched too, each once."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").write_text("")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "b" / "circle").symlink_to(tmp_path / "a")
    assert [name for _, names in walk(tmp_path / "a") for name in names] == ["1.jpg"]


def test_relative_paths_are_of_their_folder(coco, monkeypatch, tmp_path):
    """The same configuration in another working folder refers to other data."""
    coco.cfg.train_dataloader.dataset.data_root = "."
    monkeypatch.chdir(coco.folder)
    assert coco.check().errors == []
    other = tmp_path / "other"
    shutil.copytree(coco.folder / "images", other / "images")
    shutil.copy2(coco.folder / "annotations.json", other)
    (other / "images" / "1.jpg").unlink()
    monkeypatch.chdir(other)
    assert "1 of 6 images are missing" in coco.check().errors[0]


def test_sixteen_bits_file_by_file(coco):
    """Dark files are an error despite one bright file; one dark file among bright ones is a warning."""
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


def test_files_that_accompany_an_image(label_maps):
    """Files like those of Cityscapes beside the images are not reported as images with another suffix; others are."""
    for i in range(6):
        shutil.move(label_maps.folder / "images" / f"{i}.jpg", label_maps.folder / "images" / f"a_{i}_rgb.jpg")
        shutil.move(label_maps.folder / "labels" / f"{i}.png", label_maps.folder / "labels" / f"a_{i}_ids.png")
        picture().save(label_maps.folder / "images" / f"a_{i}_color.png")
    label_maps.dataset.update(img_suffix="_rgb.jpg", seg_map_suffix="_ids.png")
    findings = label_maps.check()
    assert (findings.errors, findings.warnings) == ([], [])
    picture().save(label_maps.folder / "images" / "b.png")
    assert "1 image has another suffix than _rgb.jpg" in label_maps.check().warnings[0]


def test_images_of_bad_label_maps_are_checked(label_maps):
    label_maps.label(0, FULL, "RGB")
    (label_maps.folder / "images" / "0.jpg").write_bytes(b"")
    maps, images = label_maps.check().errors
    assert "0.png has 3 channels" in maps and "0.jpg is empty" in images
