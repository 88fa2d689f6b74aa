"""Preconditioned attention, "PC" (arXiv 2603.27153): C A(X) with C = diag(1 / ||A(X)_i||_2), per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.row_norm import normalize_rows
from ..sites import AttentionSite
from .base import Method, become, check_can_become, register_method
from .multihead import ConditionedMultiheadAttention


@register_method
@dataclass(frozen=True)
class RowPreconditioner(Method):
    """Row equilibration of each head's output in front of the output projection.

    Attributes:
        detach: If False, the gradient is that of the forward pass; if True, C is a constant in backpropagation, as
            one unofficial source reports of the paper (its own words leave it open).
        eps: Smallest norm that a row is divided by; the papers give none.

    Raises:
        ValueError: If ``eps`` is not positive and finite.
    """

    alias: ClassVar[str] = "pc"

    detach: bool = False
    eps: float = 1e-6

    def __post_init__(self):
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"RowPreconditioner: eps is {self.eps!r}; expected a positive finite number")

    def check(self, site: AttentionSite) -> None:
        """Raise unless the head outputs of ``site`` reach a plain output projection."""
        if site.out is None:
            raise ValueError(
                f"{site}: cannot be preconditioned, because a norm or gate stands between its heads and its output "
                f"projection; leave it out with exclude=[{site.name!r}]"
            )
        check_can_become(site.out.owner, _layer(site), site)

    def apply(self, site: AttentionSite) -> None:
        """Put the preconditioner in front of the output projection."""
        layer = become(site.out.owner, _layer(site))
        layer.num_heads = site.num_heads
        layer.preconditioner = self

    @classmethod
    def applied_to(cls, site: AttentionSite) -> RowPreconditioner | None:
        """The preconditioner of ``site``, or None."""
        return getattr(site.out and site.out.owner, "preconditioner", None)


class PreconditionedLinear(nn.Linear):
    """An output projection that normalises each head's part of its input first.

    Shape: input (..., num_heads * d), output (..., out features), as ``nn.Linear``.
    """

    host = nn.Linear
    num_heads: int
    preconditioner: RowPreconditioner

    def forward(self, input: Tensor) -> Tensor:
        """Project the row-normalised head outputs."""
        heads = input.unflatten(-1, (self.num_heads, -1))
        rows = normalize_rows(heads, self.preconditioner.eps, self.preconditioner.detach)
        return F.linear(rows.flatten(-2), self.weight, self.bias)

    def extra_repr(self) -> str:
        """The settings, behind those of ``nn.Linear``."""
        return f"{super().extra_repr()}, num_heads={self.num_heads}, {self.preconditioner}"


def _layer(site: AttentionSite) -> type[nn.Module]:
    functional = isinstance(site.out.owner, nn.MultiheadAttention)
    return ConditionedMultiheadAttention if functional else PreconditionedLinear
