"""Extreme singular values of Jacobians.

Small Jacobians are computed as dense matrices. For larger ones, a Gram matrix is factorised, or only matrix-vector
products are used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from .kronecker import RowKronecker

HAS_SCIPY = find_spec("scipy") is not None and find_spec("numpy") is not None
"""Whether Jacobians can be measured; all other measurements need torch alone."""
if HAS_SCIPY:
    import numpy as np
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, lobpcg

WHOLE = 2048
"""A Jacobian with at most this many rows, or columns, is computed as a dense matrix."""
DENSE = 16384
"""A Gram matrix with at most this many rows is factorised, which takes 16 bytes per entry."""
RELIABLE = 0.1
"""An extreme singular value counts as found up to this residual."""
STEPS = 500
"""Maximum number of iterations to find the smallest singular value of a larger Jacobian."""


@dataclass(frozen=True)
class Extremes:
    """The extreme singular values of a Jacobian.

    Attributes:
        sigma_max: The largest singular value.
        sigma_min: The smallest nonzero singular value; NaN if none was found.
        rank: Number of nonzero singular values, or None if the Jacobian was not computed as a dense matrix.
        size: Rows and columns of the Jacobian.
        residual: 0 if the Jacobian was computed as a dense matrix. Otherwise the larger one of |G v - sigma^2 v| /
            sigma^2 of the two values, with G the smaller one of J J^T and J^T J: a true sigma^2 is within this relative
            distance. Above ``RELIABLE``, the value counts as not found.
    """

    sigma_max: float
    sigma_min: float
    rank: int | None
    size: tuple[int, int]
    residual: float

    @property
    def kappa(self) -> float:
        """sigma_max / sigma_min; NaN if sigma_min was not found, or the matrix is zero.

        Values below the rounding error of a model's own numbers count as zero, so that kappa is at most 10^6 for a
        model in float32, and 16 in bfloat16. Above ``WHOLE``, values below 10^-7 of the largest count as zero in
        float64 too.
        """
        found = self.sigma_min and self.residual <= RELIABLE
        return self.sigma_max / self.sigma_min if found else float("nan")


@dataclass(frozen=True)
class _Products:
    """A matrix given by products: ``forward`` multiplies a vector by it, ``backward`` by its transpose."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    rows: int
    columns: int
    like: Tensor

    def gram(self, vector: np.ndarray) -> np.ndarray:
        """Multiply ``vector`` by the Gram matrix, the smaller one of J J^T and J^T J."""
        first, second = (self.backward, self.forward) if self.rows <= self.columns else (self.forward, self.backward)
        direction = torch.as_tensor(vector, dtype=self.like.dtype, device=self.like.device).flatten()
        return second(first(direction)).double().cpu().numpy()

    def operator(self) -> LinearOperator:
        """Return :meth:`gram` as a linear operator of SciPy."""
        size = min(self.rows, self.columns)
        many = lambda block: np.stack([self.gram(one) for one in block.T], 1)  # noqa: E731
        return LinearOperator((size, size), self.gram, matmat=many, dtype=np.float64)

    def residual(self, value: float, vector: np.ndarray) -> float:
        """Return |G v - value v| / value."""
        return float(np.linalg.norm(self.gram(vector) - value * vector) / value)

    def largest(self) -> tuple[float, float]:
        """Return the largest eigenvalue of the Gram matrix, and its residual."""
        operator = self.operator()
        start = np.random.default_rng(0).standard_normal(operator.shape[0])
        values, vectors = eigsh(operator, 1, which="LA", tol=1e-6, v0=start)
        return values[0], self.residual(values[0], vectors[:, 0])

    def smallest(self, top: float, null: np.ndarray | None, tolerance: float) -> tuple[float, float]:
        """Return the smallest nonzero eigenvalue, orthogonal to ``null``, and its residual; NaN if none was found.

        Singular values below ``tolerance`` of the largest count as zero, if that is more than rounding.
        """
        operator = self.operator()
        start = np.random.default_rng(1).standard_normal((operator.shape[0], 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about lack of convergence, which the residual measures
            values, vectors = lobpcg(operator, start, Y=null, largest=False, tol=1e-8 * top, maxiter=STEPS)
        zero = max(max(self.rows, self.columns) * np.finfo(np.float64).eps, tolerance**2) * top
        index = next((i for i in np.argsort(values) if values[i] > zero), None)
        return (
            (math.nan, math.inf) if index is None else (values[index], self.residual(values[index], vectors[:, index]))
        )

    def smallest_by_factors(self, gram: Tensor, zero: float) -> tuple[float, float]:
        """Return the same as :meth:`smallest`, above ``zero``, by LU factors of the Gram matrix (overwritten)."""
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
    """Compute extreme singular values of the Jacobian of ``function`` at ``weight``, in its precision.

    Args:
        function: A function from any shape to any shape, differentiable in both modes.
        weight: The argument at which the Jacobian is taken.
        null: Orthonormal directions (n, rows) in which the output cannot change, if they are known.
        whole: See ``WHOLE``.
        tolerance: Values below this multiple of the largest singular value count as zero, if it is more than rounding.

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
        low, other = products.smallest(top, constraints, tolerance)
        return Extremes(math.sqrt(top), math.sqrt(low), None, (rows, columns), max(residual, other))
    product, size = (backward, rows) if rows <= columns else (forward, columns)
    matrix = vmap(product, chunk_size=64)(torch.eye(size, dtype=weight.dtype, device=weight.device))
    tolerance = max(tolerance, max(rows, columns) * torch.finfo(weight.dtype).eps)
    return _of_values(_singular_values(matrix), tolerance, (rows, columns))


@torch.no_grad()
def kronecker_extremes(
    jacobian: RowKronecker, tolerance: float = 0.0, whole: int = WHOLE, dense: int = DENSE
) -> Extremes:
    """Compute extreme singular values of a Jacobian whose rows are Kronecker products.

    Args:
        jacobian: The Jacobian.
        tolerance: See :func:`jacobian_extremes`.
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
        low, other = products.smallest(top, None, tolerance)
    return Extremes(math.sqrt(top), math.sqrt(low), None, size, max(residual, other))


def _singular_values(matrix: Tensor) -> Tensor:
    if not matrix.isfinite().all():
        raise _not_finite()
    return torch.linalg.svdvals(matrix.double())


def _of_values(values: Tensor, tolerance: float, size: tuple[int, int]) -> Extremes:
    rank = int((values > tolerance * values[0]).sum())
    return Extremes(values[0].item(), values[max(rank - 1, 0)].item(), rank, size, 0.0)


def _not_finite() -> ValueError:
    return ValueError("the Jacobian has values that are not finite; is the checkpoint damaged?")
