"""Conditioned attention: make transformers well-conditioned with one line of code.

``condattn.condition(model, 'pc')`` conditions any torch model in place. ``import condattn.registry`` registers the
conditioned backbones with OpenMMLab. ``condattn.spectra`` is imported when it is first used.
"""

from importlib import import_module

from . import methods
from .attention import hosts as _hosts  # registers the rules  # noqa: F401
from .attention.builders import halves, into, read_by, split, split_each_head, thirds, whole
from .attention.rules import find_sites, register_exception, register_rule
from .attention.site import AttentionSite, HeadOutputs, Place, Projection
from .attention.tokens import TokenEntry, register_token_rule
from .condition import Report, condition, conditioning_of, fold, initialize, remove
from .methods import (
    ConditionedInitialization,
    EmbeddedTokens,
    Method,
    RowPreconditioner,
    SpectralCorrection,
    register_method,
)

__version__ = "0.2.0"

__all__ = [
    "AttentionSite",
    "ConditionedInitialization",
    "EmbeddedTokens",
    "HeadOutputs",
    "Method",
    "Place",
    "Projection",
    "Report",
    "RowPreconditioner",
    "SpectralCorrection",
    "TokenEntry",
    "condition",
    "conditioning_of",
    "find_sites",
    "fold",
    "halves",
    "initialize",
    "into",
    "methods",
    "read_by",
    "register_exception",
    "register_method",
    "register_rule",
    "register_token_rule",
    "remove",
    "split",
    "split_each_head",
    "thirds",
    "whole",
]


def __getattr__(name: str):
    if name == "spectra":
        return import_module(".spectra", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
