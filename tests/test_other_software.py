"""Conditioned models in the hands of other software: loaders, moving averages, offloading, sharding and tracing."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.hooks import RemovableHandle

import condattn

timm = pytest.importorskip("timm")
RELATIVE = "sc(strength=3.0, relative=True)"
EXACT = 'sc(form="svd")'
CONDITIONINGS = ["pc", "sc", RELATIVE, EXACT, "ct", "sc+pc"]


def vit(conditioning="none"):
    torch.manual_seed(0)
    settings = dict(img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=5)
    model = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    condattn.condition(model, conditioning)
    return model


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_moving_average_of_equal_weights_is_the_model(conditioning, decay, used, images):
    """Of buffers as well, whether the model has been used before or not."""
    model = vit(conditioning)
    wanted = copy.deepcopy(model)(images)
    if used:
        model(images)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(5):
        average.update_parameters(model)
    torch.testing.assert_close(average(images), wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_other_hooks_replace_none_of_a_loaded_model(conditioning, images, monkeypatch):
    """As in a process that loads a pickled model: PyTorch numbers its hooks from 0 again."""
    models = [vit(conditioning), nn.TransformerEncoderLayer(24, 3, 32, batch_first=True).eval()]
    inputs = [images, torch.rand(2, 5, 24)]
    if "ct" not in conditioning:
        condattn.condition(models[1], conditioning)
    wanted = [model(x) for model, x in zip(models, inputs, strict=True)]
    text = pickle.dumps(models)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    for model, x, output in zip(pickle.loads(text), inputs, wanted, strict=True):
        records = condattn.conditioning_of(model)
        handles = [
            module.register_forward_pre_hook(look) for module in model.modules() for look in [lambda *_: None] * 3
        ]
        assert torch.equal(model(x), output)
        for handle in handles:
            handle.remove()
        assert torch.equal(model(x), output) and condattn.conditioning_of(model) == records


@torch.no_grad()
def test_layers_whose_weights_accelerate_moves(images):
    """The preconditioner applies; what would have no effect is refused."""
    accelerate = pytest.importorskip("accelerate")
    wanted = vit("pc")(images)
    model = accelerate.cpu_offload(vit(), execution_device="cpu")
    condattn.condition(model, "pc")
    torch.testing.assert_close(model(images), wanted)
    with pytest.raises(ValueError, match=r"blocks.0.attn .*: cannot condition its Linear, whose forward was replaced"):
        condattn.condition(model, "sc")
    condattn.remove(model)
    torch.testing.assert_close(model(images), vit()(images))


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["pc", "sc", "sc+pc"])
def test_a_conditioned_model_whose_weights_accelerate_moves(conditioning, images):
    accelerate = pytest.importorskip("accelerate")
    wanted = vit(conditioning)(images)
    model = accelerate.cpu_offload(vit(conditioning), execution_device="cpu")
    torch.testing.assert_close(model(images), wanted)
    for change in (condattn.remove, *([condattn.fold] if "sc" in conditioning else [])):
        with pytest.raises(ValueError, match="has a forward of accelerate's; call accelerate.hooks.remove_hook_from"):
            change(model)
    torch.testing.assert_close(model(images), wanted)
    accelerate.hooks.remove_hook_from_submodules(model)
    condattn.remove(model)
    torch.testing.assert_close(model(images), vit()(images))


@torch.no_grad()
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_weights_that_a_loader_assigns_one_by_one(conditioning, images):
    """As transformers 5 and accelerate do for a model that was built without memory."""
    trained = vit(conditioning)
    wanted = trained(images)
    with torch.device("meta"):
        model = vit(conditioning)
    for name, parameter in trained.named_parameters():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(parameter.clone()))
    for module in model.modules():
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(value, device="cpu"))
    if conditioning in (RELATIVE, EXACT):
        with pytest.raises(RuntimeError, match="made on the meta device and not loaded .*condition the model after"):
            model(images)
        model.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(model(images), wanted)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["sc", RELATIVE, EXACT, "pc"])
def test_a_trace_of_a_model_that_was_never_used(conditioning, images):
    model = vit(conditioning)
    if conditioning in (RELATIVE, EXACT):
        with pytest.raises(RuntimeError, match="run the model once before it is traced"):
            torch.jit.trace(copy.deepcopy(model), (images,))
        model(images)
    torch.testing.assert_close(torch.jit.trace(model, (images,))(images), model(images))


@torch.no_grad()
def test_a_model_with_parametrizations_stays_as_it_is(images):
    model = vit("sc+pc")
    parametrizations.weight_norm(model.blocks[0].attn.qkv)
    wanted = model(images)
    with pytest.raises(ValueError, match="cannot become a plain layer again.*remove_parametrizations first"):
        condattn.remove(model)
    torch.testing.assert_close(model(images), wanted)
    nn.utils.parametrize.remove_parametrizations(model.blocks[0].attn.qkv, "weight")
    condattn.remove(model)
    torch.testing.assert_close(model(images), vit()(images))


@pytest.fixture
def one_process(tmp_path):
    """A group of processes with this one alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("before", [True, False])
def test_fully_sharded_data_parallel(conditioning, before, images):
    """Conditioned before the model is wrapped or after; parameters are views of one, which are set anew."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wanted = vit(conditioning)(images)
    model = vit(conditioning if before else "none")
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if not before:
        condattn.condition(wrapped, conditioning)
    torch.testing.assert_close(wrapped(images), wanted)
    wrapped(images).square().mean().backward()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_sharded_weights_in_half_precision(conditioning, images):
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    wanted = vit(conditioning)(images)
    model = vit(conditioning)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    outputs = model(images)
    torch.testing.assert_close(outputs.float(), wanted, rtol=0.1, atol=0.1)
    outputs.float().square().mean().backward()
    assert all(parameter.grad.full_tensor().isfinite().all() for parameter in model.parameters())
    if "sc" in str(conditioning):
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv: the weight of .* is divided among processes"):
            condattn.fold(model)
