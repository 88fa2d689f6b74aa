"""The fast forward of Swin's blocks, compared with upstream's: equal values and gradients."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runs import compiler
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("mmengine")
from mmengine.registry import MODELS, DefaultScope
from torch.multiprocessing.reductions import StorageWeakRef

import condattn.registry
from condattn.kernels.switch import plain
from condattn.openmmlab.models.swin import recompute_in_backward

SMALL = dict(embed_dims=16, depths=(2, 2, 2), num_heads=(1, 2, 2), strides=(4, 2, 2), out_indices=(0, 1, 2))
SCOPES = ["mmdet", "mmseg"]
PC_SC = [dict(type="SpectralCorrection", strength=0.5), "pc"]


def build(scope, kind="ConditionedSwinTransformer", **settings):
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        torch.manual_seed(0)
        return MODELS.build(dict(type=kind, **{**SMALL, "window_size": 4, "drop_path_rate": 0.0, **settings}))


def pair(scope, dtype=torch.float64, **settings):
    """Build a backbone with the fast and with upstream's forward, with weights for which every part has an effect."""
    pairs = [build(scope, fast_attention=fast, **settings) for fast in (True, False)]
    torch.manual_seed(1)
    for parameter in pairs[0].parameters():
        if parameter.dim() < 2 or not parameter.any():
            nn.init.normal_(parameter, 1.0, 0.3)
    pairs[1].load_state_dict(pairs[0].state_dict())
    return [reference.to(dtype).train() for reference in pairs]


def run(model, x, seed=2, half=False):
    """Feature maps, and gradients of parameters and input; the backward is outside autocast, as in mmengine."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        maps = model(x)
    gradients = [torch.randn_like(one) for one in maps]
    torch.autograd.backward(maps, gradients)
    return [*maps, x.grad, *(p.grad for p in model.parameters())]


def assert_same(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("conditioning", ["none", PC_SC], ids=["none", "sc+pc"])
@pytest.mark.parametrize("size", [(64, 64), (50, 70), (33, 35), (8, 9)])
def test_values_and_gradients(scope, conditioning, size):
    """Whole and padded windows, odd maps, windows larger than the map; the gradient of the bias table included."""
    fast, slow = pair(scope, conditioning=conditioning)
    assert type(fast.stages[0].blocks[0].attn) is not type(slow.stages[0].blocks[0].attn)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_same(run(fast, x), run(slow, x), 1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_in_single_precision(scope):
    fast, slow = pair(scope, torch.float32, conditioning="pc", depths=(2, 2, 2))
    x = torch.randn(1, 3, 60, 80)
    assert_same(run(fast, x), run(slow, x), 1e-5)


def test_under_autocast():
    """The error against float64 is no larger than upstream's, up to one rounding."""
    fast, slow = pair("mmdet", torch.float32, conditioning="pc")
    exact = copy.deepcopy(slow).double()
    x = torch.randn(2, 3, 40, 48)
    want = run(exact, x.double())
    got, eager = run(fast, x, half=True), run(slow, x, half=True)
    for one, other, truth in zip(got, eager, want, strict=True):
        error, own = ((value.double() - truth).norm() / truth.norm() for value in (one, other))
        assert error <= 1.5 * own + 2**-8
        assert one.dtype == other.dtype


def test_double_precision_under_autocast():
    """Autocast does not change float64."""
    fast, slow = pair("mmdet")
    x = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    assert_same(run(fast, x, half=True), run(slow, x, half=True), 1e-12)


def test_on_the_meta_device():
    """Shapes on the meta device are correct, for tools that plan memory or count operations."""
    fast, slow = (reference.to("meta") for reference in pair("mmdet"))
    x = torch.empty(2, 3, 50, 48, device="meta", dtype=torch.float64)
    assert [one.shape for one in fast(x)] == [one.shape for one in slow(x)]


def test_in_threads():
    fast, slow = pair("mmdet")
    images = [torch.randn(1, 3, *size, dtype=torch.float64) for size in ((40, 48), (64, 64), (33, 35)) * 4]
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        want = [slow(x) for x in images]
        for one, other in zip(pool.map(lambda x: [y.detach() for y in fast(x)], images), want, strict=True):
            assert_same(one, other, 1e-12)


@pytest.mark.parametrize("settings", [dict(with_cp=True), dict(frozen_stages=1), dict(drop_path_rate=0.4)], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_checkpointing_frozen_stages_and_stochastic_depth(scope, settings):
    fast, slow = pair(scope, conditioning=PC_SC, **settings)
    x = torch.randn(3, 3, 36, 40, dtype=torch.float64)
    assert_same(run(fast, x), run(slow, x), 1e-12)


@pytest.mark.parametrize(
    "settings", [dict(attn_drop_rate=0.3), dict(drop_rate=0.3), dict(qkv_bias=False), dict(patch_norm=False)], ids=str
)
def test_other_settings(settings):
    fast, slow = pair("mmdet", conditioning="pc", **settings)
    x = torch.randn(2, 3, 36, 40, dtype=torch.float64)
    if "drop_rate" in settings:  # both forwards draw random numbers for different tensors
        fast.eval(), slow.eval()
    assert_same(run(fast, x), run(slow, x), 1e-12)


def test_inputs_of_any_layout():
    fast, slow = pair("mmdet")
    fast.eval(), slow.eval()
    x = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    with torch.no_grad():
        want = slow(x)
        for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert_same(fast(other), want, 1e-12)
        assert [tuple(y.shape) for y in fast(x[:0])] == [(0, *y.shape[1:]) for y in want]
        with torch.inference_mode():
            fast(x)
        assert_same(fast(x), want, 1e-12)
    assert_same(run(fast, x), run(slow, x), 1e-12)


def test_biases_follow_their_table():
    """Biases are cached in evaluation mode; the cache follows optimizer steps, state dicts and averaged weights."""
    fast, slow = pair("mmdet", conditioning=PC_SC)
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    table = lambda model: model.stages[1].blocks[1].attn.w_msa.relative_position_bias_table  # noqa: E731

    def check():
        with torch.no_grad():
            assert_same(fast.eval()(x), slow.eval()(x), 1e-12)

    check()
    for model in (fast, slow):
        with torch.no_grad():
            table(model).mul_(3.0)
    check()
    for model in (fast, slow):
        run(model.train(), x)
        torch.optim.SGD(model.parameters(), 1e-3).step()
    check()
    other = {name: value * 1.1 for name, value in slow.state_dict().items() if value.is_floating_point()}
    for model in (fast, slow):
        model.load_state_dict(other, strict=False)
    check()
    for model in (fast, slow):
        model.train()
        table(model).data.mul_(2.0)  # as averaged weights are swapped in before a validation
    check()


def test_copies_pickles_and_folds():
    fast, slow = pair("mmdet", conditioning=PC_SC)
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    fast.eval(), slow.eval()
    with torch.no_grad():
        want = slow(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert_same(other(x), want, 1e-12)
        condattn.fold(fast)
        assert_same(fast(x), want, 1e-10)


@pytest.mark.parametrize("scope", SCOPES)
def test_hooks_see_what_they_would(scope):
    """Hooks of every module in a block that is called, and of patch embedding and merging, run as often as upstream."""
    fast, slow = pair(scope, conditioning="pc", drop_path_rate=0.4)
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    names = [f"stages.0.blocks.1.{name}" for name, _ in slow.stages[0].blocks[1].named_modules() if name]
    names += [f"stages.0.downsample.{name}" for name in ("sampler", "adap_padding", "norm", "reduction")]
    for name in (*names, "patch_embed.projection", "patch_embed.norm"):
        seen = [], []
        for model, outputs in zip((fast, slow), seen, strict=True):
            module = model.get_submodule(name)
            handle = module.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
            run(model, x)
            handle.remove()
        assert len(seen[0]) == len(seen[1]), name
        if name.rpartition(".")[2] not in ("qkv", "proj", "proj_drop"):  # called without padding
            assert [one.shape for one in seen[0]] == [one.shape for one in seen[1]], name


def test_the_fast_path_is_taken(monkeypatch):
    """With default settings, in training and evaluation, no forward of upstream that is replaced is called."""
    fast, _ = pair("mmdet", torch.float32, conditioning="pc")

    def forward(self, *args):
        raise AssertionError(f"upstream's forward of {type(self).__name__}")

    for cls in type(fast).fast_classes:
        monkeypatch.setattr(cls, "forward", forward)
    for block in (block for stage in fast.stages for block in stage.blocks):
        monkeypatch.setattr(type(block.ffn.layers), "forward", forward)
        monkeypatch.setattr(type(block.attn.w_msa), "forward", forward)
    run(fast, torch.randn(1, 3, 40, 48))
    with torch.no_grad():
        fast.eval()(torch.randn(1, 3, 40, 48))
    with plain(), pytest.raises(AssertionError, match="upstream's forward"):
        fast(torch.randn(1, 3, 40, 48))


@pytest.mark.parametrize("part", ["softmax", "attn_drop", "forward"])
def test_attention_that_was_changed_runs_as_it_is(part):
    """Modules that the fast path does not call, and a subclass with a forward of its own."""
    fast, slow = pair("mmdet", conditioning="none")
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    before = run(slow, x)

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    for model in (fast, slow):
        msa = model.stages[0].blocks[1].attn.w_msa
        if part == "forward":
            kind = type(msa)
            msa.__class__ = type(kind.__name__, (kind,), dict(forward=lambda self, x, mask=None: 2 * x))
        else:
            setattr(msa, part, Doubled())
    assert not torch.allclose(run(slow, x)[0], before[0])
    with torch.no_grad():
        assert_same(fast.eval()(x), slow.eval()(x), 1e-9)


def test_layers_that_were_replaced_are_called():
    """This includes replacements whose class has the same name, such as those of adapters."""

    class Linear(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    class Conv2d(nn.Conv2d):
        def forward(self, x):
            return 2.0 * super().forward(x)

    fast, slow = pair("mmdet", conditioning="pc")
    for model in (fast, slow):
        model.patch_embed.projection.__class__ = Conv2d
        for layers in (block.ffn.layers for stage in model.stages for block in stage.blocks):
            layers[0][0].__class__ = layers[1].__class__ = Linear
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    assert_same(run(fast, x), run(slow, x), 1e-12)


class Twice(torch.Tensor):
    """A tensor subclass, as for quantised weights: a linear layer with such a weight gives twice the output."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        outputs = super().__torch_function__(function, types, args, kwargs or {})
        return 2.0 * outputs.as_subclass(torch.Tensor) if function is F.linear else outputs


def test_weights_of_another_kind():
    fast, slow = pair("mmdet", conditioning="pc")
    for model in (fast, slow):
        for block in (block for stage in model.stages for block in stage.blocks):
            for layer in (block.attn.w_msa.proj, block.ffn.layers[0][0], block.ffn.layers[1]):
                layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Twice), requires_grad=False)
    assert isinstance(slow.stages[0].blocks[0].ffn.layers[1].weight, Twice)
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    assert_same(run(fast, x), run(slow, x), 1e-12)


def test_blocks_in_checkpoints_of_others():
    """Inside another activation checkpoint, which decides what is saved, values and gradients are correct."""
    fast, slow = pair("mmdet", conditioning=PC_SC)
    for stage in fast.stages:
        for block in stage.blocks:
            block.forward = functools.partial(checkpoint, type(block).forward, block, use_reentrant=False)
    x = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    assert_same(run(fast, x), run(slow, x), 1e-12)


@pytest.mark.skipif(not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="PyTorch hides them")
def test_hooks_of_others_on_what_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        pair("mmdet")[0].stages[0].blocks[0](torch.randn(1, 120, 16, dtype=torch.float64), (10, 12))
    assert torch.Size([120, 64]) in kept  # the hidden layer


def test_maps_of_another_size_are_refused():
    merging = pair("mmdet")[0].stages[0].downsample
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        merging(torch.randn(2, 16, 16, dtype=torch.float64), (2, 4))


def test_forward_derivatives():
    """Forward-mode derivatives, which a custom backward does not provide, are correct."""
    fast, slow = pair("mmdet", conditioning="pc")
    x, tangent = (torch.randn(1, 3, 40, 48, dtype=torch.float64) for _ in range(2))
    with forward_ad.dual_level():
        found = [forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))[0]).tangent for model in (fast, slow)]
    assert_same(found[:1], found[1:], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend, stages", [("aot_eager", 2), pytest.param("inductor", 1, marks=compiler)])
def test_one_graph_for_all_sizes(backend, stages):
    """Forward and backward compile without graph breaks, and not again for each new size, padded or not."""
    newest = torch.__version__ >= "2.11"  # 2.5 makes two graphs, and more with SC
    parts = dict(depths=(2, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1))
    settings = {name: part[:stages] for name, part in parts.items()}
    fast, _ = pair("mmdet", torch.float32, conditioning=PC_SC if newest else "pc", **settings)
    fast(torch.randn(2, 3, 64, 96))  # removes the hooks of the first forward, which would need a separate graph
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(fast, backend=backend, fullgraph=True, dynamic=True)
    for size in ((64, 96), (96, 64), (50, 90), (82, 66), (40, 128), (128, 128)):
        x = torch.randn(2, 3, *size)
        assert_same(run(compiled, x), run(fast, x), 1e-4)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1 if newest else graphs <= 2
    with torch.no_grad():
        for x in (torch.randn(2, 3, 64, 96), torch.randn(2, 3, 50, 90)):
            assert_same(compiled(x), fast(x), 1e-4)


def test_what_is_computed_again_is_not_kept():
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 3)
    x = torch.randn(2, 5, 4, requires_grad=True)
    storages = []

    def then(normalized):
        storages.append(StorageWeakRef(normalized.untyped_storage()))
        return linear(normalized)

    y = recompute_in_backward(norm, x, then)
    assert storages[0].expired()
    parameters = [x, *norm.parameters(), *linear.parameters()]
    got = torch.autograd.grad(y.square().sum(), parameters)
    want = torch.autograd.grad(linear(norm(x)).square().sum(), parameters)
    assert_same(got, want, 1e-6)


def test_graphs_without_a_backward_are_freed():
    """The graph has an operation that saves its result for the backward."""
    norm, x = nn.LayerNorm(4), torch.randn(2, 5, 4, requires_grad=True)
    y = recompute_in_backward(norm, x, lambda normalized: (normalized * 2).softmax(-1))
    storage = StorageWeakRef(y.untyped_storage())
    del y
    assert storage.expired()
