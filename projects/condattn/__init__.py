"""Conditioned attention: well-conditioned transformers by one line.

``condattn.condition(model, 'pc')`` conditions any torch model in place. ``import condattn.registry`` registers the
conditioned backbones with OpenMMLab.
"""

from . import hosts, methods
from .condition import Report, condition, conditioning_of, fold
from .methods import Method, RowPreconditioner, SpectralCorrection, register_method
from .sites import AttentionSite, HeadOutputs, Projection, find_sites, register_exception, register_rule

__version__ = "0.1.0"

__all__ = [
    "AttentionSite",
    "HeadOutputs",
    "Method",
    "Projection",
    "Report",
    "RowPreconditioner",
    "SpectralCorrection",
    "condition",
    "conditioning_of",
    "find_sites",
    "fold",
    "hosts",
    "methods",
    "register_exception",
    "register_method",
    "register_rule",
]
