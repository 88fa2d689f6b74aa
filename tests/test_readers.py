"""Modules that read weights of a layer, and adapters around one: several threads, and forwards that are interrupted."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import condattn

torchvision = pytest.importorskip("torchvision")


@pytest.fixture
def switching():
    """Threads that take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def swin(conditioning):
    """A model whose attention modules read the weights of their layers themselves."""
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=3).eval()
    condattn.condition(model, conditioning)
    return model


def all_equal(model, images, runs=60):
    """Whether outputs of two threads are all equal to those of one."""
    with torch.no_grad():
        wanted = model(images)
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda _: torch.no_grad()(model)(images), range(runs)))
    return all(torch.equal(output, wanted) for output in outputs)


@pytest.mark.parametrize("conditioning", ["sc", "pc", "sc+pc"])
def test_threads_that_share_a_model(conditioning, switching):
    model = swin(conditioning)
    before = copy.deepcopy(model.state_dict())
    assert all_equal(model, torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_threads_that_share_adapters(switching):
    peft = pytest.importorskip("peft")
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", img_size=32).eval()
    condattn.condition(model, "pc")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["proj"], exclude_modules=["patch_embed.proj"]))
    assert all_equal(model, torch.randn(1, 3, 32, 32))


def interrupted(model, images):
    """Interrupt a forward while parameters are replaced, after which PyTorch calls no hook."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.functional, "dropout", interrupt)  # which the attention modules call
        model(images)


@pytest.mark.parametrize("conditioning", ["sc", "pc", "sc+pc"])
@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_forward(conditioning, saved):
    """The weights that are saved after it, and the next outputs, are those of a model that was not interrupted."""
    model, images = swin(conditioning), torch.randn(1, 3, 32, 32)
    wanted, before = model(images), copy.deepcopy(model.state_dict())

    interrupted(model, images)
    if saved:
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model(images), wanted)
    assert torch.equal(model(images), wanted)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, images).result(60), wanted)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["sc", "sc(relative=True)", "pc", "sc+pc"])
def test_what_is_written_after_an_interrupted_forward(conditioning):
    """Loaded weights, and those that folding and moving write, reach the parameters and not their replacements."""
    model, other, images = swin(conditioning), swin(conditioning), torch.randn(1, 3, 32, 32)
    model(images)
    for parameter in other.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wanted = other(images)
    interrupted(model, images)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images), wanted)
    for change in (copy.deepcopy, lambda model: model.to(torch.float64).to(torch.float32)):
        interrupted(model, images)
        model = change(model)
        assert torch.equal(model(images), wanted)
    if conditioning != "pc":
        interrupted(model, images)
        assert condattn.fold(model) > 0
        torch.testing.assert_close(model(images), wanted)
        assert torch.equal(model(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["sc", "pc", "sc+pc"])
def test_hooks_see_the_output_of_the_whole_forward(conditioning):
    """Whether they are registered before the model is conditioned, or after."""
    model, seen = swin("none"), []
    attention = model.features[1][0].attn
    look = lambda module, args, output: seen.append(output.clone())  # noqa: E731
    attention.register_forward_hook(look)
    condattn.condition(model, conditioning)
    attention.register_forward_hook(look)
    model(torch.randn(1, 3, 32, 32))
    assert torch.equal(*seen)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["sc", "pc", "sc+pc"])
def test_compiled_with_several_hooks(conditioning):
    """Those of two methods, or of the user, before and after the model is conditioned."""
    model, images = swin("none"), torch.randn(1, 3, 32, 32)
    attention, seen = model.features[1][0].attn, []
    attention.register_forward_hook(lambda module, args, output: seen.append(len(seen)))
    condattn.condition(model, conditioning)
    attention.register_forward_hook(lambda module, args, output: seen.append(len(seen)))
    wanted = model(images)
    torch.testing.assert_close(torch.compile(model, backend="eager")(images), wanted)
    assert len(seen) == 4


@pytest.mark.parametrize("conditioning", ["sc", "pc"])
def test_a_layer_that_is_parametrized_later(conditioning):
    model, images = swin(conditioning), torch.randn(1, 3, 32, 32)
    want = model(images)
    name = {"sc": "qkv", "pc": "proj"}[conditioning]
    layer = getattr(model.features[1][0].attn, name)
    torch.nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(RuntimeError, match=f"{name} of a ShiftedWindowAttention was parametrized.*remove_param"):
        model(images)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(images), want)
