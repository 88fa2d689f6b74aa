import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from condattn.openmmlab.datasets import digit_scenes
from condattn.openmmlab.datasets.digit_scenes import MARKER, ensure_digit_scenes, write_digit_scenes

SMALL = {"train": 6, "val": 4, "size": 64}
SPLITS = ("training", "validation")
CLI = Path(__file__).parents[1] / "tools" / "dataset" / "digit_scenes.py"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "digit_scenes", **SMALL)


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def semantic_map(root, split, image):
    return np.asarray(Image.open(root / "annotations" / split / image["file_name"].replace(".jpg", ".png")))


def test_same_arguments_same_bytes(scenes, tmp_path):
    assert contents(write_digit_scenes(tmp_path / "again", **SMALL)) == contents(scenes)


def test_other_seed_other_scenes(scenes, tmp_path):
    other = write_digit_scenes(tmp_path / "other", **SMALL, seed=1)
    name = "images/training/000000.jpg"
    assert (other / name).read_bytes() != (scenes / name).read_bytes()


def test_a_scene_does_not_depend_on_how_many_there_are(scenes, tmp_path):
    fewer = contents(write_digit_scenes(tmp_path / "fewer", **{**SMALL, "train": 2}) / "images")
    assert len(fewer) == 6
    assert fewer.items() <= contents(scenes / "images").items()


def test_layout_serves_coco_and_ade20k(scenes):
    for split, count in zip(SPLITS, (6, 4), strict=True):
        names = [f"{i:06d}" for i in range(count)]
        assert sorted(p.name for p in (scenes / "images" / split).iterdir()) == [f"{n}.jpg" for n in names]
        assert sorted(p.name for p in (scenes / "annotations" / split).iterdir()) == [f"{n}.png" for n in names]
        with Image.open(scenes / "images" / split / "000000.jpg") as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


def test_splits_share_no_scan_and_no_photograph(tmp_path):
    root = write_digit_scenes(tmp_path / "scenes", train=60, val=30, size=48)
    train, val = (json.loads((root / "annotations" / f"instances_{s}.json").read_text()) for s in SPLITS)
    for table, key in (("annotations", "scan"), ("images", "photograph")):
        seen = [{row[key] for row in split[table]} for split in (train, val)]
        assert all(len(values) > 1 for values in seen)
        assert not seen[0] & seen[1]


def test_every_scan_belongs_to_one_split():
    indices = [index for split in SPLITS for _, index, _ in digit_scenes._scans(split, seed=0)]
    assert sorted(indices) == list(range(1797))


@pytest.mark.parametrize("split", SPLITS)
def test_annotations_are_consistent(scenes, split):
    coco = COCO(scenes / "annotations" / f"instances_{split}.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list("0123456789")
    for image in coco.loadImgs(coco.getImgIds()):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert 1 <= len(annotations) <= 6
        union = np.zeros((64, 64), np.uint8)
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert mask.sum() == annotation["area"] > 0
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            extents = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == extents
            assert not union[mask].any(), "visible parts never overlap"
            union[mask] = annotation["category_id"]
        np.testing.assert_array_equal(union, semantic_map(scenes, split, image))


def test_scans_carry_their_own_label(scenes):
    from sklearn.datasets import load_digits

    target = load_digits().target
    annotations = json.loads((scenes / "annotations" / "instances_training.json").read_text())["annotations"]
    assert [a["category_id"] - 1 for a in annotations] == [target[a["scan"]] for a in annotations]


def test_digits_are_bright_and_the_photograph_is_dimmed(scenes):
    coco = COCO(scenes / "annotations" / "instances_training.json")
    for image in coco.loadImgs(coco.getImgIds()):
        strongest = np.asarray(Image.open(scenes / "images" / "training" / image["file_name"])).max(axis=-1)
        assert np.median(strongest[semantic_map(scenes, "training", image) == 0]) <= 0.6 * 255
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            assert np.median(strongest[coco.annToMask(annotation) > 0]) > 0.6 * 255


def test_an_existing_folder_is_reused(scenes):
    before = (scenes / MARKER).stat().st_mtime_ns
    assert write_digit_scenes(scenes, **SMALL) == scenes
    assert ensure_digit_scenes(scenes) == scenes
    assert (scenes / MARKER).stat().st_mtime_ns == before


def test_other_parameters_are_refused(scenes):
    before = contents(scenes)
    with pytest.raises(FileExistsError, match=r"train 6 instead of 7.*delete it"):
        write_digit_scenes(scenes, **{**SMALL, "train": 7})
    assert contents(scenes) == before


def test_what_is_no_finished_set_is_refused(scenes, tmp_path):
    for name, text in contents(scenes).items():
        if name != MARKER:
            target = tmp_path / "half" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
    for write in (ensure_digit_scenes, write_digit_scenes):
        with pytest.raises(FileExistsError, match=r"no finished digit scenes.*delete it"):
            write(tmp_path / "half")


def test_an_interruption_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    write_split = digit_scenes._write_split

    def interrupted(root, split, *args):
        if split == "validation":
            raise KeyboardInterrupt
        write_split(root, split, *args)

    monkeypatch.setattr(digit_scenes, "_write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(tmp_path / "digit_scenes", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_do_not_disturb(scenes, tmp_path):
    leftover = tmp_path / ".digit_scenes-killed" / "digit_scenes" / "images"
    leftover.mkdir(parents=True)
    assert contents(write_digit_scenes(tmp_path / "digit_scenes", **SMALL)) == contents(scenes)


def _write_at_once(root, barrier):
    barrier.wait()
    write_digit_scenes(root, **SMALL)


def test_two_processes_may_write_at_once(scenes, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    root = tmp_path / "digit_scenes"
    processes = [context.Process(target=_write_at_once, args=(root, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(root) == contents(scenes)
    assert [p.name for p in tmp_path.iterdir()] == ["digit_scenes"]


def test_the_loser_of_a_race_keeps_the_winners_folder(scenes, tmp_path, monkeypatch):
    root = tmp_path / "digit_scenes"
    write_split = digit_scenes._write_split

    def overtaken(*args):
        write_split(*args)
        with monkeypatch.context() as patch:
            patch.setattr(digit_scenes, "_write_split", write_split)
            write_digit_scenes(root, **SMALL)

    monkeypatch.setattr(digit_scenes, "_write_split", overtaken)
    assert write_digit_scenes(root, **SMALL) == root
    assert contents(root) == contents(scenes)
    assert [p.name for p in tmp_path.iterdir()] == ["digit_scenes"]


@pytest.mark.parametrize(
    ("name", "value"), [("train", 0), ("val", -1), ("size", 47), ("seed", -1)], ids=lambda v: str(v)
)
def test_impossible_parameters_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        write_digit_scenes(tmp_path / "digit_scenes", **{**SMALL, name: value})
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path):
    command = [sys.executable, str(CLI), "here", "--train", "2", "--val", "1", "--size", "48"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (first.returncode, first.stdout) == (0, "digit scenes: here\n")
    other = subprocess.run([*command, "--seed", "3"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 2
    assert other.stderr.startswith("error: here holds digit scenes with other parameters")
    assert other.stderr.count("\n") == 1


def test_import_is_light():
    code = (
        "import sys, condattn.openmmlab.datasets.digit_scenes\n"
        "heavy = {'sklearn', 'skimage', 'PIL', 'pycocotools', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
