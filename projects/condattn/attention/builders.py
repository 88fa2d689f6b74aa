"""Helpers for writing rules: they say which rows of which weight project queries, keys and values."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from .adapters import inner
from .site import HeadOutputs, Projection, is_convolution, is_transposed


class MissingWeightError(ValueError):
    """A layer that a rule names has no weight that is a tensor: it was quantised, or is in a wrapper of some kind."""


def whole(owner: nn.Module, parameter: str = "weight", num_heads: int | None = None) -> Projection:
    """Return all rows of a weight as one projection; pass ``num_heads`` if it differs from that of the site."""
    owner = _layer(owner, parameter)
    return Projection(owner, parameter, (slice(0, _out_features(owner, parameter)),), num_heads)


def thirds(owner: nn.Module, parameter: str = "weight") -> dict[str, Projection]:
    """Split the rows of one fused weight into three equal parts: q, k and v, in this order."""
    size = _equal_parts(_layer(owner, parameter), parameter, 3)
    return split(owner, parameter, q=size, k=size, v=size)


def halves(owner: nn.Module, first: str, second: str) -> dict[str, Projection]:
    """Split the rows of one weight into two equal parts called ``first`` and ``second``; see :func:`split`."""
    size = _equal_parts(_layer(owner, "weight"), "weight", 2)
    return split(owner, "weight", **{first: size, second: size})


def split(owner: nn.Module, parameter: str = "weight", **sizes: int) -> dict[str, Projection]:
    """Split the rows of one weight into consecutive parts of the given ``sizes``.

    Only the parts called q, k and v are returned.
    """
    owner, parts, start = _layer(owner, parameter), {}, 0
    for name, size in sizes.items():
        parts[name] = Projection(owner, parameter, (slice(start, start + size),))
        start += size
    return {name: part for name, part in parts.items() if name in ("q", "k", "v")}


def split_each_head(owner: nn.Module, num_heads: int, **sizes: int) -> dict[str, Projection]:
    """Split the rows of each head in one weight into consecutive parts of the given ``sizes``."""
    step = sum(sizes.values())
    owner, parts, start = _layer(owner, "weight"), {}, 0
    for name, size in sizes.items():
        rows = tuple(slice(h * step + start, h * step + start + size) for h in range(num_heads))
        parts[name] = Projection(owner, "weight", rows)
        start += size
    return parts


def read_by(module: nn.Module, projections: Mapping[str, Projection]) -> dict[str, Projection]:
    """Mark projections as read by ``module``, whose forward uses their weights without calling their owners."""
    return {name: replace(projection, reader=module) for name, projection in projections.items()}


def into(owner: nn.Module, projection: nn.Module | None = None, axis: int | None = None, **settings) -> HeadOutputs:
    """Describe head outputs that are the input of ``owner``.

    ``projection`` is the output projection, by default ``owner`` itself. ``axis`` is by default 1 for a convolution,
    and the last axis otherwise. ``settings`` are the other fields of :class:`HeadOutputs`.
    """
    projection = inner(owner if projection is None else projection)
    if axis is None:
        axis = 1 if is_convolution(projection) else -1
    return HeadOutputs(owner, projection, axis, **settings)


def _layer(owner: nn.Module, parameter: str) -> nn.Module:
    """Return the layer, without the adapters around it, whose weight is called ``parameter``."""
    layer = inner(owner)
    is_computed = nn.utils.parametrize.is_parametrized(layer, parameter)  # to read it may change its state
    if not is_computed and not isinstance(getattr(layer, parameter, None), Tensor):
        raise MissingWeightError(
            f"a {type(layer).__name__} in it has no {parameter} that is a tensor, as quantised and wrapped layers have "
            "not"
        )
    return layer


def _equal_parts(owner: nn.Module, parameter: str, number: int) -> int:
    """Return the rows of each of ``number`` equal parts of a weight, or raise a ``ValueError`` if there are none."""
    rows = _out_features(owner, parameter)
    if rows % number:
        raise ValueError(
            f"the {parameter} of a {type(owner).__name__} has {rows} rows, which are not {number} equal parts; "
            "describe a layer of its own by whole(layer), and parts of other sizes by split(layer, q=..., k=..., v=...)"
        )
    return rows // number


def _out_features(owner: nn.Module, parameter: str) -> int:
    return getattr(owner, parameter).shape[1 if is_transposed(owner) else 0]
