"""Language models on bytes, conditioned from a config: importing this package registers its classes with mmengine."""

from . import datasets, metrics, models, transforms

__all__ = ["datasets", "metrics", "models", "transforms"]
