"""Conditioned initialisation, "CI" (OpenReview cKNOCYPo2W, ICLR 2026): orthogonal W_Q and W_K, the identity as W_V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.site import AttentionSite
from ..attention.stored import check_stored
from ..layers.class_swap import leave_out
from .base import Method, register_method
from .initial_weights import InitialWeightsMethod
from .weight import WeightMethod, check_is_matrix

LAYOUTS = ("fused", "per_head")


@register_method
@dataclass(frozen=True)
class ConditionedInitialization(InitialWeightsMethod):
    """Well-conditioned initial weights: W_Q and W_K of each head semi-orthogonal, W_V the rectangular identity.

    W_Q and W_K of each head are U V^T of the thin decomposition of independent Gaussian matrices. Nothing else of the
    model changes, neither biases nor other weights, and training goes on as usual. Not for pretrained weights, which
    it would overwrite: :func:`condattn.condition` cannot tell that weights are pretrained.

    Attributes:
        layout: 'fused' lays the identity over the values of all heads, so that each head takes channels of its own;
            where the values have more channels than the tokens, the heads start again with the first channel, since a
            head without ones would have no output. 'per_head' lays it over the values of each head, so that all heads
            take the first channels. The source does not say which.

    Raises:
        ValueError: If it is neither.
    """

    alias: ClassVar[str] = "ci"

    layout: str = "fused"

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"ConditionedInitialization: layout is {self.layout!r}; expected one of {LAYOUTS}")

    def check(self, site: AttentionSite) -> None:
        """Raise unless ``site`` has projections whose weights are stored, and whose rows its heads divide."""
        super().check(site)
        if not site.projections:
            raise ValueError(f"{site}: has no projection of its own to initialise: {site.obstacle}; {leave_out(site)}")
        for name, projection in site.projections.items():
            check_stored(projection.owner, projection.parameter, str(site))
            rows, heads = len(projection.weight), site.heads_of(projection)
            check_is_matrix(projection.owner, name, site)
            if rows % heads:
                raise ValueError(
                    f"{site}: {heads} heads do not divide the {rows} rows of its {name}; {leave_out(site)}"
                )

    def missing(self, site: AttentionSite) -> list[str]:
        """Return the names of the projections that the site does not have."""
        return [name for name in "qkv" if name not in site.projections]

    def excludes(self, other: Method) -> str:
        """Both set the singular values of the same initial weights."""
        if isinstance(other, WeightMethod) and getattr(other, "form", None) == "svd":
            return (
                "both equalise the singular values of the same initial weights (of the semi-orthogonal weight of a "
                "head, the exact correction is a multiple of the weight itself); use the identity form"
            )
        return ""

    def set_weights(self, site: AttentionSite) -> None:
        """Write the weights of ``site``."""
        for name, projection in site.projections.items():
            weight = projection.weight
            heads = weight.unflatten(0, (site.heads_of(projection), -1))
            if name == "v":
                new = identities(heads, first=heads.shape[1] if self.layout == "fused" else 0)
            else:
                new = torch.stack([semi_orthogonal(head) for head in heads])
            projection.set_weight(new.flatten(0, 1))


def identities(like: Tensor, first: int) -> Tensor:
    """Rectangular identities of the shape of ``like``, (heads, channels of a head, channels of the tokens).

    That of head h begins at column h * ``first``, and goes on with the first column after the last.
    """
    heads, rows, columns = like.shape
    head = torch.arange(heads, device=like.device)[:, None]
    row = torch.arange(min(rows, columns), device=like.device)
    return torch.zeros_like(like).index_put_((head, row, (head * first + row) % columns), like.new_ones(()))


def semi_orthogonal(like: Tensor) -> Tensor:
    """U V^T of a Gaussian matrix of the shape, dtype and device of ``like``; its singular values are all 1."""
    u, _, vh = torch.linalg.svd(torch.randn(like.shape, dtype=torch.float64, device="cpu"), full_matrices=False)
    return (u @ vh).to(like)
