"""Overlaps and non-maximum suppression of boxes, rotated boxes and lines."""

from collections.abc import Callable

import numpy as np
import torch
import torchvision
from torch import Tensor

from .common import in_full_precision

LINE_OFFSETS = 72
"""Number of heights at which a line proposal of CLRNet has an x coordinate."""


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression: drop boxes that overlap a kept box of higher score by more than ``iou_threshold``.

    Boxes with equal scores are ordered by ``scores.sort(descending=True)``, as in mmcv; this sort is not stable.

    Args:
        boxes: (N, 4), x1, y1, x2, y2; widths are x2 - x1 + ``offset``.
        scores: (N,).
        iou_threshold: Largest IoU with a kept box at which a box is kept; rounded to single precision, as in mmcv.
        offset: 0 or 1.

    Returns:
        Indices of the kept boxes, by descending score.
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
    """Soft-NMS (arXiv 1704.04503): lower the scores of overlapping boxes, and drop boxes below ``min_score``.

    Among boxes with equal scores, the first in the current order is selected. This order is mmcv's: a selected box
    swaps places with the first remaining box, and the last remaining box moves to the place of a dropped one.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5); boxes and final scores are written here, in the order of selection.
        iou_threshold: Smallest IoU at which methods 0 and 1 lower a score.
        sigma: Width of the Gaussian of method 2.
        min_score: Boxes with lower scores are dropped; the best remaining box is selected whatever its score.
        method: Factor of the score of an overlapping box: 0 for 0, 1 for 1 - IoU, 2 for exp(-IoU^2 / sigma).
        offset: 0 or 1; widths are x2 - x1 + ``offset``.

    Returns:
        Indices in ``boxes`` of the rows of ``dets``.
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
        order = torch.cat([torch.arange(chosen), chosen + _fill_gaps_from_end(~(scores[chosen:] < min_score))])
        boxes, scores, index = boxes[order], scores[order], index[order]
    return index


def _fill_gaps_from_end(keep: Tensor) -> Tensor:
    """Indices of the elements to keep, in an order in which the last kept elements fill the gaps of dropped ones."""
    number = int(keep.sum())
    order = torch.arange(number)
    order[~keep[:number]] = number + keep[number:].nonzero()[:, 0].flip(0)
    return order


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Write the overlaps of boxes (N, 4) and (M, 4) into ``ious``: of all pairs, or row by row if ``aligned``.

    ``mode`` is 0 for intersection over union, 1 for intersection over the area of the first box; widths are
    x2 - x1 + ``offset``.
    """
    boxes, others = in_full_precision(bboxes1, bboxes2)
    overlaps = _iou(boxes if aligned else boxes[:, None], others, offset, over_first=mode == 1)
    ious.copy_(overlaps.reshape(ious.shape))


def _iou(boxes: Tensor, others: Tensor, offset: int = 0, over_first: bool = False) -> Tensor:
    """Intersection over union of boxes (..., 4), or over the area of the first; shapes are broadcast."""
    area, areas = ((b[..., 2:4] - b[..., :2] + offset).prod(-1) for b in (boxes, others))
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:4], others[..., 2:4])
    intersection = (high - low + offset).clamp(min=0).prod(-1)
    return intersection / (area if over_first else area + areas - intersection)


def _groups(scores: Tensor, suppressed: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Greedy suppression: the best remaining item removes the others for which ``suppressed(best, others)`` is true.

    Returns:
        One group for each kept item, by descending score: its index, then the indices of the items that it suppressed,
        by descending score.
    """
    remaining = scores.sort(descending=True).indices
    groups = []
    while remaining.numel():
        removed = suppressed(remaining[0], remaining[1:])
        groups.append(torch.cat([remaining[:1], remaining[1:][removed]]))
        remaining = remaining[1:][~removed]
    return groups


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Group boxes by non-maximum suppression: each kept box with those that it suppresses, IoU >= ``iou_threshold``.

    ``dets`` is (N, 5): x1, y1, x2, y2 and score. Each group is a list of indices, the kept box first.
    """
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
    """Indices of the rotated boxes that remain after suppression at IoU >= ``iou_threshold``, by descending score.

    ``dets`` is (N, 5): centre, width, height and angle in radians. A sixth column, the label, is ignored, as in mmcv's
    operator.
    """
    threshold = float(np.float32(iou_threshold))

    groups = _groups(scores, lambda i, rest: rotated_iou(dets[i, :5], dets[rest, :5]) >= threshold)
    return torch.stack([group[0] for group in groups]) if groups else scores.new_zeros(0, dtype=torch.long)


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Write the overlaps of rotated boxes (N, 5) and (M, 5) into ``ious``: of all pairs, or row by row if ``aligned``.

    ``mode_flag`` is 0 for intersection over union, 1 for intersection over the area of the first box.
    """
    overlaps = rotated_iou(boxes1 if aligned else boxes1[:, None], boxes2, over_first=mode_flag == 1)
    ious.copy_(overlaps.reshape(ious.shape))


def rotated_iou(boxes: Tensor, others: Tensor, over_first: bool = False) -> Tensor:
    """Intersection over union of rotated boxes, or over the area of the first; 0 where a box has no area.

    The intersection of two rectangles is a convex polygon. Its corners are the corners of each rectangle that lie in
    the other one, and the points at which their sides intersect. The computation is in double precision.

    Args:
        boxes: (..., 5), centre, width, height, angle in radians from x to y.
        others: Boxes of the same format; shapes are broadcast.
        over_first: Divide by the area of ``boxes`` instead of that of the union.

    Returns:
        Overlaps of the broadcast shape (...).
    """
    boxes, others = torch.broadcast_tensors(boxes.double(), others.double())
    areas = boxes[..., 2] * boxes[..., 3], others[..., 2] * others[..., 3]
    # Coordinates relative to the centre of the first box, so that large ones lose no precision.
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
    """Corners of rotated boxes (..., 5), in order along the border, (..., 4, 2)."""
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
    """Area of the convex polygon whose corners are the ``valid`` ones of ``points`` (..., P, 2), in any order."""
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
    """Suppress line proposals (CLRNet, arXiv 2203.10350) that lie closer than ``thresh`` to a better one.

    The distance of two lines is their mean absolute difference in x at the heights that both cover; lines without a
    common height do not suppress each other.

    Args:
        boxes: (N, 77): two scores, start (y in 0..1), x of the start, length in steps, and x at 72 heights.
        scores: (N,).
        thresh: Distance below which a line is suppressed.
        top_k: Largest number of kept lines.

    Returns:
        Indices of the kept lines by descending score, padded with zeros to (N,); their number; and for each line the
        rank, from 1, of the kept line whose group it belongs to, or 0 if it belongs to none.
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
