"""User-defined methods, one of each kind (tests/own_methods.py), pass the same tests as the built-in ones."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from registrations import registrations_undone
from runs import DEMO, TOOLS, error_lines, first_iteration, run

import condattn
from condattn.spectra import measure
from condattn.weights.calibrate import calibrate
from condattn.weights.load import load_weights

timm = pytest.importorskip("timm")

KINDS = ["scaled", "shrunk", "centred", "orthogonal"]
COMBINED = "orthogonal+centred+scaled+shrunk"
WITH_SC = {
    "scaled": "scaled+sc(targets=('k', 'v'))",
    "shrunk": "shrunk+sc",
    "centred": "centred+sc",
    "orthogonal": "orthogonal+sc",
}


@pytest.fixture(autouse=True, scope="module")
def own_methods():
    """The four methods, registered for this module alone."""
    with registrations_undone():
        import own_methods

        yield own_methods


def vit():
    torch.manual_seed(0)
    settings = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    return timm.models.VisionTransformer(**settings).eval()


def conditioned(conditioning):
    model = vit()
    return model, condattn.condition(model, conditioning)


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def formula(names):
    """Output of the model conditioned by these methods, in float64, by independent formulas."""
    model = vit().double()
    for block in model.blocks:
        if "orthogonal" in names:  # has a separate test
            continue
        if "scaled" in names:
            block.attn.qkv.weight.data[:24] *= 0.5
        if "sc" in names:
            first = 24 if "scaled" in names else 0
            for start in range(first, 72, 24):
                block.attn.qkv.weight.data[start : start + 24] += torch.eye(24)
        if "shrunk" in names:

            def shrink(module, args):
                heads = args[0].reshape(*args[0].shape[:-1], 3, 8)
                return (torch.cat([head / head.norm(dim=-1, keepdim=True).sqrt() for head in heads.unbind(-2)], -1),)

            block.attn.proj.register_forward_pre_hook(shrink)
    x = images().double()
    return model(x - x.mean(1, keepdim=True) if "centred" in names else x)


@torch.no_grad()
@pytest.mark.parametrize(
    "conditioning",
    ["scaled", "shrunk", "centred", *[WITH_SC[kind] for kind in KINDS[:3]], "centred+scaled+shrunk"],
)
def test_what_they_compute(conditioning):
    model, report = conditioned(conditioning)
    names = re.findall(r"[a-z]+(?=\+|\(|$)", re.sub(r"\(.*\)", "", conditioning))
    torch.testing.assert_close(model(images()).double(), formula(names), rtol=1e-4, atol=1e-5)
    assert conditioning == "+".join(map(str, report.methods))
    assert report.elsewhere == (("",) if "centred" in names else ())
    assert len(report.conditioned) == (0 if names == ["centred"] else 2)


def test_initial_weights():
    model, _ = conditioned("orthogonal(gain=2.0)+sc")
    before = vit().state_dict()
    for name, value in model.state_dict().items():
        if name.endswith("qkv.weight"):
            assert torch.equal(value[:48], before[name][:48])
            torch.testing.assert_close(value[48:] @ value[48:].T, 4 * torch.eye(24))
        else:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("scaled", "sc", r"blocks.0.attn .*its q is corrected already, by scaled; two methods cannot correct one"),
        ("sc", "scaled", r"its q is corrected already, by sc; two methods cannot correct one weight"),
        ("pc", "shrunk", r"head outputs are conditioned already, by pc; two methods cannot transform them"),
        ("shrunk", "pc", r"head outputs are conditioned already, by shrunk"),
        ("orthogonal", "ci", r"initial weights are set already, by orthogonal"),
        ("ci", "orthogonal", r"initial weights are set already, by ci"),
        ("scaled", "scaled(factor=2.0)", "Scaled more than once"),
        ("centred", "centred", "Centred more than once"),
    ],
)
def test_two_for_one_thing_are_refused_and_the_model_stays_as_it_was(first, second, message):
    model = vit()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        condattn.condition(model, f"{first}+{second}")
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert not any(condattn.conditioning_of(model).values())


@torch.no_grad()
@pytest.mark.parametrize("conditioning", [*KINDS, *WITH_SC.values(), COMBINED])
def test_fold_and_remove(conditioning):
    model, _ = conditioned(conditioning)
    before = model(images())
    folded = copy.deepcopy(model)
    count = 2 if re.search(r"scaled|sc\b", conditioning) else 0
    assert condattn.fold(folded) == count
    torch.testing.assert_close(folded(images()), before, rtol=1e-4, atol=1e-5)
    assert not any("correction" in name for name in folded.state_dict())
    left = {method["type"] for methods in condattn.conditioning_of(folded).values() for method in methods}
    assert not left & {"Scaled", "SpectralCorrection"}
    assert condattn.remove(model)
    plain = vit()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(condattn.conditioning_of(model).values())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    if "orthogonal" not in conditioning:
        assert torch.equal(model(images()), plain(images()))


@torch.no_grad()
@pytest.mark.parametrize("conditioning", [*KINDS, *WITH_SC.values(), COMBINED])
def test_copies_files_and_state(conditioning):
    model, _ = conditioned(conditioning)
    before = model(images())
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(images()), before)
    other, _ = conditioned(conditioning)
    for parameter in other.parameters():
        parameter.add_(1.0)
    assert not torch.equal(other(images()), before)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), before)


@torch.no_grad()
def test_weights_are_loaded_such_that_the_function_stays():
    plain, (model, _) = vit(), conditioned("scaled+sc(targets=('k', 'v'))")
    weights = {name: value + 0.01 * torch.randn_like(value) for name, value in plain.state_dict().items()}
    plain.load_state_dict(weights)
    load_weights(model, weights, "the test", load="effective")
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_calibration():
    """The factor of each head is the least-squares solution."""
    plain, (model, _) = vit(), conditioned("shrunk")
    seen = []
    plain.blocks[0].attn.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    plain(images())
    heads = seen[0].reshape(-1, 3, 8)
    shrunk = heads / heads.norm(dim=-1, keepdim=True).sqrt()
    found = calibrate(model, lambda: model(images()))
    wanted = [torch.linalg.lstsq(shrunk[:, h].reshape(-1, 1), heads[:, h].reshape(-1, 1)).solution for h in range(3)]
    torch.testing.assert_close(found[0].scales, torch.cat(wanted).flatten(), rtol=1e-5, atol=0)
    assert all(one.after < one.before for one in found)


def test_spectra():
    model, _ = conditioned("scaled+shrunk")
    found = {(one.site, one.matrix): one.values for one in measure(model, images()).spectra}
    w, corrected = found["blocks.0.attn", "W_Q"], found["blocks.0.attn", "W_Q + C"]
    torch.testing.assert_close(corrected, w / 2, rtol=1e-5, atol=1e-8)
    assert ("blocks.0.attn", "W_K + C") not in found
    outputs = {}

    def keep(module, args):
        outputs["heads"] = args[0].double()

    plain = vit()
    plain.blocks[0].attn.qkv.weight.data[:24] *= 0.5
    plain.blocks[0].attn.proj.register_forward_pre_hook(keep)
    plain(images())
    heads = outputs["heads"].reshape(2, 17, 3, 8).transpose(1, 2)
    wanted = torch.linalg.svdvals(heads / heads.norm(dim=-1, keepdim=True).sqrt())
    torch.testing.assert_close(found["blocks.0.attn", "C A(X)"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", [*KINDS, COMBINED])
def test_the_record_and_the_guard(conditioning):
    pytest.importorskip("mmdet")
    from condattn.openmmlab.errors import UserError
    from condattn.openmmlab.models.loading import check_conditioning, record_of

    model, _ = conditioned(conditioning)
    record = json.loads(json.dumps(record_of(model)))
    again = vit()
    for method in condattn.methods.parse(conditioning):
        found = [name for name, methods in record.items() for one in methods if one["type"] == type(method).__name__]
        settings = next(one for one in record[found[0]] if one["type"] == type(method).__name__)
        condattn.condition(again, settings)
    assert json.loads(json.dumps(record_of(again))) == record
    checkpoint = {"meta": {"conditioning": record}}
    check_conditioning(checkpoint, "a.pth", again)
    if conditioning == "orthogonal":  # computes the same as the unconditioned model
        check_conditioning(checkpoint, "a.pth", vit())
        check_conditioning({}, "a.pth", model)
    else:
        with pytest.raises(UserError, match="a.pth is of a model with conditioning=.(scaled|shrunk|centred)"):
            check_conditioning(checkpoint, "a.pth", vit())
        with pytest.raises(UserError, match="a.pth is of a model with conditioning='none'"):
            check_conditioning({}, "a.pth", model)


@pytest.fixture
def swin():
    """A function that builds mmdet's Swin, conditioned as a backbone class or by the wrapper ``Conditioned``."""
    pytest.importorskip("mmdet")
    from mmengine.registry import MODELS, DefaultScope

    import condattn.registry  # noqa: F401 - registers the backbones

    tiny = dict(embed_dims=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4)

    def build(conditioning, wrapped=False, **settings):
        with DefaultScope.overwrite_default_scope("mmdet"):
            if wrapped:
                module = dict(type="SwinTransformer", **tiny, **settings)
                return MODELS.build(dict(type="Conditioned", module=module, conditioning=conditioning))
            return MODELS.build(dict(type="ConditionedSwinTransformer", **tiny, **settings, conditioning=conditioning))

    return build


@pytest.mark.parametrize("wrapped", [False, True], ids=["backbone", "Conditioned"])
def test_initial_weights_are_set_after_the_initialisation(swin, wrapped, tmp_path):
    def is_orthogonal(model):
        values = [site.v.weight for site in condattn.find_sites(model)]
        return [torch.allclose(value @ value.T, torch.eye(len(value)), atol=1e-5) for value in values]

    model = swin("orthogonal", wrapped)
    model.init_weights()
    assert all(is_orthogonal(model))
    trained = {name: value + 1 for name, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict(trained, strict=False)
    assert not any(is_orthogonal(model))
    assert not any(is_orthogonal(swin("none", wrapped)))

    torch.save({f"backbone.{name}": value for name, value in trained.items()}, tmp_path / "swin.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "swin.pth"))
    message = "'orthogonal' sets initial weights, which the pretrained weights would replace"
    with pytest.raises(ValueError, match=message):
        swin("orthogonal", wrapped, init_cfg=pretrained).init_weights()
    swin("scaled", wrapped, init_cfg=pretrained).init_weights()


@pytest.mark.slow
def test_a_run_is_trained_resumed_and_tested(small, detection_options, tmp_path):
    """The configuration imports the methods."""
    pytest.importorskip("mmdet")
    text = f"""
_base_ = {str(DEMO / "mask_rcnn_swin_pc.py")!r}
custom_imports = dict(imports=['condattn.registry', 'own_methods'])
model = dict(backbone=dict(conditioning={COMBINED!r}))
randomness = dict(seed=3)
"""
    (tmp_path / "own.py").write_text(text)
    options = [one for one in detection_options if "max_epochs" not in one]
    options.append("default_hooks.checkpoint.max_keep_ckpts=-1")
    command = [TOOLS / "train.py", tmp_path / "own.py", "--cfg-options", *options, "train_cfg.max_epochs=2"]
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    run(*command, "--work-dir", tmp_path / "whole", cwd=tmp_path, **path)
    half = tmp_path / "whole" / "epoch_1.pth"
    run(*command, "--work-dir", tmp_path / "resumed", "--resume", half, cwd=tmp_path, **path)
    assert first_iteration(tmp_path / "resumed") > 1
    whole, resumed = (torch.load(tmp_path / name / "epoch_2.pth", weights_only=False) for name in ("whole", "resumed"))
    assert {method["type"] for methods in whole["meta"]["conditioning"].values() for method in methods} == {
        "Scaled",
        "Shrunk",
        "Centred",
        "OrthogonalValues",
    }
    same = [torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items()]
    assert all(same)
    test = [TOOLS / "test.py", tmp_path / "own.py", tmp_path / "whole" / "epoch_2.pth"]
    run(*test, "--cfg-options", *options, cwd=tmp_path, **path)
    other = [*options, "model.backbone.conditioning=scaled"]
    refused = run(*test, "--cfg-options", *other, cwd=tmp_path, status=2, **path)
    (line,) = error_lines(refused.stderr)
    assert all(name in line for name in COMBINED.split("+"))
