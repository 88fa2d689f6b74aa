"""Images of different sizes, whose results are kept apart, count together in plots, logs and warnings."""

import numpy as np
import pytest
import torch
from test_spectra import attention
from torch import nn

import condattn
from condattn.spectra import measure
from condattn.spectra.advice import find_warnings
from condattn.spectra.report import plot_heads


def sizes(model, *tokens):
    """Measure one image of each number of tokens, in this order."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, number, model.embed_dim, dtype=torch.float64, generator=generator) for number in tokens]
    return measure(model, [dict(query=x, key=x, value=x) for x in images], ["outputs", "entropy"])


def test_the_log_of_a_training_has_all_sizes():
    pytest.importorskip("mmengine")
    from condattn.openmmlab.hooks.spectra import scalars

    found = sizes(attention(), 5, 9, 7)
    assert len(found.spectra) == 6 and len(found.entropies) == 3
    logged = scalars(found)
    kappa = torch.cat([one.kappa for one in found.spectra if one.matrix == "A(X)"])
    assert kappa.shape == (3, 3) and logged["/kappa_AX"] == kappa.median().item()
    smallest = torch.cat([one.values[..., -1] for one in found.spectra if one.matrix == "A(X)"])
    assert logged["/sigma_min_AX"] == pytest.approx(smallest.median().item())
    assert logged["/entropy"] == torch.cat([one.relative for one in found.entropies]).median().item()
    assert logged["/largest_logit"] == max(one.largest_logit.max().item() for one in found.entropies)


def test_the_plot_of_the_heads_has_all_sizes():
    found = sizes(attention(), 5, 9, 7)
    (image,) = plot_heads({"none": found}).axes[0].images
    wanted = np.median([one.kappa[0].numpy() for one in found.spectra if one.matrix == "A(X)"], 0)
    np.testing.assert_allclose(image.get_array()[:, 0], np.log10(wanted))


@pytest.mark.parametrize("last", [0, 1])
def test_a_warning_is_of_all_sizes(last):
    """The preconditioner raises the condition number of three images, and not that of one of another size."""
    model = nn.MultiheadAttention(8, 1, batch_first=True).double()
    condattn.condition(model, "pc")
    with torch.no_grad():  # each token attends to equal tokens, A(X) = X
        model.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        model.in_proj_weight[:16] *= 40
        model.in_proj_bias.zero_()
    many, few = torch.zeros(3, 5, 8).double(), torch.eye(2, 8)[None].double()
    many[:, 0, 0], many[:, 1:, 1] = 1.0, 0.5  # orthonormal columns, whose rows have two norms
    calls = [dict(query=x, key=x, value=x) for x in (many, few)]
    measured = measure(model, calls if last else calls[::-1], ["outputs"])
    assert any(line.startswith("the preconditioner raises") for line in find_warnings({"": measured}))


def test_jacobians_in_the_log():
    pytest.importorskip("mmengine")
    from condattn.openmmlab.hooks.spectra import scalars

    model, x = attention(), torch.randn(1, 5, 12).double()
    found = scalars(measure(model, lambda: model(x, x, x), ["jacobian"], max_heads=1))
    assert found.keys() == {f"/kappa_dAX_dW_{name}" for name in "QKV"} | {"/bound"}


def test_each_head_in_the_log():
    pytest.importorskip("mmengine")
    from condattn.openmmlab.hooks.spectra import scalars

    model, x = attention(), torch.randn(1, 5, 12).double()
    found = measure(model, lambda: model(x, x, x), ["weights", "outputs", "entropy", "jacobian"])
    logged, middle = scalars(found, each_head=True), scalars(found)
    names = {name: f"kappa_{name}" for name in ("W_Q", "W_K", "W_V", "A(X)", "dA(X)/dW_Q", "dA(X)/dW_K", "dA(X)/dW_V")}
    names |= {"A(X)": "kappa_AX", **{f"dA(X)/dW_{name}": f"kappa_dAX_dW_{name}" for name in "QKV"}}
    checked = 0
    for row in found.rows():
        if row["quantity"] in names:
            assert logged[f"/{names[row['quantity']]}_head_{row['head']}"] == pytest.approx(row["kappa"])
            checked += 1
        if "bound" in row:
            assert logged[f"/bound_head_{row['head']}"] == pytest.approx(row["bound"])
    assert checked == 3 * 7
    assert {name: value for name, value in logged.items() if "_head_" not in name} == middle
    heads = [logged[f"/largest_logit_head_{head}"] for head in range(3)]
    assert middle["/largest_logit"] == max(heads) > min(heads)
