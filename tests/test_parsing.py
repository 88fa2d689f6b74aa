"""Conditionings as names, texts with settings, and dictionaries."""

import pytest
from small_transformer import transformer
from torch import nn

import condattn
from condattn import RowPreconditioner, SpectralCorrection
from condattn.methods.parsing import split_names


@pytest.mark.parametrize("name", ["pcc", "", "none+pc", "pc+", 3, dict(strength=1.0), dict(type="Nothing")])
def test_unknown_name(name):
    model = transformer()
    with pytest.raises(ValueError, match=r"Known: 'pc' \(RowPreconditioner\), 'sc' \(SpectralCorrection\).*'none'"):
        condattn.condition(model, name)
    assert not any(condattn.conditioning_of(model).values())


def test_unknown_setting():
    with pytest.raises(ValueError, match=r"RowPreconditioner: .*'strength'; its settings are detach, eps"):
        condattn.condition(transformer(), dict(type="RowPreconditioner", strength=1.0))


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("pc", [RowPreconditioner()]),
        ("sc", [SpectralCorrection(strength=1.0)]),
        ("sc(strength=10.0)", [SpectralCorrection()]),
        ("sc(relative=True, form='svd')", [SpectralCorrection(form="svd")]),
        ("pc(detach=True, eps=1e-08)", [RowPreconditioner(detach=True, eps=1e-8)]),
        (
            "sc(strength={'q': 1.0, 'v': 2.0}, targets=('q', 'v'))+pc",
            [SpectralCorrection(dict(q=1.0, v=2.0), targets=("q", "v")), RowPreconditioner()],
        ),
    ],
)
def test_names_take_settings_and_are_printed_with_them(text, methods):
    assert condattn.methods.parse(text) == methods
    assert "+".join(map(str, methods)) == text
    assert str(condattn.condition(transformer(), methods)).endswith(f"attention sites: {text}")


def test_dictionaries_in_both_notations():
    one, other = (f"sc(strength={value})" for value in ("dict(q=1.0, k=-1, v=10.0)", "{'q': 1.0, 'k': -1, 'v': 10.0}"))
    assert (
        condattn.methods.parse(one) == condattn.methods.parse(other) == [SpectralCorrection(dict(q=1.0, k=-1, v=10.0))]
    )


def test_a_model_whose_method_has_a_dictionary_is_printed():
    timm = pytest.importorskip("timm")
    model = nn.ModuleDict(
        dict(whole=timm.layers.Attention(8, 2), multihead=nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    )
    condattn.condition(model, SpectralCorrection(dict(q=1.0, k=1.0, v=10.0)))
    assert str(model).count("strength={'q': 1.0, 'k': 1.0, 'v': 10.0}") == 1
    assert len(model["multihead"].corrected_by) == 1


def test_lists_of_names():
    names = ["none", "sc(targets=('q', 'k'), strength={'q': 1.0, 'k': 2.0})+pc", "pc"]
    assert split_names(", ".join(names)) == names


def test_a_short_name_in_the_long_form():
    """A short name has the same settings as the ``type`` of a dictionary."""
    assert condattn.methods.parse(dict(type="sc", targets=("q",))) == [SpectralCorrection(1.0, targets=("q",))]
    assert condattn.methods.parse(dict(type="SpectralCorrection")) == [SpectralCorrection(10.0)]


@pytest.mark.parametrize(
    "text",
    ["pc(", "pc+", "pc(1)", "pc(**{})", "pc.sc", "sc-pc", "sc(strength=print(1))", "3", "", "sc(strength=dict(1))"],
)
def test_texts_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="cannot read the conditioning .*expected a text such as"):
        condattn.methods.parse(text)


def test_conditioning_of_gives_the_long_form_back():
    model = transformer()
    methods = [SpectralCorrection(dict(q=1.0, v=2.0), targets=("q", "v")), RowPreconditioner(detach=True)]
    condattn.condition(model, methods, include="encoder")
    told = condattn.conditioning_of(model)
    assert told["decoder.layers.0.self_attn"] == []
    other = transformer()
    condattn.condition(other, told["encoder.layers.0.self_attn"], include="encoder")
    assert condattn.conditioning_of(other) == told
