"""The command-line tools as a user runs them: the whole chain, several processes, and bad input."""

import importlib.util
import json
import logging
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from condattn.datasets.digit_scenes import write_digit_scenes
from condattn.engine import launch
from condattn.engine.checkpoints import check_fit, check_pretrained, drop_pretrained
from condattn.engine.errors import UserError, run_tool
from condattn.engine.progress import ProgressHook

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
DEMO = ROOT / "configs" / "demo"
LOADERS = ("train", "val", "test")
NOWHERE = ["model.backbone.init_cfg.type=Pretrained", "model.backbone.init_cfg.checkpoint=nowhere.pth"]


@dataclass(frozen=True)
class Run:
    """A finished training of a demo configuration."""

    config: Path
    options: list[str]
    work_dir: Path
    checkpoint: Path
    output: str


def run(*command, cwd: Path, status: int = 0, **env: str) -> subprocess.CompletedProcess:
    """Run a tool as a user does; fail with its output unless it exits with ``status``."""
    if str(command[0]).endswith(".py"):
        command = (sys.executable, *command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", train=8, val=4)


@pytest.fixture(scope="module")
def small(scenes) -> list[str]:
    """Options for runs of seconds: a handful of scenes, no worker processes."""
    options = ["default_hooks.logger.interval=1"]
    for loader in LOADERS:
        options += [
            f"{loader}_dataloader.dataset.data_root={scenes}",
            f"{loader}_dataloader.batch_size=4",
            f"{loader}_dataloader.num_workers=0",
            f"{loader}_dataloader.persistent_workers=False",
        ]
    return options


@pytest.fixture(scope="module")
def detection_options(small, scenes) -> list[str]:
    ann_file = scenes / "annotations" / "instances_validation.json"
    return [
        *small,
        f"val_evaluator.ann_file={ann_file}",
        f"test_evaluator.ann_file={ann_file}",
        "train_cfg.max_epochs=1",
        "train_cfg.val_interval=1",
    ]


@pytest.fixture(scope="module")
def segmentation_options(small) -> list[str]:
    return [*small, "train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]


def train(config: Path, options: list[str], folder: Path, checkpoint: str) -> Run:
    work_dir = folder / "run"
    result = run(TOOLS / "train.py", config, "--work-dir", work_dir, "--cfg-options", *options, cwd=folder)
    return Run(config, options, work_dir, work_dir / checkpoint, result.stdout + result.stderr)


@pytest.fixture(scope="module")
def detection(detection_options, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("detection")
    return train(DEMO / "mask_rcnn_swin_pc.py", detection_options, folder, "epoch_1.pth")


@pytest.fixture(scope="module")
def segmentation(segmentation_options, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("segmentation")
    return train(DEMO / "upernet_swin_pc.py", segmentation_options, folder, "iter_2.pth")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call a tool in this process, from an empty folder; return its status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(tool: str, *arguments) -> tuple[int, str, str]:
        spec = importlib.util.spec_from_file_location(f"condattn_tools_{tool}", TOOLS / f"{tool}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_tool(module.main)
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refuse(call, tmp_path):
    """Call a tool with bad input: expect status 2, one line that has ``parts``, and nothing written."""

    def refuse(tool: str, *arguments, parts: tuple[str, ...]):
        before = sorted(tmp_path.rglob("*"))
        status, _, errors = call(tool, *arguments)
        assert status == 2
        (line,) = error_lines(errors)
        assert all(part in line for part in parts), line
        assert sorted(tmp_path.rglob("*")) == before

    return refuse


# ------------------------------------------------------------------------------------------- the chain


def test_detection_trains_and_evaluates(detection):
    assert "Epoch(train) [1][2/2]" in detection.output
    assert re.search(r"Epoch\(val\) \[1\]\[1/1\].*coco/bbox_mAP: .*coco/segm_mAP: ", detection.output)
    assert "warning:" not in detection.output
    assert detection.checkpoint.is_file()


def test_segmentation_trains_and_evaluates(segmentation):
    assert "Iter(train) [2/2]" in segmentation.output
    assert re.search(r"Iter\(val\) \[1/1\].*mIoU: ", segmentation.output)
    assert "warning:" not in segmentation.output
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
    default_work_dir = tmp_path / "work_dirs" / "demo" / "upernet_swin_pc"
    assert_went_on(segmentation.checkpoint, default_work_dir / "iter_4.pth", iterations=2)


def test_detection_is_tested(detection, tmp_path):
    outputs = ["--work-dir", "test", "--out", "out/predictions.pkl", "--show-dir", "drawn"]
    options = ["--cfg-options", *detection.options, *NOWHERE]
    test = [TOOLS / "test.py", detection.config, detection.checkpoint]
    output = run(*test, *outputs, *options, cwd=tmp_path).stdout
    assert re.search(r"Epoch\(test\) \[1/1\].*coco/bbox_mAP: .*coco/segm_mAP: ", output)
    predictions = pickle.loads((tmp_path / "out" / "predictions.pkl").read_bytes())
    assert len(predictions) == 4
    assert {"labels", "scores", "bboxes", "masks"} <= predictions[0]["pred_instances"].keys()
    drawn = sorted((tmp_path / "drawn").glob("*.jpg"))
    assert len(drawn) == 4
    assert Image.open(drawn[0]).size == (2 * 192, 192)  # ground truth and prediction


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
    assert "roi_head.mask_head" in next(line for line in result.stderr.splitlines() if "warning: " in line)


@pytest.fixture
def album(scenes, tmp_path) -> Path:
    """A folder in which names repeat, with one file that is no image."""
    sources = sorted((scenes / "images" / "validation").glob("*.jpg"))
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(sources[0], folder / "a.jpg")
    shutil.copy(sources[1], folder / "sub" / "a.jpg")
    Image.open(sources[2]).resize((160, 96)).save(folder / "a.png")
    (folder / "broken.jpg").write_bytes(sources[3].read_bytes()[:100])
    return folder


def predict(trained: Run, album: Path) -> Path:
    """Predict an album; check the pictures and return the folder of the predictions."""
    out_dir = album / "results"  # below the input: a second run must not take results for images
    command = [TOOLS / "predict.py", album, trained.config, trained.checkpoint, "--out-dir", out_dir]
    result = run(*command, "--score-thr", "0", "--batch-size", "4", cwd=album.parent, status=1)
    (line,) = error_lines(result.stderr)
    assert str(album / "broken.jpg") in line
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


def test_results_of_an_earlier_prediction_are_no_input(album):
    from condattn.engine.inference import find_images

    (album / "vis").mkdir()
    shutil.copy(album / "a.jpg", album / "vis" / "a.jpg")
    names = [str(name) for _, name in find_images(album, out_dir=album)]
    assert names == ["a.jpg", "a.png", "broken.jpg", "sub/a.jpg"]
    assert find_images(album / "a.jpg", out_dir=album) == [(album / "a.jpg", Path("a.jpg"))]


# --------------------------------------------------------------------------------- several processes


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPUs")
def test_two_processes_train_together(segmentation_options, tmp_path):
    options = [*segmentation_options, "train_cfg.max_iters=1"]
    command = ["bash", TOOLS / "dist_train.sh", DEMO / "upernet_swin_pc.py", "2", "--work-dir", "run"]
    output = run(*command, "--cfg-options", *options, cwd=tmp_path, PORT=free_port()).stdout
    assert "GPU number: 2" in output
    assert output.count("Iter(train) [1/1]") == 1
    assert (tmp_path / "run" / "iter_1.pth").is_file()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPUs")
def test_two_processes_test_together(detection, tmp_path):
    command = ["bash", TOOLS / "dist_test.sh", detection.config, detection.checkpoint, "2"]
    output = run(*command, "--cfg-options", *detection.options, cwd=tmp_path, PORT=free_port()).stdout
    assert len(re.findall(r"Epoch\(test\) \[1/1\].*coco/bbox_mAP: ", output)) == 1


def test_synchronised_batch_norm_becomes_local():
    from condattn.engine.processes import _revert_sync_bn

    model = {"neck": {"norm_cfg": {"type": "SyncBN"}}, "heads": [{"norm_cfg": {"type": "GN"}}, {"type": "SyncBN"}]}
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


# ---------------------------------------------------------------------------------------- bad input


def test_a_user_error_is_one_line_and_a_fault_a_traceback(tmp_path):
    config = ROOT / "configs" / "mask_rcnn_swin_pc.py"
    result = run(TOOLS / "train.py", config, cwd=tmp_path, status=2)
    (line,) = error_lines(result.stderr)
    assert "data/coco/annotations/instances_train2017.json" in line
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 / 0)


def test_the_message_of_an_error_stays_one_line(capsys):
    def main():
        raise UserError("two\nlines")

    with pytest.raises(SystemExit):
        run_tool(main)
    assert capsys.readouterr().err == "error: two lines\n"


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("mask_rcnn_swin_pc.py", ("data/coco/annotations", "https://cocodataset.org", "configs/demo/")),
        ("upernet_swin_pc.py", ("data/ade/ADEChallengeData2016/images", "http://data.csail.mit.edu", "configs/demo/")),
        ("own_data/coco.py", ("data/own/annotations/train.json", "data_root", "configs/demo/")),
    ],
)
def test_missing_data(refuse, config, parts):
    refuse("train", ROOT / "configs" / config, parts=parts)


def test_missing_test_data(refuse):
    refuse("test", ROOT / "configs" / "retinanet_swin_pc.py", "x.pth", parts=("val2017", "test_dataloader"))


def own_data(folder: Path, categories: list[str]) -> list[str]:
    for name in ("train", "val"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        content = {"categories": [{"name": category} for category in categories]}
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
    return [f"{loader}_dataloader.dataset.data_root={folder}" for loader in LOADERS]


def test_classes_that_the_annotations_do_not_have(refuse, tmp_path):
    options = own_data(tmp_path / "own", ["cat", "horse"])
    parts = ("no category 'dog'", "'cat', 'horse'")
    refuse("train", ROOT / "configs" / "own_data" / "coco.py", "--cfg-options", *options, parts=parts)


def test_classes_in_another_order_than_in_the_annotations(refuse, tmp_path):
    options = own_data(tmp_path / "own", ["dog", "mouse", "cat"])
    parts = ("another order", "set classes = ['dog', 'cat']")
    refuse("train", ROOT / "configs" / "own_data" / "coco.py", "--cfg-options", *options, parts=parts)


def test_annotations_that_are_cut_short(refuse, tmp_path):
    options = own_data(tmp_path / "own", ["cat", "dog"])
    (tmp_path / "own" / "annotations" / "train.json").write_text('{"categories": [')
    parts = ("train.json", "no JSON")
    refuse("train", ROOT / "configs" / "own_data" / "coco.py", "--cfg-options", *options, parts=parts)


def test_missing_configuration(refuse):
    refuse("train", "configs/no.py", parts=("no configuration file configs/no.py",))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model = dict(", "was never closed"),
        ("_base_ = 'no.py'", "no.py"),
        ("model = dict()", "default_scope"),
        ("default_scope = 'mmpretrain'", "mmdet, mmseg"),
        ("custom_imports = dict(imports=['no_such_module'], allow_failed_imports=False)", "no_such_module"),
    ],
)
def test_bad_configuration(refuse, tmp_path, text, part):
    (tmp_path / "bad.py").write_text(text)
    refuse("train", "bad.py", parts=("bad.py", part))


def test_mixed_stacks(refuse, monkeypatch):
    def mixed():
        raise RuntimeError("this environment mixes two stacks")

    monkeypatch.setattr(launch, "check_stack", mixed)
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", parts=("mixes two stacks",))


@pytest.mark.parametrize(
    ("config", "option", "parts"),
    [
        ("mask_rcnn_swin_pc.py", "model.backbone.conditioning=cp", ("unknown conditioning 'cp'", "'pc'", "'sc'")),
        ("upernet_swin_pc.py", "model.backbone.type=ConditionedSvin", ("ConditionedSvin",)),
        ("upernet_swin_pc.py", "model.backbone.conditionning=pc", ("conditionning",)),
        ("mask_rcnn_swin_sc.py", "model.backbone.conditioning.strength=inf", ("strength", "finite", "inf")),
    ],
)
def test_models_that_cannot_be_built(refuse, config, option, parts):
    refuse("train", DEMO / config, "--cfg-options", option, parts=(config, *parts))


def test_pattern_that_matches_no_site(refuse, tmp_path):
    text = f"""
_base_ = {str(DEMO / "mask_rcnn_swin_pc.py")!r}
model = dict(
    _delete_=True, type="Conditioned", module={{{{_base_.model}}}}, conditioning="sc", include=["decoder"]
)
"""
    (tmp_path / "pattern.py").write_text(text)
    refuse("train", "pattern.py", parts=("'decoder'", "matches no attention site", "backbone.stages.0"))


@pytest.mark.parametrize("name", ["nowhere.pth", "https://example.invalid/weights.pth"])
def test_pretrained_weights_that_cannot_be_had(refuse, monkeypatch, name):
    from mmengine.runner import CheckpointLoader

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(CheckpointLoader, "load_checkpoint", offline)
    options = ["--cfg-options", NOWHERE[0], f"model.backbone.init_cfg.checkpoint={name}"]
    parts = (name, "--cfg-options model.backbone.init_cfg.checkpoint=FILE", "model.backbone.init_cfg=None")
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", *options, parts=parts)


@pytest.fixture
def bad_checkpoints(detection, tmp_path) -> Path:
    whole = detection.checkpoint.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").touch()
    torch.save({"state_dict": {"encoder.weight": torch.ones(2)}}, tmp_path / "foreign.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    return tmp_path


CHECKPOINTS = {
    "missing.pth": ("no checkpoint file missing.pth",),
    "cut.pth": ("cannot read the checkpoint cut.pth", "cut short"),
    "empty.pth": ("cannot read the checkpoint empty.pth",),
    "foreign.pth": ("no weight of the checkpoint foreign.pth fits", "encoder.weight", "backbone.patch_embed"),
    "list.pth": ("list.pth is no checkpoint",),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(refuse, bad_checkpoints, detection_options, scenes, name):
    config, parts = DEMO / "mask_rcnn_swin_pc.py", CHECKPOINTS[name]
    refuse("test", config, name, "--cfg-options", *detection_options, parts=parts)
    refuse("train", config, "--cfg-options", *detection_options, f"load_from={name}", parts=parts)
    refuse("predict", scenes, config, name, "--out-dir", "out", parts=parts)


def test_training_that_cannot_be_resumed(refuse, detection, tmp_path):
    checkpoint = torch.load(detection.checkpoint, weights_only=False)
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "weights.pth")
    resume = ["train", detection.config, "--cfg-options", *detection.options, "--resume"]
    refuse(*resume, "missing.pth", parts=("no checkpoint file missing.pth",))
    refuse(*resume, "weights.pth", parts=("weights.pth holds weights alone", "load_from=weights.pth"))


def test_options_that_a_configuration_does_not_serve(refuse, detection, tmp_path):
    config = DEMO / "mask_rcnn_swin_pc.py"
    unscaled = ["--auto-scale-lr", "--cfg-options", "auto_scale_lr=None"]
    refuse("train", config, *unscaled, parts=("auto_scale_lr.base_batch_size",))
    checked = [config, detection.checkpoint]
    refuse("test", *checked, "--out", "out.json", parts=("--out", ".pkl", "out.json"))
    refuse("test", *checked, "--tta", parts=("--tta", "masks"))
    undrawn = ["--show-dir", "out", "--cfg-options", "default_hooks.visualization=None"]
    refuse("test", *checked, *undrawn, parts=("default_hooks.visualization",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPUs")
def test_mixed_precision_without_a_gpu(refuse):
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", "--amp", parts=("--amp needs a GPU",))


def test_launcher_without_its_environment(refuse, detection_options, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    command = ["train", DEMO / "mask_rcnn_swin_pc.py", "--launcher", "pytorch"]
    parts = ("--launcher pytorch", "RANK", "dist_train.sh")
    refuse(*command, "--cfg-options", *detection_options, parts=parts)


def test_predicting_what_is_not_there(refuse, tmp_path):
    command = [DEMO / "mask_rcnn_swin_pc.py", "x.pth", "--out-dir", "out"]
    refuse("predict", "no", *command, parts=("no image or folder no",))
    (tmp_path / "empty").mkdir()
    refuse("predict", "empty", *command, parts=("no image below empty", ".jpg"))
    refuse("predict", "empty", *command, "--device", "abacus", parts=("--device abacus",))


@pytest.mark.parametrize("tool", ["train", "test", "predict"])
def test_help_names_every_option(call, tool):
    status, output, _ = call(tool, "--help")
    assert status == 0
    options = {
        "train": "--work-dir --amp --auto-scale-lr --resume --cfg-options --launcher --local-rank",
        "test": "--work-dir --out --show --show-dir --wait-time --cfg-options --launcher --tta --local-rank",
        "predict": "--out-dir --score-thr --device --batch-size --cfg-options",
    }
    assert all(option in output for option in options[tool].split())


# -------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("config", "work_dir"),
    [
        ("configs/mask_rcnn_swin_pc.py", "work_dirs/mask_rcnn_swin_pc"),
        ("configs/demo/mask_rcnn_swin_pc.py", "work_dirs/demo/mask_rcnn_swin_pc"),
        ("elsewhere/mine.v2.py", "work_dirs/mine.v2"),
    ],
)
def test_default_work_dir(config, work_dir):
    assert launch.default_work_dir(config) == work_dir


def test_a_checkpoint_that_fits_in_part_is_named(capsys):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    weights = {"module.0.weight": torch.ones(2, 2), "0.bias": torch.ones(5), "2.bias": torch.ones(1)}
    check_fit({"state_dict": weights}, "some.pth", model)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: some.pth fits the model in part: 1 of the model's 4 weights")
    assert "2 are not in it" in line
    assert "1 have another shape there and keep their initial values (0.bias)" in line
    assert "1 are only in it and are ignored (2.bias)" in line


def test_pretrained_weights_are_not_read_when_a_checkpoint_replaces_them(tmp_path):
    from mmengine.model import BaseModule

    backbone = BaseModule({"type": "Pretrained", "checkpoint": str(tmp_path / "no.pth")})
    backbone.layer = nn.Linear(2, 2)
    model = nn.Sequential(backbone, nn.Linear(2, 2))
    drop_pretrained(model, replaced={"0.layer.weight", "1.weight"})
    with pytest.raises(UserError, match=r"model\.0\.init_cfg\.checkpoint=FILE"):
        check_pretrained(model)
    drop_pretrained(model, replaced={"0.layer.weight", "0.layer.bias"})
    check_pretrained(model)


class Terminal:
    """A standard error that says it is a terminal, and keeps what it is sent."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text: str):
        self.text += text

    def flush(self):
        pass

    def isatty(self) -> bool:
        return True


def drive(hook: ProgressHook, logger: logging.Logger):
    runner = SimpleNamespace(max_iters=4, iter=2, val_dataloader=[0, 1], logger=logger)
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    logger.info("a line of the log")
    hook.before_val_epoch(runner)
    for index in range(2):
        hook.after_val_iter(runner, index)
    hook.after_val_epoch(runner)
    hook.after_train_iter(runner, 1)
    hook.after_train(runner)


def drive_on(terminal: Terminal, monkeypatch) -> logging.Logger:
    """Drive the hook with ``terminal`` as standard error and as the stream of the logger."""
    logger = logging.Logger("test")
    logger.addHandler(logging.StreamHandler(terminal))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        drive(ProgressHook(), logger)
    return logger


def test_progress_is_shown_on_a_terminal(monkeypatch):
    terminal = Terminal()
    logger = drive_on(terminal, monkeypatch)
    assert "train:  50%" in terminal.text  # a resumed training starts where it stopped
    assert "train: 100%" in terminal.text
    assert "val:   0%" in terminal.text
    assert "\ra line of the log\n" in terminal.text  # on a cleared line of its own
    assert logger.handlers[0].stream is terminal


def test_progress_is_silent_elsewhere(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    drive_on(terminal, monkeypatch)
    assert terminal.text == "a line of the log\n"
