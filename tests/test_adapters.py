"""LoRA adapters and conditioning, applied in every order: adapters add to conditioned layers, as in the formulas."""

import copy
import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import Attention
from torch import nn
from torch.nn import functional as F

import condattn
from condattn import RowPreconditioner, SpectralCorrection
from condattn.attention import rules as sites
from condattn.attention.builders import into, read_by, thirds

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:(Already unmerged|All adapters are already merged):UserWarning"),
]

WIDTH, HEADS = 8, 2
GENTLE, EXACT = SpectralCorrection(1.0), SpectralCorrection(form="svd")
LARGE = RowPreconditioner(eps=1.5)  # above the norms of some rows
CONDITIONINGS = {
    "pc": ["pc"],
    "large-eps-pc": [LARGE],
    "sc": [GENTLE],
    "svd": [EXACT],
    "sc+pc": [GENTLE, "pc"],
    "svd+pc": [EXACT, "pc"],
}
CLOSE = dict(rtol=0, atol=1e-10)


class Block(nn.Module):
    """Attention that calls its layers."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(heads(self.qkv(x)))


class Reader(Block):
    """Attention that reads the weights of its layers itself."""

    def forward(self, x):
        rows = heads(F.linear(x, self.qkv.weight, self.qkv.bias))
        return F.linear(rows, self.proj.weight, self.proj.bias)


class Convolutions(nn.Module):
    """Attention whose layers are convolutions of one pixel."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        rows = heads(self.qkv(x.mT[..., None]).flatten(2).mT)
        return self.proj(rows.mT[..., None]).flatten(2).mT


class SelfAttention(nn.Module):
    """A block with PyTorch's ``nn.MultiheadAttention``."""

    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **settings)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def heads(qkv):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for t in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


@pytest.fixture(autouse=True)
def rules():
    names = [f"{__name__}.Block", f"{__name__}.Convolutions", f"{__name__}.Reader"]
    for name in names[:2]:
        condattn.register_rule(name, lambda m: dict(num_heads=HEADS, out=into(m.proj), **thirds(m.qkv)))
    condattn.register_rule(
        names[2], lambda m: dict(num_heads=HEADS, out=into(m.proj, reader=m), **read_by(m, thirds(m.qkv)))
    )
    yield
    for name in names:
        del sites._RULES[name]


def norms(rows):
    return rows.square().sum(-1, keepdim=True).sqrt()


class Case:
    """A model, its initial weights, and the formula of what it should compute with adapters."""

    def __init__(self, model, conditioning, *targets):
        self.model, self.conditioning, self.targets = nn.Sequential(model).eval(), conditioning, targets
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.x = torch.randn(2, 5, WIDTH)
        whole = isinstance(model, SelfAttention)
        self.names = ("in_proj_weight", "in_proj_bias") if whole else ("qkv.weight", "qkv.bias")
        self.names += ("out_proj.weight", "out_proj.bias") if whole else ("proj.weight", "proj.bias")
        layer = model.attention if whole else model
        self.weights = [_matrix(layer.get_parameter(name)).detach().clone() for name in self.names]
        self.constant = None

    def condition(self):
        condattn.condition(self.model, self.conditioning)

    def adapt(self, config=None):
        config = config or peft.LoraConfig(
            target_modules=list(self.targets), r=2, lora_alpha=6, init_lora_weights=False
        )
        self.peft = peft.get_peft_model(self.model, config)
        return self.peft

    def delta(self, name):
        """The update that the adapter of a layer adds to its weight, alpha / r B A."""
        parameters = dict(self.peft.named_parameters())
        a, b = (
            next((p for key, p in parameters.items() if f"{name}.lora_{part}.default" in key), None) for part in "AB"
        )
        return 0.0 if a is None else 3.0 * _matrix(b) @ _matrix(a)

    def want(self, adapted=True, constants_of=None):
        """The expected output, from the initial weights; C is computed from ``constants_of`` or the initial weights."""
        qkv, qkv_bias, out, out_bias = self.weights
        attends = self.names[0] == "in_proj_weight"
        deltas = [self.delta(n) for n in (("attention", "out_proj") if attends else ("qkv", "proj"))]
        corrections = [0.0] * 3
        for method in self.conditioning:
            if method is GENTLE:
                corrections = [torch.eye(WIDTH)] * 3
            if method is EXACT:
                corrections = [exact(part) for part in (qkv if constants_of is None else constants_of).chunk(3)]
        if adapted:
            qkv, out = qkv + deltas[0], out + deltas[1]
            if self.targets == ("attention",):
                out = out + (times_in_multihead_attention() - 1) * deltas[1].detach()
        formula = Attention(
            (self.x,) * 3, qkv.chunk(3), qkv_bias.chunk(3), types.SimpleNamespace(weight=out, bias=out_bias)
        )
        settings = {}
        for method in self.conditioning:
            if method in ("pc", LARGE):
                eps = 1e-6 if method == "pc" else LARGE.eps
                settings["precondition"] = lambda rows, eps=eps: rows / norms(rows).clamp_min(eps)
        return formula.compute(HEADS, corrections=corrections, **settings)

    def check(self, model=None, **settings):
        model = self.model if model is None else model
        with torch.no_grad():
            torch.testing.assert_close(model(self.x), self.want(**settings), **CLOSE)
        (found,) = condattn.conditioning_of(model).values()
        assert sorted(one["type"] for one in found) == self.types()

    def types(self):
        return sorted(
            "RowPreconditioner" if one in ("pc", LARGE) else "SpectralCorrection" for one in self.conditioning
        )


@functools.cache
def times_in_multihead_attention():
    """How often PEFT adds the update of the output projection: twice in some versions, but with one gradient."""
    plain = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS))
    before = plain[0].out_proj.weight.detach().clone()
    adapted = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    layer = plain[0].base_layer.out_proj
    delta = layer.get_delta_weight("default").detach()
    after = adapted.merge_and_unload()[0].out_proj.weight.detach()
    return round(((after - before) / delta).median().item())


def _matrix(weight):
    return weight.flatten(1) if weight.dim() > 1 else weight


def exact(weight):
    u, s, vh = (torch.as_tensor(part) for part in np.linalg.svd(weight.detach().numpy(), full_matrices=False))
    return s.max() * u @ vh


CASES = {
    "qkv": lambda conditioning: Case(Block(), conditioning, "qkv"),
    "proj": lambda conditioning: Case(Block(), conditioning, "proj"),
    "both": lambda conditioning: Case(Block(), conditioning, "qkv", "proj"),
    "convolutions": lambda conditioning: Case(Convolutions(), conditioning, "qkv", "proj"),
    "multihead": lambda conditioning: Case(SelfAttention(), conditioning, "attention"),
    "reader's proj": lambda conditioning: Case(Reader(), conditioning, "proj"),
}


PAIRS = [(name, one) for name in CASES for one in CONDITIONINGS]
# Without PC the host reads the weight itself, so that PEFT's adapter has no effect, with or without SC.
PAIRS = [(name, one) for name, one in PAIRS if name != "reader's proj" or "pc" in one]


@pytest.fixture(params=PAIRS, ids=" ".join)
def case(request):
    name, conditioning = request.param
    return CASES[name](CONDITIONINGS[conditioning])


@pytest.mark.parametrize("order", ["conditioned first", "adapted first"])
@pytest.mark.parametrize("run_before", [True, False], ids=["", "merged before any forward"])
def test_every_state_in_both_orders(case, order, run_before):
    for step in (case.condition, case.adapt) if order == "conditioned first" else (case.adapt, case.condition):
        step()
    if run_before:
        case.check()
        case.check(copy.deepcopy(case.model))
        with case.peft.disable_adapter():
            case.check(adapted=False)
    case.peft.merge_adapter()
    case.check()
    case.peft.unmerge_adapter()
    case.check()
    want = case.want()
    plain = case.peft.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(plain(case.x), want, **CLOSE)
    assert [sorted(one["type"] for one in found) for found in condattn.conditioning_of(plain).values()] == [
        case.types()
    ]
    condattn.fold(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(case.x), want, **CLOSE)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("order", ["conditioned first", "adapted first"])
def test_folded_inside_adapters(case, order, merged):
    for step in (case.condition, case.adapt) if order == "conditioned first" else (case.adapt, case.condition):
        step()
    if merged:
        case.peft.merge_adapter()
    condattn.fold(case.model)
    if merged:
        with torch.no_grad():
            torch.testing.assert_close(case.model(case.x), case.want(), **CLOSE)
        case.peft.unmerge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(case.model(case.x), case.want(), **CLOSE)
        with case.peft.disable_adapter():
            torch.testing.assert_close(case.model(case.x), case.want(adapted=False), **CLOSE)
    if "RowPreconditioner" not in case.types():
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_conditioned_while_merged(case):
    """C is computed from the merged weights."""
    case.adapt()
    case.peft.merge_adapter()
    case.condition()
    merged = case.weights[0] + case.delta("attention" if "in_proj_weight" in case.names else "qkv")
    case.check(constants_of=merged)
    case.peft.unmerge_adapter()
    case.check(constants_of=merged)


@pytest.mark.parametrize("order", ["conditioned first", "adapted first"])
def test_gradients_of_the_adapters(case, order):
    for step in (case.condition, case.adapt) if order == "conditioned first" else (case.adapt, case.condition):
        step()
    leaves = [p for name, p in case.peft.named_parameters() if "lora" in name]
    assert len(leaves) == (4 if len(case.targets) == 2 or "attention" in case.targets else 2)
    weight = torch.randn(case.x.shape)
    got = torch.autograd.grad((case.model.train()(case.x) * weight).sum(), leaves)
    want = torch.autograd.grad((case.want() * weight).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_detached_preconditioner():
    case = CASES["proj"](["pc"])
    condattn.condition(case.model, RowPreconditioner(detach=True))
    case.adapt()
    case.x.requires_grad_()
    (got,) = torch.autograd.grad(case.model(case.x).square().sum(), case.x)
    block = copy.deepcopy(case.peft).merge_and_unload()
    (want,) = torch.autograd.grad(block(case.x).square().sum(), case.x)
    torch.testing.assert_close(got, want, **CLOSE)


def test_sequence_of_adapters_and_conditionings():
    """PC is applied before the adapter, SC after it."""
    case = CASES["both"]([GENTLE, "pc"])
    condattn.condition(case.model, "pc")
    case.adapt()
    condattn.condition(case.model, GENTLE)
    case.check()


@pytest.mark.parametrize("conditioning", ["sc", "sc+pc"])
def test_around_a_layer_whose_weight_is_read(conditioning):
    """The adapter would have no effect there, so that the forward raises an error until it is merged."""
    case = Case(Reader(), CONDITIONINGS[conditioning], "qkv")
    case.condition()
    case.adapt()
    with pytest.raises(RuntimeError, match="around qkv of Reader, .* has no effect; merge it, or leave") as info:
        case.model(case.x)
    assert "\n" not in str(info.value)
    with case.peft.disable_adapter():
        case.check(adapted=False)
    case.peft.merge_adapter()
    case.check()
    case.peft.unmerge_adapter()
    with pytest.raises(RuntimeError, match="has no effect"):
        case.model(case.x)


@pytest.mark.parametrize("conditioning", ["pc", "sc"])
def test_around_the_output_projection_of_multihead_attention_alone(conditioning):
    case = Case(SelfAttention(), CONDITIONINGS[conditioning], "out_proj")
    case.condition()
    case.adapt()
    with pytest.raises(RuntimeError, match="around out_proj of nn.MultiheadAttention, .* has no effect") as info:
        case.model(case.x)
    assert "\n" not in str(info.value)
    case.peft.merge_adapter()
    case.check()


@pytest.mark.parametrize("conditioning", ["pc", "sc"])
def test_inference_fast_path_around_an_adapter(conditioning):
    """In eval mode the fast path of nn.TransformerEncoderLayer would read in_proj_weight itself."""
    model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True))
    condattn.condition(model, CONDITIONINGS[conditioning])
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        trained = model.train()(x)
        torch.testing.assert_close(model.eval()(x), trained, **CLOSE)
        with model.disable_adapter():
            assert (model(x) - trained).abs().max() > 1e-3


@pytest.mark.parametrize("order", ["conditioned first", "adapted first"])
@pytest.mark.parametrize("target", ["qkv", "proj"])
def test_other_adapters_are_refused(order, target):
    case = Case(Block(), [GENTLE, "pc"], target)
    config = peft.IA3Config(target_modules=[target], feedforward_modules=[target])
    classes = [type(m) for m in case.model.modules()]
    with pytest.raises(ValueError, match="around a layer of conditioned attention; adapters other than LoRA") as info:
        if order == "conditioned first":
            case.condition()
            case.adapt(config)
        else:
            case.adapt(config)
            classes = [type(m) for m in case.model.modules()]
            case.condition()
    assert "\n" not in str(info.value)
    if order == "adapted first":
        assert [type(m) for m in case.model.modules()] == classes


def test_an_adapter_around_a_layer_that_is_not_conditioned():
    """Any adapter may be around it, before and after conditioning."""
    for order in ("conditioned first", "adapted first"):
        case = Case(Block(), ["pc"], "qkv")
        config = peft.IA3Config(target_modules=["qkv"], feedforward_modules=["qkv"])
        steps = [case.condition, lambda case=case, config=config: case.adapt(config)]
        for step in steps if order == "conditioned first" else steps[::-1]:
            step()
        factors = [value for name, value in case.peft.named_parameters() if "ia3" in name]
        assert factors
        with torch.no_grad():
            for factor in factors:
                nn.init.uniform_(factor, 0.5, 2.0)
            plain = copy.deepcopy(case.peft).merge_and_unload()
            torch.testing.assert_close(case.model(case.x), plain(case.x), **CLOSE)
        (found,) = condattn.conditioning_of(case.model).values()
        assert [one["type"] for one in found] == ["RowPreconditioner"]


def test_an_adapter_that_is_merged_after_an_interrupted_forward():
    """The layer transforms its input itself again."""
    case = Case(Block(), ["pc"], "proj")
    case.condition()
    case.adapt()
    x = torch.randn(2, 5, WIDTH)
    want = case.model(x)

    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    parts = case.model[0].proj.lora_A
    part = parts["default"]
    parts["default"] = Interrupted()
    parts["default"].weight = part.weight
    with pytest.raises(KeyboardInterrupt):
        case.model(x)
    parts["default"] = part
    model = case.peft.merge_and_unload()
    torch.testing.assert_close(model(x), want, **CLOSE)


def test_hooks_of_a_pickled_model(tmp_path):
    """In the process that reads it, other hooks do not take the numbers of those that it has."""
    case = Case(Block(), ["pc"], "proj")
    case.condition()
    case.adapt()
    x = torch.randn(2, 5, WIDTH)
    torch.save((case.model, x, case.model(x)), tmp_path / "model.pt")
    code = """
import sys, torch
import test_adapters
model, x, want = torch.load(sys.argv[1], weights_only=False)
for _ in range(20):
    model[0].proj.register_forward_pre_hook(lambda module, args: None)
    model[0].proj.register_forward_hook(lambda module, args, output: None)
torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code, tmp_path / "model.pt"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert not result.returncode, result.stderr


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_layers_that_peft_copies(conditioning):
    """Copies of conditioned layers by ``modules_to_save`` are conditioned; its temporary wrappers are refused."""
    config = peft.LoraConfig(target_modules=["other"], modules_to_save=["qkv", "proj"])
    for order in ("conditioned first", "copied first"):
        case = Case(Block(), CONDITIONINGS[conditioning])
        parts = nn.ModuleDict(dict(attention=case.model[0], other=nn.Linear(1, 1)))
        if order == "conditioned first":
            condattn.condition(parts, case.conditioning)
            model = peft.get_peft_model(parts, config)
            case.delta = lambda name: 0.0
            case.check(parts["attention"])
            with pytest.raises(ValueError, match="ModulesToSaveWrapper of PEFT trains a copy"):
                condattn.remove(model)
            case.check(parts["attention"])
            model.merge_and_unload()
            case.check(parts["attention"])
        else:
            peft.get_peft_model(parts, config)
            with pytest.raises(ValueError, match="cannot .* ModulesToSaveWrapper"):
                condattn.condition(parts, case.conditioning)
            assert condattn.conditioning_of(parts) == {"attention": []}


def test_parametrized_weights():
    """Other implementations of LoRA use parametrizations, which the user merges, not ``fold``."""
    case = Case(Block(), [GENTLE], "qkv")
    case.condition()
    block = case.model[0]

    class Plus(nn.Module):
        def forward(self, weight):
            return weight + 0.5

    case.delta = lambda name: 0.5 * (name == "qkv")
    nn.utils.parametrize.register_parametrization(block.qkv, "weight", Plus())
    case.check()
    with pytest.raises(ValueError, match="cannot become a plain layer again.*remove_parametrizations first"):
        condattn.fold(case.model)
    case.check()
    nn.utils.parametrize.remove_parametrizations(block.qkv, "weight")
    case.check()
    condattn.fold(case.model)
    with torch.no_grad():
        torch.testing.assert_close(case.model(case.x), case.want(), **CLOSE)


def test_variants_that_depend_on_the_weight():
    config = peft.LoraConfig(target_modules=["qkv", "proj"], r=2, use_dora=True, init_lora_weights=False)
    case = Case(Block(), [GENTLE], "qkv")
    case.condition()
    case.adapt(config)
    with pytest.raises(RuntimeError, match=r"variant of LoRA \(DoraLinearVariant\) is around a projection") as info:
        case.model(case.x)
    assert "\n" not in str(info.value)
    case = Case(Block(), ["pc"], "proj")
    case.condition()
    case.adapt(config)
    with torch.no_grad():
        unmerged = case.model(case.x)
        torch.testing.assert_close(case.peft.merge_and_unload()(case.x), unmerged, **CLOSE)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("order", ["conditioned first", "adapted first"])
def test_mmpretrain(conditioning, order):
    lora = pytest.importorskip("mmpretrain.models.peft.lora")
    case = Case(Block(), CONDITIONINGS[conditioning], "qkv", "proj")
    block = case.model[0]
    if order == "conditioned first":
        case.condition()
    for name in case.targets:
        setattr(block, name, lora.LoRALinear(getattr(block, name), alpha=6, rank=2))
        nn.init.normal_(getattr(block, name).lora_up.weight)
    if order == "adapted first":
        case.condition()
    case.delta = lambda name: 3.0 * getattr(block, name).lora_up.weight @ getattr(block, name).lora_down.weight
    case.check()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("settings, same", [({}, True), (dict(kdim=5, vdim=7), False)])
def test_flag_of_multihead_attention_tells_the_truth(conditioning, settings, same):
    module = nn.MultiheadAttention(WIDTH, HEADS, **settings)
    condattn.condition(module, CONDITIONINGS[conditioning])
    assert module._qkv_same_embed_dim is same
    module._reset_parameters()
