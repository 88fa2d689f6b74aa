"""Row preconditioner with a gain, compared with its definition."""

import pytest
import torch

pytest.importorskip("timm")

import timm

import condattn
from condattn.kernels.switch import plain as without_fast_paths
from condattn.openmmlab.study import gain as gain_module
from condattn.openmmlab.study.gain import GAINS, GainedRowPreconditioner


def projection(gain: str):
    model = timm.create_model("test_vit", img_size=32)
    condattn.condition(model, dict(type="GainedRowPreconditioner", gain=gain))
    return model, model.blocks[0].attn.proj


@pytest.mark.parametrize("gain", GAINS)
def test_the_gain_multiplies_normalised_rows(gain):
    _, layer = projection(gain)
    heads, d = layer.head_transform.num_heads, layer.in_features // layer.head_transform.num_heads
    x = torch.randn(2, 5, heads * d)
    output = layer.train()(x)
    norms = x.double().unflatten(-1, (heads, d)).norm(dim=-1)
    want = {"sqrt": torch.full((heads,), d**0.5), "initial": norms.mean((0, 1)), "learned": torch.ones(heads)}[gain]
    rows = x.double().unflatten(-1, (heads, d)) / norms[..., None] * want.double()[:, None]
    expected = rows.flatten(-2) @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.head_gain.double(), want.double(), rtol=1e-6, atol=1e-6)


def test_the_first_batch_fixes_an_initial_gain():
    model, layer = projection("initial")
    layer.train()(torch.randn(2, 5, layer.in_features))
    before = layer.head_gain.clone()
    layer(10 * torch.randn(2, 5, layer.in_features))
    assert torch.equal(layer.head_gain, before)
    other, _ = projection("initial")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.blocks[0].attn.proj.head_gain, before)


def test_evaluation_before_training_uses_the_gain_of_its_batch():
    _, layer = projection("initial")
    x = torch.randn(2, 5, layer.in_features)
    output = layer.eval()(x)
    assert layer.head_gain.isnan().all()
    torch.testing.assert_close(output, layer.train()(x))


def test_processes_have_the_same_gain(monkeypatch):
    """The mean of what the first batches of all processes give."""
    _, layer = projection("initial")
    monkeypatch.setattr(gain_module, "all_reduce", lambda values, op: values.fill_({"mean": 3.0}[op]))
    layer.train()(torch.randn(2, 5, layer.in_features))
    assert layer.head_gain.eq(3).all()


@pytest.mark.parametrize("gain", GAINS)
def test_removed(gain):
    model, _ = projection(gain)
    condattn.remove(model)
    plain = timm.create_model("test_vit", img_size=32)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_measurements_run_the_unconditioned_model():
    """With the head outputs as they are, and without the gain."""
    model, _ = projection("sqrt")
    plain = timm.create_model("test_vit", img_size=32)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "head_gain" not in name})
    seen = []
    for block in model.blocks:
        block.attn.proj.head_transform.observer = seen.append
    images = torch.randn(1, 3, 32, 32)
    with without_fast_paths():  # as measurements do
        assert torch.equal(model.eval()(images), plain.eval()(images)) and len(seen) == len(model.blocks)


def test_a_learned_gain_is_trained():
    model, _ = projection("learned")
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert dict(model.named_parameters())["blocks.0.attn.proj.head_gain"].grad.abs().sum() > 0
    record = condattn.conditioning_of(model)["blocks.0.attn"]
    assert GainedRowPreconditioner(gain="learned").to_dict() in record


def test_an_unknown_gain():
    with pytest.raises(ValueError, match="gain is 'twice'; expected one of sqrt, initial, learned"):
        GainedRowPreconditioner(gain="twice")


def test_a_gain_needs_a_linear_layer():
    with pytest.raises(ValueError, match="a gain needs nn.Linear behind the heads"):
        condattn.condition(torch.nn.MultiheadAttention(8, 2), "pc_gain")
