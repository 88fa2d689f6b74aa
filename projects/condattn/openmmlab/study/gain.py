"""Preconditioned attention with a gain, for studies: not a setting of ``RowPreconditioner`` unless it proves useful.

PC is, up to a factor of the square root of d, RMS normalisation of each head's output without a gain. Importing this
module registers the method; in a configuration: ``custom_imports = dict(imports=['condattn.openmmlab.study.gain'])``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn
from torch.nn import functional as F

from ...attention.site import AttentionSite
from ...layers.class_swap import leave_out
from ...layers.head_transform import PLAIN_LINEAR, HeadTransformLinear
from ...methods.base import register_method
from ...methods.preconditioner import RowPreconditioner

GAINS = ("sqrt", "initial", "learned")


@register_method
@dataclass(frozen=True)
class GainedRowPreconditioner(RowPreconditioner):
    """Row preconditioner whose normalised rows are multiplied by a gain.

    Attributes:
        gain: 'sqrt' is the square root of the number of channels of a head, so that the mean square of a row is 1.
            'initial' is the mean row norm of each head in the first training batch, so that training starts at the
            scale of unconditioned attention. 'learned' is a parameter for each head, initialised to 1.

    Raises:
        ValueError: If ``gain`` is none of these.
    """

    alias: ClassVar[str] = "pc_gain"

    gain: str = "sqrt"

    def __post_init__(self):
        super().__post_init__()
        if self.gain not in GAINS:
            raise ValueError(f"GainedRowPreconditioner: gain is {self.gain!r}; expected one of {', '.join(GAINS)}")

    def check(self, site: AttentionSite) -> None:
        """Raise an error unless a plain ``nn.Linear`` receives the head outputs of ``site``."""
        super().check(site)
        if type(site.out.owner) not in PLAIN_LINEAR or site.out.owner is not site.out.projection:
            raise ValueError(f"{site}: a gain needs nn.Linear behind the heads; {leave_out(site)}")

    def apply(self, site: AttentionSite) -> None:
        """Add the preconditioner and its gain to the output projection of ``site``."""
        super().apply(site)
        owner = site.out.owner
        owner.__class__ = GainedLinear
        heads = owner.head_transform.num_heads
        if self.gain == "learned":
            owner.head_gain = nn.Parameter(owner.weight.new_ones(heads))
        else:
            start = (owner.in_features / heads) ** 0.5 if self.gain == "sqrt" else torch.nan
            owner.register_buffer("head_gain", owner.weight.new_full((heads,), start))

    @classmethod
    def remove(cls, site: AttentionSite) -> None:
        """Remove the preconditioner and its gain."""
        owner = site.out.owner
        super().remove(site)
        del owner.head_gain


class GainedLinear(HeadTransformLinear):
    """An output projection whose normalised input is multiplied by a gain for each head.

    Shape: input (..., num_heads * d), output (..., out features), as ``nn.Linear``.
    """

    head_gain: Tensor
    """Gain of each head, (num_heads,); NaN until the first training batch if ``gain`` is 'initial'."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the rows of the head outputs, multiply them by the gain, and project."""
        if self.head_transform.observer is not None:  # measurements run the unconditioned model
            return super().forward(input)
        gain = self._initial_gain(input) if self.head_transform.method.gain == "initial" else self.head_gain
        gain = gain.repeat_interleave(self.in_features // len(gain)).to(input.dtype)
        return F.linear(self.head_transform.transform(input) * gain, self.weight, self.bias)

    @torch.no_grad()
    def _initial_gain(self, input: Tensor) -> Tensor:
        """Return the gain, which the first training batch of all processes fixes; before it, that of ``input``."""
        if not self.head_gain.isnan().any():
            return self.head_gain
        found = self.head_transform.scales(input).to(self.head_gain)
        if self.training:
            all_reduce(found, "mean")
            self.head_gain.copy_(found)
        return found
