"""Head outputs, normalised in front of the output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.adapters import inner
from ..attention.site import AttentionSite
from ..kernels.row_norm import normalize_rows, normalized_linear
from ..kernels.switch import is_ordinary, is_plain
from .class_swap import ConditionedLayer


class HeadNorm:
    """Normalises the rows of all heads of a site, which lie side by side in one tensor; also a forward pre-hook.

    Args:
        site: Describes the heads.
        eps: Smallest norm that a row is divided by.
        detach: Whether norms are constants in backpropagation.
        over_tokens: Whether, where attention is between channels, a row is one channel over all tokens.
    """

    def __init__(self, site: AttentionSite, eps: float = 1e-6, detach: bool = False, over_tokens: bool = False) -> None:
        out = site.out
        assert out is not None  # there is nothing to normalise
        self.eps, self.detach = eps, detach
        self.axis = out.axis
        self.channels = out.channels
        self.num_heads = site.heads_of(out)
        self.interleaved = out.interleaved
        self.over_tokens = site.cross_covariance and over_tokens

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
        return normalized_linear(x, weight, bias, self.num_heads, self.eps, self.detach)

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
        if self.over_tokens:
            return normalize_rows(x, self.eps, self.detach, dim=-2)
        heads, axis = self._heads(x)
        return normalize_rows(heads, self.eps, self.detach, dim=axis + (not self.interleaved)).flatten(axis, axis + 1)

    def _heads(self, x: Tensor) -> tuple[Tensor, int]:
        """``x`` with the axis of all heads' channels split in two, and which axis that is."""
        if self.over_tokens:
            return x, x.dim() - 1
        axis = self.axis % x.dim()
        return x.unflatten(axis, (-1, self.num_heads) if self.interleaved else (self.num_heads, -1)), axis


def head_norm_of(site: AttentionSite) -> HeadNorm | None:
    """What normalises the head outputs of ``site``, or None."""
    return None if site.out is None else getattr(inner(site.out.owner), "head_norm", None)


class PreconditionedLinear(ConditionedLayer, nn.Linear):
    """An output projection that normalises each head's part of its input first.

    Shape: input (..., num_heads * d), output (..., out features), as ``nn.Linear``.
    """

    host = nn.Linear
    head_norm: HeadNorm
    preconditioner: object
    """The settings of the method, which put the layer here."""
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
