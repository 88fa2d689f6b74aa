"""Every known attention class in a real model, compared with the unconditioned model."""

import copy
import importlib
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from attention_taps import HeadTap
from torch import nn

import condattn
from condattn import SpectralCorrection
from condattn.attention import rules as sites
from condattn.attention.classes import qualified_name
from condattn.spectra.capture import capture

ZOO = []
for library, zoo, names in (
    ("timm", "zoo_timm", "NAMES"),
    ("torchvision", "zoo_torchvision", "MODELS"),
    ("mmpretrain", "zoo_openmmlab", "NAMES"),
    ("transformers", "zoo_transformers", "MODELS"),
):
    if importlib.util.find_spec(library):
        ZOO += [(zoo, name) for name in getattr(importlib.import_module(zoo), names)]

# Head outputs of these classes are not just map times values; they are checked at the module that receives them.
# Class -> the number of heads of each of its modules in a model, the name of the receiving one in it, and its axis.
MORE_THAN_A_PRODUCT = {
    "dnl_head.DisentangledNonLocal2d": ((1,), "conv_out.conv", 1),
    "coat.FactorAttnConvRelPosEnc": ((8,) * 8, "proj", -1),
    "efficientformer_v2.Attention2d": ((8,) * 4, "upsample or act", 1),
    "efficientformer_v2.Attention2dDownsample": ((8,), "act", 1),
    "efficientvit_mit.LiteMLA": ((8, 8, 16, 16), "proj", 1),
    "efficientvit_msra.CascadedGroupAttention": ((4,) * 6, "proj", 1),
    "mvitv2.MultiScaleAttention": ((1, 2, 2, 4, 4, 4, 4, 4, 8, 8), "proj", -1),
    "multi_scale_deform_attn.MultiScaleDeformableAttention": ((3,), "output_proj", -1),
    "mvit.MultiScaleAttention": ((1, 2, 4, 8), "proj", -1),
    "modeling_nystromformer.NystromformerAttention": ((3, 3), "output.dense", -1),
    "volo.OutlookAttention": ((6,) * 4, "proj", -1),
}
# Classes that change the map after the softmax.
MIXED = ("cait.TalkingHeadAttn", "convit.GPSA", ".DiffAttention", ".DiffParallelScalingBlock")
# Where embedded tokens enter the first block, in which layout, and of which models; others are refused.
TOKENS = {
    "zoo_timm": {
        ("blocks.0", "tokens"): (
            *("beit", "beit: without biases", "deit", "eva", "eva: unfused", "vitamin", "xcit", "vision_transformer"),
            *("vision_transformer: differential", "vision_transformer: gated", "vision_transformer: latent pool"),
            *("vision_transformer: parallel", "vision_transformer: differential and parallel"),
            "vision_transformer_hybrid",
        ),
        ("stages.0.blocks.0", "channels_first"): ("davit",),
        ("layers.0.blocks.0", "channels_last"): (
            *("swin_transformer", "swin_transformer_v2", "swin_transformer_v2: without biases"),
        ),
    },
    "zoo_torchvision": {},
    "zoo_openmmlab": {
        ("stages.0.blocks.0", "tokens"): (
            *("mmdet SwinTransformer", "mmseg SwinTransformer", "mmpretrain SwinTransformer"),
            *("mmpretrain SwinTransformerV2", "mmpretrain DaViT"),
        ),
        ("layers.0", "tokens"): (
            *("mmseg VisionTransformer", "mmseg BEiT", "mmseg MAE", "mmpretrain VisionTransformer"),
            *("mmpretrain DistilledVisionTransformer", "mmpretrain BEiTViT", "mmpretrain ViTEVA02"),
        ),
        ("xca_layers.0", "tokens"): ("mmpretrain XCiT",),
    },
    "zoo_transformers": {
        ("encoder.layer.0", "tokens"): ("BERT", "RoBERTa", "Nystromformer"),
        ("encoder.layer.0 or layers.0", "tokens"): ("ViT", "DeiT"),  # up to version 4, and from 5 on
    },
}
CAUSAL = ("GPT-2", "GPT-2 with cross attention", "Llama", "Mistral", "Qwen2")
# Classes that rotate or normalise queries and keys before their product.
TURNED = (
    *("attention.AttentionRope", "attention_pool2d.RotAttentionPool2d", "modeling_qwen2.Qwen2Attention"),
    *("swin_transformer_v2_cr.WindowMultiHeadAttention", "vit_eva02.AttentionWithRoPE"),
)
NO_PC = ("iformer.SHMA",)
NO_SC = ("efficientvit_msra.CascadedGroupAttention", "attention_pool.AttentionPoolPrr")


def is_one_of(site, names):
    return qualified_name(type(site.module)).endswith(tuple(names))


@pytest.fixture(scope="module", params=ZOO, ids=lambda entry: f"{entry[0].removeprefix('zoo_')}: {entry[1]}")
def family(request):
    """A model in float64, with weights for which every branch has an effect, and a function that runs it."""
    zoo, name = request.param
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, forward = importlib.import_module(zoo).build(name)
    for parameter in model.parameters():
        if parameter.ndim < 2 or not parameter.any():  # layer scales near zero, norms and heads that start at zero
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.double()
    model.eval()
    yield model, forward
    torch.backends.mha.set_fastpath_enabled(True)


def run(model, forward):
    with torch.no_grad():
        return forward(model)


def outputs_and_gradients(model, forward):
    """The outputs, and the gradient of each parameter of the mean of their squares."""
    model.zero_grad()
    outputs = forward(model)
    if outputs.requires_grad:
        outputs.square().mean().backward()
    return outputs.detach(), [p.grad for p in model.parameters()]


def check_equal(conditioned, want, forward):
    """Compare a conditioned model with expected outputs and gradients."""
    outputs, gradients = outputs_and_gradients(conditioned, forward)
    close(outputs, want[0])
    assert [one is None for one in gradients] == [one is None for one in want[1]]
    for got, expected in zip(gradients, want[1], strict=True):
        if got is not None and got.numel():
            close(got, expected)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * max(1.0, want.abs().max().item()))


def unit_rows(x, dim):
    return x / x.square().sum(dim, keepdim=True).clamp_min(1e-12).sqrt()  # the derivative at zero is finite


def unit_heads(x, heads, axis):
    """Normalise the rows of each head along ``axis``, by an independent formula."""
    return torch.cat([unit_rows(part, axis) for part in x.chunk(heads, dim=axis)], dim=axis)


def test_every_site_is_known(family):
    model, _ = family
    assert condattn.find_sites(model)
    assert all(one.reason for one in sites.find_unsupported(model))


def test_preconditioned(family):
    """All sites at once, compared with the unconditioned model under ``HeadTap``, which knows none of its classes."""
    model, forward = copy.deepcopy(family[0]), family[1]  # some models keep parts of a graph, which cannot be copied
    chosen = [site for site in condattn.find_sites(model) if not is_one_of(site, NO_PC)]
    if not chosen:
        with pytest.raises(ValueError, match="head outputs cannot be conditioned: a gate multiplies"):
            condattn.condition(copy.deepcopy(model), "pc")
        return
    conditioned = copy.deepcopy(model)
    condattn.condition(conditioned, "pc", include=[site.name for site in chosen])

    plain = [site for site in chosen if not is_one_of(site, MORE_THAN_A_PRODUCT)]
    between_tokens = [site.module for site in plain if not site.cross_covariance]
    between_channels = [site.module for site in plain if site.cross_covariance]
    handles, numbers = [], {name: iter(heads) for name, (heads, _, _) in MORE_THAN_A_PRODUCT.items()}
    for site in chosen:
        if site not in plain:
            (name,) = (name for name in MORE_THAN_A_PRODUCT if is_one_of(site, (name,)))
            _, paths, axis = MORE_THAN_A_PRODUCT[name]
            heads, inside = next(numbers[name]), dict(site.module.named_modules())
            receiving = next(inside[path] for path in paths.split(" or ") if path in inside)
            assert (site.heads_of(site.out), site.out.owner, site.out.axis) == (heads, receiving, axis), site

            def hook(module, args, heads=heads, axis=axis):
                return (unit_heads(args[0], heads, axis), *args[1:])

            handles.append(receiving.register_forward_pre_hook(hook))
    with (
        HeadTap(lambda _, heads, dim: unit_rows(heads, dim), between_tokens),
        HeadTap(lambda _, heads, dim: unit_rows(heads, -3 - dim), between_channels),
    ):
        want = outputs_and_gradients(model, forward)
    for handle in handles:
        handle.remove()
    assert not torch.equal(want[0], run(model, forward))
    check_equal(conditioned, want, forward)


def add_correction(module, args, kwargs, layout="tokens", masked=False):
    """X + C for the first argument, by NumPy; ``masked`` leaves out the padding of zoo_transformers.py."""
    name = None if args else next(iter(kwargs))
    x = args[0] if args else kwargs[name]
    tokens = x.movedim(1, -1).flatten(1, -2) if layout == "channels_first" else x.flatten(1, -2)
    if masked:
        tokens = tokens.clone()
        tokens[1, 5:] = 0
    u, s, vh = np.linalg.svd(tokens.detach().numpy(), full_matrices=False)
    kept = s > s[:, :1] * 1e-12
    c = torch.from_numpy(s[:, :1, None] * (u * kept[:, None, :]) @ vh)
    c = c.mT.reshape(x.shape) if layout == "channels_first" else c.reshape(x.shape)
    return ((x + c, *args[1:]), kwargs) if args else (args, {**kwargs, name: x + c})


def test_embedded_tokens(family, request):
    """Where a rule says that they enter the first block; other models, and causal ones, are refused in one line."""
    model, forward = family
    zoo, name = request.node.callspec.params["family"]
    conditioned = copy.deepcopy(model)
    expected = [place for place, names in TOKENS[zoo].items() if name in names]
    if not expected:
        reason = "each token sees only those before it" if name in CAUSAL else "no rule says where the embedded tokens"
        with pytest.raises(ValueError, match=rf"\A.*{reason}.*\Z"):  # one line
            condattn.condition(conditioned, "ct")
        assert [type(m) for m in conditioned.modules()] == [type(m) for m in model.modules()]
        return
    report = condattn.condition(conditioned, "ct")
    other = copy.deepcopy(model)
    ((places, layout),) = expected
    (place,) = set(places.split(" or ")) & dict(other.named_modules()).keys()
    assert report.elsewhere == (place,)
    masked = zoo == "zoo_transformers" and "attention_mask" in forward.keywords["inputs"]
    hook = partial(add_correction, layout=layout, masked=masked)
    other.get_submodule(place).register_forward_pre_hook(hook, with_kwargs=True)
    want = run(other, forward)
    assert not torch.equal(want, run(model, forward))
    close(run(conditioned, forward), want)


def test_initialised(family):
    """Queries and keys of each head orthogonal, values rows of the identity in turn, and nothing else changed."""
    model, forward = family
    conditioned = copy.deepcopy(model)
    chosen = [site for site in condattn.find_sites(model) if site.q or site.k or site.v]
    if not chosen:
        with pytest.raises(ValueError, match="has no projection of its own to initialise"):
            condattn.condition(conditioned, "ci")
        return
    condattn.condition(conditioned, "ci", include=[site.name for site in chosen])
    changed = set()
    for site in condattn.find_sites(conditioned):
        for name in "qkv":
            projection = getattr(site, name)
            if projection is None or site.name not in {one.name for one in chosen}:
                continue
            changed.add(id(getattr(projection.owner, projection.parameter)))
            weight = projection.weight
            if name == "v":
                size, columns = len(weight) // site.heads_of(projection), weight.shape[1]
                wanted = torch.zeros_like(weight)
                for row in range(len(weight)):
                    wanted[row, row % columns] = row % size < columns
                assert torch.equal(weight, wanted)
                continue
            for head in weight.chunk(site.heads_of(projection)):
                gram = head @ head.T if len(head) <= head.shape[1] else head.T @ head
                close(gram, torch.eye(len(gram), dtype=weight.dtype))
    for one, other in zip(model.parameters(), conditioned.parameters(), strict=True):
        assert id(other) in changed or torch.equal(one, other)
    assert run(conditioned, forward).isfinite().all()


def test_corrected(family):
    """All sites at once, compared with the model with weights W + C."""
    model, forward = family
    chosen = [site.name for site in condattn.find_sites(model) if not is_one_of(site, NO_SC)]
    if not chosen:
        with pytest.raises(ValueError, match="has no projection of its own for q, k, v"):
            condattn.condition(copy.deepcopy(model), "sc")
        return
    conditioned, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    report = condattn.condition(conditioned, SpectralCorrection(1.0), include=chosen)
    assert len(report.conditioned) == len(chosen)
    for site in condattn.find_sites(by_hand):
        for projection in filter(None, (site.q, site.k, site.v)):
            weight = getattr(projection.owner, projection.parameter).detach()
            weight = weight.T if type(projection.owner).__name__ == "Conv1D" else weight.flatten(1)
            rows = [row for part in projection.rows for row in range(part.start, part.stop)]
            for i in range(min(len(rows), weight.shape[1])):
                weight[rows[i], i] += 1.0
    want = outputs_and_gradients(by_hand, forward)
    assert not torch.equal(want[0], run(model, forward))
    check_equal(conditioned, want, forward)
    parameters = [*map(id, conditioned.parameters())]
    condattn.fold(conditioned)
    assert [*map(id, conditioned.parameters())] == parameters
    close(run(conditioned, forward), want[0])
    assert [type(m) for m in conditioned.modules()] == [type(m) for m in model.modules()]


def firsts(model):
    """The first site of each class."""
    found = {}
    for site in condattn.find_sites(model):
        found.setdefault(type(site.module), site)
    return found.values()


def test_queries_and_keys_make_the_map_and_values_do_not(family):
    model, forward = family
    for site in firsts(model):
        if is_one_of(site, MORE_THAN_A_PRODUCT):
            continue
        seen = {}
        for target in ("none", *(name for name in "qkv" if getattr(site, name) is not None)):
            other = copy.deepcopy(model)
            if target != "none":
                method = SpectralCorrection(0.1, targets=(target,))
                condattn.condition(other, method, include=[site.name] if site.name else None)
            maps, outputs = [], []
            record = lambda m, heads, _, maps=maps, outputs=outputs: (maps.append(m), outputs.append(heads), heads)[2]  # noqa: E731
            with HeadTap(record, [other.get_submodule(site.name)]):
                run(other, forward)
            seen[target] = maps[0].clone(), outputs[0].clone()
        for target in seen.keys() - {"none"}:
            moved = [(a - b).abs().max() > 1e-9 for a, b in zip(seen[target], seen["none"], strict=True)]
            assert moved == [target != "v", True], (site, target)


def change_by_bias(model, forward, site, part):
    """How much a constant that is added to the bias of a projection changes the map of a site; None without a bias."""
    other = copy.deepcopy(model)
    (there,) = (one for one in condattn.find_sites(other) if one.name == site.name)
    projection = getattr(there, part)
    owner = None if projection is None else projection.owner
    bias = getattr(owner, "in_proj_bias" if isinstance(owner, nn.MultiheadAttention) else "bias", None)
    if bias is None:
        return None
    maps = []
    for constant in (0.0, 1.0):
        for rows in projection.rows:
            bias.data[rows] += constant
        with HeadTap(lambda m, heads, _: (maps.append(m.clone()), heads)[1], [other.get_submodule(site.name)]):
            run(other, forward)
    return (maps[len(maps) // 2] - maps[0]).abs().max().item()


def test_queries_are_not_taken_for_keys(family):
    """A constant that is added to all keys changes no softmax, one that is added to all queries does."""
    model, forward = family
    for site in firsts(model):
        if is_one_of(site, (*MORE_THAN_A_PRODUCT, *TURNED)) or site.cross_covariance:
            continue
        queries, keys = (change_by_bias(model, forward, site, part) for part in "qk")
        if queries and keys is not None:
            assert keys < 0.01 * queries, (site, queries, keys)  # a softmax in single precision has errors


def test_maps_and_head_outputs_are_seen(family):
    """``capture`` finds the same maps and head outputs as ``HeadTap``, which knows none of the classes."""
    model, forward = family
    for site in firsts(model):
        if is_one_of(site, MORE_THAN_A_PRODUCT):
            continue
        shown, seen = [], []
        record = lambda m, heads, dim, shown=shown: (shown.append((m, heads, dim)), heads)[1]  # noqa: E731
        with HeadTap(record, [site.module]):
            run(model, forward)
        with capture([site], lambda _, one, seen=seen: seen.append(one)):
            run(model, forward)
        if is_one_of(site, MIXED):
            assert seen[0].map is None, site
            continue
        weights, heads, dim = shown[0]
        heads = heads if (dim == -1) != site.cross_covariance else heads.mT
        weights = weights if dim == -1 or site.cross_covariance else weights.mT
        assert seen[0].map is not None, site
        close(seen[0].map.flatten().sort()[0], weights.flatten().sort()[0])
        close(seen[0].map.flatten(0, -3).sum(0), weights.flatten(0, -3).sum(0))
        assert seen[0].outputs.shape[-2:] == heads.shape[-2:], site
        close(seen[0].outputs.flatten().sort()[0], heads.flatten().sort()[0])
        close(seen[0].outputs.flatten(0, -3).sum(0), heads.flatten(0, -3).sum(0))


def test_trains_copies_and_keeps_its_keys(family):
    model, forward = family
    conditioned = copy.deepcopy(model)
    conditioned.train()
    parameters = [*map(id, conditioned.parameters())]
    for method, barred in (("pc", NO_PC), (SpectralCorrection(1.0), NO_SC)):
        chosen = [site.name for site in condattn.find_sites(model) if not is_one_of(site, barred)]
        if chosen:
            condattn.condition(conditioned, method, include=chosen)
    assert list(conditioned.state_dict()) == list(model.state_dict())
    assert [*map(id, conditioned.parameters())] == parameters  # an optimizer that was made before trains them
    if list(conditioned.parameters()):
        forward(conditioned).square().mean().backward()
    gradients = [
        getattr(projection.owner, projection.parameter).grad
        for site in condattn.find_sites(conditioned)
        for projection in filter(None, (site.q, site.k, site.v))
    ]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == bool(gradients)
    other = copy.deepcopy(conditioned)
    missing, unexpected = other.load_state_dict(conditioned.state_dict(), strict=False)
    assert not unexpected and not set(missing) & {name for name, _ in other.named_parameters()}
    for m in (other, conditioned):
        m.eval()  # not chained: eval() of some models does not return the model
    assert torch.equal(run(other, forward), run(conditioned, forward))
    assert condattn.conditioning_of(other) == condattn.conditioning_of(conditioned)
    condattn.remove(other)
    condattn.remove(conditioned)
    assert [*map(id, conditioned.parameters())] == parameters
    assert [type(one) for one in other.modules()] == [type(one) for one in model.modules()]
    assert not any(condattn.conditioning_of(other).values())
