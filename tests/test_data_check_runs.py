"""The data check: cached findings, repaired copies, the tool, and trainings."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_sets import Coco, picture, rotated
from runs import DEMO, TOOLS, error_lines, run

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.datasets import CocoDataset  # noqa: F401 (registers)

from condattn.openmmlab.data_check import check as check_module
from condattn.openmmlab.data_check import check_data
from condattn.openmmlab.data_check import coco as coco_check
from condattn.openmmlab.data_check.check import find
from condattn.openmmlab.data_check.sampling import sample
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.launch import load_config


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


def test_a_sample_has_both_ends():
    assert sample(range(100), read_all=False, number=5) == [0, 25, 50, 74, 99]
    assert sample(range(100), read_all=True, number=5) == list(range(100))
    assert sample([3, 4], read_all=False, number=5) == [3, 4]


def test_every_error_is_printed(coco, capsys):
    """The last error is raised as an exception, which the tools print."""
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


def test_a_repaired_copy_is_written_once(coco, monkeypatch):
    coco.content["annotations"][0]["id"] = 0
    coco.write()
    copied = Path(coco.check().ann_file)
    state = copied.stat().st_mtime_ns
    coco.cfg.train_dataloader.dataset.indices = 5
    assert coco.check().ann_file == str(copied)
    assert copied.stat().st_mtime_ns == state


def test_a_cache_folder_that_cannot_take_copies(coco, monkeypatch, tmp_path):
    """The copies go to the temporary folder instead; if there is none either, the error has one line."""
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


def test_a_folder_that_changes_below(label_maps):
    """Cached findings also depend on the subfolders that were searched."""
    (label_maps.folder / "images" / "below").mkdir()
    assert label_maps.check().warnings == []
    picture().save(label_maps.folder / "images" / "below" / "new.png")
    label_maps.dataset.seg_map_suffix = ".PNG"
    for path in list((label_maps.folder / "labels").iterdir()):
        path.rename(path.with_suffix(".PNG"))
    assert "new.png" in label_maps.check().warnings[0]


def test_two_data_sets_have_pictures_of_their_own(coco, tmp_path, call):
    """The page has pictures of each data set; a file in the place of its folder is an error."""
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
    """The first process prints the error, and the launcher ends the others."""
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
    """The tool prints its findings, and writes a page with pictures."""
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
    (line,) = error_lines(errors)
    assert line.startswith("error: train, ")


def test_pictures_of_more_classes_than_coco_has(coco, tmp_path, call):
    """mmdet keeps the 80 colours of COCO."""
    names = [f"class {i}" for i in range(1, 91)]
    coco.content["categories"] = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
    for entry in coco.content["annotations"]:
        entry["category_id"] += 80
    coco.write()
    for loader in ("train", "val"):
        coco.cfg[f"{loader}_dataloader"].dataset.metainfo.classes = names
    (tmp_path / "config.py").write_text(coco.cfg.pretty_text)
    status, _, errors = call("dataset/check", "config.py", "--out", "page")
    assert not status, errors
    assert list(tmp_path.joinpath("page").glob("*.png"))


def test_the_tool_on_label_maps(label_maps, tmp_path, call):
    config = tmp_path / "config.py"
    config.write_text(label_maps.cfg.pretty_text)
    status, output, _ = call("dataset/check", config, "--out", "page")
    assert not status
    assert "test: 6 of 6 images, 3 classes" in output
    assert "<td>dog</td>" in (tmp_path / "page" / "index.html").read_text()


def test_a_training_on_repaired_data(coco, tmp_path):
    """Training and evaluation run although areas are missing, an id is 0, and an image has an EXIF rotation."""
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


@pytest.mark.parametrize("name", ["mask_rcnn_swin_pc", "upernet_swin_pc"])
def test_the_built_in_data(name, scenes, tmp_path):
    """The built-in data are read if they are there, and announced if the run is going to write them."""
    cfg = load_config(str(DEMO / f"{name}.py"))
    for folder, expected in ((scenes, "8 of 8 images"), (tmp_path / "new", f"writes its data to {tmp_path / 'new'}")):
        cfg.train_dataloader.dataset.data_root = str(folder)
        (entry,) = find(cfg, "train")
        assert expected in entry.findings.summary
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_there(label_maps, tmp_path):
    """A class that reads its files alone is not expected to write them."""
    dataset = label_maps.cfg.train_dataloader.dataset
    del dataset["data_prefix"]
    dataset.data_root = str(tmp_path / "nowhere")
    (entry,) = find(label_maps.cfg, "train")
    (error,) = entry.findings.errors
    assert str(tmp_path / "nowhere") in error


def test_images_that_the_tool_reads(coco, tmp_path, call, monkeypatch):
    """A sample, or with --images every one."""
    monkeypatch.setattr(sample, "__defaults__", (2,))  # the first and the last
    (coco.folder / "images" / "3.jpg").write_bytes(b"")
    (tmp_path / "config.py").write_text(coco.cfg.pretty_text)
    assert call("dataset/check", "config.py")[0] is None
    status, _, errors = call("dataset/check", "config.py", "--images")
    assert status == 2 and "3.jpg is empty" in errors
