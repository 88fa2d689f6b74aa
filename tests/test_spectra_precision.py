"""The precision in which maps and head outputs are measured: float64 for batches of any size, or a message."""

import pytest
import torch
from test_spectra import attention
from torch import Tensor, nn

from condattn.spectra import Spectrum, capture, measure
from condattn.spectra.advice import find_warnings
from condattn.spectra.report import write_report

MATRICES = ("map", "A(X)", "C A(X)")


def call(x):
    return dict(query=x, key=x, value=x)


def test_a_large_batch_is_measured_like_a_small_one(monkeypatch):
    """In float64, whatever the number of images, and whichever call is the first."""
    model, x = attention().float(), torch.randn(8, 6, 12)
    monkeypatch.setattr(capture, "LARGE", 3 * 6 * 6)  # one image
    alone = measure(model, [call(x[i : i + 1]) for i in range(8)], ["map", "outputs"])
    for parts in ([x], [x[:2], x[2:]], [x[:6], x[6:]]):
        together = measure(model, [call(part) for part in parts], ["map", "outputs"])
        assert not together.limits and {row["precision"] for row in together.rows()} == {"float64"}
        for matrix in MATRICES:
            torch.testing.assert_close(together.kappa("", matrix), alone.kappa("", matrix), rtol=1e-6, atol=0)


def test_what_limits_the_precision_is_said(monkeypatch, tmp_path):
    model, x = attention().bfloat16(), torch.randn(2, 6, 12).bfloat16()
    monkeypatch.setattr(capture, "LARGE", 3 * 6 * 6 - 1)
    measured = measure(model, [call(x)])
    assert measured.limits == {"": "bfloat16, because the maps of one sample have more than 107 entries"}
    assert {row["precision"] for row in measured.rows() if row["quantity"] in MATRICES} == {"bfloat16"}
    (line,) = find_warnings({"": measured})
    assert line.startswith("condition numbers of maps and outputs are limited by the precision at the model itself")
    write_report({"none": measured}, tmp_path, "bfloat16")
    assert "because the maps of one sample have" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_results_of_two_precisions_are_kept_apart(order, monkeypatch):
    """Of one site and size, whichever is the first."""
    model, x = attention().bfloat16(), torch.randn(2, 6, 12).bfloat16()

    def run():
        for wide in order:
            monkeypatch.setattr(capture, "LARGE", 2**24 if wide else 0)
            model(x, x, x)

    spectra = measure(model, run, ["map"]).spectra
    assert [one.dtype for one in spectra] == [torch.float64 if wide else torch.bfloat16 for wide in order]
    assert [one.tolerance for one in spectra] == [6 * torch.finfo(one.dtype).eps for one in spectra]
    assert [len(one.values) for one in spectra] == [2, 2]


def test_rounding_errors_alone_have_no_condition_number():
    """In bfloat16, the tolerance for 128 tokens is as large as the largest singular value."""
    one = Spectrum("", "map", torch.linspace(1, 0, 128)[None, None].double(), (128, 128), torch.bfloat16)
    assert one.rank.item() == 0 and one.kappa.isnan().all() and one.sigma_min.isnan().all()


@pytest.mark.parametrize("error", [AssertionError, RuntimeError, TypeError, ValueError])
def test_modules_that_refuse_float64_are_measured_as_they_are(error):
    class Refusing(nn.MultiheadAttention):
        def forward(self, query, *arguments, **settings):
            if query.dtype != torch.float32:
                raise error("float32 {only}")
            return super().forward(query, *arguments, **settings)

    model, x = Refusing(12, 3, batch_first=True), torch.randn(2, 6, 12)
    measured = measure(model, [call(x)], ["map", "outputs"])
    reason = f"the module cannot be called in float64 ({error.__name__}: float32 {{only}})"
    assert measured.limits == {"": f"float32, because {reason}"}
    assert {row["precision"] for row in measured.rows()} == {"float32"}
    assert reason in find_warnings({"": measured})[0]


def test_modules_that_convert_by_themselves(monkeypatch):
    """A softmax in float32, as that of many language models, limits a map that is converted to float64 again."""
    timm = pytest.importorskip("timm")
    model = timm.layers.Attention(12, num_heads=3)
    model.fused_attn = False
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda self, dim: softmax(self.float(), dim).to(self.dtype))
    measured = measure(model, torch.randn(2, 6, 12), ["map", "outputs"])
    assert measured.limits == {"": "float32, because the module itself converts its data"}
    assert {one.dtype for one in measured.spectra} == {torch.float32}
