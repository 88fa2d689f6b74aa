"""On a GPU: values and gradients are those of the CPU; half precision, compilation, graphs, spectra; the tools."""

import copy
import re
from pathlib import Path

import pytest
import torch
from runs import DEMO, TOOLS, free_port, run
from torch import nn

import condattn
from condattn.condition import initialize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
CONDITIONINGS = [
    *("none", "pc", "pc(detach=True)", "sc", "sc+pc", "sc(form='svd')", "sc(strength=3.0, relative=True)"),
    *("sc(layout='per_head')", "ct", "ct(form='newton_schulz')", "ci+pc", "ct+sc+pc"),
]


def vit():
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def swin(toolbox, window_size=4, **settings):
    """A small backbone with heads of 32 channels, which the Triton kernels support."""
    pytest.importorskip(toolbox)
    from mmengine.registry import MODELS, DefaultScope

    import condattn.registry  # noqa: F401

    settings = dict(embed_dims=64, depths=(2, 2), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1)) | settings
    with DefaultScope.overwrite_default_scope(toolbox):
        return MODELS.build(
            dict(
                type="ConditionedSwinTransformer",
                conditioning="none",
                drop_path_rate=0.0,
                window_size=window_size,
                **settings,
            )
        )


class Encoder(nn.Module):
    """An encoder of PyTorch on the rows of an image."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(96, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images):
        return self.encoder(images.transpose(1, 2).flatten(2))


MODELS = {"vit": vit, "mmdet": lambda: swin("mmdet"), "mmseg": lambda: swin("mmseg", 7), "encoder": Encoder}


def conditioned(name, conditioning):
    """A model in which every parameter has an effect, conditioned on the CPU."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.any():
            nn.init.normal_(parameter, 1.0, 0.3)
    if conditioning != "none":
        condattn.condition(model, conditioning)
    return model.train()


def images(device=DEVICE, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32).to(device, dtype)


def results(model, x, half=None):
    """Outputs, and gradients of the parameters, in double precision on the CPU."""
    model.zero_grad()
    with torch.autocast(x.device.type, half, enabled=half is not None):
        outputs = model(x)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    torch.manual_seed(2)
    torch.autograd.backward(outputs, [torch.randn(y.shape).to(y) for y in outputs])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach().double().cpu() for y in (*outputs, *gradients)]


def assert_near(got, want, tolerance):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        error = (one - other).norm() / other.norm().clamp_min(1e-6)
        assert error < tolerance, f"relative error {error:.2g}"


def of(names, name):
    """Conditionings that a model supports: conditioned tokens need a rule, which PyTorch's encoder has none of."""
    return [one for one in names if name != "encoder" or "ct" not in one]


CASES = [(name, conditioning) for name in MODELS for conditioning in of(CONDITIONINGS, name)]


@pytest.mark.parametrize("name, conditioning", CASES)
def test_values_and_gradients(name, conditioning):
    model = conditioned(name, conditioning)
    want = results(copy.deepcopy(model).double(), images("cpu", torch.float64))
    assert_near(results(model.to(DEVICE), images()), want, 2e-3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, conditioning", [(n, c) for n, c in CASES if c in ("none", "sc+pc", "ct+sc+pc")])
def test_automatic_mixed_precision(name, conditioning, half):
    """The errors are of the order of those without conditioning."""
    model = conditioned(name, conditioning).to(DEVICE)
    want = results(model, images())
    got = results(model, images(), half)
    assert_near(got[:1], want[:1], 0.2)
    assert all(one.isfinite().all() for one in got)


@pytest.mark.parametrize("name", MODELS)
def test_conditioned_on_the_gpu(name):
    """The order of conditioning and moving does not matter, and removing gives the model back."""
    model = conditioned(name, "none").to(DEVICE).eval()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        condattn.condition(model, "sc+pc")
        other = copy.deepcopy(plain).cpu()
        condattn.condition(other, "sc+pc")
        x = images()
        got, want = model(x), other.to(DEVICE)(x)
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
        condattn.fold(model)
        for one, two in zip(model(x), want, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
        condattn.remove(other)
        for one, two in zip(other(x), plain(x), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("conditioning", ["pc", "sc", "ct", "ci"])
@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_later_random_numbers_are_those_without_it(conditioning, device):
    drawn = []
    for one in ("none", conditioning):
        model = vit().to(device)
        torch.manual_seed(3)
        condattn.condition(model, one)
        initialize(model)
        drawn.append(torch.cat([torch.rand(1), torch.rand(1, device=DEVICE).cpu()]))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_training_are_repeatable(name):
    """No kernel adds in an order that changes."""
    model = conditioned(name, "sc+pc").to(DEVICE)
    first, second = results(model, images()), results(model, images())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("conditioning", ["sc+pc"])
def test_compiled(name, conditioning):
    torch._dynamo.reset()
    model = conditioned(name, conditioning).to(DEVICE)
    want = results(model, images())
    model.forward = torch.compile(model.forward)
    assert_near(results(model, images()), want, 2e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "encoder", "mmdet"])
@pytest.mark.parametrize("conditioning", ["pc", "sc+pc"])
def test_captured_in_a_graph(name, conditioning):
    """Nothing waits for the GPU in a forward pass."""
    model, x = conditioned(name, conditioning).to(DEVICE).eval(), images()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = model(x)
    graph.replay()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_spectra(name):
    model = conditioned(name, "sc+pc").eval()
    want = condattn.spectra.measure(model, images("cpu"))
    got = condattn.spectra.measure(copy.deepcopy(model).to(DEVICE), images())
    for one, other in zip(got.rows(), want.rows(), strict=True):
        for key, value in other.items():
            if isinstance(value, float) and key != "sigma_min":
                assert one[key] == pytest.approx(value, rel=0.02, abs=1e-3), (other["site"], other["quantity"], key)
            elif not isinstance(value, float):
                assert one[key] == value


FLAGS = [["--amp"], ["--amp", "bfloat16"], ["--compile"], ["--amp", "bfloat16", "--compile"]]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_segmenter_trains(flags, segmentation_options, tmp_path):
    options = [*segmentation_options, "default_hooks.logger.interval=1"]
    config = DEMO / "upernet_swin_pc.py"
    output = run(
        TOOLS / "train.py", config, "--work-dir", "run", *flags, "--cfg-options", *options, cwd=tmp_path
    ).stdout
    losses = [float(loss) for loss in re.findall(r"Iter\(train\).* loss: ([\d.]+)", output)]
    assert losses and "memory: " in output
    run(TOOLS / "test.py", config, latest(tmp_path), "--cfg-options", *options, cwd=tmp_path)


@pytest.mark.parametrize("conditioning, tool", [("none", "calibrate"), ("sc", "fold")])
def test_a_detector_trains_and_predicts(conditioning, tool, detection_options, scenes, tmp_path):
    """The tools for checkpoints and pictures, after a training in mixed precision."""
    config, images = DEMO / "mask_rcnn_swin_pc.py", next(scenes.rglob("*.png")).parent
    options = ["--cfg-options", *detection_options]
    trained = [*options, f"model.backbone.conditioning={conditioning}"]
    output = run(TOOLS / "train.py", config, "--amp", "--work-dir", "run", *trained, cwd=tmp_path).stdout
    assert re.search(r"Epoch\(train\).* memory: ", output) and "coco/segm_mAP" in output
    given = [config, latest(tmp_path)]
    if tool == "calibrate":
        run(TOOLS / "checkpoints/calibrate.py", *given, "--images", images, "--out", "new.pth", *options, cwd=tmp_path)
    else:
        files = ["--images", images, "--out", "new.pth"]
        run(TOOLS / "checkpoints/fold.py", *given, *files, *trained, cwd=tmp_path)
    assert (tmp_path / "new.pth").is_file()
    run(TOOLS / "analysis/spectra.py", *given, "--images", images, "--out", "spectra", *trained, cwd=tmp_path)
    run(TOOLS / "predict.py", images, *given, "--out-dir", "predictions", *trained, cwd=tmp_path)
    assert any((tmp_path / "predictions").iterdir())


SHARDED = ["runner_type=FlexibleRunner", "strategy.type=FSDP2Strategy", "custom_hooks=[]"]


@pytest.mark.parametrize("options", [[], SHARDED], ids=["replicated", "sharded"])
def test_one_process_of_a_distributed_training(options, segmentation_options, tmp_path):
    """One GPU is enough for NCCL and for sharding, both of which the CPU does without."""
    options = [*segmentation_options, *options]
    command = ["bash", TOOLS / "dist_train.sh", DEMO / "upernet_swin_pc.py", "1", "--work-dir", "run"]
    output = run(*command, "--cfg-options", *options, cwd=tmp_path, PORT=free_port()).stdout
    assert "GPU number: 1" in output and "gloo" not in output
    assert latest(tmp_path).is_file()


def latest(folder):
    return Path((folder / "run" / "last_checkpoint").read_text().strip())
