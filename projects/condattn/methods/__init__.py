"""The conditioning methods, one file for each, and their base classes, one for each place where methods act."""

from ..layers.head_transform import HeadTransform
from .base import Method, register_method
from .head_output import HeadOutputMethod
from .initial_weights import InitialWeightsMethod
from .model_input import ModelInputMethod
from .parsing import parse
from .weight import WeightMethod

# Registered in this order, in which messages and tables list them.
# isort: off
from .preconditioner import RowPreconditioner
from .spectral import SpectralCorrection
from .tokens import EmbeddedTokens
from .initialization import ConditionedInitialization
# isort: on

__all__ = [
    "ConditionedInitialization",
    "EmbeddedTokens",
    "HeadOutputMethod",
    "HeadTransform",
    "InitialWeightsMethod",
    "Method",
    "ModelInputMethod",
    "RowPreconditioner",
    "SpectralCorrection",
    "WeightMethod",
    "parse",
    "register_method",
]
