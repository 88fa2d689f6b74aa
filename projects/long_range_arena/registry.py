"""Register everything: ``custom_imports = dict(imports=['condattn.registry', 'long_range_arena.registry'])``."""

from . import metric, model
from .datasets import aan, cifar, imdb, listops, pathfinder

__all__ = ["aan", "cifar", "imdb", "listops", "metric", "model", "pathfinder"]
