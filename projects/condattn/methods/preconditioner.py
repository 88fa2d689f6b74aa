"""Preconditioned attention, "PC" (arXiv 2603.27153): C A(X) with C = diag(1 / ||A(X)_i||_2), per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..attention.site import AttentionSite
from ..layers.head_norm import HeadNorm
from .base import register_method
from .head_output import HeadOutputMethod


@register_method
@dataclass(frozen=True)
class RowPreconditioner(HeadOutputMethod):
    """Row equilibration of each head's output, where it leaves the heads.

    Mostly that is in front of the output projection; where an activation, a norm, a gate, or a residual stands between
    the two, it is in front of that.

    Attributes:
        detach: If False, the gradient is that of the forward pass; if True, C is a constant in backpropagation, as
            one unofficial source reports of the paper (its own words leave it open).
        eps: Smallest norm that a row is divided by; the papers give none.
        cross_covariance: What a row is where attention is between channels (XCiT, DaViT), which the paper does not
            say: 'channels' takes each token's channels of a head, as elsewhere; 'tokens' each channel over all tokens.

    Raises:
        ValueError: If a setting is not one of these.
    """

    alias: ClassVar[str] = "pc"

    detach: bool = False
    eps: float = 1e-6
    cross_covariance: str = "channels"

    def __post_init__(self):
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"RowPreconditioner: eps is {self.eps!r}; expected a positive finite number")
        if self.cross_covariance not in ("channels", "tokens"):
            raise ValueError(
                f"RowPreconditioner: cross_covariance is {self.cross_covariance!r}; expected 'channels' or 'tokens'"
            )

    def head_transform(self, site: AttentionSite) -> HeadNorm:
        """What normalises the head outputs of ``site``."""
        return HeadNorm(site, self.eps, self.detach, self.cross_covariance == "tokens", self)
