"""What the attention classes of several libraries have in common, down to the names of their layers."""

from typing import Any

from ..builders import halves, into, thirds, whole


def fused(module: Any) -> dict[str, Any]:
    """q, k and v in one layer ``qkv``, and ``proj``."""
    return dict(num_heads=module.num_heads, out=into(module.proj), **thirds(module.qkv))


def separate(module: Any) -> dict[str, Any]:
    """A layer each, and ``proj``."""
    projections = dict(q=whole(module.q), k=whole(module.k), v=whole(module.v))
    return dict(num_heads=module.num_heads, out=into(module.proj), **projections)


def q_and_kv(module: Any) -> dict[str, Any]:
    """Queries in ``q``, keys and values in ``kv``, and ``proj``."""
    projections = dict(q=whole(module.q), **halves(module.kv, "k", "v"))
    return dict(num_heads=module.num_heads, out=into(module.proj), **projections)


def cross_covariance(module: Any) -> dict[str, Any]:
    """Attention between the channels of a head, otherwise as :func:`fused`."""
    heads = module.groups if hasattr(module, "groups") else module.num_heads
    return dict(num_heads=heads, cross_covariance=True, out=into(module.proj), **thirds(module.qkv))


def davit_channels(module: Any) -> dict[str, Any]:
    """DaViT, whose code calls the queries k, the keys v, and what the map is applied to q."""
    named = thirds(module.qkv)
    return cross_covariance(module) | dict(q=named["k"], k=named["v"], v=named["q"])
