"""tools/checkpoints/fold.py: the configuration that it writes is that of the folded model."""

import re

import pytest
import torch
from mmengine.config import Config, ConfigDict
from runs import CONFIGS, DEMO, load_tool

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from whole_models import small

import condattn
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.models.mmdet import ConditionedSwinTransformer
from condattn.openmmlab.runner.checkpoints import drop_pretrained
from condattn.openmmlab.runner.folding import fold_config, own_classes
from condattn.openmmlab.runner.launch import build_model, load_config
from condattn.openmmlab.runner.rewriting import write_checkpoint

SWIN = dict(type="ConditionedSwinTransformer")


START = dict(type="Pretrained", checkpoint="a.pth")
KAIMING = dict(type="Kaiming", layer="Conv2d")


def folded(model):
    return fold_config(Config(dict(model=model))).model


@pytest.mark.parametrize(
    "conditioning, left",
    [
        ("sc+pc", "pc"),
        ("ct+sc", "ct"),
        ("sc+ci+ct+pc(eps=0.001)", "ct+pc(eps=0.001)"),
        ([dict(type="SpectralCorrection"), dict(type="RowPreconditioner", detach=True)], "pc(detach=True)"),
        (None, "pc"),
    ],
)
def test_the_methods_that_are_left(conditioning, left):
    given = {} if conditioning is None else dict(conditioning=conditioning)
    assert folded(dict(backbone=dict(**SWIN, **given))).backbone == dict(**SWIN, conditioning=left)
    whole = dict(type="Conditioned", module=dict(type="DETR"), include=["decoder"])
    assert folded(dict(**whole, **given)) == dict(**whole, conditioning=left)


def test_methods_in_their_long_form_are_no_modules():
    """The names of some methods begin as those of conditioned modules do; types may be classes."""
    methods = [dict(type="SpectralCorrection"), dict(type="ConditionedInitialization"), dict(type="RowPreconditioner")]
    assert folded(dict(backbone=dict(**SWIN, conditioning=methods))).backbone == dict(**SWIN, conditioning="pc")
    assert folded(dict(backbone=dict(type=ConditionedSwinTransformer, conditioning="sc"))).backbone == dict(
        type="SwinTransformer"
    )


@pytest.mark.parametrize("bad", [0, 1])
def test_an_output_that_is_not_a_number_differs(bad):
    before, after = [torch.ones(2), torch.ones(2)], [torch.ones(2), torch.ones(2)]
    compare = load_tool("checkpoints/fold").compare
    assert compare(before, after, "the test") == 0
    after[bad][0] = torch.nan
    with pytest.raises(UserError, match="the attention of the test differs by nan of its size; nothing was written"):
        compare(before, after, "the test")


@pytest.mark.parametrize("conditioning", ["sc", "none", "sc+ci", dict(type="SpectralCorrection")])
@pytest.mark.parametrize(
    "part, upstream",
    [
        (SWIN, dict(type="SwinTransformer")),
        (dict(type="mmseg.ConditionedSwinTransformer"), dict(type="mmseg.SwinTransformer")),
        (dict(type="ConditionedVisionTransformer"), dict(type="mmseg.VisionTransformer")),
        (dict(type="ConditionedTimmBackbone"), dict(type="ConditionedTimmBackbone", conditioning="none")),
        (
            dict(type="Conditioned", module=dict(type="DETR"), include=["decoder"], data_preprocessor=dict(mean=1)),
            dict(type="DETR", data_preprocessor=dict(mean=1)),
        ),
        (dict(type="Conditioned", module="DETR", include=["decoder"], neck=None), dict(type="DETR", neck=None)),
        (dict(type="Conditioned", module=dict(**SWIN, conditioning="sc")), dict(type="SwinTransformer")),
        (
            dict(type="Conditioned", module=dict(type="DETR", init_cfg=dict(**START, load="effective"))),
            dict(type="DETR", init_cfg=START),
        ),
        (
            dict(
                type="Conditioned",
                module=dict(type="DETR", neck=dict(type="A", init_cfg=[KAIMING, dict(**START, unsafe=True)])),
            ),
            dict(type="DETR", neck=dict(type="A", init_cfg=[KAIMING, START])),
        ),
    ],
)
def test_a_part_that_is_not_conditioned_any_more(part, upstream, conditioning):
    assert folded(ConfigDict(backbone=dict(**part, conditioning=conditioning))).backbone == upstream


@pytest.mark.parametrize(
    "name, own",
    [
        ("mask_rcnn_swin_sc", []),
        ("upernet_swin_sc", []),
        ("mask_rcnn_xcit-s_sc_3x", ["ConditionedTimmBackbone"]),
        ("demo/mask_rcnn_swin_sc", ["DigitScenesDetection", "SpectraHook"]),
        ("own_data/coco", ["WarmUpLR"]),
    ],
)
@pytest.mark.parametrize("imports", [["condattn.registry"], ["json", "condattn.registry"], "condattn.registry"])
def test_the_package_is_imported_for_classes_that_are_left(name, own, imports):
    cfg = load_config(str(CONFIGS / f"{name}.py"))
    cfg.model.backbone.conditioning = "sc"
    cfg.custom_imports.imports = imports
    new = fold_config(cfg)
    assert own_classes(new) == own
    left = new.get("custom_imports", {}).get("imports")
    assert left == (imports if own else ["json"] if "json" in imports else None)


@pytest.fixture
def fold(call, scenes, tmp_path):
    """Fold the model of a configuration, with random weights; return the configuration and checkpoint written."""

    def fold(cfg):
        cfg.dump(tmp_path / "given.py")
        cfg = load_config(str(tmp_path / "given.py"))
        model = build_model(cfg)
        drop_pretrained(model, replaced=set(model.state_dict()))
        model.init_weights()
        for site in condattn.find_sites(model):  # output projections of zeros would hide what is before them
            torch.nn.init.normal_(site.out.projection.weight, std=0.1)
        write_checkpoint(tmp_path / "given.pth", model, {})
        images = scenes / "images" / "validation"
        command = ["given.py", "given.pth", "--images", images, "--num", 1, "--out", "new.pth"]
        status, output, errors = call("checkpoints/fold", *command, "--config-out", "new.py", "--device", "cpu")
        assert not status, errors
        assert re.search(r"agrees to [\d.e+-]+ of its size", output)
        new = load_config(str(tmp_path / "new.py"))
        checkpoint = torch.load(tmp_path / "new.pth", weights_only=True)
        build_model(new).load_state_dict(checkpoint["state_dict"])
        return new, checkpoint, output

    return fold


def test_tokens_stay_conditioned(fold):
    cfg = Config.fromfile(DEMO / "mask_rcnn_swin_pc.py")
    cfg.model.backbone.conditioning = "sc+ct"
    new, checkpoint, _ = fold(cfg)
    assert new.model.backbone.conditioning == "ct"
    assert any(methods for methods in checkpoint["meta"]["conditioning"].values())


def test_a_part_of_a_detector_stays_conditioned(fold):
    cfg = small("detr_r50_pc")
    cfg.model.update(conditioning="sc+pc", include=["decoder"])
    new, checkpoint, _ = fold(cfg)
    assert new.model.conditioning == "pc" and new.model.include == ["decoder"]
    conditioned = [name for name, methods in checkpoint["meta"]["conditioning"].items() if methods]
    assert conditioned and all(name.startswith("decoder") for name in conditioned)


def test_upstream_has_none_of_our_settings(fold):
    cfg = Config.fromfile(DEMO / "mask_rcnn_swin_pc.py")
    start = dict(type="Pretrained", checkpoint="swin.pth", load="effective", unsafe=True, other_conditioning=True)
    cfg.model.backbone.update(conditioning="sc", fast_attention=False, init_cfg=start)
    new, _, _ = fold(cfg)
    assert new.model.backbone.type == "SwinTransformer" and "fast_attention" not in new.model.backbone
    assert new.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="swin.pth")


def test_a_backbone_of_timm_whose_first_site_is_left_out(fold):
    cfg = Config.fromfile(DEMO / "mask_rcnn_swin_pc.py")
    settings = dict(model_name="swin_tiny_patch4_window7_224", img_size=96, window_size=6, depths=(2, 2, 2, 2))
    widths = dict(embed_dim=32, num_heads=(2, 4, 8, 8), out_indices=(0, 1, 2))
    conditioning = dict(conditioning="sc+pc", exclude=["layers.0.blocks.0*"])
    cfg.model.backbone = dict(type="ConditionedTimmBackbone", **settings, **widths, **conditioning)
    new, _, _ = fold(cfg)
    assert new.model.backbone.conditioning == "pc" and new.model.backbone.exclude == ["layers.0.blocks.0*"]


def test_a_configuration_of_another_model_is_not_written(fold, monkeypatch, tmp_path):
    """As by a method of one's own that folding merges, but that is none of the weight methods."""
    monkeypatch.setattr("condattn.openmmlab.runner.folding.WeightMethod", condattn.methods.HeadOutputMethod)
    cfg = Config.fromfile(DEMO / "mask_rcnn_swin_pc.py")
    cfg.model.backbone.conditioning = "sc+pc"
    with pytest.raises(AssertionError, match="the folded checkpoint is of a model with conditioning"):
        fold(cfg)
    assert not list(tmp_path.glob("new.*"))
