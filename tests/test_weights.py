"""Outputs always follow the current weights, however these were changed."""

import pytest
import torch
from torch import nn

import condattn
from condattn import SpectralCorrection


def double(weight):
    """Double a weight through ``.data``, as merging adapters does; autograd's version counter does not notice."""
    weight.data.mul_(2)


def replace_storage(weight):
    weight.data = weight.data * 2


def in_place(weight):
    weight.mul_(2)


CHANGES = [double, replace_storage, in_place]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["identity", "svd"])
def test_corrected_weights(float64, change, form):
    x = torch.randn(2, 4, 8)
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain.load_state_dict(module.state_dict())
    condattn.condition(module, SpectralCorrection(1.0, form=form))
    with torch.no_grad():
        module(x, x, x)
        constant = module.effective_weight("in_proj_weight") - module.in_proj_weight
        for _ in range(2):
            change(module.in_proj_weight)
            plain.in_proj_weight.copy_(module.in_proj_weight + constant)
            torch.testing.assert_close(module(x, x, x)[0], plain(x, x, x)[0], rtol=0, atol=1e-12)


def test_a_new_parameter_of_a_corrected_layer(float64):
    """A new parameter may have the memory address of a deleted one."""
    x = torch.randn(2, 4, 8)
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    condattn.condition(module, SpectralCorrection(1.0))
    plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain.load_state_dict(module.state_dict())
    identity = torch.cat([torch.eye(8)] * 3)
    with torch.no_grad():
        for seed in range(8):
            torch.manual_seed(seed)
            del module.in_proj_weight
            module.in_proj_weight = nn.Parameter(torch.randn(24, 8))
            plain.in_proj_weight.copy_(module.in_proj_weight + identity)
            torch.testing.assert_close(module(x, x, x)[0], plain(x, x, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", [*CHANGES, "parameter"])
def test_position_bias_of_swin(float64, change):
    """Compare with upstream's forward, with the same table."""
    pytest.importorskip("mmdet")
    from condattn.openmmlab.models.mmdet import ConditionedSwinTransformer

    model = ConditionedSwinTransformer(embed_dims=12, depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,))
    upstream = ConditionedSwinTransformer(
        embed_dims=12, depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,), fast_attention=False
    )
    image = torch.randn(1, 3, 56, 56)
    model.eval(), upstream.eval()
    for block in model.stages[0].blocks:
        nn.init.normal_(block.attn.w_msa.relative_position_bias_table)
    with torch.no_grad():
        before = model(image)[0]
        for block in model.stages[0].blocks:
            attention = block.attn.w_msa
            if change == "parameter":
                attention.relative_position_bias_table = nn.Parameter(
                    torch.randn_like(attention.relative_position_bias_table)
                )
            else:
                change(attention.relative_position_bias_table)
        upstream.load_state_dict(model.state_dict())
        after = model(image)[0]
        torch.testing.assert_close(after, upstream(image)[0], rtol=0, atol=1e-12)
    assert not torch.equal(before, after)
