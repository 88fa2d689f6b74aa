"""Bad input to the tools: a one-line error, a nonzero exit status, and nothing written."""

import errno
import json
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import CONFIGS, DEMO, LOADERS, NOWHERE, ROOT, TOOLS, error_lines, load_tool, run

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import condattn.registry  # noqa: F401  registers the models
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.runner import launch
from condattn.openmmlab.runner.setting_types import check_types


def test_a_user_error_is_one_line_and_a_fault_a_traceback(tmp_path):
    config = CONFIGS / "mask_rcnn_swin_pc.py"
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


def test_a_full_disk_is_one_line(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "report.md")

    with pytest.raises(SystemExit) as status:
        run_tool(main)
    assert status.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'report.md'\n"
    with pytest.raises(TimeoutError):
        run_tool(lambda: (_ for _ in ()).throw(TimeoutError()))


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("mask_rcnn_swin_pc.py", ("data/coco/annotations", "https://cocodataset.org", "configs/demo/")),
        ("upernet_swin_pc.py", ("data/ade/ADEChallengeData2016/images", "http://data.csail.mit.edu", "configs/demo/")),
        ("own_data/coco.py", ("data/own/annotations/train.json", "data_root", "configs/demo/")),
        ("studies/_base_/upernet_camvid.py", ("data/camvid/", "from the environment variable CAMVID; the config")),
    ],
)
def test_missing_data(refuse, config, parts):
    refuse("train", CONFIGS / config, parts=parts)


@pytest.mark.parametrize(
    ("root", "train", "parts"),
    [
        ("coco/fruit", "a.json", ("no data at coco/fruit/a.json", "put the data there, or set data_root")),
        (
            "",
            "/nowhere/a.json",
            ("no data at /nowhere/a.json (train_dataloader", "configs/demo/ run without any download"),
        ),
        ("~/own", "a.json", ("no data at ~/own/a.json", "write the full path of the home folder in place of ~")),
    ],
)
def test_missing_data_of_ones_own(refuse, root, train, parts):
    """The paths are joined as mmengine joins them, and the advice is not that for the public data sets."""
    options = [f"train_dataloader.dataset.data_root={root}", f"train_dataloader.dataset.ann_file={train}"]
    refuse("train", CONFIGS / "own_data" / "coco.py", "--cfg-options", *options, parts=parts)


def test_paths_of_ones_own_data(tmp_path):
    """The evaluator reads the annotation file of the data, wherever it is."""
    text = (CONFIGS / "own_data" / "coco.py").read_text().replace('"../', f'"{CONFIGS}/')
    for name, (root, file) in {"absolute": ("data/own", "/there/val.json"), "empty": ("", "val.json")}.items():
        changed = text.replace('"data/own"', repr(root)).replace('"annotations/val.json"', repr(file))
        (tmp_path / f"{name}.py").write_text(changed)
        assert launch.load_config(str(tmp_path / f"{name}.py")).val_evaluator.ann_file == file


def test_missing_test_data(refuse):
    refuse("test", CONFIGS / "retinanet_swin_pc.py", "x.pth", parts=("val2017", "test_dataloader"))


def own_data(folder: Path, categories: list[str]) -> list[str]:
    """Write a small data set with these categories in its training data; return the options that select it."""
    for name, names in (("train", categories), ("val", ["cat", "dog"])):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(folder / "images" / name / "1.png")
        polygon = [8, 8, 40, 8, 40, 40, 8, 40]
        entry = dict(image_id=1, bbox=[8, 8, 32, 32], area=1024, iscrowd=0, segmentation=[polygon])
        content = {
            "categories": [dict(id=i, name=category) for i, category in enumerate(names, 1)],
            "images": [dict(id=1, file_name="1.png", width=64, height=48)],
            "annotations": [dict(entry, id=i, category_id=i) for i, _ in enumerate(names, 1)],
        }
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
    evaluators = [f"{name}_evaluator.ann_file={folder}/annotations/val.json" for name in ("val", "test")]
    return [*(f"{loader}_dataloader.dataset.data_root={folder}" for loader in LOADERS), *evaluators]


def test_classes_that_the_annotations_do_not_have(refuse, tmp_path):
    options = own_data(tmp_path / "own", ["cat", "horse"])
    parts = ("no category 'dog'", "'cat', 'horse'")
    refuse("train", CONFIGS / "own_data" / "coco.py", "--cfg-options", *options, parts=parts)


def test_classes_in_a_file_of_their_own(call, tmp_path):
    """mmengine reads the classes from the file; the run proceeds to the next check, the missing pretrained weights."""
    options = own_data(tmp_path / "own", ["cat", "dog"])
    (tmp_path / "classes.txt").write_text("cat\ndog")
    files = [f"{loader}_dataloader.dataset.metainfo.classes=classes.txt" for loader in LOADERS]
    options += [*files, *NOWHERE]
    status, _, errors = call("train", CONFIGS / "own_data" / "coco.py", "--cfg-options", *options)
    assert status == 2
    assert "nowhere.pth" in errors


def test_annotations_that_are_cut_short(refuse, tmp_path):
    options = own_data(tmp_path / "own", ["cat", "dog"])
    (tmp_path / "own" / "annotations" / "train.json").write_text('{"categories": [')
    parts = ("train.json", "no JSON")
    refuse("train", CONFIGS / "own_data" / "coco.py", "--cfg-options", *options, parts=parts)


def test_missing_configuration(refuse):
    refuse("train", "configs/no.py", parts=("no configuration file configs/no.py",))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model = dict(", "was never closed"),
        ("_base_ = 'no.py'", "no.py"),
        ("model = dict(type=nowhere)", "nowhere"),
        (
            f"_base_ = {str(DEMO / 'mask_rcnn_swin_pc.py')!r}\nmodel = dict(backbone=dict(embed_dims=dict(a=1)))",
            "TypeError: embed_dims",
        ),
        ("model = dict()", "default_scope"),
        ("default_scope = 'mmpose'", "mmdet, mmseg, mmpretrain"),
        ("custom_imports = dict(imports=['no_such_module'], allow_failed_imports=False)", "no_such_module"),
    ],
)
def test_bad_configuration(refuse, tmp_path, text, part):
    (tmp_path / "bad.py").write_text(text)
    refuse("train", "bad.py", parts=("bad.py", part))


@pytest.mark.parametrize(("value", "state"), [(None, "is not set; give it a value"), ("", "is empty; unset it")])
def test_environment_variables_without_a_value(refuse, monkeypatch, tmp_path, value, state):
    monkeypatch.delenv("DATA_FOLDER", raising=False)
    if value is not None:
        monkeypatch.setenv("DATA_FOLDER", value)
    (tmp_path / "bad.py").write_text('root = "{{$DATA_FOLDER:' + ("" if value is None else "data") + '}}"')
    refuse("train", "bad.py", parts=(f"the environment variable DATA_FOLDER {state}",))


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
        ("upernet_swin_pc.py", "model.backbone.conditionning=pc", ("did you mean model.backbone.conditioning?",)),
        ("mask_rcnn_swin_pc.py", "model.neck.out_chanels=3", ("did you mean model.neck.out_channels?",)),
        ("mask_rcnn_swin_pc.py", "model.zz=1", ("'zz'; it is model.zz",)),
        ("mask_rcnn_swin_pc.py", "model.neck.num_outs=2", ("cannot be built: assert num_outs >= ", "fpn.py")),
        ("mask_rcnn_swin_pc.py", "model.backbone.out_indices=[0,7]", ("cannot be built: IndexError: ", ".py, line ")),
        ("mask_rcnn_swin_pc.py", "model.backbone.embed_dims=-3", ("cannot be built: ", "Error: ", ".py, line ")),
        ("mask_rcnn_swin_sc.py", "model.backbone.conditioning=sc(strength=1e999)", ("strength", "finite", "inf")),
        ("mask_rcnn_swin_sc.py", "model.backbone.conditioning.strength=2.0", ("--cfg-options", "replaced as a whole")),
    ],
)
def test_models_that_cannot_be_built(refuse, config, option, parts):
    refuse("train", DEMO / config, "--cfg-options", option, parts=(config, *parts))


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("optim_wrapper=None", ("settings that a training needs are missing: optim_wrapper",)),
        ("train_cfg=None", ("settings that a training needs are missing: train_cfg; add them",)),
        (
            "val_dataloader=None",
            ("settings that a validation needs are missing: val_dataloader", "set all three to None"),
        ),
        ("train_cfg.type=EpochTrainLoop", ("train_cfg.type", "did you mean 'EpochBasedTrainLoop'?")),
        ("optim_wrapper.type=OptimWraper", ("did you mean 'OptimWrapper'?",)),
        ("optim_wrapper.optimizer.type=Adamw", ("optim_wrapper.optimizer.type", "did you mean 'AdamW'?")),
        ("param_scheduler.0.type=LinearLr", ("param_scheduler[0].type", "did you mean 'LinearLR'?")),
        ("default_hooks.logger.type=LogerHook", ("default_hooks.logger.type", "did you mean 'LoggerHook'?")),
        ("visualizer.type=DetLocalVisualiser", ("visualizer.type", "did you mean 'DetLocalVisualizer'?")),
        ("val_evaluator.type=CocoMetrics", ("val_evaluator[0].type", "did you mean 'CocoMetric'?")),
        ("train_dataloader.dataset.pipeline.0.type=LoadImage", ("pipeline[0].type: no 'LoadImage' is registered",)),
        (
            "train_dataloader.dataset.pipeline=[Resize,Pad",
            ("expected KEY=VALUE without spaces, found train",),
        ),
        ("model.backbone", ("expected KEY=VALUE without spaces, found model.backbone",)),
    ],
)
def test_settings_of_the_runner(refuse, option, parts):
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", "--cfg-options", option, parts=parts)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("default_hooks=3", ("mask_rcnn_swin_pc.py: default_hooks: expected dict(name=dict(type=...), ...), found 3",)),
        ("default_hooks.logger=3", ("default_hooks: expected dict(name=dict(type=...), ...), found {",)),
        (
            "default_hooks.logger.interval=0",
            ("logger.interval: expected a whole number above 0, found 0",),
        ),
        ("custom_hooks=3", ("custom_hooks: expected a list of dict(type=...), found 3",)),
        ("custom_hooks=[3]", ("custom_hooks: expected a list of dict(type=...), found [3]",)),
        ("optim_wrapper=3", ("optim_wrapper: expected dict(optimizer=dict(type=..., lr=...)), found 3",)),
        ("optim_wrapper.optimizer.lr=fast", ("optim_wrapper.optimizer.lr: expected a number, found 'fast'",)),
        ("val_evaluator=3", ("val_evaluator: expected dict(type=...) or a list of these, found 3",)),
        ("train_cfg=3", ("train_cfg: expected the settings of a loop, dict(type=...), found 3",)),
        ("train_cfg.max_epochs=two", ("train_cfg.max_epochs: expected a whole number, found 'two'; write it so",)),
        ("param_scheduler=3", ("param_scheduler: expected a list of dict(type=...), found 3",)),
        ("load_from=3", ("load_from: expected the path or URL of a checkpoint, found 3",)),
        ("train_dataloader=3", ("train_dataloader: expected dict(batch_size=..., dataset=dict(...)), found 3",)),
        ("train_dataloader.batch_size=0", ("train_dataloader.batch_size: expected a whole number above 0, found 0",)),
        (
            "val_dataloader.num_workers=a",
            ("num_workers: expected a whole number, 0 or more, found 'a'",),
        ),
        ("train_dataloader.dataset.pipeline=[3]", ("dataset.pipeline: expected transforms, dict(type=...), found 3",)),
        ("randomness.seed=abc", ("randomness.seed: expected a whole number from 0 to 4294967295, found 'abc'",)),
        ("model=3", ("model: expected dict(type=...), found 3",)),
        ("train_cfg.type=3", ("train_cfg.type: expected the name of a class, found 3; write it so",)),
    ],
)
def test_settings_of_a_wrong_type(refuse, option, parts):
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", "--cfg-options", option, parts=parts)


@pytest.mark.parametrize("key", ["default_hooks", "custom_hooks", "test_evaluator", "test_cfg", "test_dataloader"])
def test_settings_of_a_wrong_type_in_an_evaluation(refuse, key):
    config = DEMO / "mask_rcnn_swin_pc.py"
    parts = (f"{config}: {key}: expected ", "found 3; write it so")
    refuse("test", config, "x.pth", "--cfg-options", f"{key}=3", parts=parts)


@pytest.mark.parametrize(
    "option",
    ["train_cfg.max_epochs=1e1", "custom_hooks=None", "param_scheduler=None", "load_from=None", "randomness.seed=None"],
)
def test_settings_of_a_permitted_type(option):
    parser = ArgumentParser()
    launch.add_config_arguments(parser)
    arguments = parser.parse_args([str(DEMO / "mask_rcnn_swin_pc.py"), "--cfg-options", option])
    check_types(launch.load_config(arguments.config, arguments.cfg_options))


def test_pattern_that_matches_no_site(refuse, tmp_path):
    text = f"""
_base_ = {str(DEMO / "mask_rcnn_swin_pc.py")!r}
model = dict(
    _delete_=True, type="Conditioned", module={{{{_base_.model}}}}, conditioning="sc", include=["decoder"]
)
"""
    (tmp_path / "pattern.py").write_text(text)
    refuse("train", "pattern.py", parts=("'decoder'", "matches no attention site", "backbone.stages.0"))


def test_a_file_in_the_way(call, detection, scenes, tmp_path):
    (tmp_path / "out").touch()
    command = [scenes / "images" / "validation", detection.config, detection.checkpoint, "--out-dir", "out"]
    status, _, errors = call("predict", *command)
    assert status == 2
    (line,) = error_lines(errors)
    assert "out" in line
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize("out", ["folder.pkl", "file/predictions.pkl", "predictions.txt"])
def test_predictions_that_cannot_be_saved(refuse, detection, tmp_path, out):
    """This is said before the evaluation."""
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "file").touch()
    refuse("test", detection.config, detection.checkpoint, "--out", out, parts=(out.split("/")[0],))


def test_label_maps_of_one_name(refuse, scenes, tmp_path):
    """Label maps are named after the images alone, so that one would replace the other."""
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        source = min((scenes / kind / "validation").glob(f"*{suffix}"))
        for folder in ("a", "b"):
            (tmp_path / "data" / kind / folder).mkdir(parents=True)
            shutil.copy(source, tmp_path / "data" / kind / folder / f"one{suffix}")
    dataset = dict(type="BaseSegDataset", data_root=str(tmp_path / "data"), img_suffix=".jpg", seg_map_suffix=".png")
    prefix = dict(img_path="images", seg_map_path="annotations")
    (tmp_path / "two.py").write_text(
        f"_base_ = {str(DEMO / 'upernet_swin_pc.py')!r}\n"
        f"dataset = dict({dataset!r}, _delete_=True, data_prefix={prefix!r}, "
        "metainfo=dict(classes=tuple('abcdefghijk')), pipeline={{_base_.test_dataloader.dataset.pipeline}})\n"
        "test_dataloader = dict(dataset=dataset)\n"
    )
    refuse(
        "test",
        "two.py",
        "x.pth",
        "--out",
        "labels",
        parts=("--out expects images with different names without", "(one)"),
    )
    # mmseg's pictures have numbers, so that the next problem is said.
    refuse("test", "two.py", "x.pth", "--show-dir", "drawn", parts=("there is no file x.pth",))


@pytest.mark.parametrize("names, refused", [(["a/x.jpg", "b/x.jpg"], True), (["x.jpg", "x.png"], False)])
def test_pictures_of_one_name(names, refused, refuse, coco, tmp_path):
    """mmdet's pictures have the names of the images with their suffixes."""
    for name, image in zip(names, coco.content["images"], strict=False):
        path = coco.folder / "images" / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(coco.folder / "images" / image["file_name"], path)
        image["file_name"] = name
    coco.write()
    data = coco.cfg.val_dataloader.dataset.to_dict() | dict(_delete_=True)
    (tmp_path / "two.py").write_text(
        f"_base_ = {str(DEMO / 'mask_rcnn_swin_pc.py')!r}\n"
        f"test_dataloader = dict(dataset={data!r})\n"
        f"test_evaluator = dict(ann_file={str(coco.folder / 'annotations.json')!r})\n"
        "model = dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)))\n"
    )
    parts = (
        ("--show-dir expects images with different names, after", "(x.jpg)") if refused else ("there is no file x.pth",)
    )
    refuse("test", "two.py", "x.pth", "--show-dir", "drawn", parts=parts)


def test_data_without_image_files_have_no_names_to_compare(monkeypatch):
    from mmengine.config import Config
    from mmengine.registry import DATASETS

    @DATASETS.register_module(force=True)
    class WithoutFiles(list):
        def __init__(self):
            super().__init__([{}, {}])

        get_data_info = list.__getitem__

    load_tool("test").check_names(
        Config(dict(default_scope="mmseg", test_dataloader=dict(dataset=dict(type=WithoutFiles))))
    )


def test_options_that_a_configuration_does_not_serve(refuse, detection, tmp_path):
    config = DEMO / "mask_rcnn_swin_pc.py"
    unscaled = ["--auto-scale-lr", "--cfg-options", "auto_scale_lr=None"]
    refuse("train", config, *unscaled, parts=("auto_scale_lr.base_batch_size",))
    checked = [config, detection.checkpoint]
    refuse("test", *checked, "--out", "out.json", parts=("--out", ".pkl", "out.json"))
    refuse("test", *checked, "--tta", parts=("--tta", "masks"))
    undrawn = ["--show-dir", "out", "--cfg-options", "default_hooks.visualization=None"]
    refuse("test", *checked, *undrawn, parts=("default_hooks.visualization",))
    several = ["--out", "out.pkl", "--cfg-options", "test_evaluator.type=MultiDatasetsEvaluator"]
    refuse("test", *checked, *several, parts=("--out", "MultiDatasetsEvaluator"))
    both = [DEMO / "upernet_swin_pc.py", "x.pth", "--show", "--show-dir", "out"]
    refuse("test", *both, parts=("use --show or --show-dir, not both",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPUs")
def test_mixed_precision_without_a_gpu(refuse):
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", "--amp", parts=("mixed precision needs a GPU", "OptimWrapper"))
    options = ["--cfg-options", "optim_wrapper.type=AmpOptimWrapper"]
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", *options, parts=("mixed precision needs a GPU",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPUs")
@pytest.mark.parametrize("wrapper, options", [("OptimWrapper", ["--amp"]), ("AmpOptimWrapper", [])])
def test_mixed_precision_of_a_configuration_with_classes(wrapper, options, refuse, tmp_path):
    config = tmp_path / "classes.py"
    wrapped = f"from mmengine.optim import {wrapper}\noptim_wrapper = dict(type={wrapper})"
    config.write_text(f'{wrapped}\ndefault_scope = "mmengine"\ntrain_cfg = train_dataloader = {{}}')
    refuse("train", config, *options, parts=("mixed precision needs a GPU",))


def test_launcher_without_its_environment(refuse, detection_options, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    command = ["train", DEMO / "mask_rcnn_swin_pc.py", "--launcher", "pytorch"]
    parts = ("--launcher pytorch", "RANK", "dist_*.sh")
    refuse(*command, "--cfg-options", *detection_options, parts=parts)


def test_predicting_what_is_not_there(refuse, tmp_path):
    command = [DEMO / "mask_rcnn_swin_pc.py", "x.pth", "--out-dir", "out"]
    refuse("predict", "no", *command, parts=("no image or folder no",))
    (tmp_path / "empty").mkdir()
    refuse("predict", "empty", *command, parts=("no image below empty", ".jpg"))
    refuse("predict", "empty", *command, "--device", "abacus", parts=("--device abacus",))


@pytest.mark.parametrize("tool", sorted(str(path.relative_to(TOOLS))[:-3] for path in TOOLS.rglob("*.py")))
def test_help(call, tool):
    status, output, _ = call(tool, "--help")
    assert status == 0 and output.startswith("usage:")


def test_configurations_of_other_tasks(refuse, scenes):
    pytest.importorskip("mmpretrain")
    images = scenes / "images" / "validation"
    config = ROOT / "projects" / "pretraining" / "configs" / "swin_fashion_mnist.py"
    refuse("test", config, "x.pth", "--out", "o.pkl", parts=("neither of a detector nor of a segmenter, as --out",))
    refuse("predict", images, config, "x.pth", "--out-dir", "o", parts=("neither of a detector", "predict.py is for"))
    refuse("dataset/check", config, "--out", "page", parts=("is of a classifier; --out is for detection",))


def test_numbers_names_and_options(refuse, call, tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    demo, spectra = DEMO / "mask_rcnn_swin_pc.py", ["analysis/spectra", "test_vit", "--out", "out"]
    refuse("train", "notes.txt", parts=("expected a configuration file (.py, .json, .yaml, .yml), got notes.txt",))
    refuse("analysis/sites", "notes.txt", parts=("notes.txt is no configuration file",))
    for name in ("heads", "sites"):
        refuse(*spectra, f"--{name}", 0, parts=(f"--{name}: expected at least 1, got 0",))
    refuse(*spectra, "--cfg-options", "a=1", parts=("--cfg-options expects a configuration, found the model test_vit",))
    refuse(
        *spectra, "--images", "bad", parts=("no image below bad can be read: UnidentifiedImageError", "name another")
    )
    for tool in ("calibrate", "fold"):
        command = [f"checkpoints/{tool}", demo, "x.pth", "--images", "bad", "--out", "new.pth", "--num", 0]
        refuse(*command, parts=("--num: expected at least 1, got 0",))
    refuse("analysis/benchmark", "--batch", 0, parts=("--batch: expected 1 or more, found 0",))
    refuse("dataset/digit_scenes", "here", "--size", 10, parts=("size must be at least", "got 10"))
    apex = ["--amp", "--cfg-options", "optim_wrapper.type=ApexOptimWrapper"]
    refuse("train", demo, *apex, parts=("--amp expects optim_wrapper.type OptimWrapper, found ApexOptimWrapper",))
    study = CONFIGS / "studies" / "digit_scenes.py"
    refuse("study", study, "--data", "here", parts=("--data:", "brings its own data"))
    status, _, errors = call("predict", "a.jpg", demo, "x.pth", "--out-dir", "out", "--batch-size", 0)
    assert status == 2 and "expected a whole number above 0, got 0" in errors


def test_a_toolbox_that_cannot_be_imported(refuse, monkeypatch):
    def fail(name):
        raise ImportError("no such package")

    monkeypatch.setattr(launch, "import_module", fail)
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", parts=("needs mmdet, which cannot be imported", "see the README"))
