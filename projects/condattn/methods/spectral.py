"""Spectral conditioning, "SC" (arXiv 2603.07162): constants added to the q, k and v projections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from torch import nn

from ..attention.site import AttentionSite, Projection, is_transposed
from ..layers.class_swap import ConditionedLayer, check_can_swap, leave_out, swap_class
from ..layers.corrected import SpectralConv2d, SpectralLinear
from ..layers.correction import Block, Correction
from ..layers.multihead import ConditionedMultiheadAttention, swap_to_conditioned
from ..layers.overrides import CorrectedWeightOverride
from .base import Method, register_method


@register_method
@dataclass(frozen=True)
class SpectralCorrection(Method):
    """W + C in place of W for the query, key and value projections; W trains, C is set once.

    ``SpectralCorrection()`` is the form of all experiments of the paper (Thm 3.8): C = 10 I_k, ones on the main
    diagonal. ``SpectralCorrection(form='svd')`` is the exact form (Thm 3.5): C = sigma_max(W) U V^T, with which
    kappa(W + C) <= 2. With a pre-LayerNorm backbone (ViT, Swin) 10 I_k saturates the softmax at initialisation; a
    strength of about 1 keeps attention alive, and ``'sc'`` stands for a strength of 1.

    Attributes:
        strength: lambda, the size of C; one number, or one per target such as ``dict(q=1.0, k=1.0, v=10.0)``.
            Default: 10, and 1 for ``form='svd'``.
        relative: Multiply ``strength`` by the spectral norm of the initial (or loaded) weight. A strength above 1
            then guarantees kappa(W + C) <= (strength + 1) / (strength - 1). Default: False, and True for
            ``form='svd'``.
        targets: Which of 'q', 'k' and 'v' are corrected.
        layout: 'fused' lays C over the whole projection of all heads, 'per_head' over each head's own rows. The
            paper does not say which.
        form: 'identity' for lambda I_k, 'svd' for lambda U V^T.

    Raises:
        ValueError: If a setting is not one of these.
    """

    alias: ClassVar[str] = "sc"
    alias_settings: ClassVar[Mapping[str, float]] = {"strength": 1.0}

    strength: float | Mapping[str, float] | None = None
    relative: bool | None = None
    targets: tuple[str, ...] = ("q", "k", "v")
    layout: str = "fused"
    form: str = "identity"

    def __post_init__(self):
        for name, known in (("layout", ("fused", "per_head")), ("form", ("identity", "svd"))):
            if getattr(self, name) not in known:
                raise ValueError(f"SpectralCorrection: {name} is {getattr(self, name)!r}; expected one of {known}")
        targets = tuple(self.targets)
        if not targets or len(set(targets)) < len(targets) or not set(targets) <= set("qkv"):
            raise ValueError(f"SpectralCorrection: targets is {targets!r}; expected some of ('q', 'k', 'v')")
        svd = self.form == "svd"
        strength = self.strength if self.strength is not None else (1.0 if svd else 10.0)
        if isinstance(strength, Mapping):
            strength = dict(strength)
            if set(strength) != set(targets):
                raise ValueError(
                    f"SpectralCorrection: strength is given for {sorted(strength)}, targets are {sorted(targets)}; "
                    "name the same ones in both"
                )
        values = strength.values() if isinstance(strength, dict) else [strength]
        for value in values:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"SpectralCorrection: strength is {value!r}; expected a finite number")
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "relative", svd if self.relative is None else self.relative)

    def check(self, site: AttentionSite) -> None:
        """Raise unless ``site`` has some of the targets, as plain linear maps that its heads divide."""
        projections = self._projections(site)
        if not projections:
            wanted = ", ".join(self.targets)
            raise ValueError(f"{site}: has no projection of its own for {wanted}: {site.obstacle}; {leave_out(site)}")
        for target, projection in projections.items():
            owner, heads = projection.owner, site.heads_of(projection)
            if projection.parameter in getattr(owner, "corrections", ()):
                raise ValueError(
                    f"{site}: its {target} is corrected already, by {owner.spectral}; two methods cannot correct one "
                    "weight: name one of them"
                )
            check_can_swap(owner, _layer(owner), site)
            if isinstance(owner, nn.Conv2d) and (owner.kernel_size != (1, 1) or owner.groups > 1):
                raise ValueError(f"{site}: its {target} is no 1 x 1 convolution of all channels; {leave_out(site)}")
            rows = len(projection.weight)
            if rows % heads:
                raise ValueError(
                    f"{site}: {heads} heads do not divide the {rows} rows of its {target}; {leave_out(site)}"
                )

    def apply(self, site: AttentionSite) -> None:
        """Replace W by W + C in the projections of ``site`` that are targets."""
        by_weight: dict[tuple[nn.Module, str], list[Block]] = {}
        for target, projection in self._projections(site).items():
            blocks = by_weight.setdefault((projection.owner, projection.parameter), [])
            blocks.extend(self._blocks(target, projection, site.heads_of(projection)))
        for (owner, parameter), blocks in by_weight.items():
            if isinstance(owner, nn.MultiheadAttention):
                layer = swap_to_conditioned(owner)
            else:
                layer = swap_class(owner, _layer(owner))
            layer.spectral = self
            layer.add_correction(parameter, Correction(tuple(blocks), bool(self.relative), self.form == "svd"))
        readers = {(p.owner, p.parameter): p.reader for p in self._projections(site).values() if p.reader}
        for (owner, parameter), reader in readers.items():
            CorrectedWeightOverride(reader, owner, parameter)

    @classmethod
    def applied_to(cls, site: AttentionSite) -> SpectralCorrection | None:
        """The correction of ``site``, or None."""
        owners = (projection.owner for projection in (site.q, site.k, site.v) if projection is not None)
        found = (getattr(owner, "spectral", None) for owner in owners)
        return next((method for method in found if method is not None), None)

    def parts(self, site: AttentionSite) -> str:
        """The projections that are corrected."""
        return ", ".join(self._projections(site))

    @classmethod
    def remove(cls, site: AttentionSite) -> None:
        """Take C away from the projections of ``site``, and give the layers their own classes back; W stays."""
        for projection in (site.q, site.k, site.v):
            owner: Any = projection and projection.owner
            if projection is None or getattr(owner, "spectral", None) is None:
                continue
            owner.drop_corrections()
            if isinstance(owner, ConditionedMultiheadAttention):
                del owner.spectral
            owner.release()
            if projection.reader is not None:
                CorrectedWeightOverride.detach(projection.reader)

    def _projections(self, site: AttentionSite) -> dict[str, Projection]:
        """The projections of ``site`` that are targets; those that the site does not have are left out."""
        return {name: getattr(site, name) for name in self.targets if getattr(site, name) is not None}

    def _blocks(self, target: str, projection: Projection, num_heads: int) -> list[Block]:
        assert self.strength is not None  # see __post_init__
        strength = float(self.strength[target] if isinstance(self.strength, Mapping) else self.strength)
        if self.layout == "fused":
            return [Block(projection.rows, strength)]
        if len(projection.rows) == num_heads:
            return [Block((rows,), strength) for rows in projection.rows]
        (rows,) = projection.rows
        step = (rows.stop - rows.start) // num_heads
        return [Block((slice(row, row + step),), strength) for row in range(rows.start, rows.stop, step)]


def _layer(owner: nn.Module) -> type[ConditionedLayer]:
    if isinstance(owner, nn.MultiheadAttention):
        return ConditionedMultiheadAttention
    if is_transposed(owner):
        return import_module("..layers.conv1d", __package__).SpectralConv1D
    return SpectralConv2d if isinstance(owner, nn.Conv2d) else SpectralLinear
