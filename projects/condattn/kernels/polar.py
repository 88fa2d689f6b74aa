"""The correction sigma_max U V^T of matrices X = U S V^T: by singular value decomposition, or by products alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .switch import is_compiling

RIDGE = 1e-11
"""What is added to the Gram matrix in Newton-Schulz iterations at least, relative to the bound of its largest
eigenvalue."""
SQUARINGS = 9
"""Number of squarings of the Gram matrix from which its largest eigenvalue is taken."""
SCALE = 1.6977
"""The largest factor by which an iteration scales. With 3 ** 0.5 and more, the largest singular values could become
zero, and their rounding errors would grow."""
ROWS = 16
"""Number of rows for which a decomposition may have an error of one eps, relative to the largest singular value. For
equal rows, errors of LAPACK have been half as large in single precision (530 eps for 16,384 rows), and twice as large
in double precision, where :func:`rounding` is larger."""


def rounding(dtype: torch.dtype) -> float:
    """The part of the largest singular value below which one counts as an error of a matrix computed in ``dtype``.

    It is 4e-12 in double precision, 3e-5 in single precision, 2.4e-4 in float16 and 2e-3 in bfloat16.

    The rounding errors of N by D entries have singular values in proportion to the square root of N, as the entries
    themselves have, so that the ratio does not depend on N. For tokens of a patch embedding it is 1.3 eps in single
    precision, and 0.07 to 0.16 eps in half precision, where a larger part would count directions that images have.
    """
    info = torch.finfo(dtype)
    return {64: 2**14, 32: 256}.get(info.bits, 0.25) * info.eps


def svd_correction(x: Tensor, detach: bool = True, zero: float | None = None) -> Tensor:
    """C = sigma_max U V^T, with which kappa(X + C) <= 2, as every singular value s of X becomes s + sigma_max.

    This holds for the singular values above a limit, a part ``zero`` of the largest, or N eps / 16 of it if that is
    more, since the decomposition itself has errors. Those below count as rounding errors (of repeated or missing rows,
    for instance) and stay as they are, so that C has the rank of X; as the largest doubles, so does its ratio to each
    of them.

    Args:
        x: Matrices X, (..., N, D), in single or double precision.
        detach: Treat C as a constant in backpropagation. If False, its gradient is exact where X has full rank. It has
            sums of singular values in the denominator and no differences, so that equal singular values do no harm. It
            can be differentiated only once.
        zero: Singular values count as zero up to this part of the largest; default: :func:`rounding` of the dtype.

    Returns:
        C, of the shape of ``x``.

    Source:
        Theorem 4.4 of conditioned embedded tokens (arXiv 2505.12789).
    """
    if detach:
        with torch.no_grad():
            return _scaled_polar_factor(*_svd(x.detach(), zero))
    if torch.jit.is_tracing():  # a trace that has functions of Python cannot be saved
        return _scaled_polar_factor(*_svd(x, zero))
    return _ScaledPolarFactor.apply(x, zero) if is_compiling() else _TransformableFactor.apply(x, zero)[0]


def newton_schulz_correction(x: Tensor, iterations: int = 12, detach: bool = True, zero: float | None = None) -> Tensor:
    """C of :func:`svd_correction` without a decomposition, from the inverse square root of the Gram matrix.

    It is computed in double precision, since the Gram matrix has the square of the condition number. Directions whose
    singular values are much smaller than the largest are corrected in part: by 95 % at a ratio of 1e-5 if enough
    iterations are made. Each iteration multiplies small ones by up to 2.5, so that 12 are enough for a ratio of 1e-3,
    and 16 for all that can be corrected.

    Args:
        x: Matrices X, (..., N, D), in single or double precision.
        iterations: Number of Newton-Schulz iterations.
        detach: Treat C as a constant in backpropagation.
        zero: As in :func:`svd_correction`, but there is no sharp limit: a direction of twice this size is
            corrected by 71 %, and one of half this size by 24 %. Default: none, so that rounding errors of tokens
            in single precision that lack directions are corrected in part (by up to 2 % of the largest).

    Returns:
        C, of the shape of ``x``.

    Source:
        Scaled iterations: Chen and Chow, A stable scaling of Newton-Schulz for improving the sign function computation
        of a Hermitian matrix (2014), equation 3.
    """
    ridge = RIDGE if zero is None else max(RIDGE, (2 * zero) ** 2)
    if detach:
        with torch.no_grad():
            return _newton_schulz(x.detach().double(), iterations, ridge).to(x.dtype)
    return _newton_schulz(x.double(), iterations, ridge).to(x.dtype)


def _svd(x: Tensor, zero: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The thin decomposition, and which singular values do not count as zero."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    limit = max(rounding(x.dtype) if zero is None else zero, x.shape[-2] // ROWS * torch.finfo(x.dtype).eps)
    return u, s, vh, s > s[..., :1] * limit


def _scaled_polar_factor(u: Tensor, s: Tensor, vh: Tensor, kept: Tensor) -> Tensor:
    return s[..., :1, None] * ((u * kept[..., None, :]) @ vh)


class _ScaledPolarFactor(torch.autograd.Function):
    """sigma_max U V^T with its gradient, for a fixed rank, as ``torch.compile`` can trace it."""

    @staticmethod
    def forward(ctx, x: Tensor, zero: float | None) -> Tensor:
        """Compute C."""
        u, s, vh, kept = _svd(x, zero)
        ctx.save_for_backward(u, s, vh, kept)
        return _scaled_polar_factor(u, s, vh, kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """The adjoint of dC = d sigma_max P + sigma_max dP, P = U V^T."""
        return _gradient(grad, *ctx.saved_tensors), None


class _TransformableFactor(torch.autograd.Function):
    """The same, with forward-mode derivatives, for ``torch.func``; the other outputs are the decomposition."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, zero: float | None) -> tuple[Tensor, ...]:
        """Compute C."""
        decomposition = _svd(x, zero)
        return _scaled_polar_factor(*decomposition), *decomposition

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        """Save the decomposition."""
        _, *decomposition = output
        ctx.mark_non_differentiable(*decomposition)
        ctx.save_for_backward(*decomposition)
        ctx.save_for_forward(*decomposition)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor, None]:
        """The adjoint of :meth:`jvp`."""
        return _gradient(grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _) -> tuple[Tensor | None, ...]:
        """Return dC = d sigma_max P + sigma_max dP, P = U V^T."""
        u, s, v, kept = _kept_columns(*ctx.saved_tensors)
        largest = u[..., :, :1].mT @ tangent @ v[..., :, :1]
        derivative = largest * (u @ v.mT) + s[..., :1, None] * _polar_derivative(tangent, u, s, v, kept)
        return derivative, None, None, None, None


def _gradient(grad: Tensor, *decomposition: Tensor) -> Tensor:
    u, s, v, kept = _kept_columns(*decomposition)
    largest = (u.mT @ grad * v.mT).sum((-2, -1), keepdim=True) * (u[..., :, :1] @ v[..., :, :1].mT)
    return largest + s[..., :1, None] * _polar_derivative(grad, u, s, v, kept)


def _kept_columns(u: Tensor, s: Tensor, vh: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """Return u, s, v and kept, with zeros in the columns of u and v that are not kept."""
    return u * kept[..., None, :], s, vh.mT * kept[..., None, :], kept


def _polar_derivative(direction: Tensor, u: Tensor, s: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """The derivative of U V^T in a direction, which is its own adjoint."""
    inverse = torch.where(kept, 1 / torch.where(kept, s, 1), 0)[..., None, :]
    inner = u.mT @ direction @ v
    both = kept[..., :, None] & kept[..., None, :]
    sums = torch.where(both, s[..., :, None] + s[..., None, :], 1)
    within = u @ ((inner - inner.mT) / sums) @ v.mT
    left = (direction @ v - u @ inner) * inverse @ v.mT
    right = (u * inverse) @ (u.mT @ direction - inner @ v.mT)
    return within + left + right


def _newton_schulz(x: Tensor, iterations: int, ridge: float) -> Tensor:
    """C by iterations that scale until ``lowest``, the smallest singular value that counts, has grown to about 1."""
    tall = x.shape[-2] >= x.shape[-1] or not x.shape[-2]  # without tokens, C is empty
    gram = x.mT @ x if tall else x @ x.mT
    unit = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    bound = gram.abs().sum(-2, keepdim=True).amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    root, inverse = gram / bound + ridge * unit, unit.expand_as(gram)
    lowest = max(ridge**0.5, (1.5 * SCALE) ** (4 - iterations))
    for _ in range(iterations):
        scale = min(SCALE, (3 / (1 + lowest + lowest**2)) ** 0.5)
        step = 1.5 * scale * unit - 0.5 * scale**3 * inverse @ root
        root, inverse = root @ step, step @ inverse
        lowest = scale * lowest * (3 - (scale * lowest) ** 2) / 2
    polar = (x @ inverse if tall else inverse @ x) / bound.sqrt()
    # The square root has no derivative at 0, the eigenvalue of a matrix of zeros.
    return _largest_eigenvalue(gram).clamp_min(torch.finfo(x.dtype).tiny).sqrt() * polar


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """The largest eigenvalue of positive semi-definite matrices, (..., 1, 1), by ``SQUARINGS`` squarings."""
    tiny = torch.finfo(gram.dtype).tiny
    power = gram
    for _ in range(SQUARINGS):
        power = power / _trace(power).clamp_min(tiny)
        power = power @ power
    return _trace(power @ gram) / _trace(power).clamp_min(tiny)


def _trace(matrices: Tensor) -> Tensor:
    """Of matrices (..., n, n): (..., 1, 1)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
