"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import gradients, in_full_precision


def deformable_attention(value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor) -> Tensor:
    """Weighted sum of ``value`` at the sampling locations of all levels, by bilinear interpolation; zero outside.

    Args:
        value: (N, sum of H * W over levels, heads, channels).
        locations: (N, queries, heads, levels, points, 2), x and y in 0..1 from border to border of a level.
        weights: (N, queries, heads, levels, points).
        shapes: (levels, 2), height and width of each level.

    Returns:
        (N, queries, heads * channels).
    """
    n, _, heads, channels = value.shape
    queries = locations.shape[1]
    sizes = shapes.tolist()
    # (N, heads, levels, queries, points, ...): the values of one head and level are sampled as one image.
    locations = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5)
    weights = weights.permute(0, 2, 3, 1, 4)
    output = value.new_zeros(n * heads, channels, queries)
    for level, features in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        image = features.permute(0, 2, 3, 1).reshape(n * heads, channels, *sizes[level])
        samples = F.grid_sample(image, locations[:, :, level].flatten(0, 1), align_corners=False)
        output = output + (samples * weights[:, :, level].flatten(0, 1)[:, None]).sum(-1)
    return output.view(n, heads * channels, queries).transpose(1, 2)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Compute :func:`deformable_attention`; the output has the data type of ``value``."""
    with torch.autocast(value.device.type, enabled=False):
        inputs = in_full_precision(value, sampling_locations, attention_weights)
        return deformable_attention(*inputs, value_spatial_shapes).to(value.dtype).contiguous()


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`deformable_attention` with respect to values, locations and weights."""
    function = partial(deformable_attention, shapes=value_spatial_shapes)
    results = gradients(function, (value, sampling_locations, attention_weights), grad_output)
    for buffer, result in zip((grad_value, grad_sampling_loc, grad_attn_weight), results, strict=True):
        buffer.copy_(result)
