"""Extreme singular values of Jacobians: whole where they are small, else by factors, or by products alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, lobpcg
from torch import Tensor
from torch.func import jvp, vjp, vmap

from .kronecker import RowKronecker

WHOLE = 2048
"""A Jacobian with no more rows, or no more columns, is computed whole."""
DENSE = 16384
"""A Gram matrix of no more rows is factorised; that takes 16 bytes an entry."""
RELIABLE = 0.1
"""Up to this residual an extreme singular value counts as found."""
STEPS = 500
"""Of the methods that find the smallest singular value of others."""


@dataclass(frozen=True)
class Extremes:
    """The extreme singular values of a Jacobian.

    Attributes:
        sigma_max: The largest.
        sigma_min: The smallest that is not zero; NaN where none was found.
        rank: How many are not zero, or None where the Jacobian was not computed whole.
        size: Its rows and columns.
        residual: 0 where it was computed whole; else the larger of |G v - sigma^2 v| / sigma^2 of the two, with G the
            smaller of J J^T and J^T J: some sigma^2 lies so close, relatively. Above ``RELIABLE`` it was not found.
    """

    sigma_max: float
    sigma_min: float
    rank: int | None
    size: tuple[int, int]
    residual: float

    @property
    def kappa(self) -> float:
        """sigma_max / sigma_min; NaN where sigma_min was not found, or is of a matrix of zeros.

        What is smaller than the rounding of a model's own numbers counts as zero: of a model in float32 it is 10^6 at
        most, in bfloat16 16. Above ``WHOLE`` what is below 10^-7 of the largest counts as zero in float64 too.
        """
        found = self.sigma_min and self.residual <= RELIABLE
        return self.sigma_max / self.sigma_min if found else float("nan")


@dataclass(frozen=True)
class _Products:
    """A matrix by its products: ``forward`` with a vector, ``backward`` of its transpose."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    rows: int
    columns: int
    like: Tensor

    def gram(self, vector: np.ndarray) -> np.ndarray:
        """Of the smaller of J J^T and J^T J."""
        first, second = (self.backward, self.forward) if self.rows <= self.columns else (self.forward, self.backward)
        direction = torch.as_tensor(vector, dtype=self.like.dtype, device=self.like.device).flatten()
        return second(first(direction)).double().cpu().numpy()

    def operator(self) -> LinearOperator:
        """:meth:`gram`, for scipy."""
        size = min(self.rows, self.columns)
        many = lambda block: np.stack([self.gram(one) for one in block.T], 1)  # noqa: E731
        return LinearOperator((size, size), self.gram, matmat=many, dtype=np.float64)

    def residual(self, value: float, vector: np.ndarray) -> float:
        """|G v - value v| / value."""
        return float(np.linalg.norm(self.gram(vector) - value * vector) / value)

    def largest(self) -> tuple[float, float]:
        """The largest eigenvalue of the Gram matrix, and its residual."""
        operator = self.operator()
        start = np.random.default_rng(0).standard_normal(operator.shape[0])
        values, vectors = eigsh(operator, 1, which="LA", tol=1e-6, v0=start)
        return values[0], self.residual(values[0], vectors[:, 0])

    def smallest(self, top: float, null: np.ndarray | None) -> tuple[float, float]:
        """The smallest that is not zero, off the directions ``null``, and its residual; NaN, if none was found."""
        operator = self.operator()
        start = np.random.default_rng(1).standard_normal((operator.shape[0], 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it has not converged: the residual says how far
            values, vectors = lobpcg(operator, start, Y=null, largest=False, tol=1e-8 * top, maxiter=STEPS)
        zero = max(self.rows, self.columns) * np.finfo(np.float64).eps * top
        index = next((i for i in np.argsort(values) if values[i] > zero), None)
        return (
            (math.nan, math.inf) if index is None else (values[index], self.residual(values[index], vectors[:, index]))
        )

    def smallest_by_factors(self, gram: Tensor, zero: float) -> tuple[float, float]:
        """As :meth:`smallest`, above ``zero``, of the Gram matrix (which is overwritten), by its LU factors."""
        gram.diagonal().sub_(zero)
        factors = torch.linalg.lu_factor(gram)

        def solve(vector: np.ndarray) -> np.ndarray:
            return (
                torch.linalg.lu_solve(*factors, torch.as_tensor(vector).to(gram).reshape(-1, 1)).flatten().cpu().numpy()
            )

        start = np.random.default_rng(1).standard_normal(len(gram))
        try:
            inverse = LinearOperator(gram.shape, solve, dtype=np.float64)
            values, vectors = eigsh(inverse, 1, which="LA", tol=1e-6, v0=start, maxiter=STEPS)
        except ArpackNoConvergence:
            return math.nan, math.inf
        value = zero + 1 / values[0]
        return value, self.residual(value, vectors[:, 0])


@torch.no_grad()
def jacobian_extremes(
    function: Callable[[Tensor], Tensor],
    weight: Tensor,
    null: Tensor | None = None,
    whole: int = WHOLE,
    tolerance: float = 0.0,
) -> Extremes:
    """Extreme singular values of the Jacobian of ``function`` at ``weight``, in the precision of ``weight``.

    Args:
        function: Differentiable in both modes; any shape to any shape.
        weight: Where.
        null: Orthonormal directions (n, rows) of the output in which it cannot change, where they are known.
        whole: See ``WHOLE``.
        tolerance: What counts as zero, relative to the largest singular value, if that is more than rounding.

    Raises:
        ValueError: If the Jacobian has values that are not finite.
    """
    output, pull = vjp(function, weight)
    rows, columns = output.numel(), weight.numel()

    def forward(direction: Tensor) -> Tensor:
        return jvp(function, (weight,), (direction.reshape(weight.shape),))[1].flatten()

    def backward(direction: Tensor) -> Tensor:
        return pull(direction.reshape(output.shape))[0].flatten()

    if min(rows, columns) > whole:
        products = _Products(forward, backward, rows, columns, weight)
        constraints = null.double().cpu().numpy().T if null is not None and rows <= columns else None
        top, residual = products.largest()
        low, other = products.smallest(top, constraints)
        return Extremes(math.sqrt(top), math.sqrt(low), None, (rows, columns), max(residual, other))
    product, size = (backward, rows) if rows <= columns else (forward, columns)
    matrix = vmap(product, chunk_size=64)(torch.eye(size, dtype=weight.dtype, device=weight.device))
    tolerance = max(tolerance, max(rows, columns) * torch.finfo(weight.dtype).eps)
    return _of_values(_singular_values(matrix), tolerance, (rows, columns))


@torch.no_grad()
def kronecker_extremes(
    jacobian: RowKronecker, tolerance: float = 0.0, whole: int = WHOLE, dense: int = DENSE
) -> Extremes:
    """Extreme singular values of a Jacobian whose rows are Kronecker products.

    Args:
        jacobian: The Jacobian.
        tolerance: As in :func:`jacobian_extremes`.
        whole: See ``WHOLE``.
        dense: See ``DENSE``.

    Raises:
        ValueError: If the Jacobian has values that are not finite.
    """
    size = jacobian.left[..., 0].numel(), jacobian.left.shape[-1] * jacobian.right.shape[-1]
    if not (jacobian.left.isfinite().all() and jacobian.right.isfinite().all()):
        raise _not_finite()
    tolerance = max(tolerance, max(size) * torch.finfo(jacobian.left.dtype).eps)
    if (values := jacobian.values()) is not None:
        return _of_values(values, tolerance, size)
    compact = jacobian.compact(tolerance)
    left, right = compact.rows(tolerance)
    rows, (a, b) = len(left), (left.shape[1], right.shape[1])
    if min(rows, a * b) <= whole:
        return _of_values(_singular_values((left[:, :, None] * right[:, None, :]).flatten(1)), tolerance, size)
    products = _Products(
        lambda direction: ((right @ direction.view(a, b).T) * left).sum(1),
        lambda direction: (left.T @ (direction[:, None] * right)).flatten(),
        rows,
        a * b,
        left,
    )
    top, residual = products.largest()
    if min(rows, a * b) <= dense:
        gram = (left @ left.T).mul_(right @ right.T) if rows <= a * b else compact.gram()
        low, other = products.smallest_by_factors(gram, max(tolerance, 1e-7) ** 2 * top)
    else:
        low, other = products.smallest(top, None)
    return Extremes(math.sqrt(top), math.sqrt(low), None, size, max(residual, other))


def _singular_values(matrix: Tensor) -> Tensor:
    if not matrix.isfinite().all():
        raise _not_finite()
    return torch.linalg.svdvals(matrix.double())


def _of_values(values: Tensor, tolerance: float, size: tuple[int, int]) -> Extremes:
    rank = int((values > tolerance * values[0]).sum())
    return Extremes(values[0].item(), values[max(rank - 1, 0)].item(), rank, size, 0.0)


def _not_finite() -> ValueError:
    return ValueError("the Jacobian has values that are not finite; is the checkpoint whole?")
