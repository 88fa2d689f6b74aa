"""The command-line tools as a user runs them: from training to prediction, and in several processes."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIGS, DEMO, LOADERS, NOWHERE, TOOLS, Run, error_lines, free_port, run

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")


# ------------------------------------------------------------------------------------------- the chain


def assert_no_warning(output: str) -> None:
    """Check for warnings, except that four scenes do not contain every digit."""
    lines = [line for line in output.splitlines() if line.startswith("warning:")]
    assert all(re.match(r"warning: val: no (object|pixel) of class", line) for line in lines), lines


def test_detection_trains_and_evaluates(detection):
    assert "Epoch(train) [1][2/2]" in detection.output
    assert re.search(r"Epoch\(val\) \[1\]\[1/1\].*coco/bbox_mAP: .*coco/segm_mAP: ", detection.output)
    assert_no_warning(detection.output)
    assert detection.checkpoint.is_file()


def test_segmentation_trains_and_evaluates(segmentation):
    assert "Iter(train) [2/2]" in segmentation.output
    assert re.search(r"Iter\(val\) \[1/1\].*mIoU: ", segmentation.output)
    assert_no_warning(segmentation.output)
    assert segmentation.checkpoint.is_file()


def assert_went_on(before: Path, after: Path, iterations: int):
    old, new = (torch.load(path, map_location="cpu", weights_only=False) for path in (before, after))
    assert new["meta"]["iter"] == old["meta"]["iter"] + iterations
    assert old["state_dict"].keys() == new["state_dict"].keys()
    changed = [key for key, value in old["state_dict"].items() if not value.equal(new["state_dict"][key])]
    assert any(key.startswith("backbone.stages") for key in changed)
    steps = [{int(s["step"]) for s in c["optimizer"]["state"].values()} for c in (old, new)]
    assert steps == [{old["meta"]["iter"]}, {new["meta"]["iter"]}]


def test_detection_resumes_from_the_latest_checkpoint(detection, tmp_path):
    work_dir = shutil.copytree(detection.work_dir, tmp_path / "run")
    options = ["--cfg-options", *detection.options, *NOWHERE, "train_cfg.max_epochs=2"]
    resume = [detection.config, "--work-dir", work_dir, "--resume"]
    output = run(TOOLS / "train.py", *resume, *options, cwd=tmp_path).stdout
    assert "resumed epoch: 1, iter: 2" in output
    assert "Epoch(train) [2][1/2]" in output
    assert "Epoch(train) [1]" not in output
    assert_went_on(detection.checkpoint, work_dir / "epoch_2.pth", iterations=2)


def test_segmentation_resumes_from_a_named_checkpoint(segmentation, tmp_path):
    options = ["--cfg-options", *segmentation.options, *NOWHERE, "train_cfg.max_iters=4"]
    resume = [segmentation.config, "--resume", segmentation.checkpoint]
    output = run(TOOLS / "train.py", *resume, *options, cwd=tmp_path).stdout
    assert "resumed epoch: 0, iter: 2" in output
    assert "Iter(train) [3/4]" in output
    assert "Iter(train) [2/4]" not in output
    assert "the configuration's is used after iteration 2: train_cfg.max_iters 2 -> 4" in output
    default_work_dir = tmp_path / "work_dirs" / "demo" / "upernet_swin_pc"
    assert_went_on(segmentation.checkpoint, default_work_dir / "iter_4.pth", iterations=2)


@pytest.mark.slow
def test_a_resumed_run_has_the_constants_of_its_first(detection_options, tmp_path):
    config = DEMO / "mask_rcnn_swin_sc.py"
    options = ["--cfg-options", *detection_options, "model.backbone.conditioning=sc(relative=True)"]
    options += ["default_hooks.checkpoint.max_keep_ckpts=2"]
    command = [TOOLS / "train.py", config, "--work-dir", tmp_path / "run", *options]
    run(*command, cwd=tmp_path)
    run(*command, "train_cfg.max_epochs=2", "--resume", cwd=tmp_path)
    first, second = (torch.load(tmp_path / "run" / f"epoch_{n}.pth", weights_only=False)["state_dict"] for n in (1, 2))
    constants = [key for key in first if key.endswith("qkv.weight_correction")]
    assert constants
    assert all(first[key].isfinite().all() and first[key].equal(second[key]) for key in constants)
    assert not any(
        first[key.removesuffix("_correction")].equal(second[key.removesuffix("_correction")]) for key in constants
    )


@pytest.mark.parametrize(
    "base, parts",
    [
        ("mask_rcnn_swin_pc.py", ("coco/bbox_mAP", "coco/segm_mAP")),
        pytest.param("retinanet_swin_pc.py", ("coco/bbox_mAP",), marks=pytest.mark.slow),
        ("png_labels", ("mIoU",)),
    ],
)
def test_ones_own_data(base, parts, scenes, tmp_path):
    """A copy of the configuration for one's own data, with the block at its top edited; a smaller model for speed."""
    name = "png_labels.py" if base == "png_labels" else "coco.py"
    block, rest = (CONFIGS / "own_data" / name).read_text().split("# ------", 1)
    block = block.replace('"../', f'"{CONFIGS}/').replace("mask_rcnn_swin_pc.py", base).replace("data/own", str(scenes))
    block = re.sub(r"classes = .*", f"classes = {[str(n) for n in range(10)]}", block)
    block = block.replace("annotations/train.json", "annotations/instances_training.json")
    block = block.replace("annotations/val.json", "annotations/instances_validation.json")
    block = block.replace("/train", "/training").replace("/val", "/validation").replace("(1333, 800)", "(192, 192)")
    block = block.replace("max_epochs = 24", "max_epochs = 1").replace("max_iters = 8000", "max_iters = 40")
    if base == "png_labels":
        block = block.replace("classes = [", 'classes = ["background", ').replace("(2048, 512)", "(192, 192)")
        block = block.replace("(512, 512)", "(64, 64)").replace("batch_size = 4", "batch_size = 2")
    (tmp_path / "mine.py").write_text(f"{block}# ------{rest}")
    options = ["model.backbone.init_cfg=None", "model.backbone.depths=[1,1,1,1]", "default_hooks.logger.interval=1"]
    options += [
        f"{loader}_dataloader.{setting}"
        for loader in LOADERS
        for setting in ("num_workers=0", "persistent_workers=False")
    ]
    if base == "mask_rcnn_swin_pc.py":
        options += ["model.test_cfg.rcnn.max_per_img=10", "model.train_cfg.rcnn.sampler.num=16"]
    if base == "retinanet_swin_pc.py":
        options += ["model.test_cfg.score_thr=0"]  # all scores are low after such a short training
    if base == "png_labels":
        options += ["train_cfg.max_iters=2", "train_cfg.val_interval=2"]
    output = run(TOOLS / "train.py", "mine.py", "--cfg-options", *options, cwd=tmp_path).stdout
    assert re.search(r"\(train\).* loss: \d", output)
    assert all(re.search(rf"\(val\).*{part}: ", output) for part in parts), output[-2000:]


@pytest.mark.slow
def test_a_backbone_of_timm_through_the_tools(detection_options, scenes, tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "xcit.py").write_text(f"""
_base_ = {str(DEMO / "mask_rcnn_swin_pc.py")!r}
model = dict(
    backbone=dict(_delete_=True, type="ConditionedTimmBackbone", model_name="xcit_nano_12_p16_224"),
    neck=dict(
        _delete_=True, type="SimpleFeaturePyramid", in_channels=128, out_channels=64, num_outs=3, scales=(4, 2, 1)
    ),
)
""")
    options = ["--cfg-options", *detection_options]
    output = run(TOOLS / "train.py", "xcit.py", *options, cwd=tmp_path).stdout
    assert re.search(r"Epoch\(val\) \[1\]\[1/1\].*coco/bbox_mAP: ", output)
    image = next((scenes / "images" / "validation").glob("*.jpg"))
    run(TOOLS / "predict.py", image, "xcit.py", "work_dirs/xcit/epoch_1.pth", "--out-dir", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "vis" / image.name).is_file()


def test_detection_is_tested(detection, tmp_path):
    """The data set has fewer colours than classes, as one has that names more classes than COCO."""
    outputs = ["--work-dir", "test", "--out", "out/predictions.pkl", "--show-dir", "drawn"]
    options = ["--cfg-options", *detection.options, *NOWHERE, "test_dataloader.dataset.metainfo.palette=[(255,0,0)]"]
    test = [TOOLS / "test.py", detection.config, detection.checkpoint]
    output = run(*test, *outputs, *options, cwd=tmp_path).stdout
    assert re.search(r"Epoch\(test\) \[1/1\].*coco/bbox_mAP: .*coco/segm_mAP: ", output)
    predictions = pickle.loads((tmp_path / "out" / "predictions.pkl").read_bytes())
    assert len(predictions) == 4
    assert {"labels", "scores", "bboxes", "masks"} <= predictions[0]["pred_instances"].keys()
    drawn = sorted((tmp_path / "drawn").glob("*.jpg"))
    assert len(drawn) == 4
    assert Image.open(drawn[0]).size == (2 * 192, 192)  # ground truth and prediction
    saved = [path.name for path in (tmp_path / "test").rglob("*.py") if path.parent.name != "vis_data"]
    assert saved == [f"{detection.config.stem}_test.py"]


def test_segmentation_is_tested_with_augmentation(segmentation, tmp_path):
    outputs = ["--work-dir", "test", "--out", "labels", "--show-dir", "drawn", "--tta"]
    options = ["--cfg-options", *segmentation.options]
    test = [TOOLS / "test.py", segmentation.config, segmentation.checkpoint]
    output = run(*test, *outputs, *options, cwd=tmp_path).stdout
    assert re.search(r"Iter\(test\) \[1/1\].*mIoU: ", output)
    labels = [np.array(Image.open(path)) for path in sorted((tmp_path / "labels").glob("*.png"))]
    assert [label.shape for label in labels] == [(192, 192)] * 4
    assert max(label.max() for label in labels) < 11
    assert len(list((tmp_path / "drawn").rglob("test_*.png"))) == 4


@pytest.mark.slow
def test_segmentation_is_tested(segmentation, tmp_path):
    options = ["--cfg-options", *segmentation.options]
    output = run(TOOLS / "test.py", segmentation.config, segmentation.checkpoint, *options, cwd=tmp_path).stdout
    assert re.search(r"Iter\(test\) \[1/1\].*mIoU: ", output)


@pytest.mark.slow
def test_boxes_are_tested_with_augmentation(detection, tmp_path):
    options = [*detection.options, "model.roi_head.mask_head=None", "test_evaluator.metric=bbox"]
    test = [TOOLS / "test.py", detection.config, detection.checkpoint, "--tta", "--cfg-options", *options]
    result = run(*test, cwd=tmp_path)
    assert re.search(r"Epoch\(test\) \[1/1\].*coco/bbox_mAP: ", result.stdout)
    assert any("warning: " in line and "roi_head.mask_head" in line for line in result.stderr.splitlines())


@pytest.fixture
def album(scenes, tmp_path) -> Path:
    """A folder with equal file names in several subfolders, and one file that is no image."""
    sources = sorted((scenes / "images" / "validation").glob("*.jpg"))
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(sources[0], folder / "a.jpg")
    shutil.copy(sources[1], folder / "sub" / "a.jpg")
    Image.open(sources[2]).resize((160, 96)).save(folder / "a.png")
    (folder / "broken.jpg").write_bytes(sources[3].read_bytes()[:100])
    (folder / "empty.jpg").touch()
    return folder


def predict(trained: Run, album: Path) -> Path:
    """Predict an album; check the pictures and return the folder of the predictions."""
    out_dir = album / "results"  # inside the input folder: a second run must not use results as images
    command = [TOOLS / "predict.py", album, trained.config, trained.checkpoint, "--out-dir", out_dir]
    result = run(*command, "--score-thr", "0", "--batch-size", "4", cwd=album.parent, status=1)
    for name, line in zip(("broken.jpg", "empty.jpg"), error_lines(result.stderr), strict=True):
        assert str(album / name) in line
    assert "Traceback" not in result.stderr
    names = {Path("a.jpg"), Path("a.png"), Path("sub/a.jpg")}
    pictures = {path.relative_to(out_dir / "vis") for path in (out_dir / "vis").rglob("*.*")}
    assert pictures == names
    for name in names:
        before, after = (Image.open(folder / name) for folder in (album, out_dir / "vis"))
        assert before.size == after.size
        assert np.abs(np.subtract(before, after, dtype=float)).mean() > 1
    return out_dir / "preds"


def test_detection_predicts_images(detection, album):
    predictions = predict(detection, album)
    result = json.loads((predictions / "sub" / "a.jpg.json").read_text())
    assert len({len(result[key]) for key in ("labels", "scores", "bboxes", "masks")}) == 1
    assert result["masks"][0]["size"] == [192, 192]
    assert json.loads((predictions / "a.jpg.json").read_text()) != result
    assert json.loads((predictions / "a.png.json").read_text())["masks"][0]["size"] == [96, 160]


def test_segmentation_predicts_images(segmentation, album):
    predictions = predict(segmentation, album)
    sizes = {path.name: Image.open(path).size for path in predictions.glob("*.png")}
    assert sizes == {"a.jpg.png": (192, 192), "a.png.png": (160, 96)}
    assert np.array(Image.open(predictions / "sub" / "a.jpg.png")).max() < 11


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_an_image_that_cannot_be_predicted_costs_no_other_its_prediction(kind, request, call, scenes, tmp_path):
    """The label map of an image of one pixel can be predicted, but not drawn."""
    trained = request.getfixturevalue(kind)
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(min((scenes / "images" / "validation").glob("*.jpg")), folder / "b.jpg")
    Image.new("RGB", (5000, 1)).save(folder / "a.png")
    Image.new("RGB", (1, 1)).save(folder / "c.png")
    command = ["predict", folder, trained.config, trained.checkpoint, "--out-dir", "out", "--batch-size", 3]
    status, output, errors = call(*command)
    assert status == 1
    drawn = kind == "detection"
    first, *others = error_lines(errors)
    assert f"the prediction of {folder / 'a.png'} fails (error: OpenCV" in first
    if drawn:
        assert others == []
    else:
        (other,) = others
        assert f"the prediction of {folder / 'c.png'} is saved, but cannot be drawn (IndexError" in other
    assert f"{2 if drawn else 1} of 3 images predicted" in output
    suffix = ".json" if drawn else ".png"
    assert {path.name for path in (tmp_path / "out" / "preds").iterdir()} == {f"b.jpg{suffix}", f"c.png{suffix}"}
    assert {path.name for path in (tmp_path / "out" / "vis").iterdir()} == ({"b.jpg", "c.png"} if drawn else {"b.jpg"})


def test_images_that_the_loader_of_the_configuration_alone_can_read(call, tmp_path):
    """A damaged image gives one line, and costs no other its prediction."""
    tifffile = pytest.importorskip("tifffile")
    from condattn.openmmlab.runner.launch import build_model, load_config
    from condattn.openmmlab.runner.rewriting import write_checkpoint

    (tmp_path / "bands.py").write_text(
        f"_base_ = {str(DEMO / 'upernet_swin_pc.py')!r}\n"
        "model = dict(\n"
        "    backbone=dict(in_channels=5, init_cfg=None),\n"
        "    data_preprocessor=dict(mean=None, std=None, bgr_to_rgb=False),\n"
        ")\n"
        "decoding = dict(color_type='unchanged', imdecode_backend='tifffile', to_float32=True)\n"
        "loader = dict(decoding, type='LoadImageFromFile')\n"
        "test_dataloader = dict(dataset=dict(pipeline=[loader, dict(type='PackSegInputs')]))\n"
    )
    (tmp_path / "images").mkdir()
    bands = np.random.default_rng(0).integers(0, 4000, (64, 64, 5)).astype(np.uint16)
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(tmp_path / "images" / name, bands, planarconfig="contig", photometric="minisblack")
    (tmp_path / "images" / "a.tif").write_bytes(b"no image")
    write_checkpoint(tmp_path / "x.pth", build_model(load_config("bands.py")), {})
    status, output, errors = call("predict", "images", "bands.py", "x.pth", "--out-dir", "out", "--batch-size", 2)
    assert status == 1
    (line,) = error_lines(errors)
    assert "the prediction of images/a.tif fails (TiffFileError" in line
    assert "1 of 2 images predicted" in output
    assert Image.open(tmp_path / "out" / "vis" / "b.tif").size == (64, 64)
    calibrate = ["checkpoints/calibrate", "bands.py", "x.pth", "--images", "images", "--out", "new.pth"]
    status, _, errors = call(*calibrate)
    assert status == 2
    assert "warning: 1 image cannot be read: images/a.tif (TiffFileError" in errors
    assert "is of a conditioned model already" in error_lines(errors)[0]


CONCATENATED = """
_base_ = {base!r}
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="ConcatDataset",
        datasets=[{{{{_base_.test_dataloader.dataset}}}}, {{{{_base_.test_dataloader.dataset}}}}],
    )
)
"""


def test_data_sets_in_a_wrapper(segmentation, call, scenes, tmp_path):
    """Pipeline and classes are those of the first data set; test-time augmentation applies to all."""
    (tmp_path / "two.py").write_text(CONCATENATED.format(base=str(segmentation.work_dir / segmentation.config.name)))
    image = min((scenes / "images" / "validation").glob("*.jpg"))
    status, _, errors = call("predict", image, "two.py", segmentation.checkpoint, "--out-dir", "out")
    assert status == 0, errors
    assert np.array(Image.open(tmp_path / "out" / "preds" / f"{image.name}.png")).shape == (192, 192)
    status, output, errors = call("test", "two.py", segmentation.checkpoint, "--tta", "--out", "labels")
    assert status is None, errors
    assert re.search(r"Iter\(test\) \[2/2\].*mIoU: ", output + errors)


def test_results_of_an_earlier_prediction_are_no_input(album):
    from condattn.openmmlab.runner.inference import find_images

    (album / "vis").mkdir()
    shutil.copy(album / "a.jpg", album / "vis" / "a.jpg")
    names = [str(name) for _, name in find_images(album, out_dir=album)]
    assert names == ["a.jpg", "a.png", "broken.jpg", "empty.jpg", "sub/a.jpg"]
    assert find_images(album / "a.jpg", out_dir=album) == [(album / "a.jpg", Path("a.jpg"))]


# --------------------------------------------------------------------------------- several processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPUs")
def test_two_processes_train_together(segmentation_options, tmp_path):
    options = [*segmentation_options, "train_cfg.max_iters=1"]
    command = ["bash", TOOLS / "dist_train.sh", DEMO / "upernet_swin_pc.py", "2", "--work-dir", "run"]
    output = run(*command, "--cfg-options", *options, cwd=tmp_path, PORT=free_port()).stdout
    assert "GPU number: 2" in output
    assert output.count("Iter(train) [1/1]") == 1
    assert (tmp_path / "run" / "iter_1.pth").is_file()
    (scalars,) = (tmp_path / "run").glob("*/vis_data/scalars.json")
    assert scalars.read_text().count('"spectra/') == 6 * 12  # only the first process logs them
    dumped = (tmp_path / "run" / "upernet_swin_pc.py").read_text()
    assert "gloo" not in dumped and "MMDistributedDataParallel" not in dumped


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPUs")
def test_two_processes_test_together(detection, tmp_path):
    command = ["bash", TOOLS / "dist_test.sh", detection.config, detection.checkpoint, "2"]
    output = run(*command, "--cfg-options", *detection.options, cwd=tmp_path, PORT=free_port()).stdout
    assert len(re.findall(r"Epoch\(test\) \[1/1\].*coco/bbox_mAP: ", output)) == 1


def test_synchronised_batch_norm_becomes_local():
    from condattn.openmmlab.processes import _revert_sync_bn

    model = {"neck": {"norm_cfg": {"type": "SyncBN"}}, "heads": [{"norm_cfg": {"type": "GN"}}, {"type": "MMSyncBN"}]}
    _revert_sync_bn(model)
    assert model == {"neck": {"norm_cfg": {"type": "BN"}}, "heads": [{"norm_cfg": {"type": "GN"}}, {"type": "BN"}]}


@pytest.mark.parametrize("arguments", [(), ("config.py",), ("config.py", "two")])
def test_scripts_explain_wrong_arguments(arguments, tmp_path):
    for script in TOOLS.glob("*.sh"):
        result = run("bash", script, *arguments, cwd=tmp_path, status=2)
        assert result.stderr.startswith("usage: ")


@pytest.mark.parametrize(("tool", "inputs"), [("train", ["configs/x.py"]), ("test", ["configs/x.py", "x.pth"])])
def test_slurm_scripts_start_a_task_a_gpu(tool, inputs, tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "port $MASTER_PORT" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", GPUS="4", PORT="1234", SRUN_ARGS="--time=1 --exclusive")
    command = ["bash", TOOLS / f"slurm_{tool}.sh", "part", "job", *inputs, "--work-dir", "a b"]
    lines = run(*command, cwd=tmp_path, **env).stdout.splitlines()
    assert {"port 1234", "--partition=part", "--job-name=job", "--time=1", "--exclusive"} <= set(lines)
    assert {"--ntasks=4", "--ntasks-per-node=4", "--gres=gpu:4"} <= set(lines)
    script = next(index for index, line in enumerate(lines) if line.endswith(f"{tool}.py"))
    assert Path(lines[script]).is_file()
    assert lines[script + 1 :] == [*inputs, "--launcher", "slurm", "--work-dir", "a b"]


def test_predictions_in_a_window(call, detection, monkeypatch):
    asked = []

    def build(cfg, *_):
        asked.append(cfg.default_hooks.visualization)
        sys.exit(7)

    command = ["test", detection.config, detection.checkpoint, "--show", "--wait-time", 5]
    status, _, errors = call(*command, "--cfg-options", *detection.options, build_runner=build)
    assert status == 7, errors
    assert (asked[0].draw, asked[0].show, asked[0].wait_time) == (True, True, 5.0)


def test_instances_below_the_threshold_are_not_drawn(call, detection, scenes, tmp_path):
    Image.open(min((scenes / "images" / "validation").glob("*.jpg"))).save(tmp_path / "a.png")
    changed = []
    for threshold in (0, 1.1):
        command = ["predict", "a.png", detection.config, detection.checkpoint, "--out-dir", f"out{threshold}"]
        status, _, errors = call(*command, "--score-thr", threshold)
        assert not status, errors
        before, after = (
            np.asarray(Image.open(tmp_path / one), float) for one in ("a.png", f"out{threshold}/vis/a.png")
        )
        changed.append(np.abs(before - after).mean())
    assert changed[0] > 1 > 2 * changed[1]


def test_a_prediction_of_another_kind(tmp_path):
    from mmengine.structures import BaseDataElement

    from condattn.openmmlab.errors import UserError
    from condattn.openmmlab.runner.inference import save_prediction

    with pytest.raises(UserError, match="predicts instances or a label map, found gt_label"):
        save_prediction(BaseDataElement(gt_label=1), tmp_path / "a")
