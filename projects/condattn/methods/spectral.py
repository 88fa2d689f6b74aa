"""Spectral conditioning, "SC" (arXiv 2603.07162): constants added to the q, k and v projections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..attention.site import AttentionSite, Projection
from ..layers.class_swap import leave_out
from ..layers.correction import Block, BlockCorrection
from .base import check_flags, register_method
from .weight import WeightMethod


@register_method
@dataclass(frozen=True)
class SpectralCorrection(WeightMethod):
    """W + C in place of W in the query, key and value projections; W is trained, C is set once.

    ``SpectralCorrection()`` is the form of all experiments of the paper (Thm 3.8): C = 10 I_k, where I_k has ones on
    the main diagonal. ``SpectralCorrection(form='svd')`` is the exact form (Thm 3.5): C = sigma_max(W) U V^T, with
    which kappa(W + C) <= 2. With a pre-LayerNorm backbone (ViT, Swin), 10 I_k saturates the softmax at initialisation.
    A strength of about 1 avoids this, and ``'sc'`` stands for a strength of 1.

    Attributes:
        strength: lambda, the size of C; one number, or one per target such as ``dict(q=1.0, k=1.0, v=10.0)``.
            Default: 10, and 1 for ``form='svd'``.
        relative: Multiply ``strength`` by the spectral norm of the initial (or loaded) weight. A strength above 1
            then guarantees kappa(W + C) <= (strength + 1) / (strength - 1). Default: False, and True for
            ``form='svd'``.
        targets: Which of 'q', 'k' and 'v' are corrected.
        layout: 'fused' places C over the whole projection of all heads, 'per_head' over each head's own rows. The paper
            does not say which it uses.
        form: 'identity' for lambda I_k, 'svd' for lambda U V^T.

    Raises:
        ValueError: If a setting has an invalid value.
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
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"SpectralCorrection: strength is {value!r}; expected a finite number")
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "relative", svd if self.relative is None else self.relative)
        check_flags(self, "relative")

    def check(self, site: AttentionSite) -> None:
        """Raise a ``ValueError`` if the base class does, or the heads do not divide the rows of a target."""
        super().check(site)
        for target, projection in self._projections(site).items():
            heads, rows = site.heads_of(projection), len(projection.weight)
            if rows % heads:
                raise ValueError(
                    f"{site}: {heads} heads do not divide the {rows} rows of its {target}; {leave_out(site)}"
                )

    def correction(self, projections: Mapping[str, Projection], site: AttentionSite) -> BlockCorrection:
        """Return the correction of one weight; in the identity form it stores one entry for each row."""
        blocks = [self._blocks(name, p.rows, site.heads_of(p)) for name, p in projections.items()]
        return BlockCorrection(sum(blocks, ()), bool(self.relative), self.form == "svd", self)

    def _blocks(self, target: str, rows: tuple[slice, ...], num_heads: int) -> tuple[Block, ...]:
        assert self.strength is not None  # see __post_init__
        strength = float(self.strength[target] if isinstance(self.strength, Mapping) else self.strength)
        if self.layout == "fused":
            return (Block(rows, strength),)
        if len(rows) == num_heads:
            return tuple(Block((part,), strength) for part in rows)
        (whole,) = rows
        step = (whole.stop - whole.start) // num_heads
        return tuple(Block((slice(row, row + step),), strength) for row in range(whole.start, whole.stop, step))
