"""Pretrained weights of backbones, as ``init_cfg`` of mmengine names them."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from backbones import SMALL, VIT, build
from mmengine.model import PretrainedInit

from condattn.openmmlab.models.loading import record_of

SCOPES = ["mmdet", "mmseg"]


def test_pretrained_weights_as_mmsegs_own_test_of_its_vit_asks_for_them():
    """The cases of mmseg's ``test_vit_init``: the settings that it passes, and the errors that it expects."""
    path = "PATH_THAT_DO_NOT_EXIST"
    missing = dict(type="Pretrained", checkpoint=path)

    def vit(**settings):
        return build("mmseg", "ConditionedVisionTransformer", **VIT, **settings)

    model = vit(pretrained=None, init_cfg=None)
    assert model.init_cfg is None
    model.init_weights()
    for settings in (dict(pretrained=None, init_cfg=missing), dict(pretrained=path, init_cfg=None)):
        model = vit(**settings)
        assert model.init_cfg == missing
        with pytest.raises(OSError, match="there is no file PATH_THAT_DO_NOT_EXIST"):
            model.init_weights()
    with pytest.raises(TypeError):
        vit(pretrained=None, init_cfg=123).init_weights()
    with pytest.raises(TypeError):
        vit(pretrained=123, init_cfg=None)
    for pretrained in (path, 123):
        for init_cfg in (missing, 123):
            with pytest.raises(AssertionError):
                vit(pretrained=pretrained, init_cfg=init_cfg)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_missing_file_is_the_error_that_upstream_raises(scope):
    settings = dict(**SMALL, init_cfg=dict(type="Pretrained", checkpoint="nowhere.pth"))
    for type in ("SwinTransformer", "ConditionedSwinTransformer"):
        with pytest.raises(FileNotFoundError):
            build(scope, type, **settings).init_weights()


def test_the_branch_of_a_file_that_a_prefix_names(tmp_path):
    models = [build("mmdet", "ConditionedSwinTransformer", **SMALL) for _ in range(2)]
    branches = zip(("student.backbone.", "backbone."), models, strict=True)
    weights = {prefix + name: value for prefix, model in branches for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "both.pth")
    start = dict(type="Pretrained", checkpoint=str(tmp_path / "both.pth"))
    for prefix, source in ((dict(prefix="student.backbone."), models[0]), ({}, models[1])):
        model = build("mmdet", "ConditionedSwinTransformer", **SMALL, init_cfg={**start, **prefix})
        model.init_weights()
        assert torch.equal(model.patch_embed.projection.weight, source.patch_embed.projection.weight)
    model = build("mmdet", "ConditionedSwinTransformer", **SMALL, init_cfg=dict(**start, prefix="teacher"))
    with pytest.raises(ValueError, match=r"no weights with the prefix 'teacher\.'"):
        model.init_weights()


@pytest.mark.parametrize("kind", ["Pretrained", PretrainedInit], ids=["name", "class"])
def test_pretrained_weights_in_a_list(kind, tmp_path):
    """As in mmengine, the other entries initialise the model before; layouts of other releases are converted."""
    source = build("mmdet", "ConditionedSwinTransformer", **SMALL)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    start = [dict(type="Constant", val=0.5, layer="LayerNorm"), dict(type=kind, checkpoint=str(tmp_path / "a.pth"))]
    model = build("mmdet", "ConditionedSwinTransformer", **SMALL, init_cfg=start)
    nn.init.zeros_(model.patch_embed.projection.weight)
    model.init_weights()
    assert torch.equal(model.patch_embed.projection.weight, source.patch_embed.projection.weight)
    model = build("mmdet", "ConditionedSwinTransformer", conditioning="ci", **SMALL, init_cfg=start)
    with pytest.raises(ValueError, match="sets initial weights, which the pretrained weights would replace"):
        model.init_weights()


def test_weights_of_another_conditioning_with_corrections_of_their_own(tmp_path):
    """other_conditioning=True leaves the corrections out, and says so."""
    source = build("mmdet", "ConditionedSwinTransformer", conditioning="sc(relative=True)", **SMALL)
    torch.save({"state_dict": source.state_dict(), "meta": {"conditioning": record_of(source)}}, tmp_path / "a.pth")
    start = dict(type="Pretrained", checkpoint=str(tmp_path / "a.pth"))
    model = build("mmdet", "ConditionedSwinTransformer", **SMALL, init_cfg=start)
    with pytest.raises(ValueError, match="load it all the same with other_conditioning=True"):
        model.init_weights()
    for conditioning in ("pc", 'sc(form="svd")'):
        other = dict(**start, other_conditioning=True)
        model = build("mmdet", "ConditionedSwinTransformer", conditioning=conditioning, **SMALL, init_cfg=other)
        model.init_weights()
        assert torch.equal(model.patch_embed.projection.weight, source.patch_embed.projection.weight)
        own = [name for name, value in model.state_dict().items() if "correction" in name and not value.isnan().all()]
        assert own == []  # they are computed by the first forward


def test_pretrained_weights_of_no_file():
    model = build("mmseg", "ConditionedVisionTransformer", **VIT, init_cfg=dict(type="Pretrained"))
    with pytest.raises(ValueError, match="expects checkpoint=FILE_OR_ADDRESS, found None"):
        model.init_weights()
