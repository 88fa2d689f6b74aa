"""Rules that describe the attention classes of other libraries, one file a library; none is imported."""

from . import openmmlab, timm, tokens, torch, torchvision, transformers

__all__ = ["openmmlab", "timm", "tokens", "torch", "torchvision", "transformers"]
