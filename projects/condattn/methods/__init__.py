"""The conditioning methods, one file a method."""

from ..layers.corrected import SpectralLinear
from ..layers.head_norm import PreconditionedLinear
from .base import Method, parse, register_method
from .preconditioner import RowPreconditioner
from .spectral import SpectralCorrection

__all__ = [
    "Method",
    "PreconditionedLinear",
    "RowPreconditioner",
    "SpectralCorrection",
    "SpectralLinear",
    "parse",
    "register_method",
]
