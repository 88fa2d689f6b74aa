"""Rules for layouts of attention, and names of layers, that several libraries have in common."""

from typing import Any

from torch import nn

from ..builders import halves, into, thirds, whole


def linear(layer: Any) -> nn.Module:
    """Return the linear layer of a pair of a linear layer and a batch norm (LeViT), which may be fused into one."""
    return getattr(layer, "linear", layer)


def fused(module: Any) -> dict[str, Any]:
    """Describe attention with one layer ``qkv`` for q, k and v, and the output projection ``proj``."""
    return dict(num_heads=module.num_heads, out=into(module.proj), **thirds(module.qkv))


def separate(module: Any) -> dict[str, Any]:
    """Describe attention with separate layers ``q``, ``k`` and ``v``, and the output projection ``proj``."""
    projections = dict(q=whole(module.q), k=whole(module.k), v=whole(module.v))
    return dict(num_heads=module.num_heads, out=into(module.proj), **projections)


def q_and_kv(module: Any) -> dict[str, Any]:
    """Describe attention with ``q`` for queries, ``kv`` for keys and values, and the output projection ``proj``."""
    projections = dict(q=whole(module.q), **halves(module.kv, "k", "v"))
    return dict(num_heads=module.num_heads, out=into(module.proj), **projections)


def cross_covariance(module: Any) -> dict[str, Any]:
    """Describe attention between the channels of a head, with the layers of :func:`fused`."""
    heads = module.groups if hasattr(module, "groups") else module.num_heads
    return dict(num_heads=heads, cross_covariance=True, out=into(module.proj), **thirds(module.qkv))


def davit_channels(module: Any) -> dict[str, Any]:
    """Describe the channel attention of DaViT.

    Its code calls the queries k, the keys v, and the values, to which the attention map is applied, q.
    """
    named = thirds(module.qkv)
    return cross_covariance(module) | dict(q=named["k"], k=named["v"], v=named["q"])
