"""Rules for the attention classes of other libraries, one file for each library; the libraries are not imported."""

from . import openmmlab, timm, tokens, torch, torchvision, transformers

__all__ = ["openmmlab", "timm", "tokens", "torch", "torchvision", "transformers"]
