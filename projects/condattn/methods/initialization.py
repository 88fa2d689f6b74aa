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
            'per_head' over those of each head, so that all heads take the first channels. The source does not say
            which.

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
            if name != "v":
                new = torch.stack([semi_orthogonal(head) for head in heads]).flatten(0, 1)
            elif self.layout == "fused":
                new = torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device)
            else:
                new = torch.eye(*heads.shape[1:], dtype=weight.dtype, device=weight.device).repeat(len(heads), 1)
            projection.set_weight(new)


def semi_orthogonal(like: Tensor) -> Tensor:
    """U V^T of a Gaussian matrix of the shape, dtype and device of ``like``; its singular values are all 1."""
    u, _, vh = torch.linalg.svd(torch.randn(like.shape, dtype=torch.float64, device="cpu"), full_matrices=False)
    return (u @ vh).to(like)
