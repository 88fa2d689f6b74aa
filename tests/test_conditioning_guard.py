"""The guard of conditioning: checkpoints are for models of the same conditioning, unless a user says otherwise."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import EMAHook
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner.priority import get_priority
from runs import DEMO
from torch import nn

import condattn

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.hooks.conditioning_guard import ConditioningGuardHook
from condattn.openmmlab.models.factory import Conditioned
from condattn.openmmlab.models.loading import check_conditioning, drop_record, record_of, trained_with, with_record
from condattn.openmmlab.runner.checkpoints import check_pretrained, read_checkpoint
from condattn.openmmlab.runner.launch import build_runner
from condattn.openmmlab.runner.rewriting import write_checkpoint

SWIN = DEMO / "mask_rcnn_swin_pc.py"
NONE = "model.backbone.conditioning=none"


def checkpoint_of(conditioning):
    model = nn.TransformerEncoderLayer(8, 2, 16)
    condattn.condition(model, conditioning)
    return {"state_dict": model.state_dict(), "meta": {"conditioning": record_of(model)}}, model


CONDITIONINGS = ["none", "pc", "sc", dict(type="RowPreconditioner", eps=1e-3), "sc+pc"]


@pytest.mark.parametrize("theirs", CONDITIONINGS, ids=str)
@pytest.mark.parametrize("ours", CONDITIONINGS, ids=str)
def test_only_the_same_conditioning_is_accepted(ours, theirs, tmp_path):
    checkpoint, _ = checkpoint_of(theirs)
    torch.save(checkpoint, tmp_path / "a.pth")
    checkpoint, (_, model) = torch.load(tmp_path / "a.pth", weights_only=True), checkpoint_of(ours)
    if ours == theirs:
        check_conditioning(checkpoint, "a.pth", model)
        return
    with pytest.raises(UserError) as caught:
        check_conditioning(checkpoint, "a.pth", model)
    message = str(caught.value)
    for pattern, expected in ((r"set conditioning=(.*?) in", theirs), (r"one has conditioning=(.*?), so", ours)):
        told = condattn.methods.parse(eval(re.search(pattern, message)[1]))
        assert set(map(repr, told)) == set(map(repr, condattn.methods.parse(expected)))
    assert "--other-conditioning" in message and ("calibrate.py" in message) == (theirs == "none")


def test_a_setting_that_a_record_lacks_has_its_default():
    checkpoint, model = checkpoint_of("pc")
    for methods in checkpoint["meta"]["conditioning"].values():
        del methods[0]["cross_covariance"]
    check_conditioning(checkpoint, "a.pth", model)
    other = checkpoint_of(dict(type="RowPreconditioner", cross_covariance="tokens"))[1]
    with pytest.raises(UserError, match="cross_covariance='tokens'"):
        check_conditioning(checkpoint, "a.pth", other)


@pytest.mark.parametrize("ours", ["none", "pc", "ct", "ct+sc"])
@pytest.mark.parametrize("theirs", ["ct+pc", "ct+ci+pc", "ct"])
def test_the_advised_setting_loads_what_acts_on_the_whole_model(theirs, ours):
    pytest.importorskip("timm")
    from timm.models import VisionTransformer

    def model(conditioning):
        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
        condattn.condition(vit, conditioning)
        return vit

    checkpoint = {"meta": {"conditioning": record_of(model(theirs))}, "state_dict": {}}
    if theirs == ours:
        check_conditioning(checkpoint, "a.pth", model(ours))
        return
    with pytest.raises(UserError) as caught:
        check_conditioning(checkpoint, "a.pth", model(ours))
    check_conditioning(checkpoint, "a.pth", model(eval(re.search(r"set conditioning=(.*?) in", str(caught.value))[1])))
    now = eval(re.search(r"one has conditioning=(.*?), so", str(caught.value))[1])
    assert set(now.split("+")) == set(ours.split("+"))


@pytest.mark.parametrize("theirs, ours", [("pc", "pc(detach=True)"), ("pc(detach=True)+sc", "sc+pc")])
def test_settings_that_change_gradients_alone_may_differ(theirs, ours):
    check_conditioning(checkpoint_of(theirs)[0], "a.pth", checkpoint_of(ours)[1])


def test_a_checkpoint_without_a_record_is_unconditioned():
    checkpoint, model = checkpoint_of("pc")
    del checkpoint["meta"]["conditioning"]
    with pytest.raises(UserError, match="is of a model with conditioning='none' at 1 of 1 places"):
        check_conditioning(checkpoint, "a.pth", model)
    check_conditioning(checkpoint, "a.pth", checkpoint_of("none")[1])


def test_the_hook_records_and_refuses():
    class Runner:
        model = checkpoint_of("pc")[1]

    checkpoint = {"meta": {}, "state_dict": Runner.model.state_dict()}
    ConditioningGuardHook().before_save_checkpoint(Runner, checkpoint)
    assert checkpoint["meta"]["conditioning"]["self_attn"][0]["type"] == "RowPreconditioner"
    ConditioningGuardHook().after_load_checkpoint(Runner, checkpoint)
    with pytest.raises(UserError, match="conditioning='none'"):
        ConditioningGuardHook().after_load_checkpoint(Runner, {})
    ConditioningGuardHook(allow_other=True).after_load_checkpoint(Runner, {})


def test_the_hook_acts_before_a_moving_average():
    """``EMAHook`` copies the weights of a checkpoint itself, and swaps those that are saved."""

    def run(point, model, checkpoint):
        runner = SimpleNamespace(model=model, _resume=False, iter=0)
        average, guard = EMAHook(), ConditioningGuardHook(allow_other=True)
        average.before_run(runner)
        for hook in sorted((average, guard), key=lambda hook: get_priority(hook.priority)):
            getattr(hook, point)(runner, checkpoint)

    def build(conditioning):
        return Conditioned(nn.TransformerEncoderLayer(8, 2, 16), conditioning).requires_grad_(False)

    checkpoint = {"meta": {}, "state_dict": build("pc").state_dict()}
    run("before_save_checkpoint", build("pc"), checkpoint)
    with pytest.raises(ValueError, match="conditioning='pc'"):
        build("none").load_state_dict(checkpoint["state_dict"])
    run("after_load_checkpoint", build("none"), checkpoint)
    build("none").load_state_dict(checkpoint["state_dict"])


def test_tools_refuse_a_checkpoint_of_another_conditioning(refuse, detection, scenes):
    options = ["--cfg-options", *detection.options, NONE]
    parts = ("conditioning='pc'", "conditioning='none'", "--other-conditioning")
    refuse("test", SWIN, detection.checkpoint, *options, parts=parts)
    refuse("train", SWIN, *options, f"load_from={detection.checkpoint}", parts=parts)
    images = scenes / "images" / "validation"
    refuse("predict", images, SWIN, detection.checkpoint, "--out-dir", "out", *options, parts=parts)


def test_tools_load_it_where_they_are_told_to(call, detection, scenes):
    options = ["--cfg-options", *detection.options, NONE]
    images = sorted((scenes / "images" / "validation").iterdir())[0]
    command = ["predict", images, SWIN, detection.checkpoint, "--out-dir", "out", "--other-conditioning"]
    assert call(*command, *options)[0] == 0


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
def test_inferencers_of_the_toolboxes_refuse_it_too(toolbox, request, tmp_path):
    from mmdet.apis import DetInferencer, init_detector
    from mmseg.apis import MMSegInferencer, init_model

    run = request.getfixturevalue({"mmdet": "detection", "mmseg": "segmentation"}[toolbox])
    build, infer = {"mmdet": (init_detector, DetInferencer), "mmseg": (init_model, MMSegInferencer)}[toolbox]
    cfg, weights = Config.fromfile(run.work_dir / run.config.name), str(run.checkpoint)
    model = infer(copy.deepcopy(cfg), weights, device="cpu").model
    name = "backbone.patch_embed.projection.weight"
    assert torch.equal(model.state_dict()[name], read_checkpoint(weights)["state_dict"][name])
    cfg.model.backbone.conditioning = "sc"
    message = "checkpoint of backbone is of a model with conditioning='pc' .* this one has conditioning='sc'"
    for load in (build, infer):
        with pytest.raises(ValueError, match=message):
            load(copy.deepcopy(cfg), weights, device="cpu")


def test_a_whole_conditioned_model_refuses_the_weights_of_another():
    def build(conditioning):
        return Conditioned(nn.TransformerEncoderLayer(8, 2, 16), conditioning)

    saved = with_record(build("pc").state_dict(), build("pc"))
    build("pc").load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"checkpoint of the model is of a model with conditioning=.* places \(self_attn\)"
    ):
        build("none").load_state_dict(saved)
    drop_record(saved)
    build("none").load_state_dict(saved)
    build("none").load_state_dict(build("pc").state_dict())


class Attention(BaseModule):
    """A part of a model, of a class that loads its pretrained weights as mmengine does."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.attn = nn.MultiheadAttention(8, 2)


class Detector(BaseModule):
    """A whole model with such a part."""

    def __init__(self, backbone, init_cfg=None):
        super().__init__(init_cfg)
        self.backbone = MODELS.build(backbone)


@pytest.fixture
def start(tmp_path):
    """Save a detector with a conditioning, and build it, whole or its backbone alone, to start from these weights."""

    def build(conditioning, whole, **init_cfg):
        backbone = dict(type=Attention, **init_cfg)
        module = dict(type=Detector, backbone=backbone) if whole else backbone
        return Conditioned(module, conditioning=conditioning)

    def save_and_build(before, after, whole, **settings):
        saved = build(before, True)
        (tmp_path / "a.pth").unlink(missing_ok=True)
        write_checkpoint(tmp_path / "a.pth", saved, {})
        init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "a.pth"), prefix="backbone.", **settings)
        return saved, build(after, whole, init_cfg=init_cfg)

    return save_and_build


@pytest.mark.parametrize("whole", [False, True])
def test_pretrained_weights_of_a_conditioned_module_and_of_its_parts(whole, start):
    """Their record is compared and kept, although mmengine drops it with the prefix."""
    saved, model = start("pc", "pc", whole)
    model.init_weights()
    weight = "attn.out_proj.weight"
    name = f"backbone.{weight}" if whole else weight
    assert torch.equal(model.state_dict()[name], saved.state_dict()[f"backbone.{weight}"])
    assert trained_with(model, condattn.RowPreconditioner) == ["RowPreconditioner"]
    _, model = start("sc", "pc", whole)
    with pytest.raises(ValueError, match=r"a.pth is of a model with conditioning='sc'.*other_conditioning=True"):
        model.init_weights()
    _, model = start("none", "pc", whole)
    model.init_weights()
    assert not trained_with(model, condattn.RowPreconditioner)


@pytest.mark.parametrize("whole", [False, True])
def test_settings_of_pretrained_weights_that_mmengine_does_not_have(whole, start):
    weight = "backbone.attn.in_proj_weight"
    saved, model = start("none", "sc", whole, load="effective")
    check_pretrained(model, {})
    effective = copy.deepcopy(model)
    assert condattn.fold(effective) == 1
    torch.testing.assert_close(
        effective.state_dict()[weight.removeprefix("" if whole else "backbone.")], saved.state_dict()[weight]
    )
    _, model = start("sc", "pc", whole, other_conditioning=True, unsafe=True)
    check_pretrained(model, {})


def test_the_advice_for_weights_without_conditioning():
    for conditioning, advised in (("pc", True), ("sc+pc", True), ("ct", False), ("ct+pc", False)):
        timm = pytest.importorskip("timm")
        model = timm.create_model("test_vit", img_size=32)
        condattn.condition(model, conditioning)
        with pytest.raises(UserError) as error:
            check_conditioning({}, "plain.pth", model)
        assert ("calibrate.py" in str(error.value)) == advised, conditioning


def test_pretrained_weights_of_a_conditioned_model_for_a_class_of_upstream(tmp_path):
    """The class has no load hook of this project, and its weights would mean something else."""
    settings = dict(type="mmdet.SwinTransformer", embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    conditioned = MODELS.build(dict(type="Conditioned", module=settings, conditioning="sc"))
    file = tmp_path / "sc.pth"
    meta = {"conditioning": {f"backbone.{site}": methods for site, methods in record_of(conditioned).items()}}
    weights = {f"backbone.{name}": value for name, value in conditioned.state_dict().items()}
    torch.save({"state_dict": weights, "meta": meta}, file)
    settings["init_cfg"] = ConfigDict(type="Pretrained", checkpoint=str(file))
    with pytest.raises(UserError, match="sc.pth is of a model with conditioning='sc' .* with --other-conditioning"):
        check_pretrained(MODELS.build(settings), settings)
    settings["convert_weights"] = False
    check_pretrained(MODELS.build(settings), settings, other_conditioning=True)


def test_a_guard_in_the_configuration_allows_what_the_option_allows(tmp_path):
    cfg = Config.fromfile(SWIN)
    cfg.update(work_dir=str(tmp_path), launcher="none", custom_hooks=[dict(type="ConditioningGuardHook")])
    (hook,) = (one for one in build_runner(cfg, True).hooks if isinstance(one, ConditioningGuardHook))
    assert hook.allow_other
