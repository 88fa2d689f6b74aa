"""Deformable convolutions (arXiv 1703.06211, 1811.11168) and convolution at selected positions."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from .common import in_full_precision, not_deterministic, write

OUTSIDE = 1e6
"""An offset in pixels that lies outside every image."""


def _gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, settings: tuple
) -> tuple[Tensor, ...]:
    """Gradients of the deformable convolution with respect to input, weight, offset, mask and bias."""
    use_mask = mask is not None
    mask = mask if use_mask else input.new_zeros(len(input), 1)
    bias = input.new_zeros(len(weight))
    offset = _finite(offset)
    grad_output, *tensors = in_full_precision(grad_output, input, weight, offset, mask, bias)
    with not_deterministic():
        results = torch.ops.torchvision._deform_conv2d_backward(grad_output.contiguous(), *tensors, *settings, use_mask)
    grad_input, grad_weight, grad_offset, grad_mask, grad_bias = results
    grad_offset = grad_offset * _inside(tensors[2], weight.shape[2:], input.shape[2:], settings).repeat_interleave(2, 1)
    return grad_input, grad_weight, grad_offset, grad_mask, grad_bias


def _inside(offset: Tensor, kernel: tuple[int, int], size: tuple[int, int], settings: tuple) -> Tensor:
    """Whether each sample lies in the image or less than one pixel outside it.

    The interpolated value is not differentiable at exactly one pixel outside the image: it is 0 there, and grows
    inwards. mmcv defines the gradient at that position as zero, torchvision as that of the inner side. Offsets that are
    initialised to zero sample exactly there wherever an image is padded by one pixel.

    Returns:
        (N, deformable groups * kernel height * kernel width, output height, output width).
    """
    samples = offset.unflatten(1, (-1, *kernel, 2))
    inside = True
    for axis in range(2):
        stride, padding, dilation = settings[axis], settings[2 + axis], settings[4 + axis]
        start = torch.arange(offset.shape[2 + axis], device=offset.device) * stride - padding
        tap = torch.arange(kernel[axis], device=offset.device) * dilation
        start = start[:, None] if axis == 0 else start
        tap = tap[:, None, None, None] if axis == 0 else tap[:, None, None]
        position = samples[:, :, :, :, axis] + tap + start
        inside = inside & (position > -1) & (position < size[axis])
    return inside.flatten(1, 3)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the deformable convolution of ``input`` (N, C, H, W) into ``output``.

    ``offset`` is (N, 2 * deformable groups * kH * kW, output height, output width), y before x for each kernel element.
    """
    _check(input, weight, offset, group, deformable_group)
    geometry = dict(stride=(dH, dW), padding=(padH, padW), dilation=(dilationH, dilationW))
    write(lambda x, w, o: deform_conv2d(x, o, w, **geometry), (input, weight, _finite(offset)), output)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the gradients of the deformable convolution with respect to input and offset."""
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grad_input, _, grad_offset, *_ = _gradients(gradOutput, input, weight, offset, None, settings)
    gradInput.copy_(grad_input)
    gradOffset.copy_(grad_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Write ``scale`` times the gradient of the deformable convolution with respect to the weight."""
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    gradWeight.copy_(_gradients(gradOutput, input, gradWeight, offset, None, settings)[1] * scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write the modulated deformable convolution, whose samples are multiplied by ``mask``, into ``output``.

    ``mask`` is (N, deformable groups * kernel height * kernel width, output height, output width). ``offset`` and
    ``mask`` may be larger than the output, see :func:`_read`.
    """
    _check(input, weight, offset, group, deformable_group)
    offset, mask = (_read(tensor, output) for tensor in (_finite(offset), mask))
    geometry = dict(stride=(stride_h, stride_w), padding=(pad_h, pad_w), dilation=(dilation_h, dilation_w))
    write(
        lambda x, w, b, o, m: deform_conv2d(x, o, w, b if with_bias else None, mask=m, **geometry),
        (input, weight, bias, offset, mask),
        output,
    )


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write the gradients of the modulated deformable convolution with respect to its inputs."""
    settings = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    read = (_read(tensor, grad_output) for tensor in (offset, mask))
    results = _gradients(grad_output, input, weight, *read, settings)
    buffers = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias)
    for buffer, result in zip(buffers[: 5 if with_bias else 4], results, strict=False):
        missing = buffer[:1].numel() - result[:1].numel()
        buffer.copy_(F.pad(result.flatten(1), (0, missing)).view_as(buffer) if missing else result)


def _read(tensor: Tensor, output: Tensor) -> Tensor:
    """Read offsets or masks as mmcv's operator does: as many values of each image as the output has positions.

    mmdet's DyHead passes those of a larger map. Values after the ones that are read have no effect.
    """
    size = output.shape[2:]
    if tensor.shape[2:] == size or tensor.shape[2:].numel() < size.numel():  # torchvision refuses smaller ones
        return tensor
    return tensor.flatten(1)[:, : tensor.shape[1] * size.numel()].unflatten(1, (-1, *size))


def _finite(offset: Tensor) -> Tensor:
    """Move samples without a finite position outside the image, where their value is 0, as in mmcv.

    torchvision's operator for CPUs reads memory at the position NaN, which may end the process.
    """
    return offset.nan_to_num(nan=OUTSIDE, posinf=OUTSIDE, neginf=-OUTSIDE)


def _check(input: Tensor, weight: Tensor, offset: Tensor, groups: int, deform_groups: int) -> None:
    """Raise if the numbers of channels do not fit; torchvision takes other numbers of groups from them."""
    height, width = weight.shape[2:]
    if input.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"deformable convolution: expected {weight.shape[1] * groups} input channels, got {input.shape[1]}"
        )
    if offset.shape[1] != 2 * deform_groups * height * width:
        raise RuntimeError(
            f"deformable convolution: expected {2 * deform_groups * height * width} channels of offsets, for a kernel "
            f"of {height} x {width} and deform_groups={deform_groups}, got {offset.shape[1]}"
        )


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the patches of ``im`` (1, C, H, W) at M positions into ``col`` (C * kernel height * kernel width, M)."""
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows[:, None], columns[None]].flatten(0, 2))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write the M columns of ``col`` (C, M) to their positions in ``im`` (1, C, H, W)."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
