"""Results of a measurement, for each site, head and quantity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..wording import counted
from .bound import Bound
from .entropy import Entropy
from .jacobian import Jacobian
from .weights import Spectrum, name_of


@dataclass(repr=False)
class Measurement:
    """Result of :func:`measure`.

    Attributes:
        sites: Name of each measured site -> its index among the sites of the model.
        preconditioned: Names of the measured sites that compute with C A(X).
        spectra: Singular values of matrices.
        entropies: Entropies of attention.
        jacobians: Jacobians of heads.
        bounds: (site, head) -> the bound of Thm 3.4 on the condition numbers of its Jacobians.
        left_out: (site, quantity) that could not be measured, such as ('backbone.attn', 'map') -> the reason.
        limits: Site whose maps and outputs could not be computed in float64 -> the dtype that limits their condition
            numbers, and the reason.
    """

    sites: dict[str, int]
    preconditioned: set[str] = field(default_factory=set)
    spectra: list[Spectrum] = field(default_factory=list)
    entropies: list[Entropy] = field(default_factory=list)
    jacobians: list[Jacobian] = field(default_factory=list)
    bounds: dict[tuple[str, int], Bound] = field(default_factory=dict)
    left_out: dict[tuple[str, str], str] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Say what was measured; the values are in :meth:`rows`."""
        return (
            f"Measurement({counted(len(self.sites), 'site')}: {counted(len(self.spectra), 'matrix', 'matrices')}, "
            f"{counted(len(self.entropies), 'entropy', 'entropies')}, {counted(len(self.jacobians), 'Jacobian')}; "
            f"{len(self.left_out)} left out; rows() has the values)"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row for each site, head and matrix, and one for the entropy of each site and head.

        Values are medians over the samples of one size. Columns: site, depth (from 0), head, quantity; sigma_max,
        sigma_min, kappa, kappa_max (over the samples), rank, singular (the share of singular samples), size, precision
        (the dtype in which the matrix was computed); or entropy (nats), relative_entropy, largest_logit; samples. The
        quantity of a Jacobian is, for instance, 'dA(X)/dW_Q', and its row also has a residual and the columns of its
        bound. ``used`` says whether the model computes with the matrix: with W + C instead of W if there is a
        correction, and with C A(X) instead of A(X) if there is a preconditioner.
        """
        rows = [*self._spectrum_rows(), *self._entropy_rows(), *self._jacobian_rows()]
        return [dict(site=site, depth=self.sites[site], head=head, **row) for site, head, row in rows]

    def is_used(self, one: Spectrum) -> bool:
        """Return whether the model computes with this matrix, instead of its other form."""
        if one.matrix in ("A(X)", "C A(X)"):
            return (one.matrix == "C A(X)") == (one.site in self.preconditioned)
        return not any(other.site == one.site and other.matrix == f"{one.matrix} + C" for other in self.spectra)

    def kappa(self, site: str, matrix: str) -> Tensor:
        """Return the condition numbers of a matrix for the samples of all sizes, (samples, heads)."""
        return torch.cat([one.kappa for one in self.spectra if (one.site, one.matrix) == (site, matrix)])

    def sigma_min(self, site: str, matrix: str) -> Tensor:
        """Return the smallest nonzero singular values of a matrix for the samples of all sizes, (samples, heads)."""
        return torch.cat([one.sigma_min for one in self.spectra if (one.site, one.matrix) == (site, matrix)])

    def relative_entropy(self, site: str) -> Tensor:
        """Return the entropy of a site as a share of its largest value, for all numbers of keys, (samples, heads)."""
        return torch.cat([one.relative for one in self.entropies if one.site == site])

    def _spectrum_rows(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        for one in self.spectra:
            values = {name: getattr(one, name) for name in ("sigma_max", "sigma_min", "kappa", "rank")}
            for head in range(one.values.shape[1]):
                yield (
                    one.site,
                    head,
                    dict(quantity=one.matrix, used=self.is_used(one))
                    | {name: _median(part[:, head]) for name, part in values.items()}
                    | dict(
                        kappa_max=_largest(values["kappa"][:, head]),
                        singular=one.singular[:, head].double().mean().item(),
                        size=f"{one.size[0]} x {one.size[1]}",
                        precision=name_of(one.dtype),
                        samples=len(one.values),
                    ),
                )

    def _entropy_rows(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        for one in self.entropies:
            for head in range(one.values.shape[1]):
                yield (
                    one.site,
                    head,
                    dict(
                        quantity="entropy",
                        entropy=_median(one.values[:, head]),
                        relative_entropy=_median(one.relative[:, head]),
                        largest_logit=one.largest_logit[:, head].max().item(),
                        samples=len(one.values),
                    ),
                )

    def _jacobian_rows(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        for one in self.jacobians:
            extremes, bound = one.extremes, self.bounds.get((one.site, one.head))
            yield (
                one.site,
                one.head,
                dict(
                    quantity=f"d{one.output}/d{one.weight}",
                    used=(one.output == "C A(X)") == (one.site in self.preconditioned),
                    sigma_max=extremes.sigma_max,
                    sigma_min=extremes.sigma_min,
                    kappa=extremes.kappa,
                    rank=extremes.rank,
                    size=f"{extremes.size[0]} x {extremes.size[1]}",
                    residual=extremes.residual,
                    samples=1,
                )
                | (dict(bound=bound.value) | {f"bound_{k}": v for k, v in asdict(bound).items()} if bound else {}),
            )


def _largest(values: Tensor) -> float:
    """Return the largest value that is not NaN, or NaN if there is none."""
    numbers = values[~values.isnan()]
    return numbers.max().item() if len(numbers) else math.nan


def _median(values: Tensor) -> float:
    """Return the median of the values that are not NaN; for an even number, the mean of the middle two."""
    return values.double().nanquantile(0.5).item()
