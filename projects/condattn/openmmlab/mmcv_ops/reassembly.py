"""Reassembly of features with predicted kernels: CARAFE (arXiv 1905.02188) and the masks of PSANet (ECCV 2018)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import gradients, write


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Upsample: each output position is the sum of the k x k inputs around its source, weighted by its own kernel.

    The source of output (y, x) is (y // scale, x // scale); features are zero outside the image.

    Args:
        features: (N, C, H, W).
        masks: (N, groups * k * k, scale * H, scale * W); each group of channels has separate kernels.
        kernel_size: Height and width of the kernels, k; odd.
        group_size: Number of groups.
        scale_factor: Upsampling factor, ``scale`` above.

    Returns:
        (N, C, scale * H, scale * W).
    """
    n, channels, height, width = features.shape
    padded = F.pad(features, [kernel_size // 2] * 4).unflatten(1, (group_size, -1))
    kernels = masks.view(n, group_size, kernel_size, kernel_size, height, scale_factor, width, scale_factor)
    output = 0
    for i in range(kernel_size):
        for j in range(kernel_size):
            source = padded[..., i : i + height, j : j + width]
            output = output + source[..., :, None, :, None] * kernels[:, :, None, i, j]
    return output.reshape(n, channels, height * scale_factor, width * scale_factor)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Write :func:`carafe` into ``output``."""
    function = partial(carafe, kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
    write(function, (features, masks), output)


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of :func:`carafe` with respect to features and masks."""
    function = partial(carafe, kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
    for buffer, result in zip((bottom_grad, mask_grad), gradients(function, (features, masks), top_grad), strict=True):
        buffer.copy_(result)


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write :func:`carafe` into ``output``, and copy the features to ``rfeatures`` for the backward pass."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of :func:`carafe`, as :func:`carafe_naive_backward` does."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def psa_mask(input: Tensor, collect: bool, mask_size: tuple[int, int], half: tuple[int, int]) -> Tensor:
    """Point-wise spatial attention (PSA) from masks that are centred on each position.

    Element (i, j) of the mask of position (h, w) is its attention to position (h + i - half_h, w + j - half_w).
    Attention to positions outside the mask is zero. Let p be the position that a mask belongs to, q the position that
    it attends to, and h * W + w the index of a position. In ``distribute`` mode, the output is indexed by (index of p,
    height and width of q); in ``collect`` mode, by (index of q, height and width of p).

    Args:
        input: (N, mask height * mask width, H, W).
        collect: Whether the mode is ``collect``, not ``distribute``.
        mask_size: Height and width of the masks.
        half: Row and column in a mask of the position that it belongs to.

    Returns:
        (N, H * W, H, W).
    """
    n, _, height, width = input.shape
    h, w = torch.arange(height, device=input.device), torch.arange(width, device=input.device)
    i, j = h - h[:, None] + half[0], w - w[:, None] + half[1]  # [this position, the other one]
    inside = ((i >= 0) & (i < mask_size[0]))[:, None, :, None] & ((j >= 0) & (j < mask_size[1]))[None, :, None, :]
    i, j = i.clamp(0, mask_size[0] - 1), j.clamp(0, mask_size[1] - 1)
    masks = input.view(n, *mask_size, height, width)
    chosen = masks[:, i[:, None, :, None], j[None, :, None, :], h[:, None, None, None], w[None, :, None, None]]
    attention = torch.where(inside, chosen, 0)  # (N, H, W, other's H, other's W)
    if collect:
        attention = attention.permute(0, 3, 4, 1, 2)
    return attention.reshape(n, height * width, height, width)


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Write :func:`psa_mask` into ``output``; ``psa_type`` is 0 for collect and 1 for distribute."""
    function = partial(psa_mask, collect=psa_type == 0, mask_size=(h_mask, w_mask), half=(half_h_mask, half_w_mask))
    write(function, (input,), output)


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Write the gradient of :func:`psa_mask`, which is linear, into ``grad_input``."""
    function = partial(psa_mask, collect=psa_type == 0, mask_size=(h_mask, w_mask), half=(half_h_mask, half_w_mask))
    grad_input.copy_(gradients(function, (torch.zeros_like(grad_input),), grad_output)[0])
