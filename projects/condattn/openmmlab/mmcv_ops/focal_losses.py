"""Sigmoid and softmax focal losses (arXiv 1708.02002, eq. 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from .common import gradients, in_full_precision, write


def sigmoid_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """Sigmoid focal loss, one binary loss for each row and class.

    With p = sigmoid(input): -alpha (1 - p)^gamma log p for the target class, -(1 - alpha) p^gamma log(1 - p) for the
    other classes.

    Args:
        input: Logits, (N, classes).
        target: Class of each row, (N,); a number that is not a class index means that the row belongs to no class.
        weight: (classes,), factor for the rows of each target class; empty if all factors are 1.
        gamma: Focusing exponent.
        alpha: Weight of the target class.

    Returns:
        (N, classes).
    """
    one_hot = (target[:, None] == torch.arange(input.shape[1], device=target.device)).to(input.dtype)
    loss = sigmoid_focal_loss(input, one_hot, alpha=alpha, gamma=gamma)
    return loss * weight.to(loss)[checked(target, weight)][:, None] if weight.numel() else loss


def softmax_loss(probabilities: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """Softmax focal loss of the target class, -alpha (1 - p)^gamma log p, times its weight; 0 for rows with target < 0.

    Args:
        probabilities: Softmax of the logits, (N, classes).
        target: Class of each row, (N,).
        weight: (classes,), factor for the rows of each target class; empty if all factors are 1.
        gamma: Focusing exponent.
        alpha: Factor of the loss.

    Returns:
        (N,).
    """
    if target.device.type == "cpu":  # the check would stall a GPU
        checked(target.clamp(min=0), probabilities[0] if len(probabilities) else weight)
    p = probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=torch.finfo(torch.float32).tiny).log()
    if weight.numel():
        loss = loss * weight.to(loss)[checked(target.clamp(min=0), weight)]
    return torch.where(target >= 0, loss, 0)


def checked(target: Tensor, weight: Tensor) -> Tensor:
    """Return ``target`` after checking that every class index in it has an entry in ``weight``.

    Raises:
        RuntimeError: If an index is out of range.
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

    The closed form is used, because it is finite where p is 0 or 1, for every ``gamma``: for the target class
    -alpha (1 - p)^gamma (1 - p - gamma p log p), for the others (1 - alpha) p^gamma (p - gamma (1 - p) log(1 - p)).
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
    """Write the gradient of :func:`softmax_loss` with respect to the logits into ``grad_input``.

    ``input`` is the softmax of these logits.
    """

    def of_logits(logits: Tensor) -> Tensor:
        return softmax_loss(logits.softmax(1), target, weight, gamma, alpha)

    # The logarithm of the probabilities equals the logits up to a constant for each row, which softmax ignores.
    (probabilities,) = in_full_precision(input)
    logits = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
    grad_input.copy_(gradients(of_logits, (logits,), buff.new_ones(buff.shape))[0])
