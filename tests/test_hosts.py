"""Rules beyond single models: all of timm, export, other implementations, the table of classes, and the tool."""

import copy
import importlib
import os
import re
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
import torch
from runs import CONFIGS, ROOT, TOOLS, compiler, error_lines, run
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import condattn
from condattn import SpectralCorrection
from condattn.attention import rules as sites

GENTLE = SpectralCorrection(1.0)
METHODS = {"pc": "pc", "sc": GENTLE, "sc+pc": [GENTLE, "pc"]}


def small(name, **settings):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, **settings).eval()


MODELS = {
    "ViT": lambda: small("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5),
    "Swin": lambda: small("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 1, 1, 1), num_classes=5),
    "XCiT": lambda: small("xcit_nano_12_p16_224", depth=2, num_classes=5),
    "BEiT": lambda: small("beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=5),
}
SIDES = {"ViT": 32, "Swin": 56, "XCiT": 64, "BEiT": 32}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param](), torch.randn(2, 3, SIDES[request.param], SIDES[request.param])


@pytest.mark.parametrize("method", METHODS)
def test_export(model, method):
    model, image = model
    condattn.condition(model, METHODS[method])
    with torch.no_grad():
        want = model(image)
        # Strict tracing cannot follow the overridden weights of BEiT in older versions.
        got = torch.export.export(model, (image,), strict=False).module()(image)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@compiler
@pytest.mark.parametrize("method", ["pc", "sc"])
@pytest.mark.parametrize("name", ["ViT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Swin", "XCiT"))])
def test_inductor(name, method):
    model, image = MODELS[name](), torch.randn(2, 3, SIDES[name], SIDES[name])
    condattn.condition(model, METHODS[method])
    with torch.no_grad():
        want = model(image)
        got = torch.compile(model)(image)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["pc", "sc", "ct(form='newton_schulz')"])
@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_onnx(name, method, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, image = MODELS[name](), torch.randn(2, 3, SIDES[name], SIDES[name])
    condattn.condition(model, METHODS.get(method, method))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(image)
        torch.onnx.export(model, (image,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=1e-3, atol=1e-4)


def test_every_implementation_of_transformers_is_conditioned_alike():
    zoo = pytest.importorskip("zoo_transformers")
    for name in ("ViT", "BERT", "GPT-2", "Llama"):
        outputs, weights = [], None
        for implementation in ("eager", "sdpa"):
            model, forward = zoo.build(name, implementation)
            weights = weights or model.state_dict()
            model.load_state_dict(weights)
            condattn.condition(model.eval(), [GENTLE, "pc"])
            with torch.no_grad():
                outputs.append(forward(model))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_weights_that_the_host_reads_are_lent_for_its_forward_only():
    model = MODELS["BEiT"]()
    image = torch.randn(1, 3, 32, 32)
    condattn.condition(model, "sc")
    model(image)
    linear = model.blocks[0].attn.qkv
    assert isinstance(linear.weight, torch.nn.Parameter)
    with pytest.raises(RuntimeError, match="shape|size"):
        model.blocks[0].attn(torch.randn(1, 3, 7))
    assert isinstance(linear.weight, torch.nn.Parameter)
    reference = copy.deepcopy(model)
    condattn.fold(model)
    assert not model.blocks[0].attn._forward_hooks and not model.blocks[0].attn._forward_pre_hooks
    torch.testing.assert_close(model(image), reference(image), rtol=0, atol=1e-6)


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@pytest.mark.parametrize("used", [True, False], ids=["used before", "new"])
def test_replicas_of_a_model_get_the_corrected_weights(used):
    """Replicas as made by nn.DataParallel, whose weights are no parameters; they leave the hooks of the model alone."""
    model = MODELS["BEiT"]().eval()
    condattn.condition(model, "sc")
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = (model if used else copy.deepcopy(model))(image)
        before = hooks(model)
        modules = dict(model.named_modules())
        replicas = {name: module._replicate_for_data_parallel() for name, module in modules.items()}
        for name, replica in replicas.items():
            for child in replica._modules:
                replica._modules[child] = replicas[f"{name}.{child}".lstrip(".")]
            for parameter, value in modules[name]._parameters.items():
                if value is not None:
                    object.__setattr__(replica, parameter, value.detach())
        for _ in range(2):
            assert torch.equal(replicas[""](image), want)
        assert hooks(model) == before


@pytest.mark.slow
def test_no_model_of_timm_has_attention_that_nobody_knows():
    """Test all registered models; print how many families are conditioned, and why the others are not."""
    timm = pytest.importorskip("timm")
    from zoo_timm import FAMILIES

    families, excepted = set(), {}
    for name in timm.list_models():
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name)
        family = timm.models._registry._model_entrypoints[name].__module__.split(".")[-1]
        unsupported = sites.find_unsupported(model)
        assert all(one.reason for one in unsupported), name
        if condattn.find_sites(model):
            families.add(family)
        elif unsupported:
            excepted[family] = sites.describe_unsupported(unsupported)
    alone = {family: reasons for family, reasons in excepted.items() if family not in families}
    ratio = len(families) / (len(families) + len(alone))
    print(f"\n{len(families)} families conditioned, {ratio:.1%}; not: {alone}")
    assert families == {name.split(":")[0] for name in FAMILIES}
    assert ratio >= 0.95


class WithoutAlgebra(TorchDispatchMode):
    """Refuses products, norms and decompositions."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not re.search(r"svd|norm|mm\b|matmul|qr", str(function)), function
        return function(*args, **(kwargs or {}))


def test_nothing_is_computed_from_the_weights_of_a_large_model():
    """So that conditioning takes no time; what depends on the weights is computed in the first forward."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224")
    with WithoutAlgebra():
        report = condattn.condition(model, "sc(relative=True)+pc")
    assert len(report.conditioned) == 24


@pytest.mark.skipif(
    all(found.name != "onedl-mmpretrain" for found in metadata.distributions()),
    reason="the table is of the default stack",
)
def test_the_table_of_supported_classes_is_up_to_date():
    command = [sys.executable, "-c", "import make_attention; print(make_attention.page())"]
    page = subprocess.run(command, cwd=ROOT / "docs", capture_output=True, text=True, check=True)
    assert page.stdout == (ROOT / "docs" / "attention.md").read_text(), "run python docs/make_attention.py"
    untested = re.findall(r"(\w+)`.*only in other versions", page.stdout)
    # timm up to 1.0.15, see below, and transformers 5: make test-transformers
    assert untested == ["Attention", "DetrCrossAttention", "DetrSelfAttention"]


class FormerAttention(nn.Module):
    """The attention of ViT, CrossViT and DeiT in timm up to 1.0.15."""

    __module__, __qualname__ = "timm.models.vision_transformer", "Attention"

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim((2, 3), (0, 2)).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FormerParallelBlock(nn.Module):
    """The block with attention beside a feed-forward network in timm up to 1.0.22."""

    __module__, __qualname__ = "timm.models.vision_transformer", "ParallelScalingBlock"

    def __init__(self, qkv_bias):
        super().__init__()
        self.num_heads, self.in_split = 2, [16, 8, 8, 8]
        self.in_proj = nn.Linear(8, 40, bias=qkv_bias)
        self.attn_out_proj, self.mlp_out_proj = nn.Linear(8, 8), nn.Linear(16, 8)
        self.mlp_bias = None if qkv_bias else nn.Parameter(torch.randn(16))
        self.register_buffer("qkv_bias", None if qkv_bias else torch.zeros(24), persistent=False)

    def forward(self, x):
        if self.mlp_bias is None:
            y = self.in_proj(x)
        else:
            y = F.linear(x, self.in_proj.weight, torch.cat((self.qkv_bias, self.mlp_bias)))
        hidden, q, k, v = y.split(self.in_split, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.attn_out_proj(heads) + self.mlp_out_proj(F.gelu(hidden))


@pytest.mark.parametrize(
    "build", [FormerAttention, lambda: FormerParallelBlock(True), lambda: FormerParallelBlock(False)]
)
def test_classes_of_earlier_versions_of_timm(build):
    """Conditioning equals the same attention with W + C, and with normalised head outputs."""
    module, x = build(), torch.randn(2, 5, 8)
    want = copy.deepcopy(module)
    (site,) = condattn.find_sites(want)
    for part in (site.q, site.k, site.v):
        part.set_weight(part.weight + torch.eye(8))
    output = site.out.projection
    output.register_forward_pre_hook(lambda m, args: (F.normalize(args[0].unflatten(-1, (2, 4)), dim=-1).flatten(-2),))
    condattn.condition(module, "sc+pc")
    for _ in range(2):
        torch.testing.assert_close(module(x), want(x))


@pytest.mark.parametrize("name", sites.known_exceptions())
def test_exceptions_exist(name):
    pytest.importorskip(name.split(".")[0])
    module, _, cls = name.rpartition(".")
    if os.environ.get("STACK_TO_TEST") == "stock":
        pytest.importorskip(module)  # the forks have more models
    assert issubclass(getattr(importlib.import_module(module), cls), torch.nn.Module)


@pytest.mark.parametrize(
    "library, name, parts",
    [
        ("timm", "vit_tiny_patch16_224", ("12 attention sites", "blocks.11.attn", "Attention", "192 x 192", "q, k, v")),
        ("timm", "iformer_t", ("SHMA", "a gate multiplies its head output")),
        ("transformers", "LlamaModel", ("32 attention sites", "LlamaAttention", "4096 x 4096")),
        ("mmdet", CONFIGS / "demo" / "mask_rcnn_swin_pc.py", ("attention sites", "backbone.stages.0", "WindowMSA")),
    ],
)
def test_tool_prints_the_sites(library, name, parts, tmp_path):
    pytest.importorskip(library)
    output = run(TOOLS / "analysis" / "sites.py", name, cwd=tmp_path).stdout
    assert all(part in output for part in parts), output


@pytest.mark.parametrize(
    "name, part", [("resnet18", "has no attention site"), ("vit_huge_tiny", "no model vit_huge_tiny")]
)
def test_tool_refuses(name, part, tmp_path):
    pytest.importorskip("timm")
    (line,) = error_lines(run(TOOLS / "analysis" / "sites.py", name, cwd=tmp_path, status=2).stderr)
    assert re.search(part, line)


@pytest.mark.parametrize("name", ["PreTrainedModel", "EncoderDecoderModel", "RagModel", "TimmBackbone"])
def test_tool_refuses_classes_without_a_default_size(name, refuse):
    pytest.importorskip("transformers")
    refuse("analysis/sites", name, parts=(f"{name} of transformers has no default size (", "such as ViTModel"))
