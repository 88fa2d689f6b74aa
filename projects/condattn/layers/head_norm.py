"""Row normalisation of head outputs."""

from __future__ import annotations

from torch import Tensor

from ..attention.site import AttentionSite
from ..kernels.row_norm import normalize_rows, normalized_linear
from ..kernels.switch import is_ordinary, is_plain
from .head_transform import HeadTransform


class HeadNorm(HeadTransform):
    """Divides each row of each head's output by its Euclidean norm.

    Args:
        site: Describes the heads.
        eps: Smallest norm that a row is divided by.
        detach: Whether the norms are treated as constants in the backward pass.
        over_tokens: Whether a row is one channel over all tokens if attention is between channels.
        method: See :class:`.head_transform.HeadTransform`.
    """

    def __init__(
        self,
        site: AttentionSite,
        eps: float = 1e-6,
        detach: bool = False,
        over_tokens: bool = False,
        method: object = None,
    ) -> None:
        super().__init__(site, method)
        self.eps, self.detach = eps, detach
        self.over_tokens = site.cross_covariance and over_tokens

    def transform_heads(self, x: Tensor, heads: int, channels: int) -> Tensor:
        """Normalise the rows of all heads."""
        if not self.over_tokens:
            return normalize_rows(x, self.eps, self.detach, dim=channels)
        last = x.dim() - 1
        tokens = next(axis for axis in range(last, -1, -1) if axis not in (heads, channels))
        return normalize_rows(x, self.eps, self.detach, dim=tokens)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``F.linear`` of the normalised rows of ``x``, (..., channels)."""
        side_by_side = self.channels is None and not self.interleaved and not self.over_tokens
        if is_plain() or not side_by_side or not is_ordinary(weight):
            return super().project(x, weight, bias)
        return normalized_linear(x, weight, bias, self.num_heads, self.eps, self.detach)
