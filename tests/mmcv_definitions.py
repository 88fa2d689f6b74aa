"""Definitions of mmcv's operators, written number by number, and differentiable by autograd."""

import math
from itertools import product

import torch
from torch import Tensor


def interpolate(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Interpolate ``image`` (C, H, W), which is zero outside, bilinearly at one point; returns (C,)."""
    _, height, width = image.shape
    value = image.new_zeros(len(image))
    top, left = math.floor(y.item()), math.floor(x.item())
    for row, column in product((top, top + 1), (left, left + 1)):
        if 0 <= row < height and 0 <= column < width:
            value = value + image[:, row, column] * (1 - (y - row).abs()) * (1 - (x - column).abs())
    return value


def interpolate_at_border(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Interpolate as RoIAlign does, where points up to one pixel outside the image take the value at its border."""
    _, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    return interpolate(image, y.clamp(0, height - 1), x.clamp(0, width - 1))


def roi_align(image, rois, size, scale, ratio, mode, aligned) -> Tensor:
    output = image.new_zeros(len(rois), image.shape[1], *size)
    shift = 0.5 if aligned else 0.0
    for r, (index, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - shift for c in corners)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1), max(width, 1)
        bins = height / size[0], width / size[1]
        counts = [ratio or math.ceil(extent) for extent in bins]
        for i, j in product(range(size[0]), range(size[1])):
            samples = [
                interpolate_at_border(
                    image[int(index)],
                    image.new_tensor(y1 + (i + (a + 0.5) / counts[0]) * bins[0]),
                    image.new_tensor(x1 + (j + (b + 0.5) / counts[1]) * bins[1]),
                )
                for a, b in product(range(counts[0]), range(counts[1]))
            ]
            if samples:
                samples = torch.stack(samples)
                output[r, :, i, j] = samples.mean(0) if mode == "avg" else samples.amax(0)
    return output


def deform_roi_pool(image, rois, offset, size, scale, ratio, gamma) -> Tensor:
    rows = []
    for r, (index, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - 0.5 for c in corners)
        bins = (y2 - y1) / size[0], (x2 - x1) / size[1]
        counts = [ratio or math.ceil(extent) for extent in bins]
        for i, j in product(range(size[0]), range(size[1])):
            x, y = x1 + gamma * (x2 - x1) * offset[r, 0, i, j], y1 + gamma * (y2 - y1) * offset[r, 1, i, j]
            samples = [
                interpolate_at_border(
                    image[int(index)],
                    y + (i + (a + 0.5) / counts[0]) * bins[0],
                    x + (j + (b + 0.5) / counts[1]) * bins[1],
                )
                for a, b in product(range(counts[0]), range(counts[1]))
            ]
            rows.append(torch.stack(samples).mean(0) if samples else image.new_zeros(image.shape[1]))
    return torch.stack(rows).view(len(rois), *size, -1).permute(0, 3, 1, 2)


def roi_pool(image, rois, size, scale) -> Tensor:
    _, channels, height, width = image.shape
    output = image.new_zeros(len(rois), channels, *size)
    for r, (index, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        for i, j in product(range(size[0]), range(size[1])):
            top, bottom = math.floor(y1 + i * (y2 - y1) / size[0]), math.ceil(y1 + (i + 1) * (y2 - y1) / size[0])
            left, right = math.floor(x1 + j * (x2 - x1) / size[1]), math.ceil(x1 + (j + 1) * (x2 - x1) / size[1])
            top, bottom = min(max(top, 0), height), min(max(bottom, 0), height)
            left, right = min(max(left, 0), width), min(max(right, 0), width)
            if bottom > top and right > left:
                output[r, :, i, j] = image[int(index), :, top:bottom, left:right].flatten(1).max(1).values
    return output


def deformable_convolution(
    image, offset, weight, bias=None, mask=None, stride=1, padding=0, dilation=1, groups=1, deform_groups=1
) -> Tensor:
    n, channels, _, _ = image.shape
    outputs, _, kh, kw = weight.shape
    height, width = offset.shape[2:]
    rows = []
    for b, i, j in product(range(n), range(height), range(width)):
        patch = []
        for c in range(channels):
            group = c // (channels // deform_groups)
            for u, v in product(range(kh), range(kw)):
                tap = group * kh * kw + u * kw + v
                y = i * stride - padding + u * dilation + offset[b, 2 * tap, i, j]
                x = j * stride - padding + v * dilation + offset[b, 2 * tap + 1, i, j]
                value = interpolate(image[b, c : c + 1], y, x)[0]
                patch.append(value if mask is None else value * mask[b, tap, i, j])
        patch = torch.stack(patch).view(groups, -1)
        rows.append((weight.view(groups, outputs // groups, -1) * patch[:, None]).sum(-1).flatten())
    output = torch.stack(rows).view(n, height, width, outputs).permute(0, 3, 1, 2)
    return output if bias is None else output + bias[:, None, None]


def deformable_attention(value, sizes, locations, weights) -> Tensor:
    n, _, heads, channels = value.shape
    queries = locations.shape[1]
    output = value.new_zeros(n, queries, heads, channels)
    start = 0
    for level, (height, width) in enumerate(sizes):
        images = value[:, start : start + height * width].view(n, height, width, heads, channels)
        start += height * width
        for b, q, h, p in product(range(n), range(queries), range(heads), range(locations.shape[4])):
            x, y = locations[b, q, h, level, p] * value.new_tensor([width, height]) - 0.5
            sample = interpolate(images[b, :, :, h].permute(2, 0, 1), y, x)
            output[b, q, h] = output[b, q, h] + weights[b, q, h, level, p] * sample
    return output.flatten(2)


def carafe(features, masks, size, groups, scale) -> Tensor:
    n, channels, height, width = features.shape
    output = features.new_zeros(n, channels, height * scale, width * scale)
    half = size // 2
    for c, y, x in product(range(channels), range(height * scale), range(width * scale)):
        for u, v in product(range(size), range(size)):
            row, column = y // scale + u - half, x // scale + v - half
            if 0 <= row < height and 0 <= column < width:
                kernel = (c // (channels // groups) * size + u) * size + v
                output[:, c, y, x] = output[:, c, y, x] + features[:, c, row, column] * masks[:, kernel, y, x]
    return output


def psa_mask(masks, kind, size) -> Tensor:
    n, _, height, width = masks.shape
    output = masks.new_zeros(n, height * width, height, width)
    half = (size[0] - 1) // 2, (size[1] - 1) // 2
    for h, w, u, v in product(range(height), range(width), range(size[0]), range(size[1])):
        row, column = h + u - half[0], w + v - half[1]
        if 0 <= row < height and 0 <= column < width:
            value = masks[:, u * size[1] + v, h, w]
            if kind == "collect":
                output[:, row * width + column, h, w] = value
            else:
                output[:, h * width + w, row, column] = value
    return output


def sigmoid_focal_loss(logits, target, gamma, alpha, weight=None) -> Tensor:
    p = 1 / (1 + (-logits).exp())
    loss = -(1 - alpha) * p**gamma * (1 - p).log()
    rows = (target >= 0) & (target < logits.shape[1])
    own = (-alpha * (1 - p) ** gamma * p.log())[rows, target[rows]]
    loss = loss.index_put((rows.nonzero()[:, 0], target[rows]), own)
    return loss if weight is None else loss * weight[target][:, None]


def softmax_focal_loss(logits, target, gamma, alpha, weight=None) -> Tensor:
    p = (logits.exp() / logits.exp().sum(1, keepdim=True))[range(len(target)), target.clamp(min=0)]
    loss = -alpha * (1 - p) ** gamma * p.log() * (target >= 0)
    return loss if weight is None else loss * weight[target.clamp(min=0)]


def box_iou(a, b, offset=0) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a, area_b = ((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    return width * height / (area_a + area_b - width * height)


def suppress(scores, close) -> list[list[int]]:
    """Greedy suppression: lists of a kept item and the items that it suppressed; ties are ordered as by PyTorch."""
    order = torch.tensor(scores).sort(descending=True).indices.tolist()
    groups, gone = [], set()
    for place, i in enumerate(order):
        if i not in gone:
            groups.append([i, *(j for j in order[place + 1 :] if j not in gone and close(i, j))])
            gone.update(groups[-1])
    return groups


def soft_nms(boxes, scores, threshold, sigma, min_score, method, offset) -> list[tuple[int, float]]:
    left, chosen = dict(enumerate(scores)), []
    while left:
        best = max(left, key=left.get)
        chosen.append((best, left.pop(best)))
        for i in list(left):
            iou = box_iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                left[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= threshold:
                left[i] *= 1 - iou if method == "linear" else 0
            if left[i] < min_score:
                del left[i]
    return chosen


def rotated_box(box):
    """The rotated box as a shapely polygon."""
    from shapely import Polygon

    x, y, width, height, angle = box
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(-width / 2, -height / 2), (width / 2, -height / 2), (width / 2, height / 2), (-width / 2, height / 2)]
    return Polygon([(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in corners])


def rotated_iou(a, b) -> float:
    a, b = rotated_box(a), rotated_box(b)
    intersection = a.intersection(b).area
    return intersection / (a.area + b.area - intersection)


def lines_are_close(a, b, threshold) -> bool:
    start_a, start_b = int(a[2] * 71 + 0.5), int(b[2] * 71 + 0.5)
    first, last = max(start_a, start_b), min(start_a + int(a[4]) - 1, start_b + int(b[4]) - 1, 71)
    heights = range(first, last + 1)
    return len(heights) > 0 and sum(abs(a[5 + i] - b[5 + i]) for i in heights) / len(heights) < threshold
