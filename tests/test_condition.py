"""``condition`` and ``conditioning_of``: sites, patterns, several methods, and the errors that they raise."""

import copy
import pkgutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from small_transformer import SITES, output, transformer
from torch import nn

import condattn
from condattn import RowPreconditioner, SpectralCorrection
from condattn.attention import rules as sites
from condattn.methods import base as registry


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


@pytest.mark.parametrize("patterns", [5, [5], {"a": 1}])
def test_patterns_that_are_none(patterns):
    with pytest.raises(ValueError, match="include is .*; expected a pattern of module names, or a list of patterns"):
        condattn.condition(transformer(), "pc", include=patterns)


def test_patterns_that_leave_nothing():
    with pytest.raises(ValueError, match="leave no attention site"):
        condattn.condition(transformer(), "pc", include="encoder", exclude="encoder")


def test_no_site():
    with pytest.raises(ValueError, match="Linear has no attention site to condition: none of its modules is of the"):
        condattn.condition(nn.Linear(2, 2))


def test_patterns_of_the_baseline_are_checked():
    with pytest.raises(ValueError, match="pattern 'typo' matches no attention site"):
        condattn.condition(transformer(), "none", include="typo")
    assert condattn.condition(transformer(), "none", include="encoder").conditioned == ()


@pytest.mark.usefixtures("registrations")
def test_sites_that_share_a_layer():
    sites.register_rule(f"{__name__}.Shared", lambda m: dict(num_heads=m.heads, out=condattn.into(m.proj)))
    model = nn.ModuleDict(dict(a=Shared(2), b=Shared(4)))
    model["b"].proj = model["a"].proj
    with pytest.raises(ValueError, match=r"a \(Shared\) and b \(Shared\) share a Linear; exclude one of them"):
        condattn.condition(model)
    assert condattn.condition(model, exclude="a").conditioned == ("b",)
    assert condattn.remove(model) == 2 and type(model["a"].proj) is nn.Linear


@pytest.mark.usefixtures("registrations")
def test_a_layer_that_no_method_changes_may_be_shared():
    sites.register_rule(
        f"{__name__}.Shared", lambda m: dict(num_heads=m.heads, q=condattn.whole(m.proj), out=condattn.into(m.last))
    )
    model = nn.ModuleDict(dict(a=Shared(2), b=Shared(2)))
    model["a"].last, model["b"].last = nn.Linear(16, 16), nn.Linear(16, 16)
    model["b"].proj = model["a"].proj
    with pytest.raises(ValueError, match=r"a \(Shared\) and b \(Shared\) share a Linear; exclude one of them"):
        condattn.condition(model, "sc")
    assert condattn.condition(model, "pc").conditioned == ("a", "b")


@pytest.mark.usefixtures("registrations")
@pytest.mark.parametrize("conditioning, lacking", [("sc", ("k", "v")), ("sc(targets=('q',))", ()), ("pc", ())])
def test_the_report_names_what_a_site_lacks(conditioning, lacking):
    """Deformable attention has no keys, for instance; a method changes what there is."""
    sites.register_rule(
        f"{__name__}.Shared", lambda m: dict(num_heads=m.heads, q=condattn.whole(m.proj), out=condattn.into(m.last))
    )
    model = nn.ModuleList([Shared(2), nn.MultiheadAttention(16, 2)])
    model[0].last = nn.Linear(16, 16)
    report = condattn.condition(model, conditioning)
    assert report.conditioned == ("0", "1")
    assert report.partial == ((("0", *report.methods, lacking),) if lacking else ())
    wanted = "; sc changes no k and no v, for lack of projections, at 0" if lacking else ""
    assert str(report) == f"conditioned 2 of 2 attention sites: {conditioning}{wanted}"


@pytest.mark.usefixtures("registrations")
@pytest.mark.parametrize("conditioning", ["pc", "sc"])
def test_a_rule_that_names_a_reader_without_the_layer(conditioning):
    def rule(m):
        read = condattn.read_by(m.last, dict(q=condattn.whole(m.proj)))
        return dict(num_heads=m.heads, **read, out=condattn.into(m.proj, reader=m.last))

    sites.register_rule(f"{__name__}.Shared", rule)
    model = Shared(2)
    model.last = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="a Linear reads parameters of a Linear, which is not in it; name the module"):
        condattn.condition(model, conditioning)
    assert type(model.proj) is nn.Linear


@pytest.mark.parametrize(
    "conditioning, step",
    [
        ("pc", "condattn.methods.head_output.swap_to_conditioned"),
        ("sc(relative=True)", "condattn.layers.correction.CorrectedModule._register"),
        ("ci", "condattn.methods.initialization.ConditionedInitialization.set_weights"),
    ],
)
def test_an_error_while_a_place_is_conditioned_leaves_nothing(conditioning, step, monkeypatch):
    """As if the memory were exhausted at the second place."""
    model, calls = transformer(), []
    module, _, name = step.rpartition(".")
    original = getattr(pkgutil.resolve_name(module), name)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return original(*arguments)

    monkeypatch.setattr(step, fail)
    with pytest.raises(MemoryError):
        condattn.condition(model, conditioning)
    assert [type(module) for module in model.modules()] == [type(module) for module in transformer().modules()]
    assert not any(condattn.conditioning_of(model).values()) and condattn.remove(model) == 0
    assert condattn.condition(model, conditioning).conditioned


@pytest.mark.parametrize("conditioning", ["pc", "sc", "ci"])
@pytest.mark.parametrize("layer", ["in_proj", "out_proj"])
def test_sites_that_share_a_parameter(conditioning, layer):
    """Only a method that writes weights refuses them."""
    model = nn.ModuleDict({name: nn.MultiheadAttention(8, 2) for name in "ab"})
    if layer == "in_proj":
        model["b"].in_proj_weight = model["a"].in_proj_weight
    else:
        model["b"].out_proj.weight = model["a"].out_proj.weight
    if conditioning != "ci":
        assert condattn.condition(model, conditioning).conditioned == ("a", "b")
        x, alone = torch.randn(3, 1, 8), copy.deepcopy(model["a"])
        assert torch.equal(model["a"](x, x, x)[0], alone(x, x, x)[0])
        return
    message = r"a \(MultiheadAttention\) and b \(MultiheadAttention\) share a Parameter; exclude one of them"
    with pytest.raises(ValueError, match=message):
        condattn.condition(model, conditioning)
    assert condattn.condition(model, conditioning, exclude="b").conditioned == ("a",)


class Shared(nn.Module):
    """Attention that may share its output projection with another module."""

    def __init__(self, heads):
        super().__init__()
        self.heads, self.proj = heads, nn.Linear(16, 16)


@pytest.mark.parametrize("conditioning", ["pc", "sc"])
@pytest.mark.usefixtures("registrations")
def test_heads_that_do_not_divide(conditioning):
    sites.register_rule(
        f"{__name__}.Shared",
        lambda m: dict(num_heads=m.heads, out=condattn.into(m.proj), q=condattn.whole(m.proj)),
    )
    with pytest.raises(ValueError, match="3 heads do not divide"):
        condattn.condition(Shared(3), conditioning)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"model is a str; expected a torch.nn.Module"):
        condattn.condition("swin")


def test_a_compiled_model_notices(monkeypatch):
    """Not all versions of torch.compile notice hooks that come or go, so that each change clears its caches."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    compiled, image = torch.compile(model, backend="eager"), torch.randn(1, 3, 32, 32)
    reset, resets = torch.compiler.reset, []
    monkeypatch.setattr(torch.compiler, "reset", lambda: (resets.append(1), reset()))
    with torch.no_grad():
        outputs = [compiled(image)]
        for change in (
            lambda m: condattn.condition(m, [SpectralCorrection(1.0), "pc"]),
            condattn.fold,
            condattn.remove,
        ):
            change(model)
            outputs.append(compiled(image))
            torch.testing.assert_close(outputs[-1], model(image))
            assert resets
            resets.clear()
        before, conditioned, folded, removed = outputs
        torch.testing.assert_close(folded, conditioned, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, conditioned) and not torch.allclose(folded, removed)


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


@pytest.mark.usefixtures("registrations")
def test_a_convolution_that_is_no_projection():
    from condattn.attention.builders import into, thirds

    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Conv2d(4, 12, 3), nn.Conv2d(4, 4, 1)

    name = f"{__name__}.{Convolved.__qualname__}"
    condattn.register_rule(name, lambda m: dict(num_heads=2, out=into(m.proj), **thirds(m.qkv)))
    with pytest.raises(ValueError, match="its q is no convolution of size 1 and of all channels"):
        condattn.condition(Convolved(), "sc")


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
    with pytest.raises(
        ValueError, match=r"1 \(Own\): cannot condition its Own, which has methods or properties that Multi"
    ):
        condattn.condition(model, "pc")
    assert not any(condattn.conditioning_of(model).values())
    assert condattn.condition(model, "pc", exclude="1").conditioned == ("0",)


def test_a_layer_with_properties_of_its_own_is_refused():
    """The class that it would get does not have them."""

    class Own(nn.Linear):
        @property
        def size(self):
            return self.weight.shape

    timm = pytest.importorskip("timm")
    model = timm.layers.Attention(8, 2)
    model.qkv = Own(8, 24)
    with pytest.raises(ValueError, match="cannot condition its Own, which has methods or properties that Linear has n"):
        condattn.condition(model, "sc")
    assert condattn.condition(model, "pc").conditioned == ("",)


def test_parametrized_weights_are_refused():
    timm = pytest.importorskip("timm")
    module = timm.layers.Attention(8, 2)
    nn.utils.parametrizations.weight_norm(module.qkv)
    with pytest.raises(ValueError, match="cannot condition its parametrized Linear"):
        condattn.condition(module, "sc")


def test_parametrized_projections_that_their_module_reads_are_refused():
    """Its weight is overridden in the module that uses it, which a parametrization would undo."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    module = swin.ShiftedWindowAttention(8, [4, 4], [0, 0], 2)
    nn.utils.parametrizations.weight_norm(module.proj)
    with pytest.raises(ValueError, match="cannot condition its parametrized Linear"):
        condattn.condition(module, "pc")
    assert not any(condattn.conditioning_of(module).values())


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
    before = condattn.conditioning_of(model)
    with pytest.raises(NotImplementedError, match="Halve cannot be removed: the class does not define remove"):
        condattn.remove(model)
    assert condattn.conditioning_of(model) == before


def test_the_model_itself_may_be_the_site():
    module = nn.MultiheadAttention(8, 2)
    report = condattn.condition(module, "pc")
    assert report.conditioned == ("",)
    assert "1 of 1 attention sites" in str(report)


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
        "found = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(found - set(sys.stdlib_module_names) - {'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["condattn"]


TORCH_ALONE = """
import sys

OTHERS = {"numpy", "scipy", "timm", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "torchvision", "transformers"}
OTHERS |= {"peft", "PIL", "matplotlib", "rich", "jinja2", "yaml", "safetensors", "pandas", "sklearn"}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in OTHERS else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)

import torch
from torch import nn

import condattn
from condattn.weights.calibrate import calibrate
from condattn.weights.load import load_pretrained

x = torch.randn(2, 3, 8)


def model(conditioning):
    made = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    condattn.condition(made, conditioning)
    return made


one = model("sc(relative=True)+pc")
wanted = one(x)
condattn.fold(one)
torch.testing.assert_close(one(x), wanted)
condattn.remove(one)
two = model("pc")
torch.save(one.state_dict(), sys.argv[1])
assert len(load_pretrained(two, sys.argv[1]).loaded) == len(one.state_dict())
(site,) = calibrate(two, lambda: two(x))
assert site.after < site.before
assert condattn.spectra.measure(two, [x]).rows()
assert not OTHERS & {name.split(".")[0] for name in sys.modules}
"""


def test_the_core_needs_torch_alone(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", TORCH_ALONE, str(tmp_path / "weights.pth")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
