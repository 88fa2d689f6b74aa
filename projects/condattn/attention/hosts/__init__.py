"""Rules that describe the attention classes of other libraries, one file a library; none is imported."""

__all__ = ["openmmlab", "timm", "torch", "torchvision", "transformers"]
