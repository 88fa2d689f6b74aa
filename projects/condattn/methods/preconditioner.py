"""Preconditioned attention, "PC" (arXiv 2603.27153): C A(X) with C = diag(1 / ||A(X)_i||_2), per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..attention.site import AttentionSite
from ..layers.head_norm import HeadNorm
from .base import check_flags, register_method
from .head_output import HeadOutputMethod


@register_method
@dataclass(frozen=True)
class RowPreconditioner(HeadOutputMethod):
    """Row equilibration of each head's output: every row is divided by its norm.

    It is applied before the output projection. If an activation, a norm, a gate, or a residual is between the heads and
    the projection, it is applied before that.

    Attributes:
        detach: If False, the gradient is exact. If True, C is a constant in the backward pass, as one unofficial source
            reports about the paper, whose own words leave it open.
        eps: Smallest norm that a row is divided by; the papers give no value. It is at least 2^-14 in float16.
        cross_covariance: What a row is if attention is between channels (XCiT, DaViT), which the paper does not say.
            With 'channels', it is a token's channels of a head, as in other attention; with 'tokens', it is one channel
            over all tokens.

    Raises:
        ValueError: If a setting has an invalid value.
    """

    alias: ClassVar[str] = "pc"
    gradient_settings = ("detach",)

    detach: bool = False
    eps: float = 1e-6
    cross_covariance: str = "channels"

    def __post_init__(self):
        check_flags(self, "detach")
        is_number = isinstance(self.eps, int | float) and not isinstance(self.eps, bool)
        if not (is_number and math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"RowPreconditioner: eps is {self.eps!r}; expected a positive finite number")
        if self.cross_covariance not in ("channels", "tokens"):
            raise ValueError(
                f"RowPreconditioner: cross_covariance is {self.cross_covariance!r}; expected 'channels' or 'tokens'"
            )

    def head_transform(self, site: AttentionSite) -> HeadNorm:
        """Return the transform that normalises the head outputs of ``site``."""
        return HeadNorm(site, self.eps, self.detach, self.cross_covariance == "tokens", self)
