"""Rules for attention classes: registered, missing, and wrong ones."""

import warnings

import pytest
import torch
from registrations import registrations_undone
from torch import nn

import condattn
from condattn.attention import rules as sites


class StrangeAttention(nn.Module):
    """Attention for which no rule exists."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)


@pytest.mark.usefixtures("registrations")
def test_unknown_attention_is_named_with_the_rule_to_add():
    with pytest.raises(ValueError, match=r"StrangeAttention \(the model itself\): no rule describes it; add a rule"):
        condattn.condition(StrangeAttention())
    model = nn.ModuleDict(dict(known=nn.MultiheadAttention(4, 2), a=StrangeAttention(), b=StrangeAttention()))
    with pytest.warns(UserWarning, match=r"StrangeAttention \(a and 1 more\): no rule describes it; add a rule"):
        assert condattn.condition(model, "pc").conditioned == ("known",)
    condattn.register_exception(f"{__name__}.StrangeAttention", "it is a test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condattn.condition(model, "sc")


@pytest.mark.parametrize("name", ["MHA", "GroupedMHA", "MHSA", "CrossAttn", "WindowMSA", "SelfAtten"])
def test_names_that_look_like_attention(name):
    model = type(name, (StrangeAttention,), {})()
    assert [one.module for one in sites.find_unsupported(model)] == [model]


@pytest.mark.parametrize("name", ["Alpha", "Norm", "MLP", "Mixer"])
def test_names_that_do_not(name):
    assert sites.find_unsupported(type(name, (nn.Linear,), {})(2, 2)) == []


@pytest.mark.usefixtures("registrations")
def test_the_advice_about_a_site_that_cannot_be_conditioned():
    """A site in a model can be left out; a model that is the only site cannot."""
    condattn.register_rule(
        f"{__name__}.StrangeAttention", lambda m: dict(num_heads=2, obstacle="a test", **condattn.thirds(m.qkv))
    )
    with pytest.raises(ValueError, match="a test; this module is the only site, so that the method cannot be used"):
        condattn.condition(StrangeAttention(), "pc")
    with pytest.raises(ValueError, match=r"a test; leave the site out with exclude=\['a'\]"):
        condattn.condition(nn.ModuleDict(dict(a=StrangeAttention())), "pc")


def test_unknown_attention_is_left_out_without_a_warning_where_patterns_say_so():
    model = nn.ModuleDict(dict(known=nn.MultiheadAttention(4, 2), strange=StrangeAttention()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert condattn.condition(model, "pc", exclude="strange").conditioned == ("known",)
        assert condattn.condition(model, "sc", include="known").conditioned == ("known",)
        with pytest.raises(ValueError, match="leave no attention site"):
            condattn.condition(model, "none", include="strange")


class Wrapped(nn.Module):
    """A wrapper that has no weight of its own, such as a user's own LoRA."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_a_layer_without_a_weight():
    """Its attention is left out with the reason; the rest of the model is conditioned."""
    timm = pytest.importorskip("timm")
    model = nn.ModuleList(timm.layers.Attention(8, 2) for _ in range(2))
    model[0].qkv = Wrapped(model[0].qkv)
    reason = (
        r"Attention \(0\): a Wrapped in it has no weight that is a tensor, as quantised and wrapped layers have not"
    )
    with pytest.warns(UserWarning, match=reason):
        assert condattn.condition(model, "sc+pc").conditioned == ("1",)
    assert condattn.fold(model) == condattn.remove(model) == 1
    assert condattn.condition(model, "pc", exclude="0").conditioned == ("1",)
    with pytest.raises(ValueError, match=reason):
        condattn.condition(model[:1], "pc")


def test_a_layer_that_is_wrapped_after_it_was_conditioned():
    """Nothing is folded or removed, rather than a part."""
    timm = pytest.importorskip("timm")
    model, x = nn.Sequential(*(timm.layers.Attention(8, 2) for _ in range(2))), torch.randn(1, 3, 8)
    condattn.condition(model, "sc+pc")
    model[1].qkv = Wrapped(model[1].qkv)
    wanted, weight = model(x), model[0].qkv.weight.clone()
    for function in (condattn.fold, condattn.remove, condattn.conditioning_of):
        with pytest.raises(
            ValueError, match=r"1 \(Attention\) was conditioned, and then a layer was replaced: a Wrapp"
        ):
            function(model)
    assert torch.equal(model(x), wanted) and torch.equal(model[0].qkv.weight, weight)


def test_register_rule():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).movedim(-2, -3).unbind(-4 + 1)
            return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))

    name = f"{Mine.__module__}.{Mine.__qualname__}"
    condattn.register_rule(name, lambda m: dict(num_heads=2, out=condattn.into(m.proj), **condattn.thirds(m.qkv)))
    try:
        model = nn.Sequential(Mine())
        assert condattn.condition(model, "sc+pc").conditioned == ("0",)
        with pytest.raises(ValueError, match="has a rule already"):
            condattn.register_rule(name, dict)
    finally:
        del sites._RULES[name]


class Derived(StrangeAttention):
    """A subclass of it."""


def describe(module):
    return dict(num_heads=2, out=condattn.into(module.proj), **condattn.thirds(module.qkv))


@pytest.mark.parametrize("attends", [True, False])
def test_the_nearest_class_decides_between_rules_and_exceptions(attends):
    base, derived = f"{__name__}.StrangeAttention", f"{__name__}.Derived"
    model = nn.ModuleDict(dict(base=StrangeAttention(), derived=Derived()))

    def found():
        return [site.name for site in condattn.find_sites(model)], [one.name for one in sites.find_unsupported(model)]

    with registrations_undone():
        condattn.register_exception(base, "it is a test", attends=attends)
        assert found() == ([], ["base", "derived"] if attends else [])
        condattn.register_rule(derived, describe)
        assert found() == (["derived"], ["base"] if attends else [])
        condattn.register_rule(base, describe)
        assert found() == (["base", "derived"], [])
    with registrations_undone():
        condattn.register_rule(base, describe)
        condattn.register_exception(derived, "it is a test", attends=attends)
        assert found() == (["base"], ["derived"] if attends else [])
        condattn.register_exception(derived, "it is a test", attends=not attends)
        assert found() == (["base"], [] if attends else ["derived"])
        with pytest.raises(ValueError, match="StrangeAttention has a rule, which an exception does not replace"):
            condattn.register_exception(base, "it is a test")
        with pytest.raises(ValueError, match="expected the module and name of a class as text, .* got 'Attention'"):
            condattn.register_exception("Attention", "it is a test")


class Separate(nn.Module):
    """A made-up attention class, which tests describe wrongly."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (lambda m: dict(num_heads=2, q=m.q, out=condattn.into(m.out)), "expected q made by whole.*, found a Linear"),
        (lambda m: dict(num_heads=2, q=condattn.whole(m.q), out=m.out), "expected out made by into.*, found a Linear"),
        (lambda m: dict(num_heads=2, **condattn.thirds(m.q)), "has 8 rows, which are not 3 equal parts"),
        (lambda m: dict(heads=2, q=condattn.whole(m.q)), "unexpected keyword argument 'heads'"),
        (lambda m: dict(q=condattn.whole(m.q)), "missing .* argument: 'num_heads'"),
        (lambda m: None, "expected a dictionary with num_heads, q, k, v and out"),
        (lambda m: dict(num_heads=m.num_heads), "AttributeError: 'Separate' object has no attribute 'num_heads'"),
    ],
)
def test_rules_that_are_wrong(describe, message):
    with registrations_undone():
        condattn.register_rule(f"{Separate.__module__}.Separate", describe)
        with pytest.raises(ValueError, match=f"the rule for .*Separate is wrong: .*{message}"):
            condattn.condition(nn.Sequential(Separate()), "pc")


@pytest.mark.parametrize("name", [Separate, "Separate"])
def test_rules_for_classes_that_are_not_named_fully(name):
    with pytest.raises(ValueError, match="expected the module and name of a class as text"):
        condattn.register_rule(name, dict)
