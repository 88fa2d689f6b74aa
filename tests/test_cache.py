"""The cache of what is made of weights."""

import pytest
import torch
from torch import nn

import condattn
from condattn.kernels.cache import WeightCache


class TestCache:
    """What is made of weights is made again when they change, and only then."""

    def made(self, cache, weight):
        calls = []
        with torch.no_grad():
            cache.get(lambda: calls.append(1) or weight * 2, weight)
        return len(calls)

    def test_of_a_weight(self):
        cache, weight = WeightCache(), nn.Parameter(torch.ones(3))
        assert [self.made(cache, weight) for _ in range(3)] == [1, 0, 0]
        torch.optim.SGD([weight], 0.1).step()
        weight.grad = torch.ones(3)
        torch.optim.SGD([weight], 0.1).step()
        assert [self.made(cache, weight) for _ in range(2)] == [1, 0]
        weight.data = torch.zeros(3)
        assert self.made(cache, weight) == 1
        cache.clear()
        assert self.made(cache, weight) == 1
        assert len([cache.get(lambda: weight * 2, weight) for _ in range(2)]) == 2  # with gradients, each time

    @pytest.mark.parametrize("form", ["identity", "svd"])
    def test_of_corrections(self, form):
        """An optimizer step, a state dict, averages of weights as mmengine swaps them in, another precision."""
        torch.manual_seed(0)
        model = nn.MultiheadAttention(8, 2, batch_first=True)
        layer = nn.Sequential(nn.Linear(8, 24))
        condattn.condition(model, dict(type="SpectralCorrection", strength=0.5, form=form))
        x = torch.randn(1, 4, 8)
        model.eval()
        effective = lambda: model.effective_weight("in_proj_weight")  # noqa: E731
        with torch.no_grad():
            model(x, x, x)
            assert effective() is effective()
        constant = (effective() - model.in_proj_weight).detach()
        for change in (
            lambda: model.in_proj_weight.mul_(2),
            lambda: model.load_state_dict({**model.state_dict(), "in_proj_weight": layer[0].weight}),
            lambda: (model.in_proj_weight.data.copy_(torch.randn(24, 8)), model.eval()),
            lambda: torch.optim.AdamW([model.in_proj_weight]).step(),
        ):
            model.in_proj_weight.grad = torch.ones(24, 8)
            with torch.no_grad():
                effective()
                change()
                want = model.in_proj_weight + model.in_proj_weight_correction if form == "svd" else None
                got = effective()
                assert torch.equal(got, effective())
                torch.testing.assert_close(got, model.in_proj_weight + constant if want is None else want)
        with torch.inference_mode():
            model(x, x, x)
        model.train()
        model(x, x, x)[0].sum().backward()
        with torch.no_grad():
            assert model.double().effective_weight("in_proj_weight").dtype == torch.float64
