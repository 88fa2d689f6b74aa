"""Calibration, folding, publishing and conversion: the mathematics, and the tools on a trained demo."""

import copy
import hashlib
import os
import re
import shutil
from inspect import signature

import numpy as np
import pytest
import torch
from computed_weights import COMPUTED
from mmengine.config import Config, ConfigDict
from runs import DEMO, Malice
from torch import nn

import condattn
from condattn.weights.calibrate import calibrate

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.models.loading import recorded
from condattn.openmmlab.runner.checkpoints import read_safely

SWIN = DEMO / "mask_rcnn_swin_pc.py"
SC = "model.backbone.conditioning=sc"
NONE = "model.backbone.conditioning=none"


def mean_norms(heads):
    """Mean row norm of each head, of head outputs (rows, heads, d), in float64."""
    rows = heads.double().numpy()
    return torch.as_tensor(np.sqrt((rows**2).sum(-1)).mean(0))


@pytest.mark.parametrize("interleaved", [False, True], ids=["ViT", "NesT"])
def test_calibration_folds_the_mean_row_norms(interleaved):
    pytest.importorskip("timm")
    if interleaved:
        from timm.models.nest import Attention
    else:
        from timm.models.vision_transformer import Attention
    plain = Attention(24, 3, qkv_bias=True).eval()
    x = torch.randn(5, 1, 7, 24) if interleaved else torch.randn(5, 7, 24)
    seen = []
    plain.proj.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        plain(x)
    heads, wanted = seen[0]
    heads = heads.unflatten(-1, (8, 3)).transpose(-1, -2) if interleaved else heads.unflatten(-1, (3, 8))
    scales = mean_norms(heads.flatten(0, -3))
    columns = scales.repeat(8) if interleaved else scales.repeat_interleave(8)
    model = Attention(24, 3, qkv_bias=True)
    model.load_state_dict(plain.state_dict())
    condattn.condition(model, "pc")
    (site,) = calibrate(model, lambda: model(x))
    assert model.training and not site.reason
    torch.testing.assert_close(site.scales, scales)
    torch.testing.assert_close(model.proj.weight.double(), plain.proj.weight.double() * columns)
    model.eval()
    with torch.no_grad():
        error = (model(x) - wanted).norm() / wanted.norm()
    assert site.after == pytest.approx(error.item(), rel=1e-4)
    assert site.after < 0.5 * site.before


def test_calibration_of_multihead_attention_is_exact_where_rows_have_one_norm():
    """With one token, all rows of a sequence are equal, and calibration restores the function exactly."""
    model = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    x = torch.randn(1, 1, 12).expand(2, 4, 12)
    with torch.no_grad():
        wanted, _ = model(x, x, x)
        condattn.condition(model, "pc")
        assert not torch.allclose(model(x, x, x)[0], wanted)
        (site,) = calibrate(model, lambda: model(x, x, x))
        torch.testing.assert_close(model(x, x, x)[0], wanted)
    assert site.after < 1e-6 < site.before


def test_calibration_does_not_write_a_weight_that_another_layer_uses_too():
    model = nn.ModuleDict({name: nn.MultiheadAttention(8, 2, batch_first=True) for name in "ab"})
    model["b"].out_proj.weight = model["a"].out_proj.weight
    condattn.condition(model, "pc", exclude="b")
    before, x = model["a"].out_proj.weight.clone(), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="a.out_proj.weight and b.out_proj.weight are one parameter"):
        calibrate(model, lambda: model["a"](x, x, x))
    assert torch.equal(model["a"].out_proj.weight, before)


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_calibration_does_not_write_a_weight_that_is_computed(compute):
    timm = pytest.importorskip("timm")
    model, x = nn.ModuleList(timm.layers.Attention(8, 2) for _ in range(2)), torch.randn(2, 3, 8)
    compute(model[1].proj)
    condattn.condition(model, "pc")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="1.proj: the weight of a .* cannot be written"):
        calibrate(model, lambda: model[1](model[0](x)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibration_over_processes():
    """As with all batches in one process, also where one process has fewer, or none that reach a site."""
    plain = nn.ModuleDict({name: nn.MultiheadAttention(8, 2, batch_first=True) for name in "ab"}).eval()
    batches = [("a", 2 * torch.randn(2, 3, 8)), ("a", torch.randn(2, 3, 8)), ("a", torch.randn(2, 3, 8))]
    batches += [("b", torch.randn(2, 3, 8))]

    def calibrated(part, reduce):
        model = copy.deepcopy(plain)
        condattn.condition(model, "pc")
        calibrate(model, lambda: [model[name](x, x, x) for name, x in part], reduce=reduce)
        return model

    sent = []
    other = calibrated(batches[:1], lambda value: (sent.append(value), value)[1])
    assert torch.equal(other["b"].out_proj.weight, plain["b"].out_proj.weight)
    together = calibrated(batches[1:], lambda value: (value + sent.pop(0)) / 2)
    whole = calibrated(batches, lambda value: value)
    assert not sent
    for name in "ab":
        torch.testing.assert_close(together[name].out_proj.weight, whole[name].out_proj.weight)
        assert not torch.allclose(whole[name].out_proj.weight, plain[name].out_proj.weight)


def test_calibration_says_what_it_cannot_do():
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match="has no site whose head outputs are changed"):
        calibrate(nn.MultiheadAttention(4, 2), lambda: None)
    model = timm.create_model("levit_128s").eval()
    condattn.condition(model, "pc")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no input reached an attention site"):
        calibrate(model, lambda: None)
    found = calibrate(model, lambda: model(torch.randn(1, 3, 224, 224)))
    assert all("stands between its heads and the output projection" in str(site) for site in found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibration_of_gpt2():
    """Its output projections store their weights as (in features, out features)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=24, n_layer=1, n_head=3, vocab_size=8, n_positions=8)
    model = transformers.GPT2Model(config).eval()
    tokens = torch.tensor([[1, 5, 2, 7]])
    attention, before = model.h[0].attn, model.h[0].attn.c_proj.weight.clone()
    seen = []
    attention.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(tokens)
    scales = mean_norms(seen[0].unflatten(-1, (3, 8)).flatten(0, -3)).repeat_interleave(8)
    condattn.condition(model, "pc")
    (site,) = calibrate(model, lambda: model(tokens))
    assert not site.reason and site.after < site.before
    torch.testing.assert_close(attention.c_proj.weight.double(), before.double() * scales[:, None])


def test_a_gate_is_no_projection():
    """What timm's attention multiplies the head outputs by would be left out of the measured error."""
    eva = pytest.importorskip("timm.models.eva")
    model = eva.EvaAttention(24, 3, gated=True, scale_norm=False)
    condattn.condition(model, "pc")
    (site,) = calibrate(model, lambda: model(torch.randn(1, 4, 24)))
    assert "a gate stands between" in site.reason


@pytest.mark.parametrize("head_first", [False, True])
def test_calibration_of_convolutions(head_first):
    """Their heads lie side by side along the channels of a map, and its pixels are the rows."""
    attention2d = pytest.importorskip("timm.layers.attention2d")
    model, x = attention2d.Attention2d(24, num_heads=3, head_first=head_first).eval(), torch.randn(2, 24, 4, 5)
    seen, before = [], model.proj.weight.detach().clone()
    handle = model.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    scales = mean_norms(seen[0].unflatten(1, (3, 8)).permute(0, 3, 4, 1, 2).flatten(0, 2))
    condattn.condition(model, "pc")
    (site,) = calibrate(model, lambda: model(x))
    assert not site.reason and site.after < site.before
    torch.testing.assert_close(site.scales, scales)
    columns = scales.repeat_interleave(8)[:, None, None]
    torch.testing.assert_close(model.proj.weight.double(), before.double() * columns)


def test_calibration_of_some_of_the_channels_of_a_projection():
    """Behind the heads, that of a parallel block receives the hidden channels of the feed-forward network."""
    vit = pytest.importorskip("timm.models.vision_transformer")
    if "fuse_out_proj" not in signature(vit.ParallelScalingBlock).parameters:
        pytest.skip("this timm has two projections")
    model, x, seen = vit.ParallelScalingBlock(24, 3, fuse_out_proj=True).eval(), torch.randn(2, 5, 24), []
    before = model.out_proj.weight.detach().clone()
    handle = model.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    assert seen[0].shape[-1] == 24 + 96
    scales = mean_norms(seen[0][..., :24].unflatten(-1, (3, 8)).flatten(0, 1))
    condattn.condition(model, "pc")
    (site,) = calibrate(model, lambda: model(x))
    assert not site.reason and site.after < site.before
    torch.testing.assert_close(site.scales, scales)
    columns = torch.cat([scales.repeat_interleave(8), torch.ones(96).double()])
    torch.testing.assert_close(model.out_proj.weight.double(), before.double() * columns)


def test_calibration_leaves_each_module_in_its_mode():
    """Such as frozen stages, which stay in evaluation mode while the others train."""
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True), nn.Dropout(), nn.Dropout()])
    condattn.condition(model, "pc")
    model.train()
    model[1].eval()
    x, modes = torch.randn(2, 3, 8), [module.training for module in model.modules()]
    seen = []
    calibrate(model, lambda: (seen.extend(module.training for module in model.modules()), model[0](x, x, x)))
    assert not any(seen)
    assert [module.training for module in model.modules()] == modes and not all(modes)


@pytest.mark.parametrize("what, reason", [("lora", "an adapter is around its output proj"), ("gain", "a GainedLinear")])
def test_projections_that_cannot_take_the_factors(what, reason):
    """An adapter would add its update to them; a gain scales the head outputs itself. Nothing is written."""
    timm = pytest.importorskip("timm")
    model, x = nn.ModuleList([timm.layers.Attention(8, 2)]), torch.randn(2, 3, 8)
    if what == "lora":
        peft = pytest.importorskip("peft")
        condattn.condition(model, "pc")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["proj"], r=2, init_lora_weights=False), model)
    else:
        pytest.importorskip("condattn.openmmlab.study.gain")
        condattn.condition(model, dict(type="GainedRowPreconditioner", gain="sqrt"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (site,) = calibrate(model, lambda: model[0](x))
    assert site.scales is None and reason in str(site)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="session")
def vanilla(detection, tmp_path_factory):
    """A checkpoint as of an unconditioned training: the demo's weights without the record of conditioning."""
    path = tmp_path_factory.mktemp("vanilla") / "vanilla.pth"
    checkpoint = torch.load(detection.checkpoint, weights_only=False)
    del checkpoint["meta"]["conditioning"]
    checkpoint["state_dict"] = dict(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    return path


def test_calibrate_then_evaluate(call, refuse, vanilla, detection, scenes, tmp_path):
    images = scenes / "images" / "validation"
    command = ["checkpoints/calibrate", SWIN, vanilla, "--images", images, "--out", "new.pth", "--num", 3]
    status, output, _ = call(*command)
    assert not status
    errors = re.findall(r"error of the output ([\d.]+) before, ([\d.]+) after", output)
    assert len(errors) == 6 and all(float(after) < float(before) for before, after in errors)
    checkpoint = torch.load("new.pth", weights_only=True)
    assert len(checkpoint["meta"]["conditioning"]) == 6 and set(checkpoint) == {"meta", "state_dict"}
    assert call("test", SWIN, tmp_path / "new.pth", "--cfg-options", *detection.options)[0] is None
    refuse(*command, parts=("new.pth exists already",))
    command[6] = "newer.pth"
    refuse(*command, "--cfg-options", NONE, parts=("has no PC and no SC; there is nothing to calibrate",))
    command[2] = detection.checkpoint
    refuse(*command, parts=("is of a conditioned model already",))


def test_calibrate_leaves_out_images_that_cannot_be_read(call, refuse, vanilla, scenes, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "._a.jpg"):  # hidden files, such as those of macOS, are no images
        (tmp_path / "images" / name).write_text("no image")
    command = ["checkpoints/calibrate", SWIN, vanilla, "--images", "images", "--out", "new.pth"]
    refuse(*command, parts=("1 image cannot be read: images/a.jpg (AssertionError: failed to load", "; replace them"))
    shutil.copy(min((scenes / "images" / "validation").glob("*.jpg")), tmp_path / "images" / "b.jpg")
    status, output, errors = call(*command)
    assert not status and "calibrated on 1 images" in output
    assert re.search(
        r"^warning: 1 image cannot be read: images/a.jpg \(AssertionError: .*\); left out$", errors, re.MULTILINE
    )


def test_calibrate_spectral_correction_then_fold_gives_the_same_weights_back(call, refuse, vanilla, scenes, tmp_path):
    """Calibration replaces W by W - C, and folding adds C again; the folded model is of upstream's class."""
    images = scenes / "images" / "validation"
    options = ["--cfg-options", SC]
    command = ["checkpoints/calibrate", SWIN, vanilla, "--images", images, "--out", "sc.pth", "--num", 2, *options]
    status, output, _ = call(*command)
    assert not status and "W - C in place of W" in output
    fold = ["checkpoints/fold", SWIN, "sc.pth", "--images", images, "--out", "plain.pth", "--config-out", "plain.py"]
    status, _, errors = call(*fold, *options, TOLERANCE=-1.0)
    assert status == 2 and "the attention of the folded model differs by" in errors
    assert not (tmp_path / "plain.pth").exists()
    status, output, _ = call(*fold, *options)
    assert not status and re.search(r"agrees to [\d.e+-]+ of its size on 4 images", output)
    assert "plain.py: needs condattn, for 'DigitScenesDetection', 'SpectraHook'" in output
    old, new = (torch.load(path, weights_only=False)["state_dict"] for path in (vanilla, "plain.pth"))
    assert old.keys() == new.keys()
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-5)
    cfg = Config.fromfile("plain.py")
    assert cfg.model.backbone.type == "SwinTransformer" and cfg.custom_imports.imports == ["condattn.registry"]
    from mmdet.apis import inference_detector, init_detector

    cfg.test_dataloader.dataset.data_root = str(scenes)
    model = init_detector(cfg, "plain.pth", device="cpu")
    assert type(model.backbone).__module__ == "mmdet.models.backbones.swin"
    inference_detector(model, str(sorted(images.iterdir())[0]))
    refuse(*fold, *options, parts=("plain.pth exists already",))
    fold[6], fold[8] = "other.pth", "other.py"
    refuse("checkpoints/fold", SWIN, vanilla, *fold[3:], "--cfg-options", NONE, parts=("no spectral correction",))


def test_initial_weights_that_pretrained_ones_would_replace(refuse, detection, vanilla):
    options = ["--cfg-options", *detection.options, "model.backbone.conditioning=ci"]
    parts = ("conditioning='ci' sets initial weights, which the pretrained weights would replace",)
    refuse("train", SWIN, *options, f"load_from={vanilla}", parts=parts)
    pretrained = ["model.init_cfg.type=Pretrained", f"model.init_cfg.checkpoint={vanilla}"]
    refuse("train", SWIN, *options, *pretrained, parts=parts)


def test_publish(call, refuse, detection, tmp_path):
    status, output, _ = call("checkpoints/publish", detection.checkpoint, "swin.pth")
    assert not status and "optimizer" in output
    (path,) = tmp_path.glob("swin-*.pth")
    assert path.name == f"swin-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {"meta", "state_dict"}
    assert checkpoint["meta"].keys() == {"mmengine_version", "dataset_meta", "conditioning"}
    assert call("checkpoints/publish", detection.checkpoint, "with_config.pth", "--keep-config")[0] is None
    (other,) = tmp_path.glob("with_config-*.pth")
    assert torch.load(other, weights_only=True)["meta"].keys() == checkpoint["meta"].keys() | {"cfg"}
    assert call("test", SWIN, path, "--cfg-options", *detection.options)[0] is None
    refuse("checkpoints/publish", detection.checkpoint, "swin.bin", parts=("ends with .pth", "swin.bin"))
    torch.save({"model": {}}, "other.pth")
    refuse("checkpoints/publish", "other.pth", "swin.pth", parts=("has no state_dict; its entries are model",))


def test_weights_alone_in_safetensors(call, segmentation):
    """A safetensors file has no record of the conditioning."""
    safetensors = pytest.importorskip("safetensors.torch")
    weights = torch.load(segmentation.checkpoint, weights_only=False)["state_dict"]
    safetensors.save_file(weights, "weights.safetensors")
    command = ["test", segmentation.config, "weights.safetensors", "--cfg-options", *segmentation.options]
    assert "--other-conditioning" in call(*command)[2]
    status, _, errors = call(*command, "--other-conditioning")
    warnings = [line for line in errors.splitlines() if line.startswith("warning:")]
    assert status is None and all("no pixel of class" in line for line in warnings)


def test_the_runner_executes_nothing_in_a_file(tmp_path, monkeypatch):
    """After ``read_safely``, mmengine's own reader executes nothing in a checkpoint either."""
    from mmengine.runner import load_checkpoint

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"weight": torch.ones(2, 2)}, "extra": Malice(tmp_path / "executed")}, "evil.pth")
    read_safely()
    with pytest.raises(UserError, match=r"evil\.pth holds more than weights .*mkdir"):
        load_checkpoint(nn.Linear(2, 2), "evil.pth")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.pth"):
        load_checkpoint(nn.Linear(2, 2), "nowhere.pth")
    read_safely(unsafe=True)
    load_checkpoint(nn.Linear(2, 2), "evil.pth")
    assert (tmp_path / "executed").is_dir()
    read_safely()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert(call, refuse, suffix, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 3))
    torch.save(model.state_dict(), "timm.pth")
    status, output, _ = call("checkpoints/convert", "timm.pth", f"mmdet{suffix}", "--to", "mmdet")
    assert not status
    assert "timm.pth: Swin of timm;" in output and "left out: 4 (norm.weight, norm.bias, head.fc" in output
    status, _, _ = call("checkpoints/convert", f"mmdet{suffix}", "back.pth", "--to", "timm")
    back = torch.load("back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[name], model.state_dict()[name]) for name in back)
    assert len(back) == len(model.state_dict()) - 4
    if suffix == ".pth":  # upstream's backbone reads only this format
        from mmdet.models.backbones.swin import SwinTransformer

        init_cfg = ConfigDict(type="Pretrained", checkpoint="mmdet.pth")
        widths = dict(embed_dims=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 3))
        backbone = SwinTransformer(**widths, init_cfg=init_cfg)
        backbone.init_weights()
        weight = backbone.stages[0].blocks[0].attn.w_msa.qkv.weight
        assert torch.equal(weight, model.layers[0].blocks[0].attn.qkv.weight)
    refuse("checkpoints/convert", "timm.pth", "back.pth", "--to", "mmseg", parts=("back.pth exists already",))
    torch.save(timm.create_model("xcit_nano_12_p16_224", depth=1).state_dict(), "xcit.pth")
    refuse("checkpoints/convert", "xcit.pth", "x.pth", "--to", "mmseg", parts=("XCiT of timm", "mmseg has no names"))
    torch.save({"conv.weight": torch.ones(1)}, "conv.pth")
    refuse(
        "checkpoints/convert", "conv.pth", "x.pth", "--to", "mmseg", parts=("no known format (conv.weight)", "DaViT")
    )
    scaled = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3, init_values=1e-5)
    torch.save(scaled.state_dict(), "scaled.pth")
    parts = ("scaled.pth has weights for which ViT of mmseg has no names: blocks.0.ls1.gamma",)
    refuse("checkpoints/convert", "scaled.pth", "x.pth", "--to", "mmseg", parts=parts)
    assert os.listdir(tmp_path) == [name for name in os.listdir(tmp_path) if not name.startswith(".")]


def test_converted_weights_keep_the_record_of_their_conditioning(call, refuse):
    """As of a whole detector in mmdet's names, and back."""
    timm = pytest.importorskip("timm")
    widths = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 3))
    model = timm.create_model("swin_tiny_patch4_window7_224", **widths)
    condattn.condition(model, "sc+pc")
    record = condattn.conditioning_of(model)
    torch.save({"meta": {"conditioning": record}, "state_dict": model.state_dict()}, "timm.pth")
    assert not call("checkpoints/convert", "timm.pth", "mmdet.pth", "--to", "mmdet")[0]
    found = recorded(torch.load("mmdet.pth", weights_only=True))
    assert found == {f"backbone.stages.{i}.blocks.0.attn.w_msa": record[f"layers.{i}.blocks.0.attn"] for i in range(4)}
    assert not call("checkpoints/convert", "mmdet.pth", "back.pth", "--to", "timm")[0]
    assert recorded(torch.load("back.pth", weights_only=True)) == record
    parts = ("timm.pth was trained with conditioned attention", "choose a name with .pth")
    refuse("checkpoints/convert", "timm.pth", "mmdet.safetensors", "--to", "mmdet", parts=parts)


@pytest.mark.parametrize("conditioning, reason", [("ct", "trained without EmbeddedTokens cannot"), ("ci", "nothing")])
def test_what_cannot_be_calibrated(refuse, detection, vanilla, scenes, conditioning, reason):
    images = scenes / "images" / "validation"
    options = ["--cfg-options", *detection.options, f"model.backbone.conditioning={conditioning}"]
    command = [SWIN, vanilla, "--images", images, "--out", "new.pth"]
    refuse("checkpoints/calibrate", *command, *options, parts=(reason,))


def test_calibration_before_the_first_iteration(call, detection, vanilla, tmp_path):
    hook = "custom_hooks = [dict(type='CalibrationHook', batches=1)]"
    (tmp_path / "calibrated.py").write_text(f"{Config.fromfile(SWIN).pretty_text}\n{hook}\n")
    command = ["train", "calibrated.py", "--other-conditioning", "--work-dir", "run"]
    options = ["--cfg-options", *detection.options, f"load_from={vanilla}"]
    status, output, errors = call(*command, *options)
    assert not status
    assert len(re.findall("relative error of the output", output + errors)) >= 6
