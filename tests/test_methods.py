"""Every supported attention class, conditioned, compared with the formulas of ``hosts.py`` in float64."""

import importlib

import numpy as np
import pytest
import torch
from hosts import EMBED, HEADS, HOSTS
from torch import nn

import condattn
from condattn import ConditionedInitialization, EmbeddedTokens, RowPreconditioner, SpectralCorrection

pytestmark = pytest.mark.usefixtures("float64")

CLOSE = dict(rtol=0, atol=1e-10)
GENTLE = SpectralCorrection(1.0)


def rows_over_norm(rows, eps=1e-6):
    return rows / rows.square().sum(-1, keepdim=True).sqrt().clamp_min(eps)


def rows_over_constant(rows):
    return rows / rows.detach().square().sum(-1, keepdim=True).sqrt()


def constant(weight, form, layout, strength, relative):
    """C for the projection ``weight`` (embed, in features), block by block with numpy's linear algebra."""
    blocks = weight.detach().split(EMBED // HEADS if layout == "per_head" else EMBED)
    parts = []
    for block in blocks:
        u, s, vh = (torch.as_tensor(a) for a in np.linalg.svd(block.numpy(), full_matrices=False))
        size = strength * (s.max() if relative else 1.0)
        parts.append(size * (u @ vh if form == "svd" else torch.eye(*block.shape)))
    return torch.cat(parts)


@pytest.fixture(params=HOSTS)
def host(request):
    host = HOSTS[request.param]
    importlib.import_module(host.needs)
    return host


def values_and_gradients(run, module, x):
    """The output, and the gradients of a fixed random function of it for all parameters and inputs."""
    leaves = [*module.parameters(), *dict.fromkeys(x)]
    output = run()
    torch.manual_seed(1)
    return output, torch.autograd.grad((output * torch.randn(output.shape)).sum(), leaves)


def agree(host, module, conditioned, batch, masked, **formula):
    x = host.inputs(batch)
    for t in x:
        t.requires_grad_()
    mask = host.mask(batch) if masked else None
    got, got_gradients = values_and_gradients(lambda: host.call(conditioned, x, mask), conditioned, x)
    want, want_gradients = values_and_gradients(
        lambda: host.describe(module, x, mask).compute(HEADS, **formula), module, x
    )
    torch.testing.assert_close(got, want, **CLOSE)
    for g, w in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(g, w, **CLOSE)


def build(host, conditioning):
    """Build an unconditioned module, and a conditioned one with the same weights."""
    module, conditioned = host.build(), host.build()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    report = condattn.condition(conditioned, conditioning)
    assert len(report.conditioned) == 1
    conditioned.load_state_dict(module.state_dict())
    return module, conditioned


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("batch", [1, 3])
class TestAgainstFormulas:
    def test_unconditioned(self, host, batch, masked):
        module, untouched = build_none(host)
        agree(host, module, untouched, batch, masked)

    def test_preconditioned(self, host, batch, masked):
        module, conditioned = build(host, "pc")
        agree(host, module, conditioned, batch, masked, precondition=rows_over_norm)

    def test_preconditioned_detached(self, host, batch, masked):
        module, conditioned = build(host, RowPreconditioner(detach=True))
        agree(host, module, conditioned, batch, masked, precondition=rows_over_constant)

    @pytest.mark.parametrize("form", ["identity", "svd"])
    @pytest.mark.parametrize("layout", ["fused", "per_head"])
    @pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
    def test_corrected(self, host, batch, masked, form, layout, relative):
        method = SpectralCorrection(1.5, relative=relative, layout=layout, form=form)
        module, conditioned = build(host, method)
        w = host.describe(module, host.inputs(1), None).w
        corrections = tuple(constant(m, form, layout, 1.5, relative) for m in w)
        agree(host, module, conditioned, batch, masked, corrections=corrections)

    def test_corrected_and_preconditioned(self, host, batch, masked):
        module, conditioned = build(host, ["pc", SpectralCorrection(dict(q=0.5, v=2.0), targets=("q", "v"))])
        w = host.describe(module, host.inputs(1), None).w
        corrections = (torch.eye(*w[0].shape) * 0.5, 0.0, torch.eye(*w[2].shape) * 2.0)
        agree(host, module, conditioned, batch, masked, precondition=rows_over_norm, corrections=corrections)


def describe(module: nn.Module) -> list:
    """Classes, names of attributes, and numbers of hooks of every module in ``module``."""
    return [
        (name, type(one), sorted(vars(one)), len(one._forward_hooks), len(one._forward_pre_hooks))
        for name, one in module.named_modules()
    ]


@pytest.mark.parametrize("run", [False, True], ids=["", "after a forward"])
@pytest.mark.parametrize(
    "conditioning", ["pc", "sc", SpectralCorrection(form="svd"), "sc+pc"], ids=["pc", "sc", "svd", "sc+pc"]
)
def test_removed(host, conditioning, run):
    """After ``remove``, classes, attributes, hooks and keys are upstream's, and the weights are unchanged."""
    module, conditioned = build(host, conditioning)
    before = describe(module)
    x = host.inputs(2)
    if run:
        host.call(conditioned, x, None)
    assert condattn.remove(conditioned) == 1
    assert describe(conditioned) == before
    assert list(conditioned.state_dict()) == list(module.state_dict())
    assert not any(condattn.conditioning_of(conditioned).values())
    torch.testing.assert_close(host.call(conditioned, x, None), host.call(module, x, None), rtol=0, atol=0)
    assert condattn.remove(conditioned) == 0
    condattn.condition(conditioned, conditioning)


@pytest.mark.parametrize("conditioning", ["pc", GENTLE, [GENTLE, "pc"]], ids=["pc", "sc", "sc+pc"])
class TestModes:
    def test_eval_agrees_with_train(self, host, conditioning):
        _, conditioned = build(host, conditioning)
        x, mask = host.inputs(2), host.mask(2)
        with torch.no_grad():
            trained = host.call(conditioned.train(), x, mask)
            evaluated = host.call(conditioned.eval(), x, mask)
        torch.testing.assert_close(evaluated, trained, **CLOSE)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
    def test_fold(self, host, conditioning, dtype, tolerance):
        conditioned = build(host, conditioning)[1].to(dtype)
        x = tuple(t.to(dtype) for t in host.inputs(2))
        x = x if host.cross else (x[0],) * 3
        want = host.call(conditioned, x, None)
        assert condattn.fold(conditioned) == (conditioning != "pc")
        torch.testing.assert_close(host.call(conditioned, x, None), want, rtol=0, atol=tolerance)

    def test_autocast(self, host, conditioning):
        """In bf16, errors of values are at most twice those of the unconditioned module, and gradients are close."""
        module, conditioned = build(host, conditioning)
        x = tuple(t.float() for t in host.inputs(2))
        x = x if host.cross else (x[0],) * 3
        errors = []
        for m in (module.float(), conditioned.float()):
            want, want_gradients = values_and_gradients(lambda m=m: host.call(m, x, None), m, ())
            with torch.autocast("cpu", torch.bfloat16):
                got, got_gradients = values_and_gradients(lambda m=m: host.call(m, x, None).float(), m, ())
            # The median over tokens, because rows that nearly cancel out have large relative errors.
            errors.append(((got - want).norm(dim=-1) / want.norm(dim=-1)).median().item())
        assert errors[1] <= 2 * errors[0]
        got_gradients, want_gradients = (nn.utils.parameters_to_vector(g) for g in (got_gradients, want_gradients))
        assert (got_gradients - want_gradients).norm() <= 0.2 * want_gradients.norm()


def build_none(host):
    module, untouched = host.build(), host.build()
    classes = [type(m) for m in untouched.modules()]
    assert condattn.condition(untouched, "none").conditioned == ()
    assert [type(m) for m in untouched.modules()] == classes
    untouched.load_state_dict(module.state_dict())
    return module, untouched


def test_literal_defaults():
    assert SpectralCorrection().to_dict() == dict(
        type="SpectralCorrection", strength=10.0, relative=False, targets=("q", "k", "v"), layout="fused",
        form="identity",
    )  # fmt: skip
    exact = SpectralCorrection(form="svd")
    assert (exact.strength, exact.relative) == (1.0, True)
    assert RowPreconditioner().to_dict() == dict(
        type="RowPreconditioner", eps=1e-6, detach=False, cross_covariance="channels"
    )
    assert EmbeddedTokens().to_dict() == dict(type="EmbeddedTokens", form="svd", detach=True, iterations=12)
    assert ConditionedInitialization().to_dict() == dict(type="ConditionedInitialization", layout="fused")
