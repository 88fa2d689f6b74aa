"""Conditioned initialisation: which weights it sets, to what, and what it is refused beside."""

import importlib.util
from pathlib import Path

import pytest
import torch
from computed_weights import COMPUTED
from hypothesis import given, settings
from hypothesis import strategies as st
from registrations import registrations_undone
from torch import nn

import condattn
from condattn import ConditionedInitialization
from condattn.condition import initialize
from condattn.methods.initialization import semi_orthogonal

timm = pytest.importorskip("timm")
ROOT = Path(__file__).parents[1]


def vit(**other):
    options = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=4)
    return timm.models.VisionTransformer(**options, **other)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6))
def test_semi_orthogonal(rows, columns, seed):
    torch.manual_seed(seed)
    w = semi_orthogonal(torch.empty(rows, columns, dtype=torch.float64))
    product = w @ w.T if rows <= columns else w.T @ w
    torch.testing.assert_close(product, torch.eye(min(rows, columns), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["fused", "per_head"])
def test_which_weights_become_what(layout):
    torch.manual_seed(0)
    plain, model = vit(), vit()
    model.load_state_dict(plain.state_dict())
    report = condattn.condition(model, f"ci(layout={layout!r})")
    assert report.conditioned == ("blocks.0.attn", "blocks.1.attn")
    heads = []
    for name, value in model.state_dict().items():
        if not name.endswith("attn.qkv.weight"):
            assert torch.equal(value, plain.state_dict()[name]), name
            continue
        q, k, v = value.chunk(3)
        for part in (*q.chunk(3), *k.chunk(3)):
            torch.testing.assert_close(part @ part.T, torch.eye(8), rtol=0, atol=1e-6)
            heads.append(part)
        assert torch.equal(v, torch.eye(24) if layout == "fused" else torch.eye(8, 24).repeat(3, 1))
    for i, one in enumerate(heads):  # independent of each other
        assert not any(torch.allclose(one, other, atol=0.05) for other in heads[:i])
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_the_other_initial_weights_are_those_without_it():
    """Although it draws random numbers before the head is built, and before it is initialised again."""
    pytest.importorskip("mmpretrain")
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromfile(ROOT / "configs" / "studies" / "_base_" / "vit_fashion_mnist.py")
    states = []
    for conditioning in ("none", "ci"):
        torch.manual_seed(3)
        cfg.model.backbone.conditioning = conditioning
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            model = MODELS.build(cfg.model)
        model.init_weights()
        states.append(model.state_dict())
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert changed == {f"backbone.layers.{i}.attn.qkv.weight" for i in range(4)}


@pytest.mark.parametrize("conditioning", ["pc", "sc", "ct", "ci"])
def test_later_random_numbers_are_those_without_it(conditioning, monkeypatch):
    """On the CPU the same, and the generators of other devices are not touched."""
    model = vit()
    for device in (torch.cuda, torch.xpu):
        monkeypatch.setattr(device, "manual_seed_all", lambda seed: pytest.fail("sets the generators of GPUs"))
    state = torch.get_rng_state()
    condattn.condition(model, conditioning)
    initialize(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_set_from_any_device_and_precision():
    (site,) = condattn.find_sites(vit().blocks[0])
    site.q.set_weight(torch.ones(24, 24, dtype=torch.float64))
    assert site.q.weight.dtype == torch.float32 and torch.equal(site.q.weight, torch.ones(24, 24))


def test_values_of_other_sizes():
    """The rectangular identity where values are narrower or wider than the input; no head is without ones."""
    model = nn.MultiheadAttention(8, 2, kdim=12, vdim=5)
    condattn.condition(model, "ci")
    first, second = model.v_proj_weight.chunk(2)
    assert torch.equal(first, torch.eye(5)[:4])
    assert torch.equal(second, torch.eye(5)[[4, 0, 1, 2]])
    narrow = nn.MultiheadAttention(8, 2, vdim=3)
    condattn.condition(narrow, "ci")
    first, second = narrow.v_proj_weight.chunk(2)
    assert torch.equal(first, torch.eye(4, 3)) and torch.equal(second, torch.eye(4, 3)[:, [2, 0, 1]])
    per_head = nn.MultiheadAttention(8, 2, vdim=5)
    condattn.condition(per_head, "ci(layout='per_head')")
    assert all(torch.equal(head, torch.eye(4, 5)) for head in per_head.v_proj_weight.chunk(2))
    for head in (*model.q_proj_weight.chunk(2), *model.k_proj_weight.chunk(2)):
        torch.testing.assert_close(head @ head.T, torch.eye(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["levit_128s", "efficientformer_l1"])
def test_values_with_more_channels_than_the_tokens(name):
    """Every head has an output of its own, and with PC no gradient is divided by the smallest norm."""
    model = timm.create_model(name)
    condattn.condition(model, "ci+pc")
    sites = condattn.find_sites(model)
    assert any(len(site.v.weight) > site.v.weight.shape[1] for site in sites)
    for site in sites:
        for head in site.v.weight.unflatten(0, (site.num_heads, -1)):
            torch.testing.assert_close(head @ head.T, torch.eye(len(head)), rtol=0, atol=0)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_weights_that_are_kept_transposed():
    transformers = importlib.import_module("transformers")
    model = transformers.GPT2Model(transformers.GPT2Config(30, 16, 24, 1, 3))
    condattn.condition(model, "ci+pc")
    q, k, v = model.h[0].attn.c_attn.weight.T.chunk(3)
    assert torch.equal(v, torch.eye(24))
    for head in (*q.chunk(3), *k.chunk(3)):
        torch.testing.assert_close(head @ head.T, torch.eye(8), rtol=0, atol=1e-6)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = vit()
        assert len(condattn.condition(model, "ci+pc").conditioned) == 2
    assert model.blocks[0].attn.qkv.weight.is_meta


def test_a_model_that_is_initialised_again():
    """The weights of the method are set again where the code that initialises calls for it."""
    model = vit()
    condattn.condition(model, "ci")
    model.init_weights()
    assert not torch.equal(model.blocks[0].attn.qkv.weight[48:], torch.eye(24))
    condattn.initialize(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight[48:], torch.eye(24))


def test_it_is_done_once_and_reproducible():
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(vit())
        condattn.condition(models[-1], "ci")
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(ValueError, match="ConditionedInitialization is applied already"):
        condattn.condition(models[0], "ci")
    assert condattn.fold(models[0]) == 0
    assert condattn.remove(models[0]) == 2
    assert all(torch.equal(value, first[name]) for name, value in models[0].state_dict().items())


@pytest.mark.parametrize("conditioning", ["ci+sc(form='svd')", "sc(form='svd')+ci", "pc+ci+sc(form='svd')"])
def test_the_exact_correction_of_the_same_weights_is_refused(conditioning):
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="ci and sc.* make no sense together: both equalise the singular values"):
        condattn.condition(model, conditioning)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    condattn.condition(model, "sc(form='svd')")
    with pytest.raises(ValueError, match=r"blocks.0.attn.*make no sense together"):
        condattn.condition(model, "ci")


def test_the_exact_correction_of_other_weights_is_not():
    model = vit()
    condattn.condition(model, "sc(form='svd')", include="blocks.0")
    assert condattn.condition(model, "ci", include="blocks.1").conditioned == ("blocks.1.attn",)


def test_a_relative_correction_is_of_the_weights_that_were_set():
    """In either order, also if the model has been used in between."""
    relative = "sc(strength=3.0, relative=True)"
    for calls in ([f"ci+{relative}"], [f"{relative}+ci"], [relative, "ci"], ["ci", relative]):
        model = vit().eval()
        for conditioning in calls:
            condattn.condition(model, conditioning)
            model(torch.rand(1, 3, 16, 16))
        qkv = model.blocks[0].attn.qkv
        largest = torch.linalg.matrix_norm(qkv.weight[:24], 2)
        torch.testing.assert_close(
            qkv.effective_weight()[:24] - qkv.weight[:24], 3 * largest * torch.eye(24), rtol=1e-5, atol=1e-5
        )


def test_combinations():
    for conditioning in ("ci+pc", "ct+ci+sc+pc"):
        model = vit().eval()
        report = condattn.condition(model, conditioning)
        assert str(report).endswith(f": {conditioning}")
        assert model(torch.rand(1, 3, 16, 16)).isfinite().all()


def test_pretrained_weights_are_refused(tmp_path):
    pytest.importorskip("mmseg")
    from mmengine.registry import MODELS, DefaultScope

    import condattn.registry

    with DefaultScope.overwrite_default_scope("mmseg"):
        settings = dict(type="ConditionedTimmBackbone", model_name="vit_tiny_patch16_224")
        backbone = MODELS.build(dict(**settings, conditioning="ci"))
        torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
        pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "vit.pth"))
        settings["init_cfg"] = pretrained
        message = "'ci' sets initial weights, which the pretrained weights would replace"
        with pytest.raises(ValueError, match=message):
            MODELS.build(dict(**settings, conditioning="ci")).init_weights()
        MODELS.build(dict(**settings, conditioning="pc")).init_weights()
    backbone.init_weights()
    sites = condattn.find_sites(backbone)
    assert all(torch.equal(site.v.weight, torch.eye(192)) for site in sites)


def test_weights_that_are_loaded_when_a_module_is_built_are_refused(tmp_path):
    """As wrappers of other libraries load them, also in a part of the module."""
    pytest.importorskip("mmpretrain")
    from mmengine.registry import MODELS, DefaultScope

    import condattn.registry  # noqa: F401

    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "vit.pth")
    loaded = dict(checkpoint_path=str(tmp_path / "vit.pth"))
    backbone = dict(type="TIMMBackbone", model_name="test_vit", num_classes=5)
    head = dict(type="LinearClsHead", num_classes=5, in_channels=64)
    modules = {
        "backbone": (backbone, loaded),
        "backbone of a classifier": (dict(type="ImageClassifier", backbone=backbone, head=head), {}),
        "classifier": (dict(type="TimmClassifier", model_name="test_vit", num_classes=5), loaded),
    }
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        for name, (module, start) in modules.items():
            MODELS.build(dict(type="Conditioned", module=module, conditioning="ci"))
            pretrained = {**module, **start} if start else {**module, "backbone": {**backbone, **loaded}}
            MODELS.build(dict(type="Conditioned", module=pretrained, conditioning="pc"))
            with pytest.raises(ValueError, match="'ci' sets initial weights, which the pretrained weights") as error:
                MODELS.build(dict(type="Conditioned", module=pretrained, conditioning="ci"))
            assert "\n" not in str(error.value), name


def test_pretrained_weights_of_the_whole_model_are_refused():
    pytest.importorskip("mmpretrain")
    from mmengine.registry import MODELS, DefaultScope

    from condattn.openmmlab.errors import UserError
    from condattn.openmmlab.runner.checkpoints import check_initial_weights

    def classifier(conditioning, **start):
        timm_backbone = dict(type="ConditionedTimmBackbone", model_name="vit_tiny_patch16_224")
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            backbone = dict(**timm_backbone, conditioning=conditioning)
            return MODELS.build(dict(type="ImageClassifier", backbone=backbone, **start))

    check_initial_weights(classifier("ci"), set())
    check_initial_weights(classifier("ci"), {"backbone.model.pos_embed", "head.weight"})
    check_initial_weights(classifier("pc", pretrained="vit.pth"), {"backbone.model.blocks.0.attn.qkv.weight"})
    for start, loaded in (
        (dict(pretrained="vit.pth"), set()),
        (dict(init_cfg=dict(type="Pretrained", checkpoint="vit.pth")), set()),
        ({}, {"backbone.model.blocks.0.attn.qkv.weight"}),
    ):
        with pytest.raises(UserError, match="'ci' sets initial weights, which the pretrained weights would replace"):
            check_initial_weights(classifier("ci", **start), loaded)


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed_are_refused(compute):
    model = vit().eval()  # in training, reading a parametrized weight changes the state of its spectral norm
    compute(model.blocks[1].attn.qkv)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks.1.attn \(Attention\): the weight .* cannot be written"):
        condattn.condition(model, "ci")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (site,) = condattn.find_sites(model.blocks[1])
    with pytest.raises(ValueError, match="set_weight: the weight of a .*Linear cannot be written"):
        site.q.set_weight(torch.zeros(24, 24))


@pytest.mark.parametrize("conditioning", ["ci", "sc"])
@pytest.mark.parametrize("settings", [dict(kernel_size=3), dict(kernel_size=1, groups=2)])
def test_convolutions_over_several_pixels_or_parts_of_channels_are_refused(settings, conditioning):
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Conv2d(8, 24, **settings), nn.Conv2d(8, 8, 1)

    with registrations_undone():
        rule = lambda m: dict(num_heads=2, out=condattn.into(m.proj, axis=1), **condattn.thirds(m.qkv))  # noqa: E731
        condattn.register_rule(f"{Convolutional.__module__}.{Convolutional.__qualname__}", rule)
        model = nn.Sequential(Convolutional())
        before = model[0].qkv.weight.clone()
        with pytest.raises(ValueError, match="its q is no convolution of size 1 and of all channels"):
            condattn.condition(model, conditioning)
        assert torch.equal(model[0].qkv.weight, before)


def test_a_layout_that_is_none():
    with pytest.raises(ValueError, match="ConditionedInitialization: layout is 'whole'; expected one of"):
        ConditionedInitialization("whole")
