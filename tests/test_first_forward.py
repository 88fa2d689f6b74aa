"""The first forward raises an error if it does not call the modules that the rule names."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import condattn
from condattn import SpectralCorrection
from condattn.attention import rules as sites
from condattn.attention.builders import into, read_by, thirds

GENTLE = SpectralCorrection(1.0)


class Calling(nn.Module):
    """Attention that calls its layers, or behaves differently as ``mode`` says."""

    def __init__(self, mode="call"):
        super().__init__()
        self.num_heads, self.mode = 2, mode
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        if self.mode == "fail":
            raise RuntimeError("no memory")
        reads = self.mode == "read"
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias) if reads else self.qkv(x)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(-3, -2) for t in qkv.chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        if reads or self.mode == "read proj":
            return F.linear(heads, self.proj.weight, self.proj.bias)
        return self.proj(heads)


class Model(nn.Module):
    """One attention module for each mode; a forward runs the first ``depth`` of them."""

    def __init__(self, *modes):
        super().__init__()
        self.attentions = nn.ModuleList(map(Calling, modes))
        self.depth = len(modes)

    def forward(self, x):
        for attention in self.attentions[: self.depth]:
            x = x + attention(x)
        return x


@pytest.fixture(autouse=True)
def rule():
    name = f"{__name__}.Calling"
    condattn.register_rule(name, lambda m: dict(num_heads=2, out=into(m.proj), **thirds(m.qkv)))
    yield
    del sites._RULES[name]


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def x():
    return torch.randn(2, 5, 8)


@pytest.mark.parametrize("conditioning", ["pc", GENTLE, [GENTLE, "pc"]], ids=["pc", "sc", "sc+pc"])
@pytest.mark.parametrize("mode, names", [("read", "proj, qkv|qkv, proj"), ("read proj", "proj")])
def test_a_rule_that_names_what_is_not_called(conditioning, mode, names):
    model = Model("call", mode)
    condattn.condition(model, conditioning)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=rf"attentions.1 \(Calling\) did not call ({names}) .* reader=m\)"
        ) as info:
            model(x())
        assert "\n" not in str(info.value)
    assert not hooks(model.attentions[0])


def test_no_hook_stays_where_all_are_called():
    model = Model("call", "call")
    condattn.condition(model, "sc+pc")
    assert hooks(model)
    model(x())
    assert not hooks(model)


def test_fold_takes_the_hooks_with_it():
    model = Model("call", "call")
    condattn.condition(model, "sc")
    condattn.fold(model)
    assert not hooks(model)
    condattn.condition(model, "sc+pc")
    condattn.fold(model)
    assert hooks(model)
    model(x())
    assert not hooks(model)


def test_a_site_that_does_not_run_is_no_error():
    """Layer drop may skip a site, and so may scales without attention."""
    model = Model("call", "read")
    condattn.condition(model, "pc")
    model.depth = 1
    for _ in range(2):
        model(x())
    model.depth = 2
    with pytest.raises(RuntimeError, match=r"attentions.1 .* did not call"):
        model(x())


def test_a_forward_that_fails_is_not_judged():
    model = Model("fail")
    condattn.condition(model, "pc")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^no memory$"):
            model(x())
    assert not hooks(model.attentions[0].proj) and not hooks(model.attentions[0].qkv)
    model.attentions[0].mode = "call"
    model(x())
    assert not hooks(model)


def test_threads_that_run_at_once():
    """The first forward that ends makes the check and removes the hooks."""
    model, inside, done = Model("call"), threading.Event(), threading.Event()
    condattn.condition(model, "pc")

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert done.wait(60)

    handle = model.attentions[0].qkv.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(model, x())
        assert inside.wait(60)
        model(x())
        done.set()
        first.result()
    handle.remove()
    assert not hooks(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_and_frozen_stages(reentrant):
    model = Model("call", "call")
    condattn.condition(model, "sc+pc")
    model.attentions[0].requires_grad_(False).eval()
    y = x().requires_grad_()
    checkpoint(model, y, use_reentrant=reentrant).sum().backward()
    assert not hooks(model)
    got, y.grad = y.grad, None
    model(y).sum().backward()
    torch.testing.assert_close(y.grad, got)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_judged_by_themselves(copied):
    model = Model("call", "read")
    condattn.condition(model, "pc")
    other = copied(model)
    for one in (model, other):
        with pytest.raises(RuntimeError, match=r"attentions.1 .* did not call"):
            one(x())
    right = copied(Model("call"))
    condattn.condition(right, "pc")
    other = copied(right)
    right(x())
    assert not hooks(right) and hooks(other)
    other(x())
    assert not hooks(other)


@pytest.mark.parametrize("conditioning", ["pc", GENTLE, [GENTLE, "pc"]], ids=["pc", "sc", "sc+pc"])
def test_compiled_in_one_graph(conditioning):
    model = Model("call", "call")
    condattn.condition(model, conditioning)
    y = x()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(y)
    exported = torch.export.export(copy.deepcopy(model), (y,)).module()(y)
    traced = torch.jit.trace(copy.deepcopy(model), (y,))(y)
    want = model(y)
    for one in (got, exported, traced):
        torch.testing.assert_close(one, want)
    assert not hooks(model)


def test_readers_that_are_named():
    """Attention with readers computes the same as attention that calls its layers."""
    model, other = Model("call"), Model("read")
    other.load_state_dict(model.state_dict())
    condattn.condition(model, [GENTLE, "pc"])
    describe = sites._RULES[f"{__name__}.Calling"]
    sites._RULES[f"{__name__}.Calling"] = lambda m: dict(
        num_heads=2, out=into(m.proj, reader=m), **read_by(m, thirds(m.qkv))
    )
    try:
        condattn.condition(other, [GENTLE, "pc"])
        y = x()
        for _ in range(2):
            torch.testing.assert_close(other(y), model(y))
            torch.testing.assert_close(
                torch.autograd.grad(other(y).sum(), other.parameters()),
                torch.autograd.grad(model(y).sum(), model.parameters()),
            )
            assert all(
                isinstance(p, nn.Parameter) for p in (other.attentions[0].proj.weight, other.attentions[0].proj.bias)
            )
    finally:
        sites._RULES[f"{__name__}.Calling"] = describe


def test_a_reader_that_multiplies_otherwise():
    class Odd(Calling):
        def forward(self, x):
            return x @ self.proj.weight.T

    module = Odd()
    describe = lambda m: dict(num_heads=2, out=into(m.proj, reader=m))  # noqa: E731
    name = f"{__name__}.test_a_reader_that_multiplies_otherwise.<locals>.Odd"
    condattn.register_rule(name, describe)
    try:
        condattn.condition(module, "pc")
        with pytest.raises(RuntimeError, match="was given the weight of a preconditioned projection"):
            module(x())
        assert isinstance(module.proj.weight, nn.Parameter)
    finally:
        del sites._RULES[name]


SWIN = dict(embed_dims=12, depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,))


@pytest.mark.parametrize("fast", [True, False])
def test_what_a_fast_path_reads_counts_as_used(fast, monkeypatch):
    pytest.importorskip("mmdet")
    from condattn.openmmlab.models.mmdet import ConditionedSwinTransformer

    model = ConditionedSwinTransformer(**SWIN, conditioning="sc+pc", fast_attention=fast)
    if fast:  # the first forward must also take the fast path
        monkeypatch.setattr(type(model.stages[0].blocks[0].attn.w_msa), "forward", None)
    image = torch.randn(1, 3, 56, 56)
    first = model(image)[0]
    assert not hooks(model)
    assert torch.equal(model(image)[0], first)


class Scripted(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x)


class Plain(nn.Module):
    """Attention that TorchScript can compile."""

    def __init__(self, norm=False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(self.norm((q @ k.transpose(-2, -1)).softmax(-1) @ v))


@pytest.mark.parametrize("out", ["proj", "norm"])
@pytest.mark.parametrize("conditioning", ["pc", "sc"])
def test_scripting_is_one_line_and_folding_lets_it_work(conditioning, out):
    name = f"{__name__}.Plain"
    condattn.register_rule(name, lambda m: dict(num_heads=1, out=into(getattr(m, out), m.proj), **thirds(m.qkv)))
    try:
        model, y = Scripted(Plain()), x()
        condattn.condition(model, conditioning)
        want = model(y)
        with pytest.raises(
            RuntimeError, match="torch.jit.script cannot compile conditioned attention; use .*fold"
        ) as info:
            torch.jit.script(model)
        assert "\n" not in str(info.value)
        torch.testing.assert_close(torch.jit.trace(model, (y,))(y), want)
        if conditioning == "sc":
            condattn.fold(model)
            torch.testing.assert_close(torch.jit.script(model)(y), want)
    finally:
        del sites._RULES[name]


def test_scripting_of_multihead_attention():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    condattn.condition(model, "pc")
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile conditioned attention"):
        torch.jit.script(model)
