"""Pooling of regions of interest: RoIAlign (arXiv 1703.06870) and RoIPool (arXiv 1504.08083).

Regions are rows (index of the image in the batch, x1, y1, x2, y2), in pixels of the image; ``spatial_scale`` converts
them to pixels of the feature map.
"""

import math

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

from .common import in_full_precision, not_deterministic, write

MAX = 0
"""``pool_mode`` that takes the largest sample of a bin; 1 takes their mean."""


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the pooled samples of each region's bins into ``output``.

    Args:
        input: (N, C, H, W).
        rois: (R, 5).
        output: (R, C, aligned_height, aligned_width).
        argmax_y: y of the largest sample in the feature map, of the output's shape; empty unless ``pool_mode`` is
            ``MAX``.
        argmax_x: x of the largest sample, in the same way.
        aligned_height: Number of bins of a region in y.
        aligned_width: Number of bins of a region in x.
        spatial_scale: Size of the feature map divided by the size of the image.
        sampling_ratio: Number of samples of a bin in each direction; 0 for the bin's size in pixels, rounded up.
        pool_mode: ``MAX`` or 1 (mean).
        aligned: Whether regions are shifted by half a pixel, so that pixel centres lie at .5.
    """
    check_images(input, rois)
    size = (aligned_height, aligned_width)
    if pool_mode != MAX:
        write(
            lambda x, r: torch.ops.torchvision.roi_align(x, r, spatial_scale, *size, sampling_ratio, aligned),
            (input, rois),
            output,
        )
        return
    features, regions = in_full_precision(input, rois)
    start, extent = extents(regions, spatial_scale, aligned)
    bins = extent / extent.new_tensor(size)
    # Regions with equal numbers of samples are pooled together: each sample is one bin of a finer RoIAlign.
    samples = (
        bins.nan_to_num(0).ceil().long()
        if sampling_ratio <= 0
        else torch.full_like(bins, sampling_ratio, dtype=torch.long)
    )
    for counts in samples.unique(dim=0).tolist():
        chosen = (samples == samples.new_tensor(counts)).all(1).nonzero()[:, 0]
        if min(counts) <= 0:  # a bin without samples has the value 0 and no position
            output[chosen], argmax_y[chosen], argmax_x[chosen] = 0, -1, -1
            continue
        fine = [n * count for n, count in zip(size, counts, strict=True)]
        values = torch.ops.torchvision.roi_align(features, regions[chosen], spatial_scale, *fine, 1, aligned)
        values, index = F.max_pool2d(values, counts, return_indices=True)
        step = (extent[chosen] / extent.new_tensor(fine))[:, :, None, None, None]
        origin = start[chosen][:, :, None, None, None]
        output[chosen] = values.to(output)
        argmax_y[chosen] = (origin[:, 0] + (index // fine[1] + 0.5) * step[:, 0]).to(argmax_y)
        argmax_x[chosen] = (origin[:, 1] + (index % fine[1] + 0.5) * step[:, 1]).to(argmax_x)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of :func:`roi_align_forward` with respect to its input into ``grad_input`` (N, C, H, W)."""
    check_images(grad_input, rois)
    grad, regions = in_full_precision(grad_output, rois)
    if pool_mode != MAX:
        settings = (spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
        with not_deterministic():
            grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad, regions, *settings))
        return
    n, channels, height, width = grad_input.shape
    y, x = in_full_precision(argmax_y, argmax_x)
    inside = (y != -1) & (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y0, x0 = y.floor(), x.floor()
    image = (
        rois[:, 0].long()[:, None, None, None] * channels + torch.arange(channels, device=grad.device)[:, None, None]
    )
    total = grad.new_zeros(n * channels * height * width)
    for row, weight_y in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
        for column, weight_x in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
            index = (image * height + row.clamp(max=height - 1).long()) * width + column.clamp(max=width - 1).long()
            total.index_add_(0, index.flatten(), torch.where(inside, weight_y * weight_x * grad, 0).flatten())
    grad_input.copy_(total.view_as(grad_input))


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the largest value in each bin of each region into ``output``, and its position into ``argmax``.

    A region reaches from x1 to x2 + 1 in the image. Its bins have fractional borders; a bin contains every pixel that
    it touches. The value of an empty bin is 0, and its position is -1.

    Args:
        input: (N, C, H, W).
        rois: (R, 5).
        output: (R, C, pooled_height, pooled_width).
        argmax: Positions of the largest values, y * W + x, of the same shape.
        pooled_height: Number of bins of a region in y.
        pooled_width: Number of bins of a region in x.
        spatial_scale: Size of the feature map divided by the size of the image.
    """
    check_images(input, rois)
    features, regions = in_full_precision(input, rois)
    size, limits = regions.new_tensor([pooled_height, pooled_width]), input.shape[-2:]
    start = regions[:, [2, 1]] * spatial_scale
    extent = (regions[:, [4, 3]] + 1) * spatial_scale - start
    valid = (extent > 0).all(1) & extent.isfinite().all(1) & start.isfinite().all(1)
    for i, (image, is_valid) in enumerate(zip(rois[:, 0].long().tolist(), valid.tolist(), strict=True)):
        output[i], argmax[i] = 0, -1
        if not is_valid:
            continue
        width_of_bins = extent[i] / size
        masks, first = [], []
        for axis, number in enumerate((pooled_height, pooled_width)):
            bins = torch.arange(number, device=input.device)[:, None]
            start_of_region, end_of_region = start[i, axis].item(), (start[i, axis] + extent[i, axis]).item()
            first.append(min(max(math.floor(start_of_region), 0), limits[axis] - 1))
            stop = max(first[axis] + 1, min(math.ceil(end_of_region) + 1, limits[axis]))
            pixels = torch.arange(first[axis], stop, device=input.device)
            low = (bins * width_of_bins[axis] + start[i, axis]).floor()
            high = ((bins + 1) * width_of_bins[axis] + start[i, axis]).ceil()
            masks.append((low <= pixels) & (pixels < high))
        rows, columns = masks
        part = features[image, :, first[0] : first[0] + rows.shape[1], first[1] : first[1] + columns.shape[1]]
        in_row, x = torch.where(columns[:, None, None], part, -torch.inf).max(-1)  # (bins, C, rows)
        largest, y = torch.where(rows[:, None, None], in_row, -torch.inf).max(-1)  # (bins in y, in x, C)
        x = x.expand(pooled_height, *x.shape).gather(-1, y[..., None])[..., 0]
        nonempty = (rows.any(1)[:, None] & columns.any(1))[..., None]
        output[i] = torch.where(nonempty, largest, 0).permute(2, 0, 1).to(output)
        position = (y + first[0]) * limits[1] + x + first[1]
        argmax[i] = torch.where(nonempty, position, -1).permute(2, 0, 1).to(argmax)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the gradient of :func:`roi_pool_forward` with respect to its input into ``grad_input`` (N, C, H, W)."""
    (grad,) = in_full_precision(grad_output)
    places = argmax.long().flatten(2)
    grad = torch.where(places >= 0, grad.flatten(2), 0)
    total = torch.zeros_like(grad_input, dtype=grad.dtype).flatten(2)
    for region, image in enumerate(rois[:, 0].long().tolist()):
        total[image].scatter_add_(1, places[region].clamp(min=0), grad[region])
    grad_input.copy_(total.view_as(grad_input))


def extents(rois: Tensor, spatial_scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """Starts and sizes of regions in the feature map, (R, 2) each, y before x."""
    offset = 0.5 if aligned else 0.0
    start, end = rois[:, [2, 1]] * spatial_scale - offset, rois[:, [4, 3]] * spatial_scale - offset
    extent = end - start
    return start, extent if aligned else extent.clamp(min=1)


def check_images(features: Tensor, rois: Tensor) -> None:
    """Raise if a region refers to an image outside the batch.

    On a CPU only, because the check would stall a GPU, and not in graphs, which cannot branch on values.
    """
    is_eager = rois.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_eager and len(rois) and not (rois[:, 0].min() >= 0 and rois[:, 0].max() < len(features)):
        raise RuntimeError(
            f"regions of interest: expected images 0 to {len(features) - 1} in the first column, got "
            f"{rois[:, 0].min():g} to {rois[:, 0].max():g}"
        )
