"""The correction of conditioned embedded tokens: condition number, rank, gradient, and its Newton-Schulz form."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condattn import EmbeddedTokens
from condattn.kernels.polar import newton_schulz_correction, rounding, svd_correction

ROOT = Path(__file__).parents[1]


def matrix(rows, columns, condition, seed, rank=None):
    """A random float64 matrix whose singular values go from 1 down to 1 / condition, and zeros beyond ``rank``."""
    rng = np.random.default_rng(seed)
    size = min(rows, columns)
    u = np.linalg.qr(rng.standard_normal((rows, size)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, size)))[0]
    values = np.geomspace(1, 1 / condition, size)
    values[rank if rank is not None else size :] = 0
    return torch.from_numpy(u * values @ v.T)


def singular_values(x):
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    return values[values > values[0] * 1e-10]


shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=80, deadline=None)
@given(shapes, st.floats(0, 6), st.floats(-3, 3), st.integers(0, 10**6))
def test_the_condition_number_is_at_most_2(shape, exponent, scale, seed):
    """Theorem 4.4, for any shape, fewer tokens than channels included, and any scale."""
    x = 10**scale * matrix(*shape, 10**exponent, seed)
    c = svd_correction(x)
    u, s, vh = np.linalg.svd(x.numpy(), full_matrices=False)
    np.testing.assert_allclose(c.numpy(), s[0] * u @ vh, atol=1e-8 * s[0])
    values = singular_values(x + c)
    assert len(values) == min(shape) and values[0] / values[-1] <= 2 + 1e-9


@settings(max_examples=80, deadline=None)
@given(shapes, st.floats(0, 4), st.floats(-3, 3), st.integers(0, 10**6))
def test_the_condition_number_in_single_precision_is_at_most_2(shape, exponent, scale, seed):
    x = (10**scale * matrix(*shape, 10**exponent, seed)).float()
    values = singular_values(x + svd_correction(x))
    assert len(values) == min(shape) and values[0] / values[-1] <= 2 + 1e-4


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-5), (torch.float64, 3.6e-12)])
def test_below_the_limit_the_ratio_to_the_largest_doubles(dtype, limit):
    """The bound is over singular values above it, which docs/methods.md gives."""
    assert limit == pytest.approx(rounding(dtype), rel=0.06)
    for part, corrected in ((1.2 * limit, True), (0.8 * limit, False)):
        x = torch.tensor([[1, 0], [0, part]], dtype=dtype)
        wanted = torch.diag(torch.tensor([2, part + corrected], dtype=dtype))
        torch.testing.assert_close(x + svd_correction(x), wanted, rtol=1e-5, atol=limit / 100)


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2.4e-4), (torch.bfloat16, 2e-3)])
def test_the_limits_of_half_precision(dtype, limit):
    assert limit == pytest.approx(rounding(dtype), rel=0.06)


@pytest.mark.parametrize("tokens, limit", [(4096, 3.05e-5), (16384, 1.22e-4)])
def test_the_limit_grows_with_many_tokens(tokens, limit):
    for part, corrected in ((1.1 * limit, True), (0.9 * limit, False)):
        x = torch.zeros(tokens, 2)
        x[0, 0], x[1, 1] = 1, part
        assert svd_correction(x)[1, 1].item() == pytest.approx(float(corrected), abs=1e-5)
    assert rounding(torch.float32) == pytest.approx(3.05e-5, rel=0.01)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 16), st.integers(2, 16), st.data())
def test_the_rank_stays(rows, columns, data):
    """Repeated tokens: directions that X does not have are not made up."""
    rank = data.draw(st.integers(1, min(rows, columns)))
    x = matrix(rows, columns, 10.0, data.draw(st.integers(0, 1000)), rank)
    values = singular_values(x + svd_correction(x))
    assert len(values) == rank and values[0] / values[-1] <= 2 + 1e-9
    assert not svd_correction(torch.zeros(rows, columns)).any()


@pytest.mark.parametrize("correct", [svd_correction, partial(newton_schulz_correction, iterations=40)])
@pytest.mark.parametrize("tokens", [100, 20000])
def test_many_tokens_in_single_precision(correct, tokens):
    """The rank is not underestimated where there are many tokens, as in large images."""
    x = matrix(tokens, 48, 3e3, 0, rank=24).float()
    values = singular_values(x + correct(x))
    assert values[23] >= values[0] / 2.1 and values[24] < 0.05 * values[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [49, 784, 3136, 16384])
@pytest.mark.parametrize("rank", [1, 2])
def test_images_of_one_color(tokens, rank, dtype):
    """The errors of the decomposition are not taken for directions of the tokens, nor are they differentiated."""
    colors = torch.randn(rank, 96, dtype=dtype)
    x = colors[torch.arange(tokens) % rank].requires_grad_()
    c = svd_correction(x, detach=False)
    if rank == 1:
        assert (c - x).norm() < 1e-3 * x.norm()
    assert torch.linalg.matrix_rank(c.detach(), rtol=1e-3) == rank
    (grad,) = torch.autograd.grad((c * torch.randn(tokens, 96, dtype=dtype)).sum(), x)
    assert grad.norm() < 100 * tokens**0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["svd", "newton_schulz"])
def test_rounding_errors_of_half_precision_are_not_amplified(dtype, form):
    """Directions that the tokens have through rounding alone are not corrected, also where a norm follows."""
    x = 3 * matrix(400, 32, 20.0, 0, rank=16).float()
    exact, rounded = svd_correction(x), x.to(dtype).float()
    method = EmbeddedTokens(form=form, iterations=60)
    found = method.correction(rounded[None], rounding(dtype))[0]
    assert (found - exact).norm() < (0.02 if form == "svd" else 0.35) * exact.norm()
    assert (svd_correction(rounded) - exact).norm() > 0.5 * exact.norm()


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (2, 6, 3)])
def test_the_gradient_is_that_of_the_forward_pass(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    options = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradcheck(lambda x: svd_correction(x, detach=False), x, **options)
    assert torch.autograd.gradcheck(lambda x: newton_schulz_correction(x, 60, detach=False), x, atol=1e-4, rtol=1e-3)


def test_the_gradient_where_singular_values_are_equal():
    """PyTorch's own gradient of a decomposition divides by their differences."""
    x = (3 * torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0]).requires_grad_()
    weight = torch.randn(6, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad((svd_correction(x, detach=False) * weight).sum(), x)
    assert grad.isfinite().all()
    # Among orthogonal changes of X, sigma_max stays and C changes as X itself does.
    turn = torch.randn(4, 4, dtype=torch.float64)
    direction = x.detach() @ (turn - turn.T)
    torch.testing.assert_close((grad * direction).sum(), (weight * direction).sum())


def test_transforms_of_functions():
    """``torch.func`` agrees with backpropagation, also where the rank is not full."""
    correct = partial(svd_correction, detach=False, zero=1e-6)
    x, weight, direction = matrix(7, 5, 10.0, 0, rank=3), *torch.randn(2, 7, 5, dtype=torch.float64)
    wanted = x.clone().requires_grad_()
    (correct(wanted) * weight).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: (correct(x) * weight).sum())(x), wanted.grad)
    value, tangent = torch.func.jvp(correct, (x,), (direction,))
    torch.testing.assert_close(value, correct(x))
    torch.testing.assert_close((tangent * weight).sum(), (direction * wanted.grad).sum())
    torch.testing.assert_close(torch.func.vmap(correct)(torch.stack([x, 2 * x])), torch.stack([value, 2 * value]))
    (grad,) = torch.autograd.grad(correct(wanted).square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_by_default_the_correction_is_a_constant():
    x = torch.randn(5, 3, requires_grad=True)
    assert not svd_correction(x).requires_grad and not newton_schulz_correction(x).requires_grad
    assert EmbeddedTokens().detach


def error_of_newton_schulz(x, iterations):
    """Against the decomposition in double precision, relative to the size of C."""
    exact, found = svd_correction(x.double()), newton_schulz_correction(x, iterations)
    assert found.dtype == x.dtype
    return ((found - exact).norm() / exact.norm()).item()


SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def errors_of_the_page():
    """The table in docs/methods.md: condition number, iterations, error."""
    page = (ROOT / "docs" / "methods.md").read_text()
    table = re.search(r"^  \| condition number of X .*(?:\n  \|.*)+", page, re.MULTILINE)[0]
    header, _, *rows = re.findall(r"^  \|(.*)\|$", table, re.MULTILINE)
    iterations = [int(number) for number in re.findall(r"\d+", header)]
    for row in rows:
        condition, *errors = (cell.strip() for cell in row.split("|"))
        for number, error in zip(iterations, errors, strict=True):
            yield float(condition.replace(",", "")), number, float(error.replace(" · 10", "e").translate(SUPERSCRIPTS))


ERRORS = list(errors_of_the_page())


@pytest.mark.parametrize("shape", [(200, 48), (48, 200)], ids=str)
@pytest.mark.parametrize("condition, iterations, error", ERRORS)
def test_the_errors_of_newton_schulz_are_those_of_the_page(shape, condition, iterations, error):
    assert error / 3 < error_of_newton_schulz(matrix(*shape, condition, 0), iterations) < 3 * error


def test_the_page_has_all_errors():
    assert {condition for condition, *_ in ERRORS} == {10, 100, 1e3, 1e4, 1e5} and len(ERRORS) == 20


@pytest.mark.parametrize(
    ("condition", "iterations", "error"), [(10.0, 12, 1e-3), (1e3, 12, 1e-2), (1e4, 16, 2e-3), (1e5, 16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(200, 48), (48, 200), (64, 64)], ids=str)
def test_newton_schulz_in_single_precision(shape, condition, iterations, error):
    assert error_of_newton_schulz(matrix(*shape, condition, 0).float(), iterations) <= error


@pytest.mark.parametrize("iterations", [12, 16, 48])
def test_newton_schulz_and_directions_that_tokens_lack(iterations):
    """Rounding errors in single precision are corrected in part, and far less than by their share of C."""
    torch.manual_seed(0)
    x = (torch.randn(197, 48) @ torch.randn(48, 768)).float()
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    coefficients = (u.mT @ newton_schulz_correction(x, iterations).double() @ vh.mT / s[0]).diagonal()
    torch.testing.assert_close(coefficients[:48], torch.ones(48, dtype=torch.float64), rtol=0, atol=1e-3)
    assert coefficients[48:].abs().max() < 0.02


@pytest.mark.parametrize("iterations", range(1, 60))
def test_singular_values_stay_within_the_largest(iterations):
    """No direction is overshot, whatever the number of iterations."""
    x = torch.diag(torch.logspace(0, -6, 40, dtype=torch.float64))
    corrected = newton_schulz_correction(x, iterations).diagonal()
    assert corrected.min() >= 0 and corrected.max() <= 1 + 1e-6


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("correct", [svd_correction, newton_schulz_correction])
def test_no_tokens(correct, detach):
    x = torch.zeros(2, 0, 5, requires_grad=True)
    (x + correct(x, detach=detach)).sum().backward()
    assert correct(x).shape == x.grad.shape == (2, 0, 5)


@pytest.mark.parametrize("correct", [svd_correction, newton_schulz_correction])
def test_tokens_that_are_zero_have_a_gradient(correct):
    """One image of a batch, whose other gradients are those that they have alone."""
    x = torch.randn(2, 5, 3)
    x[1] = 0
    x.requires_grad_()
    weight = torch.randn(2, 5, 3)
    (found,) = torch.autograd.grad((weight * correct(x, detach=False)).sum(), x)
    (alone,) = torch.autograd.grad((weight[:1] * correct(x[:1], detach=False)).sum(), x)
    torch.testing.assert_close(found[0], alone[0])
    assert found.isfinite().all() and not correct(x)[1].any()
