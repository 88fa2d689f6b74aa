"""Helpers that the operators share: the precision of the computation, and gradients by autograd."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def in_full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert ``tensors`` to the data type of the first, or to float32 if that is in half precision."""
    dtype = torch.float32 if tensors[0].dtype in (torch.float16, torch.bfloat16) else tensors[0].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``function(*inputs)`` with respect to each input, by evaluating the function again with autograd.

    Args:
        function: A differentiable function of tensors.
        inputs: Its arguments.
        grad_output: Gradient with respect to its output, of the output's shape.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in in_full_precision(*inputs)]
    with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
        output = function(*leaves)
    with not_deterministic():
        return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


@contextmanager
def not_deterministic() -> Iterator[None]:
    """Let PyTorch warn instead of raise where gradients are summed in no fixed order, as in mmcv's operators.

    With ``torch.use_deterministic_algorithms(True)``, such backward passes of torchvision and of ``grid_sample`` would
    raise an error on a GPU.
    """
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(strict, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)


def write(function: Callable[..., Tensor], inputs: Sequence[Tensor], output: Tensor) -> None:
    """Write ``function(*inputs)``, computed in full precision and outside autocast, into ``output``."""
    with torch.autocast(output.device.type, enabled=False):
        result = function(*in_full_precision(*inputs))
    if result.shape != output.shape:
        raise RuntimeError(f"expected an output of shape {tuple(result.shape)}, got {tuple(output.shape)}")
    output.copy_(result)
