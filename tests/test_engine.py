"""Modules that the command-line tools share."""

import copy
import logging
import sys
from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
import torch
from runs import CONFIGS
from torch import nn

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.hooks.progress import ProgressHook
from condattn.openmmlab.models.settings import setting_path
from condattn.openmmlab.runner import launch
from condattn.openmmlab.runner.checkpoints import check_fit, check_pretrained, drop_pretrained
from condattn.openmmlab.runner.tta import add_tta


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("sc(strength=3.0,relative=True)+pc(detach=True)", "sc(strength=3.0,relative=True)+pc(detach=True)"),
        ("pc+sc(targets=('q','k'))", "pc+sc(targets=('q','k'))"),
        ("sc+pc", "sc+pc"),
        ("[a,b]", ["a", "b"]),
        ("(1,2)", (1, 2)),
        ("a,b", ["a", "b"]),
        ("3", 3),
    ],
)
def test_options_of_a_configuration(value, expected):
    """A conditioning with settings is parsed as one value; everything else as mmengine does."""
    parser = ArgumentParser()
    launch.add_config_arguments(parser)
    options = parser.parse_args(["config.py", "--cfg-options", f"model.conditioning={value}"]).cfg_options
    assert options == {"model.conditioning": expected}


def test_an_option_below_a_value_that_is_no_dictionary(tmp_path):
    path = tmp_path / "config.py"
    path.write_text('default_scope = "mmdet"\nmodel = dict(conditioning="pc")')
    with pytest.raises(UserError, match="--cfg-options does not fit .*replaced as a whole"):
        launch.load_config(str(path), {"model.conditioning.type": "RowPreconditioner"})


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


class Renaming(nn.Module):
    """Renames and resizes weights that it loads, as mmdet's semi-supervised detectors and mmpretrain's backbones do."""

    def __init__(self):
        super().__init__()
        self.student, self.positions = nn.Linear(2, 2), nn.Parameter(torch.zeros(6))
        self._register_load_state_dict_pre_hook(self.resize)

    def resize(self, state_dict, *args):
        if len(state_dict["positions"]) != 6:
            state_dict["positions"] = state_dict["positions"].repeat(2)

    def _load_from_state_dict(self, state_dict, *args):
        for name in ("weight", "bias"):
            if name in state_dict:
                state_dict[f"student.{name}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, *args)


def test_a_checkpoint_that_the_model_adapts_fits(capsys):
    model = Renaming()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "positions": torch.arange(3.0)}
    loaded = check_fit({"state_dict": weights}, "some.pth", model)
    assert not capsys.readouterr().err
    torch.testing.assert_close(model.state_dict(), before)  # the model is as it was
    wanted = {"student.weight": torch.ones(2, 2), "student.bias": torch.ones(2)}
    torch.testing.assert_close(loaded, {"positions": torch.arange(3.0).repeat(2), **wanted})
    model.load_state_dict(loaded)
    torch.testing.assert_close(model.state_dict(), loaded)


def test_a_plain_detector_starts_a_semi_supervised_one(capsys):
    """And a region proposal network a two-stage detector."""
    from mmdet.registry import MODELS

    detector = launch.load_config(str(CONFIGS / "demo/mask_rcnn_swin_pc.py")).model
    plain = MODELS.build(detector)
    teacher = MODELS.build(dict(type="SemiBaseDetector", detector=detector, semi_train_cfg={}))
    loaded = check_fit({"state_dict": plain.state_dict()}, "plain.pth", teacher)
    assert set(loaded) == {f"{part}.{name}" for part in ("student", "teacher") for name in plain.state_dict()}
    assert "warning:" not in capsys.readouterr().err
    parts = {name: value for name, value in plain.state_dict().items() if not name.startswith("roi_head.")}
    proposals = {name.replace("rpn_head.", "bbox_head."): value for name, value in parts.items()}
    loaded = check_fit({"state_dict": proposals}, "rpn.pth", plain)
    assert set(loaded) == set(parts)


def test_pretrained_weights_are_not_read_when_a_checkpoint_replaces_them(tmp_path):
    from mmengine.model import BaseModule

    backbone = BaseModule({"type": "Pretrained", "checkpoint": str(tmp_path / "no.pth")})
    backbone.layer = nn.Linear(2, 2)
    model = nn.Sequential(backbone, nn.Linear(2, 2))
    drop_pretrained(model, replaced={"0.layer.weight", "1.weight"})
    with pytest.raises(UserError, match=r"model\.0\.init_cfg\.checkpoint=FILE"):
        check_pretrained(model, {})
    drop_pretrained(model, replaced={"0.layer.weight", "0.layer.bias"})
    check_pretrained(model, {})


def test_the_setting_of_pretrained_weights_in_a_conditioned_model():
    backbone = dict(type="Conditioned", module=dict(type="ResNet"))
    for model, path in (
        (dict(type="DETR", backbone=backbone), "model.backbone.module"),
        (dict(type="Conditioned", module="DETR", backbone=dict(type="ResNet")), "model.backbone"),
        (dict(type="Conditioned", module=dict(type="DETR", backbone=backbone)), "model.module.backbone.module"),
    ):
        assert setting_path(model, "backbone") == path
        assert setting_path(model, "backbone.layer1") == f"{path}.layer1"
        assert setting_path(model, "head") == f"{path.partition('.backbone')[0]}.head"
        semi_supervised = dict(type="SoftTeacher", detector=model)
        for part in ("student", "teacher"):
            inside = path.replace("model", "model.detector", 1)
            assert setting_path(semi_supervised, f"{part}.backbone") == inside


@pytest.mark.parametrize("wrapped, path", [(False, "model.roi_head"), (True, "model.module.roi_head")])
def test_masks_of_augmented_images_are_not_merged(wrapped, path):
    cfg = launch.load_config(str(CONFIGS / "demo/mask_rcnn_swin_pc.py"))
    if wrapped:
        cfg.model = dict(type="Conditioned", module=cfg.model)
    model = nn.ModuleDict(dict(roi_head=nn.ModuleDict(dict(mask_head=nn.Identity()))))
    with pytest.raises(UserError, match=f"--cfg-options {path}.mask_head=None"):
        add_tta(cfg, model)


@pytest.mark.parametrize("head", ["panoptic_head", "mask_head", "bbox_head.mask_head"])
def test_masks_that_no_setting_turns_off_are_not_merged(head):
    """Of MaskFormer, SOLO and RTMDet-Ins."""
    cfg = launch.load_config(str(CONFIGS / "demo/mask_rcnn_swin_pc.py"))
    model = nn.Identity()
    for name in reversed(head.split(".")):
        model = nn.ModuleDict({name: model})
    with pytest.raises(UserError, match="this model predicts masks; test without --tta$"):
        add_tta(cfg, model)


def test_augmented_images_are_normalised_as_others():
    """mmengine gives a ``data_preprocessor`` of the configuration to the model around the others."""
    cfg = launch.load_config(str(CONFIGS / "demo/upernet_swin_pc.py"))
    own, general = dict(cfg.model.data_preprocessor, mean=[5.0] * 3), dict(cfg.model.data_preprocessor, mean=[9.0] * 3)
    for expected, settings in ((5.0, own), (9.0, None)):
        changed = copy.deepcopy(cfg)
        changed.data_preprocessor, changed.model.data_preprocessor = general, settings
        if settings is None:
            del changed.model.data_preprocessor
        add_tta(changed, nn.Identity())
        assert "data_preprocessor" not in changed and changed.model.module.data_preprocessor.mean == [expected] * 3


@pytest.mark.parametrize("setting, meant", [("num_querys", "num_queries"), ("conditionin", "conditioning")])
def test_a_misspelt_setting_of_a_conditioned_model(setting, meant):
    cfg = launch.load_config(str(CONFIGS / "detr_r50_pc.py"), {f"model.{setting}": 3})
    with pytest.raises(UserError, match=f"it is model.{setting}; did you mean model.{meant}"):
        launch.build_model(cfg)


class Terminal:
    """A stream that claims to be a terminal, and records its input."""

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
    assert "train:  50%" in terminal.text  # a resumed training starts at the position of its checkpoint
    assert "train: 100%" in terminal.text
    assert "val:   0%" in terminal.text
    assert "\ra line of the log\n" in terminal.text  # on a separate, cleared line
    assert logger.handlers[0].stream is terminal


def test_progress_is_silent_elsewhere(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    drive_on(terminal, monkeypatch)
    assert terminal.text == "a line of the log\n"
