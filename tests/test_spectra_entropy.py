"""The entropy of attention, as a share of that of uniform attention to the keys that are not masked."""

import pytest
import torch
from test_spectra import attention

from condattn.spectra import measure


def relative(model, *inputs):
    return torch.cat([one.relative for one in measure(model, inputs, ["entropy"]).entropies])


def nearly_uniform(**settings):
    model = attention(**settings)
    with torch.no_grad():
        model.in_proj_weight[:24] *= 1e-3
    return model


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_masked_keys_do_not_count(value):
    model, x = nearly_uniform(), torch.randn(2, 8, 12).double()
    mask = torch.zeros(8, 8).double()
    mask[:, 3:] = value
    inputs = dict(query=x, key=x, value=x)
    torch.testing.assert_close(relative(model, inputs | dict(attn_mask=mask)), torch.ones(2, 3).double())
    causal = torch.full((8, 8), value).double().triu(1)
    torch.testing.assert_close(relative(model, inputs | dict(attn_mask=causal)), torch.ones(2, 3).double())


def test_rows_whose_keys_are_all_masked_do_not_count():
    model, x = nearly_uniform(), torch.randn(1, 8, 12).double()
    mask = torch.zeros(8, 8).double()
    mask[:, 3:] = mask[6:] = torch.finfo(torch.float32).min
    found = relative(model, dict(query=x, key=x, value=x, attn_mask=mask))
    torch.testing.assert_close(found, torch.ones(1, 3).double())


def test_strongly_peaked_attention_is_not_taken_for_masked():
    """Its logits lie further apart than those of a mask of windows."""
    model, x = attention(), torch.randn(2, 8, 12).double()
    with torch.no_grad():
        model.in_proj_weight[:24] *= 30
    (one,) = measure(model, [dict(query=x, key=x, value=x)], ["entropy"]).entropies
    assert one.largest_logit.min() > 100 and one.relative.max() < 0.05
    torch.testing.assert_close(one.largest, torch.full((2, 3), 8.0).double().log())


@pytest.mark.parametrize("library", ["timm", "mmdet", "transformers"])
def test_the_mask_of_shifted_windows(library):
    """It adds -100, and differs between windows."""
    pytest.importorskip(library)
    x = torch.randn(2, 3, 32, 32)
    if library == "timm":
        import timm

        sizes = dict(embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, img_size=32)
        model = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    elif library == "mmdet":
        from condattn.openmmlab.models.mmdet import ConditionedSwinTransformer

        sizes = dict(embed_dims=8, depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,), window_size=4)
        model = ConditionedSwinTransformer(conditioning="none", **sizes)
        model.init_weights()
    else:
        import transformers

        sizes = dict(embed_dim=8, depths=[2], num_heads=[2], window_size=4, image_size=32, patch_size=4)
        model = transformers.SwinModel(transformers.SwinConfig(**sizes))
    plain, shifted = measure(model, x, ["entropy"]).entropies
    torch.testing.assert_close(plain.largest, torch.full((8, 2), 16.0).double().log())
    first, right, below, corner = shifted.largest[:4, 0].exp().tolist()
    assert [first, right, below, corner] == pytest.approx([16, 8, 8, 4])
    assert torch.equal(shifted.largest[:4], shifted.largest[4:])  # of both images
    torch.testing.assert_close(shifted.relative, torch.ones(8, 2).double(), rtol=0, atol=0.01)
