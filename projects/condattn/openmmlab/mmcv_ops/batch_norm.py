"""The parts of mmcv's batch normalisation over several processes, ``MMSyncBN``, which itself exchanges the statistics.

Maps are (N, C, positions), statistics and parameters (C,).
"""

from torch import Tensor


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write the mean of each channel into ``mean``."""
    mean.copy_(input.float().mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write the mean squared deviation of each channel from ``mean`` into ``var``."""
    var.copy_((input.float() - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Write the normalised maps into ``norm`` and ``output``, and update the running statistics.

    Args:
        input: The maps of this process.
        mean: Mean of each channel over all processes.
        var: Variance of each channel over all processes.
        weight: Factor of each channel.
        bias: Added to each channel.
        running_mean: Updated with ``mean``; empty if there are no running statistics.
        running_var: Updated with the unbiased variance; empty in the same way.
        norm: Receives the maps before ``weight`` and ``bias``.
        std: Receives the standard deviations.
        output: Receives the result.
        eps: Added to the variance.
        momentum: Part of the new statistics in the running ones.
        group_size: Number of processes.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    if running_mean.numel():
        count = len(input) * input.shape[2] * group_size
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        running_var.copy_(momentum * var * count / max(count - 1, 1) + (1 - momentum) * running_var)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write the gradients with respect to weight and bias."""
    grad_weight.copy_((grad_output.float() * norm).sum((0, 2)))
    grad_bias.copy_(grad_output.float().sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Write the gradient with respect to the maps; those of weight and bias are means over the processes."""
    number = len(grad_output) * grad_output.shape[2]
    common = (grad_weight[:, None] * norm + grad_bias[:, None]) / number
    grad_input.copy_(weight[:, None] * (grad_output.float() - common) / std[:, None])
