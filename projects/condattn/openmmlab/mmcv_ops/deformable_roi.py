"""Deformable pooling of regions of interest (arXiv 1703.06211): RoIAlign whose bins are shifted one by one."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import gradients, in_full_precision
from .roi import check_images, extents


def pool(
    features: Tensor,
    offset: Tensor,
    rois: Tensor,
    size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    """Mean of the samples of each bin, which is shifted by ``gamma`` times the size of its region times its offset.

    Args:
        features: (N, C, H, W).
        offset: (R, 2, bins in y, bins in x), x before y.
        rois: (R, 5).
        size: Number of bins of a region in y and x.
        spatial_scale: Size of the feature map divided by the size of the image.
        sampling_ratio: Number of samples of a bin in each direction; 0 for the bin's size in pixels, rounded up.
        gamma: Factor of the offsets.

    Returns:
        (R, C, bins in y, bins in x).
    """
    start, extent = extents(rois, spatial_scale, aligned=True)
    bins = extent / extent.new_tensor(size)
    counts = bins.nan_to_num(0).ceil().long() if sampling_ratio <= 0 else torch.full_like(bins, sampling_ratio).long()
    output = features.new_zeros(len(rois), features.shape[1], *size)
    # Regions of one image with equal numbers of samples are pooled together.
    groups = torch.cat([rois[:, :1].long(), counts], dim=1)
    for image, *number in groups.unique(dim=0).tolist():
        if min(number) <= 0:  # a bin without samples has the value 0
            continue
        chosen = (groups == groups.new_tensor([image, *number])).all(1).nonzero()[:, 0]
        positions = []
        for axis in range(2):
            steps = torch.arange(size[axis] * number[axis], device=rois.device).view(size[axis], number[axis])
            place = start[chosen, axis, None, None] + (steps + 0.5) * bins[chosen, axis, None, None] / number[axis]
            place = place[:, :, None, :, None] if axis == 0 else place[:, None, :, None, :]
            shift = gamma * extent[chosen, axis, None, None] * offset[chosen, 1 - axis]
            positions.append(place + shift[..., None, None])
        samples = _interpolate(features[image], *torch.broadcast_tensors(*positions))
        output = output.index_copy(0, chosen, samples.mean((-2, -1)).transpose(0, 1))
    return output


def _interpolate(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values of ``image`` (C, H, W) at positions, (C, *positions); up to a pixel outside, those of the border."""
    height, width = image.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    grid = torch.stack([(2 * x.clamp(0, width - 1) + 1) / width, (2 * y.clamp(0, height - 1) + 1) / height], -1) - 1
    values = F.grid_sample(image[None], grid.view(1, -1, 1, 2), padding_mode="border", align_corners=False)
    return values.view(len(image), *y.shape) * inside


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Write :func:`pool` into ``output``; an empty ``offset`` shifts no bin."""
    check_images(input, rois)
    size = (pooled_height, pooled_width)
    with torch.autocast(output.device.type, enabled=False):
        features, regions = in_full_precision(input, rois)
        shifts = _shifts(features, offset, len(rois), size)
        output.copy_(pool(features, shifts, regions, size, spatial_scale, sampling_ratio, gamma))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Write the gradients of :func:`pool` with respect to features and offsets."""
    size = (pooled_height, pooled_width)
    features, regions = in_full_precision(input, rois)
    settings = dict(spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma)
    function = partial(pool, rois=regions, size=size, **settings)
    results = gradients(function, (features, _shifts(features, offset, len(rois), size)), grad_output)
    grad_input.copy_(results[0])
    if offset.numel():
        grad_offset.copy_(results[1].view_as(grad_offset))


def _shifts(features: Tensor, offset: Tensor, number: int, size: tuple[int, int]) -> Tensor:
    shape = (number, 2, *size)
    return offset.to(features).reshape(shape) if offset.numel() else features.new_zeros(shape)
