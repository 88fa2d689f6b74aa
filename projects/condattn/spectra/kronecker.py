"""Structured Jacobians of softmax attention, which are small enough for dense matrices.

A change dW of a weight changes row i of a head's output by dO_i = A_i dW z_i, where A_i (d x a) and z_i (b) are known
without a derivative with respect to the weight. The rows of the Jacobian for token i are therefore the Kronecker
product of A_i and z_i^T. With the map P, the scaling s of the logits, and the derivative of the softmax of a row,
Lambda_i = Diag(p_i) - p_i p_i^T:

    dO_i = s (V^T Lambda_i K) dW_Q x_i,    dO_i = s (V^T Lambda_i X) dW_K^T q_i,    dO_i = dW_V (P X)_i
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import jvp, vmap

from ..attention.site import AttentionSite
from .capture import LARGE, Seen, precondition
from .weights import head_bias, head_weight


@dataclass(frozen=True)
class RowKronecker:
    """A Jacobian whose rows are Kronecker products: dO_i = A_i dW z_i.

    Attributes:
        left: A, (N, d, a).
        right: z, (N, b).
        transposed: Whether callers give dW as (b, a) instead of (a, b).
        summands: Size of the terms that the softmax sums to each A_i, (N,); if attention is saturated, they nearly
            cancel.
    """

    left: Tensor
    right: Tensor
    transposed: bool = False
    summands: Tensor | None = None

    def is_rounding(self, direction: Tensor, product: Tensor) -> bool:
        """Return whether a product, (N, d), may be only the rounding error of terms that cancelled."""
        if self.summands is None:
            return False
        return bool(product.norm() < 1e-9 * (self.summands * self.right.norm(dim=1)).norm() * direction.norm())

    def __call__(self, direction: Tensor) -> Tensor:
        """Return the product with one change of the weight, (N, d)."""
        change = direction.T if self.transposed else direction
        return torch.einsum("nda,na->nd", self.left, self.right @ change.T)

    def scaled(self, factor: Tensor) -> RowKronecker:
        """Return the Jacobian for another scaling of the logits."""
        return replace(self, left=self.left * factor)

    def values(self) -> Tensor | None:
        """Return all singular values if every A_i is the same, else None.

        Each is the product of a singular value of A and one of the matrix with the rows z.
        """
        if not torch.equal(self.left, self.left[:1].expand_as(self.left)):
            return None
        parts = torch.linalg.svdvals(self.right), torch.linalg.svdvals(self.left[0])
        return torch.outer(*parts).flatten().sort(descending=True).values

    def compact(self, tolerance: float) -> RowKronecker:
        """Return a Jacobian with the same nonzero singular values, without weight changes that have no effect.

        Args:
            tolerance: Values below this multiple of the largest count as zero.
        """
        left = _within_span(self.left.flatten(0, 1), tolerance).unflatten(0, self.left.shape[:2])
        return RowKronecker(left, _within_span(self.right, tolerance))

    def rows(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return rows (n, a) and (n, b) whose Kronecker products, row by row, have the same nonzero singular values.

        Directions in which no output changes are left out.

        Args:
            tolerance: See :meth:`compact`.
        """
        _, lengths, vh = torch.linalg.svd(self.left, full_matrices=False)
        sizes = lengths * self.right.norm(dim=1)[:, None]
        token, direction = (sizes > tolerance * sizes.max()).nonzero(as_tuple=True)
        return lengths[token, direction, None] * vh[token, direction], self.right[token]

    def gram(self) -> Tensor:
        """Return J^T J, (a b, a b)."""
        a, b = self.left.shape[-1], self.right.shape[-1]
        lefts = self.left.mT @ self.left
        rights = (self.right[:, :, None] * self.right[:, None, :]).flatten(1)
        gram = rights.new_empty(a * b, a * b)
        for i in range(a):
            gram[i * b : (i + 1) * b] = (lefts[:, i].T @ rights).view(a, b, b).transpose(0, 1).reshape(b, a * b)
        return gram


def _within_span(rows: Tensor, tolerance: float) -> Tensor:
    """Express rows (n, m) in an orthonormal basis of their span, as (n, r)."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    tolerance = max(tolerance, max(rows.shape) * torch.finfo(rows.dtype).eps)
    return rows @ basis[: int((values > tolerance * values[0]).sum())].T


def row_kronecker(
    site: AttentionSite, seen: Seen, name: str, head: int, sample: int, conditioned: bool
) -> RowKronecker | None:
    """Return the Jacobian of a head, assuming that it computes plain softmax attention with a logit scaling of 1.

    The caller must compare it with a derivative of the host, because the assumption is not checked here.

    Args:
        site: The site.
        seen: A captured call of the site.
        name: 'q', 'k' or 'v'.
        head: Number of the head.
        sample: Which image or window.
        conditioned: Whether the output is C A(X) instead of A(X).

    Returns:
        The Jacobian; None if the tokens or the map could not be captured.
    """
    if site.cross_covariance or seen.map is None or len(seen.sources) < 3 or not (site.q and site.k and site.v):
        return None
    tokens = {part: seen.sources[part][sample].double() for part in "qkv"}
    made = {part: tokens[part] @ head_weight(site, part, head).double().T for part in "qkv"}
    weights, outputs = seen.map[sample, head].double(), seen.outputs[sample, head].double()
    change = torch.eye(outputs.shape[1], dtype=torch.float64, device=outputs.device)
    if conditioned:
        norm = lambda rows: precondition(site, rows[None, None])[0, 0]  # noqa: E731
        change = vmap(lambda unit: jvp(norm, (outputs,), (unit.expand_as(outputs),))[1], out_dims=-1)(change)
    change = change.expand(len(outputs), -1, -1)
    if name == "v":
        return RowKronecker(change, weights @ tokens["v"])
    others, right = (made["k"], tokens["q"]) if name == "q" else (tokens["k"], made["q"] + head_bias(site, "q", head))
    left = change @ _through_softmax(weights, made["v"], others)
    summands = torch.linalg.matrix_norm(change) * (weights @ (made["v"].norm(dim=1) * others.norm(dim=1)))
    return RowKronecker(left, right, name == "k", summands)


def _through_softmax(weights: Tensor, values: Tensor, others: Tensor) -> Tensor:
    """Return V^T Lambda_i Y for every row p_i of the map, (N, d, columns of Y).

    It is computed as a weighted sum of products of deviations from the means under p_i.
    """
    parts = []
    for rows in weights.split(max(1, LARGE // others.numel())):
        values_left, others_left = (x - (rows @ x)[:, None] for x in (values, others))
        parts.append((values_left * rows[..., None]).mT @ others_left)
    return torch.cat(parts)
