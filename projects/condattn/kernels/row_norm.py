"""Row normalisation of head outputs."""

import torch
from torch import Tensor


def normalize_rows(x: Tensor, eps: float, detach: bool, dim: int = -1) -> Tensor:
    """Divide each row by its Euclidean norm: ``x_i / max(||x_i||_2, eps)``.

    The norm is taken in float32 for half precision, else in the precision of ``x``. Zero rows stay zero, with a
    finite gradient.

    Args:
        x: Rows of shape (..., d), or lying along ``dim``.
        eps: Smallest divisor.
        detach: Treat the norm as a constant in backpropagation instead of using the exact gradient.
        dim: The axis along which a row lies.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    norm = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    if detach:
        norm = norm.detach()
    # The backward of a product costs less than that of a quotient.
    return (wide * norm.clamp_min(eps).reciprocal()).to(x.dtype)
