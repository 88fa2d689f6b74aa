"""Singular values of matrices, and of the weights of each head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.site import AttentionSite, as_matrix, indices
from ..layers.correction import CorrectedModule, corrections_of


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one kind of matrix at one site.

    Attributes:
        site: Name of the site.
        matrix: 'W_Q', 'W_K', 'W_V' (D x d), the same with ' + C', 'map' (N x M), 'A(X)' or 'C A(X)' (N x d).
        values: (samples, heads, k) in float64, in descending order. Weights have one sample; for maps and outputs, a
            sample is an image, or a window of one.
        size: Rows and columns of the matrix.
        dtype: That in which the matrix was computed: float64, or a less precise one if that was impossible. That of
            weights is float64, since weights count as exact.
    """

    site: str
    matrix: str
    values: Tensor
    size: tuple[int, int]
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """Values up to this multiple of the largest one count as zero: max(size) times the precision of ``dtype``."""
        return max(self.size) * torch.finfo(self.dtype).eps

    @property
    def sigma_max(self) -> Tensor:
        """The largest singular values, (samples, heads)."""
        return self.values[..., 0]

    @property
    def rank(self) -> Tensor:
        """Number of nonzero singular values, (samples, heads)."""
        return (self.values > self.tolerance * self.values[..., :1]).sum(-1)

    @property
    def sigma_min(self) -> Tensor:
        """The smallest nonzero singular values, (samples, heads); NaN if all count as zero."""
        last = (self.rank - 1).clamp_min(0)
        return self.values.gather(-1, last[..., None])[..., 0].masked_fill(self.rank == 0, torch.nan)

    @property
    def kappa(self) -> Tensor:
        """sigma_max / sigma_min, (samples, heads); NaN if all singular values count as zero."""
        return self.sigma_max / self.sigma_min

    @property
    def singular(self) -> Tensor:
        """Whether the rank is not full, (samples, heads); sigma_min and kappa then ignore the zeros."""
        return self.rank < self.values.shape[-1]


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as 'float32'."""
    return str(dtype).removeprefix("torch.")


def spectrum(site: str, matrix: str, values: Tensor, dtype: torch.dtype) -> Spectrum:
    """Compute the spectrum of matrices (samples, heads, rows, columns) that were computed in ``dtype``."""
    singular = torch.linalg.svdvals(values.double())
    return Spectrum(site, matrix, singular.cpu(), tuple(values.shape[-2:]), dtype)


def weight_spectra(site: AttentionSite) -> list[Spectrum]:
    """Compute the singular values of each head's W_Q, W_K and W_V, and of W + C if there is a correction.

    Raises:
        ValueError: If a weight is not finite.
    """
    spectra = []
    for name in ("q", "k", "v"):
        projection = getattr(site, name)
        if projection is None:
            continue
        weights = {f"W_{name.upper()}": projection.weight.unflatten(0, (site.heads_of(projection), -1))}
        if corrections_of(projection):
            weights[f"W_{name.upper()} + C"] = effective_heads(site, name)
        for matrix, heads in weights.items():
            if not heads.isfinite().all():
                raise ValueError(f"{site}: {matrix} has values that are not finite; is the checkpoint damaged?")
            # Weights count as exact, whatever dtype they are stored in.
            spectra.append(spectrum(site.name, matrix, heads.mT[None], torch.float64))
    return spectra


def effective_heads(site: AttentionSite, name: str) -> Tensor:
    """Return the weight of each head that a site computes with, including any correction: (heads, d, D), in float64.

    Args:
        site: The site.
        name: 'q', 'k' or 'v'; the site must have this projection.
    """
    projection = getattr(site, name)
    owner = projection.owner
    if isinstance(owner, CorrectedModule):
        # Added in float64, in which sites are recomputed: half precision would round W + C.
        weight = owner.effective_weight(projection.parameter, torch.float64)
    else:
        weight = getattr(owner, projection.parameter).double()
    matrix = as_matrix(owner, weight)[indices(projection.rows)]
    return matrix.unflatten(0, (site.heads_of(projection), -1))


def head_weight(site: AttentionSite, name: str, head: int) -> Tensor:
    """Return the weight, (d, D), that one head computes with; that of its group if keys and values are shared."""
    heads = effective_heads(site, name)
    return heads[head * len(heads) // site.num_heads]


def head_bias(site: AttentionSite, name: str, head: int) -> Tensor | float:
    """Return the bias, (d,), that belongs to :func:`head_weight`; 0 if there is none."""
    projection = getattr(site, name)
    bias = getattr(projection.owner, "bias" if projection.parameter == "weight" else "in_proj_bias", None)
    if bias is None:
        bias = getattr(site.module, f"{name}_bias", None)  # where the module itself reads the weights
        return 0.0 if bias is None else bias.unflatten(0, (site.num_heads, -1))[head]
    heads = bias[indices(projection.rows)].unflatten(0, (site.heads_of(projection), -1))
    return heads[head * len(heads) // site.num_heads]
