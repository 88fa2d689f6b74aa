"""``condition``, ``fold`` and ``conditioning_of``, and the errors that they raise."""

import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from registrations import registrations_undone
from torch import nn

import condattn
from condattn import RowPreconditioner, SpectralCorrection
from condattn.attention import rules as sites
from condattn.methods import base as registry
from condattn.methods.parsing import split_names


def transformer():
    torch.manual_seed(0)
    return nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True).eval()


def output(model, dtype=torch.float32):
    torch.manual_seed(1)
    return model(torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype))


SITES = [
    "encoder.layers.0.self_attn",
    "encoder.layers.1.self_attn",
    "decoder.layers.0.self_attn",
    "decoder.layers.0.multihead_attn",
    "decoder.layers.1.self_attn",
    "decoder.layers.1.multihead_attn",
]


def test_find_sites_sees_the_same_before_and_after():
    model = transformer()
    before = condattn.find_sites(model)
    assert [site.name for site in before] == SITES
    weights = [site.v.weight.clone() for site in before]
    condattn.condition(model, "sc+pc")
    after = condattn.find_sites(model)
    assert [site.name for site in after] == SITES
    assert all(torch.equal(site.v.weight, w) for site, w in zip(after, weights, strict=True))


def test_none_changes_nothing():
    model, untouched = transformer(), transformer()
    report = condattn.condition(model, "none")
    assert (report.methods, report.conditioned, str(report)) == ((), (), "conditioning: none")
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    assert torch.equal(output(model), output(untouched))


@pytest.mark.parametrize(
    "include, exclude, expected",
    [
        (None, None, SITES),
        ("decoder", None, SITES[2:]),
        (["encoder", "*.multihead_attn"], None, [*SITES[:2], SITES[3], SITES[5]]),
        (None, "encoder", SITES[2:]),
        ("decoder.layers.?", ["decoder.layers.1"], SITES[2:4]),
        (["*.self_attn"], ["decoder"], SITES[:2]),
    ],
)
def test_patterns(include, exclude, expected):
    model = transformer()
    report = condattn.condition(model, "pc", include, exclude)
    assert list(report.conditioned) == expected
    assert set(report.conditioned) | set(report.left_out) == set(SITES)
    assert [name for name, methods in condattn.conditioning_of(model).items() if methods] == expected


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_that_matches_nothing(argument):
    with pytest.raises(ValueError, match="pattern 'backbone' matches no attention site; the sites are 'encoder.lay"):
        condattn.condition(transformer(), "pc", **{argument: ["backbone"]})


def test_patterns_that_leave_nothing():
    with pytest.raises(ValueError, match="leave no attention site"):
        condattn.condition(transformer(), "pc", include="encoder", exclude="encoder")


def test_no_site():
    with pytest.raises(ValueError, match="Linear has no attention site to condition: none of its modules is of the"):
        condattn.condition(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"StrangeAttention \(the model itself\): no rule describes it; add a rule"):
        condattn.condition(StrangeAttention())


class StrangeAttention(nn.Module):
    """Attention for which no rule exists."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)


def test_unknown_attention_is_named_with_the_rule_to_add():
    model = nn.ModuleDict(dict(known=nn.MultiheadAttention(4, 2), a=StrangeAttention(), b=StrangeAttention()))
    with pytest.warns(UserWarning, match=r"StrangeAttention \(a and 1 more\): no rule describes it; add a rule"):
        assert condattn.condition(model, "pc").conditioned == ("known",)
    condattn.register_exception(f"{__name__}.StrangeAttention", "it is a test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condattn.condition(model, "sc")
    del sites._EXCEPTIONS[f"{__name__}.StrangeAttention"]


def test_unknown_attention_is_left_out_without_a_warning_where_patterns_say_so():
    model = nn.ModuleDict(dict(known=nn.MultiheadAttention(4, 2), strange=StrangeAttention()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert condattn.condition(model, "pc", exclude="strange").conditioned == ("known",)
        assert condattn.condition(model, "sc", include="known").conditioned == ("known",)
        with pytest.raises(ValueError, match="leave no attention site"):
            condattn.condition(model, "none", include="strange")


def test_patterns_of_the_baseline_are_checked():
    with pytest.raises(ValueError, match="pattern 'typo' matches no attention site"):
        condattn.condition(transformer(), "none", include="typo")
    assert condattn.condition(transformer(), "none", include="encoder").conditioned == ()


def test_sites_that_share_a_layer():
    sites.register_rule(f"{__name__}.Shared", lambda m: dict(num_heads=m.heads, out=condattn.into(m.proj)))
    model = nn.ModuleDict(dict(a=Shared(2), b=Shared(4)))
    model["b"].proj = model["a"].proj
    with pytest.raises(ValueError, match=r"a \(Shared\) and b \(Shared\) share a Linear; exclude one of them"):
        condattn.condition(model)
    assert condattn.condition(model, exclude="a").conditioned == ("b",)
    del sites._RULES[f"{__name__}.Shared"]


class Shared(nn.Module):
    """Attention that may share its output projection with another module."""

    def __init__(self, heads):
        super().__init__()
        self.heads, self.proj = heads, nn.Linear(16, 16)


@pytest.mark.parametrize("conditioning", ["pc", "sc"])
def test_heads_that_do_not_divide(conditioning):
    sites.register_rule(
        f"{__name__}.Shared",
        lambda m: dict(num_heads=m.heads, out=condattn.into(m.proj), q=condattn.whole(m.proj)),
    )
    with pytest.raises(ValueError, match="3 heads do not divide"):
        condattn.condition(Shared(3), conditioning)
    del sites._RULES[f"{__name__}.Shared"]


def test_not_a_model():
    with pytest.raises(TypeError, match=r"model is a str; expected a torch.nn.Module"):
        condattn.condition("swin")


def test_a_compiled_model_notices():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    compiled, image = torch.compile(model, backend="eager"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = compiled(image)
        condattn.condition(model, "pc")
        torch.testing.assert_close(compiled(image), model(image))
        assert not torch.allclose(before, model(image))


def test_attention_that_cannot_be_conditioned_hides_what_is_in_it(monkeypatch):
    monkeypatch.setattr(sites, "_EXCEPTIONS", {})
    monkeypatch.setattr(sites, "_ATTENDING", set())
    condattn.register_exception("torch.nn.modules.transformer.TransformerDecoderLayer", "it is a test", attends=True)
    model = transformer()
    with pytest.warns(UserWarning, match=r"TransformerDecoderLayer \(decoder.layers.0 and . more\): it is a test"):
        conditioned = condattn.condition(model, "pc").conditioned
    assert conditioned and all(name.startswith("encoder.") for name in conditioned)


def test_heads_that_do_not_divide_the_channels():
    timm = pytest.importorskip("timm")
    module = timm.layers.Attention(8, 2)
    module.num_heads = 3
    with pytest.raises(ValueError, match="head outputs cannot be conditioned: 3 heads do not divide its 8 channels"):
        condattn.condition(module, "pc")
    with pytest.raises(ValueError, match="3 heads do not divide the 8 rows of its q"):
        condattn.condition(module, SpectralCorrection(layout="per_head"))


def test_a_convolution_that_is_no_projection():
    from condattn.attention.builders import into, thirds

    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Conv2d(4, 12, 3), nn.Conv2d(4, 4, 1)

    name = f"{__name__}.{Convolved.__qualname__}"
    condattn.register_rule(name, lambda m: dict(num_heads=2, out=into(m.proj), **thirds(m.qkv)))
    with pytest.raises(ValueError, match="its q is no 1 x 1 convolution of all channels"):
        condattn.condition(Convolved(), "sc")
    del sites._RULES[name]


@pytest.mark.parametrize("name", ["pcc", "", "none+pc", "pc+", 3, dict(strength=1.0), dict(type="Nothing")])
def test_unknown_name(name):
    model = transformer()
    with pytest.raises(ValueError, match=r"Known: 'pc' \(RowPreconditioner\), 'sc' \(SpectralCorrection\).*'none'"):
        condattn.condition(model, name)
    assert not any(condattn.conditioning_of(model).values())


def test_unknown_setting():
    with pytest.raises(ValueError, match=r"RowPreconditioner: .*'strength'; its settings are detach, eps"):
        condattn.condition(transformer(), dict(type="RowPreconditioner", strength=1.0))


def test_method_twice():
    with pytest.raises(ValueError, match="names RowPreconditioner more than once"):
        condattn.condition(transformer(), "pc+sc+pc")
    model = transformer()
    condattn.condition(model, "pc", include="encoder")
    with pytest.raises(ValueError, match=r"encoder.layers.0.self_attn .*: RowPreconditioner is applied already"):
        condattn.condition(model, "pc")
    condattn.condition(model, "sc")
    condattn.condition(model, "pc", exclude="encoder")
    assert all(len(methods) == 2 for methods in condattn.conditioning_of(model).values())


def test_a_site_that_cannot_be_conditioned_leaves_the_model_untouched():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return query, None

    model = nn.ModuleList([nn.MultiheadAttention(4, 2), Own(4, 2)])
    with pytest.raises(ValueError, match=r"1 \(Own\): cannot condition its Own, which has methods that Multi"):
        condattn.condition(model, "pc")
    assert not any(condattn.conditioning_of(model).values())
    assert condattn.condition(model, "pc", exclude="1").conditioned == ("0",)


def test_parametrized_weights_are_refused():
    timm = pytest.importorskip("timm")
    module = timm.layers.Attention(8, 2)
    nn.utils.parametrizations.weight_norm(module.qkv)
    with pytest.raises(ValueError, match="cannot condition its parametrized Linear"):
        condattn.condition(module, "sc")


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


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (RowPreconditioner, "self_attn.*: its head outputs are conditioned already, by pc"),
        (SpectralCorrection, "self_attn.*: its q is corrected already, by sc"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_two_methods_for_one_thing_are_refused(base, message, at_once):
    """The model is unchanged after the error."""

    @condattn.register_method
    @dataclass(frozen=True)
    class Other(base):
        alias = "other"

    try:
        model = transformer()
        keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
        if not at_once:
            condattn.condition(model, base.alias)
        with pytest.raises(ValueError, match=message):
            condattn.condition(model, [base.alias, "other"] if at_once else "other")
        if at_once:
            assert list(model.state_dict()) == keys
            assert [type(module) for module in model.modules()] == classes
            assert not any(condattn.conditioning_of(model).values())
        else:
            assert all(len(methods) == 1 for methods in condattn.conditioning_of(model).values())
    finally:
        del registry._METHODS["Other"], registry._ALIASES["other"]


def test_lists_of_names():
    names = ["none", "sc(targets=('q', 'k'), strength={'q': 1.0, 'k': 2.0})+pc", "pc"]
    assert split_names(", ".join(names)) == names


def test_a_short_name_in_the_long_form():
    """A short name has the same settings as the ``type`` of a dictionary."""
    assert condattn.methods.parse(dict(type="sc", targets=("q",))) == [SpectralCorrection(1.0, targets=("q",))]
    assert condattn.methods.parse(dict(type="SpectralCorrection")) == [SpectralCorrection(10.0)]


@pytest.mark.parametrize(
    "text", ["pc(", "pc+", "pc(1)", "pc(**{})", "pc.sc", "sc-pc", "sc(strength=print(1))", "3", ""]
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


def test_a_user_method_is_one_class(request):
    from dataclasses import dataclass

    from condattn.methods import base

    @condattn.register_method
    @dataclass(frozen=True)
    class Halve(condattn.Method):
        alias = "halve"
        factor: float = 0.5

        def check(self, site):
            pass

        def apply(self, site):
            with torch.no_grad():
                site.v.weight.mul_(self.factor)
            site.module.halved = self

        @classmethod
        def applied_to(cls, site):
            return getattr(site.module, "halved", None)

    request.addfinalizer(lambda: (base._METHODS.pop("Halve"), base._ALIASES.pop("halve")))
    model = transformer()
    before = condattn.find_sites(model)[0].v.weight.clone()
    condattn.condition(model, "halve+pc")
    assert torch.equal(condattn.find_sites(model)[0].v.weight, before / 2)
    assert condattn.conditioning_of(model)[SITES[0]][1] == dict(type="Halve", factor=0.5)
    with pytest.raises(ValueError, match="the conditioning method name 'Halve' is taken"):
        condattn.register_method(Halve)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("conditioning", ["sc", "sc+pc", SpectralCorrection(form="svd")], ids=str)
def test_fold_computes_the_same(conditioning, dtype, tolerance, training):
    model = transformer().to(dtype).train(training)
    condattn.condition(model, conditioning)
    want = output(model, dtype)
    assert condattn.fold(model) == len(SITES)
    torch.testing.assert_close(output(model, dtype), want, rtol=0, atol=tolerance)
    assert condattn.fold(model) == 0


def test_a_folded_model_takes_the_fused_inference_kernel():
    """torch's encoder layers use this kernel only without gradients, and it rounds differently."""
    model = transformer()
    condattn.condition(model, SpectralCorrection(1.0))
    with torch.no_grad():
        want = output(model)
        condattn.fold(model)
        torch.testing.assert_close(output(model), want, rtol=0, atol=1e-5)


def test_folded_correction_is_the_vanilla_model():
    model, vanilla = transformer(), transformer()
    condattn.condition(model, SpectralCorrection(2.0, relative=True))
    assert set(model.state_dict()) > set(vanilla.state_dict())
    parameters = dict(model.named_parameters())
    want = output(model)
    condattn.fold(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in vanilla.named_modules()]
    assert list(model.state_dict()) == list(vanilla.state_dict())
    assert list(dict(model.named_buffers())) == list(dict(vanilla.named_buffers()))
    assert all(p is parameters[n] for n, p in model.named_parameters())
    vanilla.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(vanilla), want, rtol=0, atol=1e-6)


def test_fold_keeps_the_preconditioner():
    model = transformer()
    condattn.condition(model, "sc+pc")
    condattn.fold(model)
    assert set(map(str, condattn.conditioning_of(model).values())) == {str([RowPreconditioner().to_dict()])}


def test_the_model_itself_may_be_the_site():
    module = nn.MultiheadAttention(8, 2)
    report = condattn.condition(module, "pc")
    assert report.conditioned == ("",)
    assert "1 of 1 attention sites" in str(report)


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


@pytest.mark.parametrize("conditioning", ["pc", "sc", SpectralCorrection(form="svd")], ids=str)
def test_compiles(conditioning):
    model = transformer()
    condattn.condition(model, conditioning)
    want = output(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(output(compiled), want, rtol=1e-4, atol=1e-5)


def test_import_is_light():
    """``import condattn`` loads no library except torch (and what torch itself loads)."""
    code = (
        "import sys, torch; before = set(sys.modules); import condattn;"
        "print(*sorted({n.split('.')[0] for n in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    third_party = {
        "mmengine",
        "mmcv",
        "mmdet",
        "mmseg",
        "timm",
        "transformers",
        "numpy",
        "scipy",
        "torchvision",
        "triton",
    }
    assert not third_party & set(done.stdout.split())
    assert "condattn" in done.stdout


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


def test_measurements_without_scipy(monkeypatch):
    """They need it for Jacobians alone."""
    measure = condattn.spectra.measure
    monkeypatch.setattr(sys.modules[measure.__module__], "HAS_SCIPY", False)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    assert measure(model, quantities=["weights"]).rows()
    with pytest.raises(ModuleNotFoundError, match="needs numpy and scipy: pip install"):
        measure(model, torch.rand(1, 4, 8), quantities=["jacobian"])
