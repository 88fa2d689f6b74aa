"""What is made of weights, kept while they stay what they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .switch import is_plain


class WeightCache:
    """Keeps a tensor that is made of weights, for forwards without gradients.

    It is made again when a weight was changed by an operation in place (an optimizer, ``load_state_dict``, averages of
    weights), moved, cast or replaced. What changes ``weight.data`` in place goes unnoticed, and has to call
    :meth:`clear`; modules do when their mode is set, before each validation.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it."""
        self._kept = None, None

    def get(self, make: Callable[[], Tensor], *weights: Tensor) -> Tensor:
        """``make()``, or what it gave for these weights before."""
        needs_gradient = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if needs_gradient or is_plain() or any(weight.is_inference() for weight in weights):
            return make()
        state = [(weight.data_ptr(), weight._version, weight.dtype, weight.device) for weight in weights]
        kept = self._kept  # at once, for other threads
        if state != kept[0]:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = state, make()
        return kept[1]
