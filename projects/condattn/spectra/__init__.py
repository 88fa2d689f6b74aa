"""Condition numbers of attention, measured."""

from .jacobian import Bound, Jacobian
from .measure import QUANTITIES, Entropy, Measurement, measure
from .weights import Spectrum

__all__ = ["QUANTITIES", "Bound", "Entropy", "Jacobian", "Measurement", "Spectrum", "measure"]
