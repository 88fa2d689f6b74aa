"""How widely attention is spread: the entropy of its rows, among the keys that no mask takes away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..kernels.windows import MASKED
from .capture import Seen

NEVER = -5e3
"""A key with a logit up to this counts as masked; masks add minus infinity, or -10^4 and less, to what is there."""


@dataclass(frozen=True)
class Entropy:
    """How widely attention is spread at one site.

    Attributes:
        site: Name of the site.
        values: Entropy of the rows of the map, in nats, averaged over the rows, (samples, heads).
        largest: What ``values`` would be if attention were uniform over the keys that are not masked, (samples, heads);
            log(keys) without a mask.
        keys: Number of keys M.
        largest_logit: Largest finite entry of the input of the softmax, with bias and mask, (samples, heads).
    """

    site: str
    values: Tensor
    largest: Tensor
    keys: int
    largest_logit: Tensor

    @property
    def relative(self) -> Tensor:
        """The entropy as a share of its largest value, (samples, heads); NaN where no row has several keys."""
        return self.values / self.largest.masked_fill(self.largest == 0, torch.nan)


def entropy(site: str, seen: Seen, chosen: Sequence[int]) -> Entropy:
    """Compute the entropy of the ``chosen`` samples of a call, one sample at a time, to save memory."""
    mask = _window_mask(seen)
    values, largest, logits = [], [], []
    for sample in chosen:
        allowed = seen.logits[sample] > NEVER
        if mask is not None:
            allowed = allowed & (mask[sample % len(mask)] == 0)
        keys = allowed.sum(-1)
        rows = (keys > 0).sum(-1).clamp_min(1)  # rows without a key, such as those of padding, do not count
        own = torch.special.entr(seen.map[sample].double()).sum(-1).masked_fill(keys == 0, 0.0)
        values.append(own.sum(-1) / rows)
        largest.append(keys.clamp_min(1).double().log().sum(-1) / rows)
        finite = seen.logits[sample].isfinite()
        logits.append(seen.logits[sample].masked_fill(~finite, -torch.inf).amax((-2, -1)).double())
    values, largest, logits = (torch.stack(one).cpu() for one in (values, largest, logits))
    return Entropy(site, values, largest, seen.map.shape[-1], logits)


def _window_mask(seen: Seen) -> Tensor | None:
    """Return the mask of shifted windows among the arguments of a call, (windows, 1, N, M); None if there is none.

    It adds -100 to the logits, which unmasked ones may have as well, so that the mask itself has to be found.
    """
    for value in tree_leaves((seen.args, seen.kwargs)):
        if not isinstance(value, Tensor) or value.shape[-2:] != seen.map.shape[-2:] or not value.is_floating_point():
            continue
        is_per_sample = value.dim() < 4 or value.shape[-3] == 1
        mask = value.reshape(-1, 1, *value.shape[-2:])
        if is_per_sample and len(seen.map) % len(mask) == 0 and ((mask == 0) | (mask <= MASKED)).all():
            return mask
    return None
