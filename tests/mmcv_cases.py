"""Helpers that the tests of mmcv's operators share."""

import sys

import torch

ROIS = torch.tensor(
    [
        [0, 1.3, 2.1, 14.7, 12.2],
        [1, -3.0, -2.0, 6.1, 30.0],
        [1, 0.0, 0.0, 15.9, 15.9],
        [0, 5.2, 5.1, 5.9, 6.4],
        [1, 4, 4, 4, 9],
    ]
)
IMAGES = (2, 3, 8, 9)


def use(extension, monkeypatch):
    """Make every module of mmcv.ops call the operators of ``extension``."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
            monkeypatch.setattr(module, "ext_module", extension)


def boxes_and_scores(number: int, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    corners = torch.rand(number, 2) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(number, 2) * 30], dim=1)
    scores = torch.rand(number)
    return (boxes.round(), (scores * 5).round() / 5) if ties else (boxes, scores)


def rotated(number: int) -> torch.Tensor:
    """Random rotated boxes far from the origin, where differences of coordinates lose precision."""
    return torch.cat([torch.rand(number, 2) * 30 + 1000, 3 + torch.rand(number, 2) * 20, torch.randn(number, 1)], dim=1)


def compare(function, definition, *inputs, tolerance=1e-9):
    """Compare values and gradients of ``function(*inputs)`` with those of ``definition`` in double precision."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    references = [x.double().clone().requires_grad_() for x in inputs]
    output, want = function(*leaves), definition(*references)
    torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(want)
    want_gradients = torch.autograd.grad(want, references, direction)
    got_gradients = torch.autograd.grad(output, leaves, direction.to(output.dtype))
    for got, expected in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=10 * tolerance, atol=10 * tolerance)
