"""Condition numbers of attention, measured."""

from .jacobian import Bound, Jacobian
from .measure import QUANTITIES, measure
from .results import Entropy, Measurement
from .weights import Spectrum

__all__ = ["QUANTITIES", "Bound", "Entropy", "Jacobian", "Measurement", "Spectrum", "measure"]
