"""The bound on the condition number of a head's Jacobian, by Thm 3.4 of arXiv 2603.07162."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.site import AttentionSite
from .capture import Seen, noise
from .weights import head_weight

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Bound:
    """The bound on the condition number of a head's Jacobian, by Thm 3.4 of arXiv 2603.07162, and its factors.

    It is a bound if X and the weights are square, and neither they nor the map are singular. For other factors, each
    condition number is that of the nonzero singular values. Products of such factors may have larger condition numbers,
    so that the value is then only the expression in the theorem, and no guarantee. Biases, and terms that are added to
    the logits, are not included.

    The value is kappa(X)^3 kappa(Lambda) kappa(W_V) (kappa(W_Q) + kappa(W_K)) + kappa(X) kappa(map), where Lambda is
    the derivative of the softmax: Diag(p) - p p^T for each row p of the map. Lambda is always singular; its condition
    number is therefore also that of its nonzero singular values.
    """

    tokens: float
    softmax_derivative: float
    map: float
    w_q: float
    w_k: float
    w_v: float

    @property
    def value(self) -> float:
        """The bound."""
        weights = self.w_v * (self.w_q + self.w_k)
        return self.tokens**3 * self.softmax_derivative * weights + self.tokens * self.map


def head_bound(site: AttentionSite, seen: Seen, head: int, sample: int = 0) -> Bound:
    """Compute the bound of Thm 3.4 for one head and one image or window.

    Raises:
        ValueError: If the site is not self-attention between tokens, or its tokens, map and weights are not all known.
    """
    refusal = ValueError(
        f"{site}: Thm 3.4 is of heads that are softmax(X W_Q W_K^T X^T) X W_V, of tokens X that are seen"
    )
    if site.cross_covariance or seen.tokens is None or seen.map is None or not (site.q and site.k and site.v):
        raise refusal
    weights = {name: head_weight(site, name, head) for name in ("q", "k", "v")}
    values = seen.tokens[sample] @ weights["v"].to(seen.tokens.dtype).T
    # What remains is the bias, because the rows of the map sum to one.
    offset = seen.outputs[sample, head] - seen.map[sample, head] @ values
    if not torch.allclose(offset, offset[:1].expand_as(offset), atol=1e-3 * seen.outputs[sample, head].abs().max()):
        raise refusal
    rows = seen.map[sample, head].double()
    derivatives = (torch.diag_embed(part) - part[:, :, None] * part[:, None, :] for part in rows.split(32))
    return Bound(
        _kappa(seen.tokens[sample], tolerance=noise(seen)),
        _ratio(torch.cat([torch.linalg.svdvals(part).flatten() for part in derivatives]), rows.shape[-1] * EPS),
        _kappa(seen.map[sample, head]),
        *(_kappa(weights[name]) for name in ("q", "k", "v")),
    )


def _kappa(matrix: Tensor, tolerance: float = 0.0) -> float:
    return _ratio(torch.linalg.svdvals(matrix.double()), max(tolerance, max(matrix.shape) * EPS))


def _ratio(values: Tensor, tolerance: float) -> float:
    """Return the largest singular value divided by the smallest nonzero one; NaN if all are zero."""
    top = values.max()
    values = values[values > tolerance * top]
    return (top / values.min()).item() if len(values) else math.nan
