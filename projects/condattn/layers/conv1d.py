"""Transformers' ``Conv1D`` (GPT-2) with corrected weights; imported only on demand, as it imports transformers."""

from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .corrected import CorrectedLayer


class CorrectedConv1D(CorrectedLayer, Conv1D):
    """An input projection with the weight W + C, stored as (in features, out features). Shape: as ``Conv1D``."""

    host = Conv1D
    transposed = True
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Project with the effective weight."""
        return F.linear(x, self.effective_weight().T, self.bias)
