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
