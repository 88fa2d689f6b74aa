"""Focal losses (arXiv 1708.02002, eq. 5) of a sigmoid and of a softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from .common import gradients, in_full_precision, write


def sigmoid_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss of each class by itself.

    With p = sigmoid(input): -alpha (1 - p)^gamma log p for the target class, -(1 - alpha) p^gamma log(1 - p) for the
    others.

    Args:
        input: Logits, (N, classes).
        target: Class of each row, (N,); a number that is no class means that the row belongs to none.
        weight: (classes,), what a row is multiplied by for its target class; empty for 1.
        gamma: Exponent.
        alpha: Weight of the target class.

    Returns:
        (N, classes).
    """
    one_hot = (target[:, None] == torch.arange(input.shape[1], device=target.device)).to(input.dtype)
    loss = sigmoid_focal_loss(input, one_hot, alpha=alpha, gamma=gamma)
    return loss * weight.to(loss)[checked(target, weight)][:, None] if weight.numel() else loss


def softmax_loss(probabilities: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss of the target class, -alpha (1 - p)^gamma log p, times its weight; rows with target < 0 have none.

    Args:
        probabilities: Softmax of the logits, (N, classes).
        target: (N,).
        weight: (classes,) or empty.
        gamma: Exponent.
        alpha: Factor.

    Returns:
        (N,).
    """
    if target.device.type == "cpu":  # where looking costs nothing
        checked(target.clamp(min=0), probabilities[0] if len(probabilities) else weight)
    p = probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=torch.finfo(torch.float32).tiny).log()
    if weight.numel():
        loss = loss * weight.to(loss)[checked(target.clamp(min=0), weight)]
    return torch.where(target >= 0, loss, 0)


def checked(target: Tensor, weight: Tensor) -> Tensor:
    """``target``, all of whose numbers have a weight.

    Raises:
        RuntimeError: If one has none.
    """
    if target.numel() and (target.min() < 0 or target.max() >= len(weight)):
        raise RuntimeError(
            f"focal loss: expected targets of 0 to {len(weight) - 1} for {len(weight)} classes, got "
            f"{int(target.min())} to {int(target.max())}"
        )
    return target


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write :func:`sigmoid_loss` into ``output``."""
    write(lambda x: sigmoid_loss(x, target, weight, gamma, alpha), (input,), output)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each element of :func:`sigmoid_loss` into ``grad_input``.

    By its closed form, which is finite where p is 0 or 1, whatever ``gamma``: for the target class
    -alpha (1 - p)^gamma (1 - p - gamma p log p), for others (1 - alpha) p^gamma (p - gamma (1 - p) log(1 - p)).
    """
    (x,) = in_full_precision(input)
    p = x.sigmoid()
    own = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * F.logsigmoid(x))
    other = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * F.logsigmoid(-x))
    result = torch.where(target[:, None] == torch.arange(x.shape[1], device=x.device), own, other)
    if weight.numel():
        result = result * weight.to(result)[checked(target, weight)][:, None]
    grad_input.copy_(result)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write :func:`softmax_loss` of the probabilities ``input`` into ``output``."""
    write(lambda p: softmax_loss(p, target, weight, gamma, alpha), (input,), output)


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivatives of :func:`softmax_loss` with respect to the logits behind ``input`` into ``grad_input``."""

    def of_logits(logits: Tensor) -> Tensor:
        return softmax_loss(logits.softmax(1), target, weight, gamma, alpha)

    # Up to a constant a row, the logarithm of its probabilities is the row's logits.
    (probabilities,) = in_full_precision(input)
    logits = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
    grad_input.copy_(gradients(of_logits, (logits,), buff.new_ones(buff.shape))[0])
