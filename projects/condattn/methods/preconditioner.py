"""Preconditioned attention, "PC" (arXiv 2603.27153): C A(X) with C = diag(1 / ||A(X)_i||_2), per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import inner, is_copying
from ..kernels.row_norm import normalize_rows, normalized_linear
from ..kernels.switch import is_ordinary, is_plain
from ..sites import AttentionSite
from .base import ConditionedLayer, Method, become, check_can_become, leave_out, refuse_scripting, register_method
from .lending import Postponement
from .multihead import ConditionedMultiheadAttention, become_conditioned


@register_method
@dataclass(frozen=True)
class RowPreconditioner(Method):
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

    def check(self, site: AttentionSite) -> None:
        """Raise unless a module receives the head outputs of ``site``, and its heads divide their channels."""
        out = site.out
        if out is None:
            raise ValueError(f"{site}: cannot be preconditioned: {site.obstacle}; {leave_out(site)}")
        if is_copying(out.owner):
            raise ValueError(
                f"{site}: cannot be preconditioned: a {type(out.owner).__name__} of PEFT is around its "
                "output projection; condition the model before get_peft_model"
            )
        if isinstance(out.owner, nn.MultiheadAttention):
            check_can_become(out.owner, ConditionedMultiheadAttention, site)
        if out.reader is not None:
            check_can_become(inner(out.owner), PreconditionedLinear, site)
        channels, heads = _channels(site), out.num_heads or site.num_heads
        if channels and channels % heads:
            raise ValueError(
                f"{site}: cannot be preconditioned: {heads} heads do not divide its {channels} channels; "
                f"{leave_out(site)}"
            )

    def apply(self, site: AttentionSite) -> None:
        """Put the preconditioner in front of what receives the head outputs."""
        owner = inner(site.out.owner)
        owner.preconditioner = self
        owner.head_norm = HeadNorm(self, site)
        owner.is_prepared = False
        if isinstance(owner, nn.MultiheadAttention):
            become_conditioned(owner)
        elif type(owner) in PLAIN_LINEAR and owner is site.out.projection:
            become(owner, PreconditionedLinear)
        else:
            owner.register_forward_pre_hook(owner.head_norm)
            owner.__prepare_scriptable__ = refuse_scripting
        if site.out.reader is not None:
            Postponement(site.out.reader, owner)

    @classmethod
    def applied_to(cls, site: AttentionSite) -> RowPreconditioner | None:
        """The preconditioner of ``site``, or None."""
        return getattr(site.out and inner(site.out.owner), "preconditioner", None)


class HeadNorm:
    """Normalises the rows of all heads of a site, which lie side by side in one tensor; also a forward pre-hook.

    Args:
        method: The settings.
        site: Describes the heads.
    """

    def __init__(self, method: RowPreconditioner, site: AttentionSite) -> None:
        self.method = method
        self.axis = site.out.axis
        self.channels = site.out.channels
        self.num_heads = site.out.num_heads or site.num_heads
        self.interleaved = site.out.interleaved
        self.over_tokens = site.cross_covariance and method.cross_covariance == "tokens"

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        """As a forward pre-hook: normalise the first argument, unless an adapter around the module has done so."""
        return args if module.is_prepared else (self.normalize(args[0]), *args[1:])

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise the rows of ``x``, a tensor with the channels of all heads along the site's axis."""
        if self.channels is None:
            return self._normalize(x)
        before, after = self.channels.start, x.shape[self.axis] - self.channels.stop
        parts = list(x.split([before, x.shape[self.axis] - before - after, after], dim=self.axis))
        parts[1] = self._normalize(parts[1])
        return torch.cat(parts, dim=self.axis)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` of the normalised rows of ``x``, (..., channels)."""
        side_by_side = self.channels is None and not self.interleaved and not self.over_tokens
        if is_plain() or not side_by_side or not is_ordinary(weight):
            return F.linear(self.normalize(x), weight, bias)
        return normalized_linear(x, weight, bias, self.num_heads, self.method.eps, self.method.detach)

    def row_norms(self, x: Tensor) -> Tensor:
        """Mean norm of the rows of each head in ``x``, (num_heads,), in float64; what is divided by on average."""
        part = x if self.channels is None else x.movedim(self.axis, -1)[..., self.channels].movedim(-1, self.axis)
        heads, axis = self._heads(part.double())
        norms = torch.linalg.vector_norm(heads, dim=-2 if self.over_tokens else axis + (not self.interleaved))
        if self.over_tokens:
            return norms.unflatten(-1, (self.num_heads, -1)).mean(-1).flatten(0, -2).mean(0)
        return norms.movedim(axis, -1).flatten(0, -2).mean(0)

    def rows(self, x: Tensor) -> Tensor:
        """The head outputs in ``x`` as matrices: (samples, num_heads, rows, d); the samples are the first axis."""
        part = x if self.channels is None else x.movedim(self.axis, -1)[..., self.channels].movedim(-1, self.axis)
        axis = self.axis % x.dim()
        heads = part.unflatten(axis, (-1, self.num_heads) if self.interleaved else (self.num_heads, -1))
        heads = heads.movedim((axis + self.interleaved, axis + (not self.interleaved)), (-2, -1))
        return heads.flatten(1, -3).transpose(1, 2) if heads.dim() > 3 else heads.unsqueeze(2)

    def _normalize(self, x: Tensor) -> Tensor:
        eps, detach = self.method.eps, self.method.detach
        if self.over_tokens:
            return normalize_rows(x, eps, detach, dim=-2)
        heads, axis = self._heads(x)
        return normalize_rows(heads, eps, detach, dim=axis + (not self.interleaved)).flatten(axis, axis + 1)

    def _heads(self, x: Tensor) -> tuple[Tensor, int]:
        """``x`` with the axis of all heads' channels split in two, and which axis that is."""
        if self.over_tokens:
            return x, x.dim() - 1
        axis = self.axis % x.dim()
        return x.unflatten(axis, (-1, self.num_heads) if self.interleaved else (self.num_heads, -1)), axis


class PreconditionedLinear(ConditionedLayer, nn.Linear):
    """An output projection that normalises each head's part of its input first.

    Shape: input (..., num_heads * d), output (..., out features), as ``nn.Linear``.
    """

    host = nn.Linear
    head_norm: HeadNorm
    preconditioner: RowPreconditioner
    is_prepared: bool = False
    """Whether an adapter around the layer has normalised the input."""

    def forward(self, input: Tensor) -> Tensor:
        """Project the row-normalised head outputs."""
        if self.is_prepared:
            return F.linear(input, self.weight, self.bias)
        return self.head_norm.project(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The settings, behind those of ``nn.Linear``."""
        return f"{super().extra_repr()}, num_heads={self.head_norm.num_heads}, {self.preconditioner}"


PLAIN_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _channels(site: AttentionSite) -> int | None:
    """How many channels of head outputs lie along the axis, where the layers tell."""
    out = site.out
    if out.channels is not None:
        return out.channels.stop - out.channels.start
    for name in ("in_features", "in_channels"):
        if hasattr(out.projection, name):
            return getattr(out.projection, name)
    return len(site.v.weight) if site.v is not None else None
