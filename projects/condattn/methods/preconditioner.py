"""Preconditioned attention, "PC" (arXiv 2603.27153): C A(X) with C = diag(1 / ||A(X)_i||_2), per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..attention.adapters import inner, is_copying
from ..attention.site import AttentionSite, HeadOutputs
from ..layers.class_swap import check_can_swap, leave_out, refuse_scripting, restore_class, swap_class
from ..layers.head_norm import PLAIN_LINEAR, HeadNorm, PreconditionedLinear
from ..layers.hooks import remove_hooks
from ..layers.multihead import ConditionedMultiheadAttention, swap_to_conditioned
from ..layers.overrides import PostponedProjection
from .base import Method, register_method


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
        if (other := getattr(inner(out.owner), "preconditioner", None)) is not None:
            raise ValueError(
                f"{site}: its head outputs are normalised already, by {other}; two methods cannot normalise them: name "
                "one of them"
            )
        if is_copying(out.owner):
            raise ValueError(
                f"{site}: cannot be preconditioned: a {type(out.owner).__name__} of PEFT is around its "
                "output projection; condition the model before get_peft_model"
            )
        if isinstance(out.owner, nn.MultiheadAttention):
            check_can_swap(out.owner, ConditionedMultiheadAttention, site)
        if out.reader is not None:
            check_can_swap(inner(out.owner), PreconditionedLinear, site)
        channels, heads = _channels(site, out), site.heads_of(out)
        if channels and channels % heads:
            raise ValueError(
                f"{site}: cannot be preconditioned: {heads} heads do not divide its {channels} channels; "
                f"{leave_out(site)}"
            )

    def apply(self, site: AttentionSite) -> None:
        """Put the preconditioner in front of what receives the head outputs."""
        out = site.out
        assert out is not None  # see check
        owner: Any = inner(out.owner)
        owner.preconditioner = self
        owner.head_norm = self.head_norm(site)
        owner.is_prepared = False
        if isinstance(owner, nn.MultiheadAttention):
            swap_to_conditioned(owner)
        elif type(owner) in PLAIN_LINEAR and owner is out.projection:
            swap_class(owner, PreconditionedLinear)
        else:
            owner.register_forward_pre_hook(owner.head_norm)
            owner.__prepare_scriptable__ = refuse_scripting
        if out.reader is not None:
            PostponedProjection(out.reader, owner)

    def head_norm(self, site: AttentionSite) -> HeadNorm:
        """What normalises the head outputs of ``site``."""
        return HeadNorm(site, self.eps, self.detach, self.cross_covariance == "tokens")

    @classmethod
    def applied_to(cls, site: AttentionSite) -> RowPreconditioner | None:
        """The preconditioner of ``site``, or None."""
        return None if site.out is None else getattr(inner(site.out.owner), "preconditioner", None)

    @classmethod
    def remove(cls, site: AttentionSite) -> None:
        """Take the preconditioner away, and give the layer its own class back."""
        assert site.out is not None
        owner: Any = inner(site.out.owner)
        norm = owner.head_norm
        del owner.preconditioner, owner.head_norm, owner.is_prepared
        if isinstance(owner, ConditionedMultiheadAttention):
            owner.release()
        elif isinstance(owner, PreconditionedLinear):
            restore_class(owner)
        else:
            remove_hooks(owner, lambda hook: hook is norm)
            del owner.__prepare_scriptable__
        if site.out.reader is not None:
            PostponedProjection.detach(site.out.reader)


def _channels(site: AttentionSite, out: HeadOutputs) -> int | None:
    """How many channels of head outputs lie along the axis, where the layers tell."""
    if out.channels is not None:
        return out.channels.stop - out.channels.start
    for name in ("in_features", "in_channels"):
        if hasattr(out.projection, name):
            return getattr(out.projection, name)
    return len(site.v.weight) if site.v is not None else None
