"""Measure the condition numbers of attention."""

from .bound import Bound
from .entropy import Entropy
from .jacobian import Jacobian
from .measure import QUANTITIES, measure
from .results import Measurement
from .weights import Spectrum

__all__ = ["QUANTITIES", "Bound", "Entropy", "Jacobian", "Measurement", "Spectrum", "measure"]
