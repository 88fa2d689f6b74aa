"""Transformers' ``Conv1D`` (GPT-2), corrected; imported where a model has one, because it imports transformers."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .corrected import CorrectedLayer


class CorrectedConv1D(CorrectedLayer, Conv1D):
    """An input projection with the weight W + C, kept as (in features, out features). Shape: as ``Conv1D``."""

    host = Conv1D
    transposed = True
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Project with the effective weight."""
        return x @ self.effective_weight() + self.bias
