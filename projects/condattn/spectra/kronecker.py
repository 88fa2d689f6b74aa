"""Jacobians of softmax attention by their structure, which makes them small enough for dense matrices.

One row of a head's output changes with a weight as dO_i = A_i dW z_i, with A_i (d x a) and z_i (b) that no weight
derivative is needed for: rows i of the Jacobian are the Kronecker product of A_i and z_i^T. With the map P, the
scaling s of the logits, and the derivative of the softmax of a row, Lambda_i = Diag(p_i) - p_i p_i^T:

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
        transposed: Whether dW is (b, a) to others, not (a, b).
        summands: Size of what the softmax sums up to each A_i, (N,); where attention is saturated, nearly all cancels.
    """

    left: Tensor
    right: Tensor
    transposed: bool = False
    summands: Tensor | None = None

    def is_rounding(self, direction: Tensor, product: Tensor) -> bool:
        """Whether what is left of a product, (N, d), may be the rounding of what cancelled."""
        if self.summands is None:
            return False
        return bool(product.norm() < 1e-9 * (self.summands * self.right.norm(dim=1)).norm() * direction.norm())

    def __call__(self, direction: Tensor) -> Tensor:
        """The product with one change of the weight: (N, d)."""
        change = direction.T if self.transposed else direction
        return torch.einsum("nda,na->nd", self.left, self.right @ change.T)

    def scaled(self, factor: Tensor) -> RowKronecker:
        """The same with another scaling of the logits."""
        return replace(self, left=self.left * factor)

    def values(self) -> Tensor | None:
        """All singular values, where every A_i is the same: those of A times those of the rows z."""
        if not torch.equal(self.left, self.left[:1].expand_as(self.left)):
            return None
        parts = torch.linalg.svdvals(self.right), torch.linalg.svdvals(self.left[0])
        return torch.outer(*parts).flatten().sort(descending=True).values

    def compact(self, tolerance: float) -> RowKronecker:
        """The same singular values but for zeros, without the changes of the weight that change no output.

        Args:
            tolerance: What counts as zero, relative to the largest.
        """
        left = _within_span(self.left.flatten(0, 1), tolerance).unflatten(0, self.left.shape[:2])
        return RowKronecker(left, _within_span(self.right, tolerance))

    def rows(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """Rows (n, a) and (n, b) whose products, row by row, have the same singular values but for zeros.

        Args:
            tolerance: As of :meth:`compact`; directions in which no output changes are left out.
        """
        _, lengths, vh = torch.linalg.svd(self.left, full_matrices=False)
        sizes = lengths * self.right.norm(dim=1)[:, None]
        token, direction = (sizes > tolerance * sizes.max()).nonzero(as_tuple=True)
        return lengths[token, direction, None] * vh[token, direction], self.right[token]

    def gram(self) -> Tensor:
        """J^T J, (a b, a b)."""
        a, b = self.left.shape[-1], self.right.shape[-1]
        lefts = self.left.mT @ self.left
        rights = (self.right[:, :, None] * self.right[:, None, :]).flatten(1)
        gram = rights.new_empty(a * b, a * b)
        for i in range(a):
            gram[i * b : (i + 1) * b] = (lefts[:, i].T @ rights).view(a, b, b).transpose(0, 1).reshape(b, a * b)
        return gram


def _within_span(rows: Tensor, tolerance: float) -> Tensor:
    """Rows (n, m) as (n, r), by an orthonormal basis of what they span."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    tolerance = max(tolerance, max(rows.shape) * torch.finfo(rows.dtype).eps)
    return rows @ basis[: int((values > tolerance * values[0]).sum())].T


def row_kronecker(
    site: AttentionSite, seen: Seen, name: str, head: int, sample: int, conditioned: bool
) -> RowKronecker | None:
    """What the Jacobian is if the head is plain softmax attention, but for the scaling of its logits, which is 1 here.

    Args:
        site: The site.
        seen: A call of it.
        name: 'q', 'k' or 'v'.
        head: Number of the head.
        sample: Which image or window.
        conditioned: Whether the output is C A(X), and not A(X).

    Returns:
        The Jacobian; None where tokens or map could not be seen. Whether it is right, a derivative of the host tells.
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
    """V^T Lambda_i Y for every row p_i of the map, (N, d, columns of Y): sums of what is left of the rows' means."""
    parts = []
    for rows in weights.split(max(1, LARGE // others.numel())):
        values_left, others_left = (x - (rows @ x)[:, None] for x in (values, others))
        parts.append((values_left * rows[..., None]).mT @ others_left)
    return torch.cat(parts)
