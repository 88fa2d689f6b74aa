"""Conditioned embedded tokens in models: where they enter, masks, half precision, compilation, what is refused."""

import importlib.util
from inspect import signature
from itertools import permutations

import numpy as np
import pytest
import torch
from registrations import registrations_undone
from torch import nn

import condattn
from condattn import EmbeddedTokens
from condattn.attention.tokens import find_token_entries, known_token_rules
from condattn.condition import same_conditioning
from condattn.kernels.polar import svd_correction

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers") if importlib.util.find_spec("transformers") else None
needs_transformers = pytest.mark.skipif(transformers is None, reason="needs transformers")


def by_hand(tokens):
    """X + C of tokens (batch, N, D), by NumPy."""
    out = []
    for x in tokens.double().numpy():
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        kept = s > s[0] * 1e-12
        out.append(x + s[0] * (u * kept) @ vh)
    return torch.from_numpy(np.stack(out))


MODELS = {
    "vit": lambda: timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3),
    "swin": lambda: timm.models.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 2)
    ),
    "davit": lambda: timm.models.DaVit(depths=(1, 1), embed_dims=(24, 32), num_heads=(2, 2), window_size=4),
    "xcit": lambda: timm.models.Xcit(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, eta=1.0),
}


def test_tokens_under_autocast():
    """Their rounding errors are those of half precision, although a norm returns them in single precision."""

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.norm = nn.Linear(12, 32), nn.LayerNorm(32)
            self.blocks = nn.ModuleList([nn.Identity()])

        def forward(self, x):
            return self.blocks[0](self.norm(self.project(x)).float())

    torch.manual_seed(0)
    model = Embedding()
    with registrations_undone():
        condattn.register_token_rule(
            f"{Embedding.__module__}.{Embedding.__qualname__}", lambda m: dict(module=m.blocks[0])
        )
        condattn.condition(model, "ct")
    x = torch.randn(1, 200, 12)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("conditioning", ["ct", "ct(detach=False)", "ct(form='newton_schulz', detach=False)"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_in_one_graph(conditioning, autocast):
    model, image = MODELS["vit"]().eval(), torch.randn(2, 3, 16, 16)
    condattn.condition(model, conditioning)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        grads = [
            torch.autograd.grad(f(image).float().square().sum(), model.patch_embed.proj.weight)
            for f in (compiled, model)
        ]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=0.05 if autocast else 1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(image), model(image), rtol=1e-3, atol=0.02 if autocast else 1e-5)


@pytest.mark.parametrize("conditioning", ["ct", "ct(detach=False)", "ct(form='newton_schulz')"])
def test_exported_and_traced(conditioning, tmp_path):
    model, image = MODELS["vit"]().eval(), torch.randn(2, 3, 16, 16)
    condattn.condition(model, conditioning)
    want = model(image)
    for strict in (True, False):
        torch.testing.assert_close(torch.export.export(model, (image,), strict=strict).module()(image), want)
    torch.jit.save(torch.jit.trace(model, (image,)), tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(image), want)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("conditioning", ["ct", "ct(form='newton_schulz', iterations=60)"])
def test_the_tokens_of_the_first_block(name, conditioning):
    """In each layout, against a hook that knows none of the code under test."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    images = images[..., :16, :16] if name == "vit" else images
    plain = model(images)
    conditioned = MODELS[name]().double().eval()
    conditioned.load_state_dict(model.state_dict())
    report = condattn.condition(conditioned, conditioning)
    assert report.conditioned == () and len(report.elsewhere) == 1

    def hook(module, args):
        x = args[0]
        if name == "swin":
            tokens = by_hand(x.flatten(1, 2))
        elif name == "davit":
            tokens = by_hand(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        else:
            tokens = by_hand(x)
        return (tokens.reshape(x.shape), *args[1:])

    model.get_submodule(report.elsewhere[0]).register_forward_pre_hook(hook)
    tolerance = 1e-9 if conditioning == "ct" else 1e-5
    torch.testing.assert_close(conditioned(images), model(images), rtol=0, atol=tolerance)
    assert not torch.allclose(conditioned(images), plain)
    condattn.remove(conditioned)
    assert torch.equal(conditioned(images), plain)


def test_combinations_do_not_depend_on_the_order():
    torch.manual_seed(0)
    state = MODELS["vit"]().state_dict()
    for names in (("ct", "sc", "pc"), ("ct", "ci", "sc(strength=3.0, relative=True)", "pc")):
        outputs = []
        for order in permutations(names):
            model = MODELS["vit"]().eval()
            model.load_state_dict(state)
            torch.manual_seed(1)  # 'ci' sets random weights
            condattn.condition(model, "+".join(order))
            outputs.append(model(torch.ones(1, 3, 16, 16)))
        assert all(torch.equal(output, outputs[0]) for output in outputs)
    record = condattn.conditioning_of(model)
    assert [one["type"] for one in record["blocks.0"]] == ["EmbeddedTokens"]
    found = [one["type"] for one in record["blocks.0.attn"]]
    assert sorted(found) == ["ConditionedInitialization", "RowPreconditioner", "SpectralCorrection"]
    assert condattn.fold(model) == 2 and condattn.conditioning_of(model)["blocks.0"] == record["blocks.0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Decomposed in single precision: LAPACK has no other."""
    torch.manual_seed(0)
    model = MODELS["vit"]().eval()
    condattn.condition(model, "ct")
    images = torch.rand(1, 3, 16, 16)
    wanted = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), wanted, rtol=0.1, atol=0.1)
    found = model.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)


def test_tokens_that_are_not_finite_reach_the_output():
    """So that the check of the loss names where they come from."""
    model = MODELS["vit"]().eval()
    condattn.condition(model, "ct")
    images = torch.rand(2, 3, 16, 16)
    images[0, 0, 0, 0] = torch.nan
    output = model(images)
    assert output[0].isnan().any() and output[1].isfinite().all()


def test_padding_of_images_takes_part():
    """It consists of tokens as any others, so that the size a batch is padded to matters."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, dynamic_img_size=True, pos_embed="none"
    ).eval()
    seen = []
    condattn.condition(model, "ct")
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.rand(1, 3, 16, 16)
    model(images)
    model(nn.functional.pad(images, (0, 0, 0, 8)))
    assert not torch.allclose(seen[0][:, :17], seen[1][:, :17], atol=1e-3)


@pytest.fixture
def bert():
    config = transformers.BertConfig(30, 24, 2, 3, 32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


@needs_transformers
@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_tokens_take_no_part(bert, attention):
    bert.set_attn_implementation(attention) if hasattr(bert, "set_attn_implementation") else None
    condattn.condition(bert, "ct")
    words = torch.randint(0, 30, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    seen = []
    bert.encoder.layer[0].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    padded = bert(words, attention_mask=mask).last_hidden_state
    alone = bert(words[1:, :5]).last_hidden_state
    torch.testing.assert_close(padded[1:, :5], alone, rtol=1e-4, atol=1e-5)
    embedded = bert.embeddings(words)
    assert torch.equal(seen[0][1, 5:], embedded[1, 5:])
    torch.testing.assert_close(seen[0][:1].double(), by_hand(embedded[:1]), rtol=1e-4, atol=1e-5)


@needs_transformers
@torch.no_grad()
def test_masked_tokens_anywhere(bert):
    """They are not changed at all, wherever they are; a mask that differs between queries is refused."""
    condattn.condition(bert, "ct")
    words, seen = torch.randint(0, 30, (2, 40)), []
    mask = (torch.arange(80).view(2, 40) % 3 > 0).long()
    bert.encoder.layer[0].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    bert(words, attention_mask=mask)
    kept = mask == 0
    assert torch.equal(seen[0][kept], bert.embeddings(words)[kept])
    assert not torch.equal(seen[0][~kept], bert.embeddings(words)[~kept])
    causal = torch.ones(2, 40, 40).tril()
    message = "lets queries see different tokens; expected a mask of padding alone"
    with pytest.raises(ValueError, match=message):
        bert(words, attention_mask=causal)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=message):
        torch.compile(bert, backend="eager")(words, attention_mask=causal)


@needs_transformers
@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, number", [(torch.float16, -65504.0), (torch.float16, -1e4), (torch.bfloat16, -3e38)], ids=str
)
def test_masks_that_are_added_in_half_precision(bert, dtype, number):
    """The smallest number of float16 stands for padding, and so does that of older models."""
    condattn.condition(bert.to(dtype), "ct")
    block, x, seen = bert.encoder.layer[0], torch.randn(2, 9, 24).to(dtype), []
    block.attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = torch.zeros(2, 1, 1, 9, dtype=dtype)
    mask[..., 5:] = number
    block(x, mask)
    assert torch.equal(seen[0][:, 5:], x[:, 5:])
    torch.testing.assert_close(seen[0][:, :5].double(), by_hand(x[:, :5]), rtol=0.02, atol=0.02)


@needs_transformers
def test_masks_that_are_no_tensors_are_refused(bert):
    """Such as those of flex attention, which say nothing of padding that could be read here."""
    condattn.condition(bert, "ct")
    with pytest.raises(ValueError, match="conditioned tokens cannot read a object as the mask 'attention_mask'"):
        bert.encoder.layer[0](torch.rand(1, 5, 24), attention_mask=object())


@needs_transformers
def test_what_is_left_out_is_not_conditioned(bert):
    """Whole models are, by patterns of their attention sites; a causal one among them does not matter."""
    both = nn.ModuleDict({"one": bert, "two": transformers.BertModel(bert.config)})
    assert condattn.condition(both, "ct+pc", include="one").elsewhere == ("one.encoder.layer.0",)
    assert condattn.condition(both, "ct", include="two.encoder.layer.1").elsewhere == ("two.encoder.layer.0",)
    gpt = transformers.GPT2Model(transformers.GPT2Config(30, 16, 24, 2, 3))
    mixed = nn.ModuleDict({"vision": transformers.BertModel(bert.config), "text": gpt})
    with pytest.raises(ValueError, match=r"text.h.0 \(GPT2Block\): its embedded tokens cannot be conditioned"):
        condattn.condition(mixed, "ct")
    assert condattn.condition(mixed, "ct", exclude="text").elsewhere == ("vision.encoder.layer.0",)


@needs_transformers
def test_causal_models_are_refused(bert):
    """With C the first token would depend on the last one."""
    gpt = transformers.GPT2Model(transformers.GPT2Config(30, 16, 24, 2, 3))
    with pytest.raises(ValueError, match=r"h.0 \(GPT2Block\): its embedded tokens cannot be conditioned: each token"):
        condattn.condition(gpt, "ct")
    assert not gpt.h[0]._forward_pre_hooks
    decoder = transformers.BertModel(transformers.BertConfig(30, 24, 2, 3, 32, is_decoder=True))
    with pytest.raises(ValueError, match="cannot be conditioned: each token sees only those before it"):
        condattn.condition(decoder, "ct")
    x = torch.randn(1, 6, 8)
    other = x.clone()
    other[:, -1] += 1.0
    assert not torch.allclose(svd_correction(x)[:, 0], svd_correction(other)[:, 0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name, patch", [("vit_tiny_patch16_224", 16), ("eva02_tiny_patch14_224", 14)])
def test_masks_of_timm(name, patch):
    """Masks of PyTorch's attention: padding takes no part; other masks, and causal attention, are refused."""
    model = timm.create_model(name, img_size=4 * patch, depth=2, embed_dim=16, num_heads=2).eval()
    if "attn_mask" not in signature(model.forward_features).parameters:
        pytest.skip("this timm passes no mask")
    condattn.condition(model, "ct")
    images, seen = torch.randn(2, 3, 4 * patch, 4 * patch), []
    model.blocks[0].norm1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.forward_features(images)
    tokens = seen[0].shape[1]
    shown = torch.arange(tokens) % 3 > 0
    for mask in (shown.expand(tokens, tokens), shown.expand(2, 1, tokens, tokens), torch.zeros(tokens, tokens)):
        seen.clear()
        kept = shown if mask.dtype == torch.bool else torch.ones(tokens, dtype=torch.bool)
        model.forward_features(images, attn_mask=mask)
        condattn.remove(model)
        model.forward_features(images)
        condattn.condition(model, "ct")
        corrected, plain = seen
        assert torch.equal(corrected[:, ~kept], plain[:, ~kept])
        torch.testing.assert_close(corrected[:, kept].double(), by_hand(plain[:, kept]), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="mask 'attn_mask' lets queries see different tokens"):
        model.forward_features(images, attn_mask=torch.ones(tokens, tokens, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="with is_causal=True each token sees only those before it"):
        model.forward_features(images, is_causal=True)


def test_models_without_a_rule_are_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1)
    message = (
        r"no rule says where .* TransformerEncoder enter .*not for a causal.*register_token_rule\(.*mask='ARGUMENT'"
    )
    with pytest.raises(ValueError, match=message):
        condattn.condition(model, "sc+ct")
    assert not any(condattn.conditioning_of(model).values())


def test_a_model_without_a_known_attention_class():
    """CT needs a rule for the tokens alone; what is missing is said."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x):
            return self.blocks[0](x)

    with pytest.raises(ValueError, match=r"no rule says where .* Mixer enter .*register_token_rule\("):
        condattn.condition(Mixer(), "ct")
    with pytest.raises(ValueError, match="Mixer has no attention site to condition"):
        condattn.condition(Mixer(), "ct+pc")
    with registrations_undone():
        condattn.register_token_rule(f"{Mixer.__module__}.{Mixer.__qualname__}", lambda m: dict(module=m.blocks[0]))
        report = condattn.condition(model := Mixer(), "ct")
        assert str(report) == "conditioned the input of blocks.0: ct"
        x = torch.randn(1, 5, 8)
        torch.testing.assert_close(model(x), model.blocks[0].forward(by_hand(x).float()), rtol=1e-4, atol=1e-5)


def test_a_first_block_that_is_not_called():
    """The first forward raises an error, since the hook of the block, which conditions the tokens, does not run."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.calls = False

        def forward(self, x):
            return self.blocks[0](x) if self.calls else self.blocks[0].forward(x)

    with registrations_undone():
        name = f"{Encoder.__module__}.{Encoder.__qualname__}"
        condattn.register_token_rule(name, lambda m: dict(module=m.blocks[0]))
        model = nn.Sequential(Encoder())
        condattn.condition(model, "ct")
        x = torch.randn(1, 5, 8)
        with pytest.raises(RuntimeError, match=r"^0 \(Encoder\) did not call blocks.0 in its forward.* for its tokens"):
            model(x)
        model[0].calls = True
        torch.testing.assert_close(model(x), model[0].blocks[0].forward(by_hand(x).float()), rtol=1e-4, atol=1e-5)
        assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
        assert condattn.remove(model) == 1
        condattn.condition(model, "ct")
        assert model[0]._forward_hooks
        condattn.remove(model)
        assert not any((*one._forward_hooks, *one._forward_pre_hooks) for one in model.modules())


def test_rules_of_users():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, batch_first=True)])

        def forward(self, x):
            return self.blocks[0](src=x)

    name = f"{Encoder.__module__}.{Encoder.__qualname__}"
    with registrations_undone():
        condattn.register_token_rule(name, lambda m: dict(module=m.blocks[0]))
        with pytest.raises(ValueError, match="has a rule for its tokens already"):
            condattn.register_token_rule(name, dict)
        model = nn.Sequential(Encoder()).eval()
        x = torch.randn(1, 5, 8)
        wanted = model[0].blocks[0](by_hand(x).float())
        assert condattn.condition(model, "ct").elsewhere == ("0.blocks.0",)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert "timm.models.xcit.Xcit" in known_token_rules()


@pytest.mark.parametrize(
    "describe, message",
    [
        (lambda m: dict(module=nn.Identity()), "TypeError: expected a module in it"),
        (lambda m: dict(module=m.block, layout="rows"), "TypeError: expected a module in it, and a layout out of"),
        (lambda m: dict(block=m.block), "KeyError: 'module'"),
        (lambda m: dict(module=m.block, masks=""), "TypeError: .*unexpected keyword argument 'masks'"),
        (lambda m: dict(module=m.blocks[0]), "AttributeError: .*no attribute 'blocks'"),
        (lambda m: None, "TypeError: 'NoneType' object is not subscriptable"),
    ],
)
def test_rules_that_are_wrong(describe, message):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Identity()

    with registrations_undone():
        condattn.register_token_rule(f"{Encoder.__module__}.{Encoder.__qualname__}", describe)
        with pytest.raises(ValueError, match=f"the rule for the tokens of .*Encoder is wrong: {message}.*; expected a"):
            find_token_entries(Encoder())


def test_rules_for_classes_that_are_not_named_fully():
    with pytest.raises(ValueError, match="expected the module and name of a class as text"):
        condattn.register_token_rule("Encoder", dict)


@pytest.mark.parametrize("settings", [dict(form="qr"), dict(iterations=0), dict(iterations=1.5), dict(detach=1)])
def test_settings_that_are_none(settings):
    with pytest.raises(ValueError, match="EmbeddedTokens: (form|iterations|detach) is .*; expected"):
        EmbeddedTokens(**settings)


@pytest.mark.parametrize("theirs, same", [("ct(detach=False)", True), ("ct(form='newton_schulz')", False)])
def test_checkpoints_fit_models_that_differ_in_gradients_alone(theirs, same):
    records = []
    for conditioning in ("ct", theirs):
        model = MODELS["vit"]()
        condattn.condition(model, conditioning)
        records.append(condattn.conditioning_of(model)["blocks.0"])
    assert records[0] != records[1] and same_conditioning(*records) == same


def test_patterns_that_leave_no_model_with_tokens():
    model = nn.ModuleDict({"vit": MODELS["vit"](), "other": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="include and exclude leave no model whose embedded tokens"):
        condattn.condition(model, "ct", include="other")
