"""Overlaps and non-maximum suppression of boxes, rotated boxes and lines."""

from collections.abc import Callable

import numpy as np
import torch
import torchvision
from torch import Tensor

from .common import in_full_precision

LINE_OFFSETS = 72
"""Number of points of a line proposal (CLRNet)."""


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than ``iou_threshold``, best first.

    Equal scores come in the order of ``scores.sort(descending=True)``, which is mmcv's, and no stable one.

    Args:
        boxes: (N, 4), x1, y1, x2, y2; widths are x2 - x1 + ``offset``.
        scores: (N,).
        iou_threshold: Largest intersection over union that is kept; rounded to single precision, as mmcv does.
        offset: 0 or 1.
    """
    boxes, scores = in_full_precision(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    order = scores.sort(descending=True).indices
    ranks = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
    return order[torchvision.ops.nms(boxes[order], ranks, float(np.float32(iou_threshold)))]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): scores of overlapping boxes are lowered, and dropped below ``min_score``.

    Among equal scores the first one wins, in an order in which a chosen box changes places with the first one left,
    and a dropped one is replaced by the last: that of mmcv.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5); boxes and final scores are written here, in the order in which they were chosen.
        iou_threshold: Overlap from which methods 0 and 1 act.
        sigma: Width of method 2.
        min_score: What is lower is dropped; the best box of each turn is kept whatever its score.
        method: 0: to 0; 1: times 1 - IoU; 2: times exp(-IoU^2 / sigma).
        offset: Widths are x2 - x1 + ``offset``.

    Returns:
        Indices of the boxes in ``dets``.
    """
    boxes, scores = (tensor.detach().clone() for tensor in in_full_precision(boxes, scores))
    index = torch.arange(len(boxes))
    threshold = float(np.float32(iou_threshold))
    chosen = 0
    while chosen < len(boxes):
        best = chosen + int(scores[chosen:].argmax())
        for tensor in (boxes, scores, index):
            tensor[[chosen, best]] = tensor[[best, chosen]]
        dets[chosen] = torch.cat([boxes[chosen], scores[chosen : chosen + 1]]).to(dets)
        chosen += 1
        overlap = _iou(boxes[chosen - 1], boxes[chosen:], offset)
        if method == 2:
            factor = torch.exp(-overlap.square() / sigma)
        else:
            factor = torch.where(overlap >= threshold, (1 - overlap) * method, 1)
        scores[chosen:] *= factor
        order = torch.cat([torch.arange(chosen), chosen + _replaced_by_last(~(scores[chosen:] < min_score))])
        boxes, scores, index = boxes[order], scores[order], index[order]
    return index


def _replaced_by_last(keep: Tensor) -> Tensor:
    """Indices of what is kept, each element that is not being replaced by the last that is and stands behind it."""
    number = int(keep.sum())
    order = torch.arange(number)
    order[~keep[:number]] = number + keep[number:].nonzero()[:, 0].flip(0)
    return order


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Write overlaps of boxes (N, 4) and (M, 4) into ``ious``: each with each, or with its own if ``aligned``.

    ``mode`` is 0 for intersection over union, 1 for intersection over the area of the first; widths are
    x2 - x1 + ``offset``.
    """
    boxes, others = in_full_precision(bboxes1, bboxes2)
    overlaps = _iou(boxes if aligned else boxes[:, None], others, offset, over_first=mode == 1)
    ious.copy_(overlaps.reshape(ious.shape))


def _iou(boxes: Tensor, others: Tensor, offset: int = 0, over_first: bool = False) -> Tensor:
    """Intersection over union of boxes (..., 4) whose shapes are broadcast, or over the area of the first."""
    area, areas = ((b[..., 2:4] - b[..., :2] + offset).prod(-1) for b in (boxes, others))
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:4], others[..., 2:4])
    intersection = (high - low + offset).clamp(min=0).prod(-1)
    return intersection / (area if over_first else area + areas - intersection)


def _groups(scores: Tensor, suppressed: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Greedy suppression: the best that is left takes away those that ``suppressed(best, others)`` marks.

    Returns:
        For each one that is kept, best first: its index and those of what it suppressed, by falling score.
    """
    left = scores.sort(descending=True).indices
    groups = []
    while left.numel():
        taken = suppressed(left[0], left[1:])
        groups.append(torch.cat([left[:1], left[1:][taken]]))
        left = left[1:][~taken]
    return groups


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes, ``dets`` (N, 5) with scores: one that is kept, and those it overlaps by ``iou_threshold``."""
    (dets,) = in_full_precision(dets)
    threshold = float(np.float32(iou_threshold))
    return [group.tolist() for group in _groups(dets[:, 4], lambda i, rest: _iou(dets[i], dets[rest]) >= threshold)]


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Indices of the rotated boxes that no better one overlaps by ``iou_threshold``, best first.

    ``dets`` is (N, 5): centre, width, height and angle in radians (a sixth column, the label, plays no part, as in
    mmcv's operator).
    """
    threshold = float(np.float32(iou_threshold))

    groups = _groups(scores, lambda i, rest: rotated_iou(dets[i, :5], dets[rest, :5]) >= threshold)
    return torch.stack([group[0] for group in groups]) if groups else scores.new_zeros(0, dtype=torch.long)


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Write overlaps of rotated boxes (N, 5) and (M, 5) into ``ious``: each with each, or with its own if ``aligned``.

    ``mode_flag`` is 0 for intersection over union, 1 for intersection over the area of the first.
    """
    overlaps = rotated_iou(boxes1 if aligned else boxes1[:, None], boxes2, over_first=mode_flag == 1)
    ious.copy_(overlaps.reshape(ious.shape))


def rotated_iou(boxes: Tensor, others: Tensor, over_first: bool = False) -> Tensor:
    """Intersection over union of rotated boxes, or over the first one's area; 0 where a box has no area.

    The intersection of two rectangles is the convex polygon of their corners that lie in the other one and of the
    points in which their sides meet. Computed in double precision.

    Args:
        boxes: (..., 5), centre, width, height, angle in radians from x to y.
        others: The same; their shapes are broadcast.
        over_first: Divide by the area of ``boxes`` instead.

    Returns:
        (...).
    """
    boxes, others = torch.broadcast_tensors(boxes.double(), others.double())
    areas = boxes[..., 2] * boxes[..., 3], others[..., 2] * others[..., 3]
    # Relative to the first one's centre, so that large coordinates cost no digits.
    others = torch.cat([others[..., :2] - boxes[..., :2], others[..., 2:]], dim=-1)
    boxes = torch.cat([torch.zeros_like(boxes[..., :2]), boxes[..., 2:]], dim=-1)
    corners, others_corners = _corners(boxes), _corners(others)
    sides, others_sides = (c.roll(-1, dims=-2) - c for c in (corners, others_corners))
    p, r, q, s = (
        corners[..., :, None, :],
        sides[..., :, None, :],
        others_corners[..., None, :, :],
        others_sides[..., None, :, :],
    )
    determinant = _cross(r, s)
    parallel = determinant.abs() < 1e-14
    t, u = (_cross(q - p, side) / determinant.masked_fill(parallel, 1) for side in (s, r))
    meet = ~parallel & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    points = torch.cat([corners, others_corners, (p + t[..., None] * r).flatten(-3, -2)], dim=-2)
    valid = torch.cat([_inside(corners, others), _inside(others_corners, boxes), meet.flatten(-2)], dim=-1)
    intersection = _convex_area(points, valid)
    base = areas[0] if over_first else areas[0] + areas[1] - intersection
    return torch.where((areas[0] < 1e-14) | (areas[1] < 1e-14), 0, intersection / base)


def _corners(boxes: Tensor) -> Tensor:
    """Corners of rotated boxes (..., 5) in turn, (..., 4, 2)."""
    signs = boxes.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    across, up = (boxes[..., None, 2:4] / 2 * signs).unbind(-1)
    cos, sin = boxes[..., 4, None].cos(), boxes[..., 4, None].sin()
    return boxes[..., None, :2] + torch.stack([cos * across - sin * up, sin * across + cos * up], dim=-1)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points (..., P, 2) lie in rotated boxes (..., 5), borders included, (..., P)."""
    x, y = (points - boxes[..., None, :2]).unbind(-1)
    cos, sin = boxes[..., 4, None].cos(), boxes[..., 4, None].sin()
    local = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1).abs()
    return (local <= boxes[..., None, 2:4] / 2 + 1e-9).all(-1)


def _convex_area(points: Tensor, valid: Tensor) -> Tensor:
    """Area of the convex polygon with the ``valid`` ones of ``points`` (..., P, 2) as its corners, in any order."""
    centre = (points * valid[..., None]).sum(-2, keepdim=True) / valid.sum(-1)[..., None, None].clamp(min=1)
    points = points - centre
    angles = torch.atan2(points[..., 1], points[..., 0]).masked_fill(~valid, torch.inf)
    order = angles.argsort(-1)
    points, valid = points.gather(-2, order[..., None].expand_as(points)), valid.gather(-1, order)
    points = torch.where(valid[..., None], points, points[..., :1, :])
    return torch.where(valid[..., 0], _cross(points, points.roll(-1, dims=-2)).sum(-1).abs() / 2, 0)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def line_nms_forward(boxes: Tensor, scores: Tensor, thresh: float, top_k: int) -> list[Tensor]:
    """Suppression of line proposals (CLRNet, arXiv 2203.10350) that lie closer than ``thresh`` to a better one.

    Args:
        boxes: (N, 77): two scores, start (y in 0..1), x of the start, length in steps, and x at 72 heights. The
            distance of two lines is the mean difference in x at the heights that both have; they need one in common.
        scores: (N,).
        thresh: Distance.
        top_k: How many lines are kept at most.

    Returns:
        Indices of what is kept, best first, filled up with zeros to (N,); their number; and for each line the number,
        from 1, of the kept one that it belongs to, or 0.
    """
    if boxes.shape[1] != 5 + LINE_OFFSETS:
        raise RuntimeError(f"line_nms: expected lines with {5 + LINE_OFFSETS} numbers, got {boxes.shape[1]}")
    start = (boxes[:, 2] * (LINE_OFFSETS - 1) + 0.5).int()
    end = start + boxes[:, 4].int() - 1
    heights = torch.arange(LINE_OFFSETS, device=boxes.device)

    def close(best: Tensor, others: Tensor) -> Tensor:
        first, last = torch.maximum(start[best], start[others]), torch.minimum(end[best], end[others])
        last = last.clamp(max=LINE_OFFSETS - 1)
        common = (heights >= first[:, None]) & (heights <= last[:, None])
        distance = ((boxes[best, 5:] - boxes[others, 5:]).abs() * common).sum(1)
        return (first >= 0) & (last >= first) & (distance < thresh * (last - first + 1))

    groups = _groups(scores, close)[:top_k]
    keep, parent = torch.zeros_like(scores, dtype=torch.long), torch.zeros_like(scores, dtype=torch.long)
    for number, group in enumerate(groups):
        keep[number] = group[0]
        parent[group] = number + 1
    return [keep, torch.tensor(len(groups), device=boxes.device), parent]
