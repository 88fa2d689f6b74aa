"""A loss that is not finite stops a run, with the attention sites that explain it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import error_lines
from torch import nn

pytest.importorskip("mmdet")

import condattn
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.hooks.finite_loss import find_trouble, weights_blamed
from condattn.openmmlab.study.run import DIVERGED


def test_a_loss_that_is_not_a_number_stops_the_run(call, detection, tmp_path):
    checkpoint = torch.load(detection.checkpoint, weights_only=False)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("blocks.1.attn.w_msa.qkv.weight"))
    checkpoint["state_dict"][name][0, 0] = 3e38  # overflows in the first product
    torch.save(checkpoint, "bad.pth")
    options = [*detection.options, "load_from=bad.pth"]
    status, _, errors = call("train", detection.config, "--work-dir", "run", "--cfg-options", *options)
    assert status == 2
    (line,) = error_lines(errors)
    assert "is not finite in iteration 1" in line
    assert f"saturated logits at {name.removesuffix('.qkv.weight')}" in line
    assert "the last checkpoint is none" in line
    assert not list(Path("run").rglob("*.pth"))


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("svd failed"), ValueError("matrix contains NaN")])
def test_an_exception_after_an_update_with_gradients_that_overflowed(error, tmp_path):
    """It is explained by the weights, and counts as a divergence in a study; another exception is left as it is."""
    runner = SimpleNamespace(model=nn.Linear(2, 2), iter=3, work_dir=tmp_path)
    with pytest.raises(type(error), match=str(error)), weights_blamed(runner):
        raise error
    runner.model.bias.data[1] = float("nan")
    expected = f"bias is not finite in iteration 4 .{type(error).__name__}: {error}.; the last checkpoint is none"
    with pytest.raises(UserError, match=expected) as found, weights_blamed(runner):
        raise error
    assert DIVERGED in str(found.value)


def test_trouble_where_queries_share_keys():
    """The heads of queries and keys differ in number."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, intermediate_size=16, num_hidden_layers=1, vocab_size=8, max_position_embeddings=8)
    config = transformers.Qwen2Config(**sizes, num_attention_heads=3, num_key_value_heads=1)
    model = transformers.Qwen2Model(config)
    assert find_trouble(model, (torch.tensor([[1, 2, 3]]),), {}) == []
    model.layers[0].self_attn.k_proj.bias.data.fill_(1e6)
    assert find_trouble(model, (torch.tensor([[1, 2, 3]]),), {}) == ["saturated logits at layers.0.self_attn"]


def test_trouble_is_named_by_site():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            from timm.models.vision_transformer import Attention

            self.sound, self.long, self.silent, self.broken = (Attention(8, 2) for _ in range(4))
            self.long.qkv.weight.data *= 1e4
            self.silent.qkv.weight.data[16:] = 0
            self.broken.qkv.weight.data[0, 0] = float("inf")

        def forward(self, x):
            return [part(x) for part in (self.sound, self.long, self.silent, self.broken)]

    pytest.importorskip("timm")
    model = Model()
    condattn.condition(model, "pc")
    trouble = find_trouble(model, (torch.randn(1, 5, 8),), {})
    assert sorted(trouble) == sorted(
        [
            "saturated logits at long, broken",
            "zero rows at silent",
            "weights that are not finite at broken",
            "head outputs that are not finite at broken",
        ]
    )
