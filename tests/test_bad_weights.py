"""Weights that the tools cannot use: a one-line error or a warning, and nothing written."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from runs import DEMO, NOWHERE

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import ConfigDict
from mmengine.registry import MODELS

import condattn.registry  # noqa: F401  registers the models
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.checkpoints import check_pretrained, read_checkpoint


@pytest.mark.parametrize("name", ["nowhere.pth", "https://example.invalid/weights.pth", "torchvision://resnet50"])
def test_pretrained_weights_that_cannot_be_had(refuse, monkeypatch, tmp_path_factory, name):

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path_factory.mktemp("hub")))
    options = ["--cfg-options", NOWHERE[0], f"model.backbone.init_cfg.checkpoint={name}"]
    parts = (name, "--cfg-options model.backbone.init_cfg.checkpoint=FILE", "model.backbone.init_cfg=None")
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", *options, parts=parts)


def test_weights_of_timm_that_cannot_be_had(refuse, call, detection_options, tmp_path, monkeypatch):
    """The weights are not needed if a checkpoint replaces them."""
    import timm

    create = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no network")
        return create(*args, **kwargs)

    text = f"""
_base_ = {str(DEMO / "mask_rcnn_swin_pc.py")!r}
model = dict(
    backbone=dict(_delete_=True, type="ConditionedTimmBackbone", model_name="test_vit", pretrained=True),
    neck=dict(
        _delete_=True, type="SimpleFeaturePyramid", in_channels=64, out_channels=64, num_outs=3, scales=(4, 2, 1)
    ),
)
"""
    (tmp_path / "timm.py").write_text(text)
    monkeypatch.setattr(timm, "create_model", offline)
    parts = ("timm:test_vit", "no network", "model.backbone.checkpoint_path=FILE", "model.backbone.pretrained=False")
    refuse("train", "timm.py", "--cfg-options", *detection_options, parts=parts)
    status, _, errors = call("train", "timm.py", "--cfg-options", *detection_options, "model.backbone.pretrained=False")
    assert status is None, errors
    checkpoint = tmp_path / "work_dirs" / "timm" / "epoch_1.pth"
    status, _, errors = call("test", "timm.py", checkpoint, "--cfg-options", *detection_options)
    assert status is None, errors
    more = ["train_cfg.max_epochs=2", "train_cfg.val_interval=2"]
    status, _, errors = call("train", "timm.py", "--resume", "--cfg-options", *detection_options, *more)
    assert status is None, errors
    assert (tmp_path / "work_dirs" / "timm" / "epoch_2.pth").exists()


def test_pretrained_weights_of_which_none_fits(refuse, detection_options, tmp_path):
    torch.save({"state_dict": {"features.norm.weight": torch.ones(2)}}, tmp_path / "foreign.pth")
    options = [NOWHERE[0], "model.backbone.init_cfg.checkpoint=foreign.pth", *detection_options]
    parts = ("no weight of foreign.pth has a place", "features.norm.weight", "patch_embed", "init_cfg=None")
    refuse("train", DEMO / "mask_rcnn_swin_pc.py", "--cfg-options", *options, parts=parts)


def test_weights_of_which_none_fits_beside_corrections_that_are_computed_from_them(tmp_path):
    torch.save({"state_dict": {"features.norm.weight": torch.ones(2)}}, tmp_path / "foreign.pth")
    start = dict(type="Pretrained", checkpoint=str(tmp_path / "foreign.pth"))
    module = dict(type="mmseg.MixVisionTransformer", embed_dims=8, init_cfg=start)
    settings = dict(type="Conditioned", module=module, conditioning="sc(relative=True)")
    with pytest.raises(UserError, match=r"none fits: the file has features\.norm\.weight, the model expects layers"):
        check_pretrained(MODELS.build(settings), settings)
    swin = ConfigDict(type="mmdet.SwinTransformer", init_cfg=start)  # whose own code for such files fails
    with pytest.raises(UserError, match=r"foreign\.pth cannot be loaded; .* \(IndexError: list index out of range\)"):
        check_pretrained(MODELS.build(swin), swin)


@pytest.fixture
def bad_checkpoints(detection, tmp_path) -> Path:
    whole = detection.checkpoint.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").touch()
    torch.save({"state_dict": {"encoder.weight": torch.ones(2)}}, tmp_path / "foreign.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    weights = read_checkpoint(str(detection.checkpoint))["state_dict"]
    name = next(name for name in weights if name.endswith("blocks.1.attn.w_msa.proj.weight"))
    contents = {
        "numbered.pth": {"state_dict": dict(enumerate(weights.values()))},
        "bare_and_numbered.pth": dict(enumerate(weights.values())),
        "flat.pth": {"state_dict": {name: value.reshape(-1, 1, 1) for name, value in weights.items() if value.dim()}},
        "listed.pth": {"state_dict": list(weights.values())},
        "no_metadata.pth": {"state_dict": weights, "meta": [1]},
        "not_a_number.pth": {"state_dict": {**weights, name: torch.full_like(weights[name], float("nan"))}},
        "infinite.pth": {"state_dict": {**weights, name: torch.full_like(weights[name], float("-inf"))}},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    return tmp_path


CHECKPOINTS = {
    "missing.pth": ("there is no file missing.pth",),
    "cut.pth": ("cannot read the checkpoint cut.pth", "cut short"),
    "empty.pth": ("cannot read the checkpoint empty.pth",),
    "foreign.pth": ("no weight of the checkpoint foreign.pth fits", "encoder.weight", "backbone.patch_embed"),
    "list.pth": ("list.pth is no checkpoint",),
    "numbered.pth": ("numbered.pth: expected weights with names, found the key 0, of type int",),
    "bare_and_numbered.pth": ("expected weights with names, found the key 0, of type int",),
    "flat.pth": (
        "no weight of the checkpoint flat.pth fits",
        "have another shape",
        "there, 32 x 3 x 4 x 4 in the model",
    ),
    "listed.pth": ("listed.pth: expected state_dict to be a dictionary of weights, found a list",),
    "no_metadata.pth": ("expected meta to be a dictionary, found a list",),
    "not_a_number.pth": ("is damaged", "1 weights", "not finite", "blocks.1.attn.w_msa.proj.weight"),
    "infinite.pth": ("is damaged", "1 weights", "not finite", "blocks.1.attn.w_msa.proj.weight"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(refuse, bad_checkpoints, detection_options, scenes, name):
    config, parts = DEMO / "mask_rcnn_swin_pc.py", CHECKPOINTS[name]
    refuse("test", config, name, "--cfg-options", *detection_options, parts=parts)
    refuse("train", config, "--cfg-options", *detection_options, f"load_from={name}", parts=parts)
    refuse("predict", scenes, config, name, "--out-dir", "out", parts=parts)


def test_a_checkpoint_without_a_part_of_the_model_is_predicted_with_a_warning(call, detection, scenes, tmp_path):
    checkpoint = read_checkpoint(str(detection.checkpoint))
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: value for name, value in weights.items() if not name.startswith("roi_head.")}
    torch.save(checkpoint, tmp_path / "headless.pth")
    image = sorted((scenes / "images" / "validation").iterdir())[0]
    status, _, errors = call("predict", image, detection.config, "headless.pth", "--out-dir", "out")
    assert status == 0
    (line,) = [line for line in errors.splitlines() if line.startswith("warning: ")]
    missing = len(weights) - len(checkpoint["state_dict"])
    assert f"{missing} are not in it and keep their initial values (all of roi_head)" in line


def test_a_file_that_is_not_what_its_name_says_is_predicted_with_a_warning(call, detection, scenes, tmp_path):
    shutil.copy(detection.checkpoint, tmp_path / "swin-0a1b2c3d.pth")
    found = hashlib.sha256(detection.checkpoint.read_bytes()).hexdigest()[:8]
    image = sorted((scenes / "images" / "validation").iterdir())[0]
    status, _, errors = call("predict", image, detection.config, "swin-0a1b2c3d.pth", "--out-dir", "out")
    assert status == 0
    (line,) = [line for line in errors.splitlines() if line.startswith("warning: ")]
    assert f"swin-0a1b2c3d.pth is another file than its name says: its SHA-256 starts with {found}, not with" in line


def test_training_that_cannot_be_resumed(refuse, detection, tmp_path):
    checkpoint = torch.load(detection.checkpoint, weights_only=False)
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "weights.pth")
    resume = ["train", detection.config, "--cfg-options", *detection.options, "--resume"]
    refuse(*resume, "missing.pth", parts=("there is no file missing.pth",))
    refuse(*resume, "weights.pth", parts=("weights.pth holds weights alone", "load_from=weights.pth"))


def test_names_of_weights_that_a_collection_does_not_have():
    with pytest.raises(UserError, match="torchvision:// has no weights called resnet5000; it has"):
        read_checkpoint("torchvision://resnet5000")
