"""The base class of methods that add a constant to weights of the query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention.site import AttentionSite, Projection, indices, is_convolution, is_transposed
from ..layers.class_swap import ConditionedLayer, check_can_swap, leave_out, swap_class
from ..layers.corrected import CONVOLUTIONS, CorrectedLinear
from ..layers.correction import CorrectedModule, Correction, corrections_of
from ..layers.fusion import allow_fusion, forbid_fusion
from ..layers.multihead import ConditionedMultiheadAttention, swap_to_conditioned
from ..layers.overrides import CorrectedWeightOverride, path_in
from .base import Method


def check_is_matrix(owner: nn.Module, target: str, site: AttentionSite) -> None:
    """Raise a ``ValueError`` if ``owner``, the projection ``target`` of ``site``, maps more than single tokens."""
    if is_convolution(owner) and (set(owner.kernel_size) != {1} or owner.groups > 1):
        raise ValueError(f"{site}: its {target} is no convolution of size 1 and of all channels; {leave_out(site)}")


class WeightMethod(Method):
    """Base class of methods that use W + C in place of W in projections of a site; W is trained, C is set once.

    Subclasses implement :meth:`constant`. Saving, loading, :func:`condattn.fold`, the spectra of W + C, and loading
    weights so that the function is preserved (``load='effective'``) need no further code.

    Attributes:
        targets: Which of 'q', 'k' and 'v' are changed.
        depends_on_weight: Whether C is a function of the weight, and is therefore saved with it. Otherwise it is
            computed from the settings alone.
    """

    targets: Sequence[str] = ("q", "k", "v")
    depends_on_weight: ClassVar[bool] = True

    def constant(self, weight: Tensor, target: str, num_heads: int) -> Tensor:
        """Return C of one projection; to be defined unless :meth:`correction` is.

        Args:
            weight: W in float64, (out features of the projection, in features), head after head.
            target: 'q', 'k' or 'v'.
            num_heads: Number of heads of the projection.

        Returns:
            C, of the shape of ``weight``.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither constant nor correction")

    def correction(self, projections: Mapping[str, Projection], site: AttentionSite) -> Correction:
        """Return the correction of one weight, whose rows contain these projections of ``site``."""
        parts = tuple((name, tuple(indices(p.rows)), site.heads_of(p)) for name, p in projections.items())
        return RowsCorrection(self, parts)

    def check(self, site: AttentionSite) -> None:
        """Raise a ``ValueError`` unless ``site`` has targets, all linear maps that no other method corrects."""
        projections = self._projections(site)
        if not projections:
            wanted = ", ".join(self.targets)
            raise ValueError(f"{site}: has no projection of its own for {wanted}: {site.obstacle}; {leave_out(site)}")
        for target, projection in projections.items():
            owner = projection.owner
            if others := corrections_of(projection):
                raise ValueError(
                    f"{site}: its {target} is corrected already, by {others[0].method}; two methods cannot correct one "
                    "weight: name one of them"
                )
            if projection.reader is not None:
                path_in(projection.reader, owner)
            check_can_swap(owner, _layer(owner), site)
            check_is_matrix(owner, target, site)

    def apply(self, site: AttentionSite) -> None:
        """Replace W by W + C in the projections of ``site`` that are targets."""
        by_weight: dict[tuple[nn.Module, str], dict[str, Projection]] = {}
        for target, projection in self._projections(site).items():
            by_weight.setdefault((projection.owner, projection.parameter), {})[target] = projection
        for (owner, parameter), projections in by_weight.items():
            correction = self.correction(projections, site)
            if isinstance(owner, nn.MultiheadAttention):
                layer: CorrectedModule = swap_to_conditioned(owner)
            else:
                layer = swap_class(owner, _layer(owner))
            layer.add_correction(parameter, correction)
        forbid_fusion(site.module, {owner for owner, _ in by_weight})
        readers = {(p.owner, p.parameter): p.reader for p in self._projections(site).values() if p.reader}
        for (owner, parameter), reader in readers.items():
            # Another method may have registered the same override.
            CorrectedWeightOverride.detach(reader, owner, parameter)
            CorrectedWeightOverride(reader, owner, parameter)

    @classmethod
    def applied_to(cls, site: AttentionSite) -> WeightMethod | None:
        """Return the method of this class that corrects weights of ``site``, or None."""
        methods = (correction.method for p in site.projections.values() for correction in corrections_of(p))
        return next((method for method in methods if type(method) is cls), None)

    def layers(self, site: AttentionSite) -> list[nn.Module]:
        """Return the layers whose weights are corrected."""
        return [projection.owner for projection in self._projections(site).values()]

    def parts(self, site: AttentionSite) -> str:
        """Return the names of the projections that are corrected."""
        return ", ".join(self._projections(site))

    def missing(self, site: AttentionSite) -> list[str]:
        """Return the names of the targets that the site does not project itself."""
        return [target for target in self.targets if target not in site.projections]

    @classmethod
    def remove(cls, site: AttentionSite) -> None:
        """Remove C from the projections of ``site``, and restore the classes of the layers; W stays."""
        allow_fusion(site.module)
        for projection in site.projections.values():
            owner: Any = projection.owner
            if isinstance(owner, CorrectedModule):
                owner.drop_corrections(cls)
                owner.release()
            if projection.reader is not None and projection.parameter not in getattr(owner, "corrections", ()):
                CorrectedWeightOverride.detach(projection.reader, owner, projection.parameter)

    def _projections(self, site: AttentionSite) -> dict[str, Projection]:
        """Return the projections of ``site`` that are targets, without those that the site does not have."""
        return {name: site.projections[name] for name in self.targets if name in site.projections}


@dataclass(frozen=True)
class RowsCorrection(Correction):
    """The correction of some rows of a weight by :meth:`WeightMethod.constant`.

    Attributes:
        method: The method.
        parts: Target, rows, and number of heads of each projection in the weight.
    """

    method: WeightMethod
    parts: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The alias of the method."""
        return self.method.alias

    @property
    def depends_on_weight(self) -> bool:
        """Whether C is a function of the weight, as the method declares."""
        return self.method.depends_on_weight

    @property
    def rows(self) -> frozenset[int]:
        """The rows that are corrected."""
        return frozenset(row for _, rows, _ in self.parts for row in rows)

    @torch.no_grad()
    def compute(self, weight: Tensor) -> Tensor:
        """Compute C for ``weight``, (out features, in features)."""
        exact = weight.detach().double()
        constant = torch.zeros_like(exact)
        for target, rows, num_heads in self.parts:
            constant[list(rows)] = self.method.constant(exact[list(rows)], target, num_heads).to(exact)
        return constant.to(weight.dtype)


def _layer(owner: nn.Module) -> type[ConditionedLayer]:
    if isinstance(owner, nn.MultiheadAttention):
        return ConditionedMultiheadAttention
    if is_transposed(owner):
        return import_module("..layers.conv1d", __package__).CorrectedConv1D
    return next((layer for layer in CONVOLUTIONS if isinstance(owner, layer.host)), CorrectedLinear)
