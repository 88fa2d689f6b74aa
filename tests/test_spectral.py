"""Spectral corrections: their guarantees, when the constants are fixed, and what a checkpoint contains."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import condattn
from condattn import SpectralCorrection
from condattn.layers.correction import Block, BlockCorrection, CorrectedModule

EXACT = SpectralCorrection(form="svd")
RELATIVE = SpectralCorrection(3.0, relative=True)


def attention(method, seed=0):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(12, 3, batch_first=True)
    condattn.condition(module, method)
    return module


def run(module, x=None):
    x = torch.linspace(-1, 1, 5 * 12).reshape(1, 5, 12) if x is None else x
    return module(x, x, x, need_weights=False)[0]


def kappa(matrix):
    s = torch.linalg.svdvals(matrix)
    return (s[0] / s[-1]).item()


def corrected(weight, correction):
    class Layer(CorrectedModule, nn.Linear):
        pass

    layer = Layer(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    layer.add_correction("weight", correction)
    return layer.effective_weight().detach()


matrices = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31 - 1))


@settings(deadline=None, max_examples=100)
@given(matrices)
def test_exact_form_has_kappa_at_most_two(shape):
    """Thm 3.5 of arXiv 2603.07162."""
    rows, columns, seed = shape
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    got = corrected(weight, BlockCorrection((Block((slice(0, rows),), 1.0),), relative=True, svd=True))
    assert kappa(got) <= 2 + 1e-9


@settings(deadline=None, max_examples=100)
@given(matrices, st.floats(1.01, 50.0))
def test_relative_identity_meets_its_guarantee(shape, strength):
    """lambda > ||W||_2 implies kappa(W + lambda I) <= (lambda + ||W||_2) / (lambda - ||W||_2)."""
    rows, columns, seed = shape
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    got = corrected(weight, BlockCorrection((Block((slice(0, rows),), strength),), relative=True, svd=False))
    assert kappa(got) <= (strength + 1) / (strength - 1) * (1 + 1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.floats(-20, 20, allow_subnormal=False))
def test_identity_is_laid_block_by_block(blocks, rows, columns, strength):
    weight = torch.zeros(blocks * rows, columns, dtype=torch.float64)
    layout = tuple(Block((slice(i * rows, (i + 1) * rows),), strength) for i in range(blocks))
    got = corrected(weight, BlockCorrection(layout, relative=False, svd=False))
    want = torch.cat([strength * torch.eye(rows, columns, dtype=torch.float64)] * blocks)
    assert torch.equal(got, want)


def test_absolute_identity_of_a_model_built_on_the_meta_device():
    with torch.device("meta"):
        module = attention("sc")
    module.load_state_dict(attention("none").state_dict(), assign=True)
    assert torch.equal(run(module), run(attention("sc")))


@pytest.mark.parametrize("method", ["sc", EXACT, RELATIVE], ids=str)
def test_a_model_built_on_the_meta_device_that_is_initialised(method):
    with torch.device("meta"):
        module = attention(method)
    module.to_empty(device="cpu")
    weights = nn.MultiheadAttention(12, 3, batch_first=True)
    for parameter, value in zip(module.parameters(), weights.parameters(), strict=True):
        nn.init.zeros_(parameter).data.add_(value)
    condattn.condition(weights, method)
    assert torch.equal(run(module), run(weights))


def test_absolute_identity_adds_no_key():
    assert set(attention("sc").state_dict()) == set(nn.MultiheadAttention(12, 3).state_dict())


@pytest.mark.parametrize("method", [EXACT, RELATIVE], ids=["svd", "relative"])
class TestConstantsOfTheWeights:
    def test_reinitialising_before_the_first_forward_counts(self, method):
        module = attention(method)
        module._reset_parameters()
        fresh = nn.MultiheadAttention(12, 3, batch_first=True)
        fresh.load_state_dict(module.state_dict(), strict=False)
        condattn.condition(fresh, method)
        assert torch.equal(run(module), run(fresh))

    def test_training_does_not_move_them(self, method):
        module = attention(method)
        run(module)
        before = module.in_proj_weight_correction.clone()
        assert before.isfinite().all()
        with torch.no_grad():
            module.in_proj_weight.mul_(5.0)
        run(module)
        assert torch.equal(module.in_proj_weight_correction, before)

    def test_a_resumed_run_has_the_same_ones(self, method):
        module = attention(method)
        run(module)
        with torch.no_grad():
            module.in_proj_weight.add_(0.1)
        resumed = attention(method, seed=1)
        resumed.load_state_dict(module.state_dict())
        assert torch.equal(run(resumed), run(module))

    def test_a_checkpoint_before_the_first_forward_leaves_them_open(self, method):
        module = attention(method)
        state = copy.deepcopy(module.state_dict())
        other = attention(method, seed=1)
        run(other)
        other.load_state_dict(state)
        assert torch.equal(run(other), run(module))
        assert torch.equal(other.in_proj_weight_correction, module.in_proj_weight_correction)

    def test_the_state_dict_is_the_module_itself(self, method):
        """A moving average that keeps a state dict expects that it shares memory with the module."""
        module = attention(method)
        state = module.state_dict()
        run(module)
        assert torch.equal(state["in_proj_weight_correction"], module.in_proj_weight_correction)

    def test_weights_that_are_loaded_leave_it_so(self, method):
        """Those of a model without corrections, from which they are computed anew."""
        module = attention(method)
        run(module)
        state = module.state_dict()
        module.load_state_dict(attention("none", seed=1).state_dict())
        run(module)
        assert torch.equal(state["in_proj_weight_correction"], module.in_proj_weight_correction)

    @pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "and-buffers"])
    def test_a_moving_average_has_the_same_ones(self, method, update_buffers):
        averaging = pytest.importorskip("mmengine.model").ExponentialMovingAverage
        module = attention(method)
        average = averaging(module, momentum=0.5, update_buffers=update_buffers)
        for _ in range(3):
            run(module)
            with torch.no_grad():
                module.in_proj_weight.mul_(1.1)
            average.update_parameters(module)
        want = run(module)
        for mine, averages in zip(module.state_dict().values(), average.module.state_dict().values(), strict=True):
            assert mine.isfinite().all()
            if update_buffers:
                assert averages.isfinite().all()
        run(average.module)
        assert torch.equal(run(module), want)
        if update_buffers:
            torch.testing.assert_close(
                average.module.in_proj_weight_correction, module.in_proj_weight_correction, rtol=1e-6, atol=1e-7
            )

    @pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
    def test_a_moving_average_of_timm_has_the_same_ones(self, method, kind):
        """It is copied before the first forward, and averages what it finds in the state dict of the copy."""
        averaging = getattr(pytest.importorskip("timm.utils"), kind)
        module = attention(method)
        average = averaging(module, decay=0.5)
        for _ in range(3):
            run(module)
            with torch.no_grad():
                module.in_proj_weight.mul_(1.1)
            average.update(module)
        assert not torch.equal(average.module.in_proj_weight, module.in_proj_weight)
        run(average.module)
        torch.testing.assert_close(
            average.module.in_proj_weight_correction, module.in_proj_weight_correction, rtol=1e-6, atol=1e-7
        )

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_a_copy_does_not_fix_those_of_the_original(self, method, copied):
        module = attention(method)
        other = copied(module)
        before = copy.deepcopy(module)
        with torch.no_grad():
            module.in_proj_weight.mul_(2.0)
            other.in_proj_weight.mul_(3.0)
        run(module), run(other), run(before)
        torch.testing.assert_close(module.in_proj_weight_correction, 2 * before.in_proj_weight_correction)
        assert torch.equal(other.in_proj_weight_correction, before.in_proj_weight_correction)

    def test_a_copy_on_the_meta_device(self, method):
        with torch.device("meta"):
            module = copy.deepcopy(attention(method))
        module.to_empty(device="cpu").load_state_dict(attention(method).state_dict())
        assert torch.equal(run(module), run(attention(method)))

    def test_a_vanilla_checkpoint_starts_over_from_its_weights(self, method):
        torch.manual_seed(3)
        vanilla = nn.MultiheadAttention(12, 3, batch_first=True)
        module = attention(method)
        run(module)
        module.load_state_dict(vanilla.state_dict())
        want = copy.deepcopy(vanilla)
        condattn.condition(want, method)
        assert torch.equal(run(module), run(want))

    @pytest.mark.parametrize("assign", [False, True], ids=["", "assign"])
    def test_a_model_built_on_the_meta_device(self, method, assign):
        torch.manual_seed(3)
        weights = nn.MultiheadAttention(12, 3, batch_first=True)
        with torch.device("meta"):
            module = attention(method)
        if not assign:
            module.to_empty(device="cpu")
        module.load_state_dict(weights.state_dict(), assign=assign)
        condattn.condition(weights, method)
        assert torch.equal(run(module), run(weights))

    @pytest.mark.parametrize("assign", [False, True], ids=["", "assign"])
    @pytest.mark.parametrize("settled", [False, True], ids=["open", "fixed"])
    def test_a_model_built_on_the_meta_device_loads_its_own_checkpoint(self, method, assign, settled):
        saved = attention(method, seed=3)
        if settled:
            run(saved)
            with torch.no_grad():
                saved.in_proj_weight.mul_(5.0)
        with torch.device("meta"):
            module = attention(method)
        if not assign:
            module.to_empty(device="cpu")
        module.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
        assert torch.equal(run(module), run(saved))

    def test_loading_other_modules_does_not_touch_them(self, method):
        model = nn.ModuleDict({"attention": attention(method), "head": nn.Linear(2, 2)})
        run(model["attention"])
        before = model["attention"].in_proj_weight_correction.clone()
        model.load_state_dict(nn.ModuleDict({"head": nn.Linear(2, 2)}).state_dict(), strict=False)
        assert torch.equal(model["attention"].in_proj_weight_correction, before)


@pytest.mark.parametrize("method", ["sc", EXACT, RELATIVE, "sc+pc"], ids=str)
class TestCopies:
    def test_deepcopy(self, method):
        module = attention(method)
        assert torch.equal(run(copy.deepcopy(module)), run(module))

    def test_a_copy_of_a_compiled_module_computes_with_its_own_weights(self, method):
        module = attention(method)
        plain = copy.deepcopy(module)
        module.compile(backend="eager")
        other = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in (*plain.parameters(), *other.parameters()):
                parameter.zero_()
        assert torch.equal(run(other), run(plain)) and not torch.equal(run(other), run(module))

    def test_compiled_before_the_first_forward(self, method):
        """Which fixes the corrections that depend on the weights."""
        module = attention(method)
        plain = copy.deepcopy(module)
        torch.testing.assert_close(run(torch.compile(module, backend="aot_eager")), run(plain))

    def test_pickle(self, method):
        module = attention(method)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        assert torch.equal(run(torch.load(buffer, weights_only=False)), run(module))

    def test_state_dict(self, method):
        module, other = attention(method), attention(method, seed=1)
        other.load_state_dict(module.state_dict())
        assert torch.equal(run(other), run(module))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(strength=float("nan")), "strength is nan; expected a finite number"),
        (dict(strength=float("inf")), "strength is inf; expected a finite number"),
        (dict(strength="ten"), "strength is 'ten'; expected a finite number"),
        (dict(strength=True), "strength is True; expected a finite number"),
        (dict(relative="False"), "relative is 'False'; expected True or False"),
        (dict(strength=dict(q=1.0)), "name the same ones in both"),
        (dict(targets=()), "expected some of"),
        (dict(targets=("q", "o")), "expected some of"),
        (dict(targets=("q", "q")), "expected some of"),
        (dict(layout="heads"), "layout is 'heads'; expected one of"),
        (dict(form="eye"), "form is 'eye'; expected one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SpectralCorrection(**settings)
