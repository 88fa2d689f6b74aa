"""The conditioning methods, one file a method."""

from .base import Method, parse, register_method
from .preconditioner import PreconditionedLinear, RowPreconditioner
from .spectral import SpectralCorrection, SpectralLinear

__all__ = [
    "Method",
    "PreconditionedLinear",
    "RowPreconditioner",
    "SpectralCorrection",
    "SpectralLinear",
    "parse",
    "register_method",
]
