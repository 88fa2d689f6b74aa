"""Attention sites: what every softmax-attention module has in common, whoever wrote it.

A *rule* describes the site of one host class. Rules are matched by the qualified name of the class (subclasses
included), so describing a class never imports the library it belongs to::

    register_rule('my.models.Attention', lambda m: dict(num_heads=m.heads, out=into(m.proj), **thirds(m.qkv)))

It names the layers that the forward of the class calls. A weight that the forward uses without calling its layer has a
reader: ``**read_by(m, thirds(m.qkv))``, ``out=into(m.proj, reader=m)``.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .adapters import inner
from .classes import look_up, qualified_name


@dataclass(frozen=True)
class Projection:
    """One linear map of a site: some rows of a weight matrix.

    Attributes:
        owner: The module that evaluates the map (an ``nn.Linear``, a 1 x 1 ``nn.Conv2d``, or the attention module
            itself where it calls its projections functionally, as ``nn.MultiheadAttention`` does), inside adapters.
        parameter: Name of the weight in ``owner``.
        rows: The rows of that matrix that belong to the map, head after head, as slices.
        num_heads: Number of heads of the map; fewer than the site's where keys and values are shared by groups of
            queries. None: as the site.
        reader: The module whose forward uses the weight of ``owner`` without calling ``owner``, or None.
    """

    owner: nn.Module
    parameter: str
    rows: tuple[slice, ...]
    num_heads: int | None = None
    reader: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        """The rows of the trained weight, without any correction: (out features of the map, in features)."""
        matrix = as_matrix(self.owner, getattr(self.owner, self.parameter))
        return matrix[self.rows[0]] if len(self.rows) == 1 else matrix[indices(self.rows)]


@dataclass(frozen=True)
class HeadOutputs:
    """Where the outputs of all heads of a site pass, side by side: the input of a module.

    Attributes:
        owner: The module whose (first) input they are; the attention module itself if it projects them functionally.
            Where an adapter is around a layer, it is the adapter.
        projection: The output projection that they reach, here or behind an activation, a norm or a gate, inside
            adapters; None if there is none.
        axis: The axis of that input along which the channels of the heads lie.
        channels: The channels that are head outputs, where others lie beside them; None: all.
        num_heads: Number of heads along the axis; None: as the site. 1 where the heads have an axis of their own.
        interleaved: Whether channel c belongs to head c modulo the number of heads, and not to head c // head size.
        reader: The module whose forward uses weight and bias of ``owner``, a linear layer of as many outputs as
            inputs, without calling it, and does no more to the result than move tokens; None: ``owner`` is called.
    """

    owner: nn.Module
    projection: nn.Module | None
    axis: int = -1
    channels: slice | None = None
    num_heads: int | None = None
    interleaved: bool = False
    reader: nn.Module | None = None


@dataclass(frozen=True)
class AttentionSite:
    """Where one attention module projects q, k and v, and where its head outputs go.

    Attributes:
        name: Qualified name of ``module`` in the model that was searched; '' for the model itself.
        module: The host module.
        num_heads: Number of heads.
        q: The query projection, or None where the queries are made elsewhere.
        k: The key projection, or None.
        v: The value projection, or None.
        out: Where the head outputs pass, or None where no module receives them.
        cross_covariance: Whether attention is between the channels of a head (XCiT, DaViT), not between tokens.
        obstacle: Why a part is None, in words that end a sentence "cannot be conditioned: ...".
    """

    name: str
    module: nn.Module
    num_heads: int
    q: Projection | None = None
    k: Projection | None = None
    v: Projection | None = None
    out: HeadOutputs | None = None
    cross_covariance: bool = False
    obstacle: str = ""

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'} ({type(self.module).__name__})"


Describe = Callable[[Any], Mapping[str, Any]]
_RULES: dict[str, Describe] = {}
_EXCEPTIONS: dict[str, str] = {}
_ATTENDING: set[str] = set()


def register_rule(class_name: str, describe: Describe) -> None:
    """Teach :func:`find_sites` a host class.

    Args:
        class_name: Qualified name of the class, for instance ``'mmdet.models.backbones.swin.WindowMSA'``.
        describe: Takes an instance and returns the fields of its :class:`AttentionSite` but ``name`` and ``module``;
            :func:`whole`, :func:`thirds`, :func:`split`, :func:`split_each_head` and :func:`into` make them.

    Raises:
        ValueError: If the class has a rule already.
    """
    if class_name in _RULES:
        raise ValueError(f"{class_name} has a rule already; register each attention class once")
    _RULES[class_name] = describe


def register_exception(class_name: str, reason: str, attends: bool = False) -> None:
    """Say why a class that calls itself attention has no site.

    Args:
        class_name: Qualified name of the class.
        reason: Ends a sentence "it has no site: ...".
        attends: Whether it is attention all the same. Then there are no sites in it either, and
            :func:`condattn.condition` warns that it is left out.
    """
    _EXCEPTIONS[class_name] = reason
    if attends:
        _ATTENDING.add(class_name)


def whole(owner: nn.Module, parameter: str = "weight", num_heads: int | None = None) -> Projection:
    """All rows of a weight as one projection; ``num_heads`` if it has fewer heads than the site."""
    owner = inner(owner)
    return Projection(owner, parameter, (slice(0, _out_features(owner, parameter)),), num_heads)


def thirds(owner: nn.Module, parameter: str = "weight") -> dict[str, Projection]:
    """q, k and v as the three equal parts, in this order, of the rows of one fused weight."""
    size = _out_features(inner(owner), parameter) // 3
    return split(owner, parameter, q=size, k=size, v=size)


def halves(owner: nn.Module, first: str, second: str) -> dict[str, Projection]:
    """Two of q, k and v as the two equal parts, in this order, of the rows of one weight."""
    size = _out_features(inner(owner), "weight") // 2
    return split(owner, **{first: size, second: size})


def split(owner: nn.Module, parameter: str = "weight", **sizes: int) -> dict[str, Projection]:
    """Parts of given ``sizes``, in their order, of the rows of one weight; those called q, k and v are returned."""
    owner, parts, start = inner(owner), {}, 0
    for name, size in sizes.items():
        parts[name] = Projection(owner, parameter, (slice(start, start + size),))
        start += size
    return {name: part for name, part in parts.items() if name in ("q", "k", "v")}


def split_each_head(owner: nn.Module, num_heads: int, **sizes: int) -> dict[str, Projection]:
    """Parts of given ``sizes``, in their order, of each head's rows of one weight, head after head."""
    step = sum(sizes.values())
    owner, parts, start = inner(owner), {}, 0
    for name, size in sizes.items():
        rows = tuple(slice(h * step + start, h * step + start + size) for h in range(num_heads))
        parts[name] = Projection(owner, "weight", rows)
        start += size
    return parts


def read_by(module: nn.Module, projections: Mapping[str, Projection]) -> dict[str, Projection]:
    """The same projections, whose weights the forward of ``module`` uses without calling their owners."""
    return {name: replace(projection, reader=module) for name, projection in projections.items()}


def into(owner: nn.Module, projection: nn.Module | None = None, axis: int | None = None, **settings) -> HeadOutputs:
    """Head outputs that are the input of ``owner``, by default the output projection itself.

    ``axis`` is by default 1 before a two-dimensional convolution, else the last; ``settings`` are the other fields of
    :class:`HeadOutputs`.
    """
    projection = inner(owner if projection is None else projection)
    if axis is None:
        axis = 1 if isinstance(projection, nn.Conv2d | nn.ConvTranspose2d) else -1
    return HeadOutputs(owner, projection, axis, **settings)


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """All attention sites of ``model`` that a rule describes, in the order of ``model.named_modules()``.

    Sites are found alike before and after conditioning.
    """
    sites = []
    for name, module in _named_modules(model):
        describe = look_up(_RULES, type(module))
        if describe is not None and not _attends(type(module)):
            sites.append(AttentionSite(name=name, module=module, **describe(module)))
    return sites


@dataclass(frozen=True)
class Siteless:
    """Attention that has no site.

    Attributes:
        name: Qualified name of the module in the model that was searched; '' for the model itself.
        module: The module.
        reason: Why not, as its exception says; '' if no rule describes it.
    """

    name: str
    module: nn.Module
    reason: str


def find_siteless(model: nn.Module) -> list[Siteless]:
    """Attention of ``model`` that has no site.

    These are the exceptions that attend, and what neither a rule nor an exception describes but looks like attention:
    its class says so, it has weights of its own, and no site is in it or around it.
    """
    sites = [site.name for site in find_sites(model)]
    siteless = []
    for name, module in _named_modules(model):
        cls = type(module)
        reason = look_up(_EXCEPTIONS, cls) or ""
        if reason:
            found = _attends(cls)
        else:
            calls_itself = re.search("atte?n|mh?sa$", cls.__name__, re.IGNORECASE)
            weights = any(parameter.ndim > 1 for parameter in module.parameters())
            found = calls_itself and weights and not any(_contains(name, s) or _contains(s, name) for s in sites)
        if found:
            siteless.append(Siteless(name, module, reason))
    return siteless


def describe_siteless(siteless: Sequence[Siteless]) -> str:
    """One text for all: each class once, where it is, why it has no site, and what to do about it."""
    places: dict[tuple[str, str], list[str]] = {}
    for one in siteless:
        key = qualified_name(type(one.module)), one.reason or "no rule describes it"
        places.setdefault(key, []).append(one.name or "the model itself")
    texts = []
    for (cls, reason), (first, *others) in places.items():
        texts.append(f"{cls} ({first}{f' and {len(others)} more' if others else ''}): {reason}")
    if not all(one.reason for one in siteless):
        texts.append(RULE)
    return "; ".join(texts)


RULE = (
    "add a rule: condattn.register_rule('MODULE.CLASS', "
    "lambda m: dict(num_heads=m.num_heads, out=into(m.proj), **thirds(m.qkv))), "
    "with into and thirds of condattn.sites; where its forward uses a weight without calling the layer, "
    "**read_by(m, thirds(m.qkv)) or out=into(m.proj, reader=m)"
)
"""The rule of the commonest kind, as advice."""


def known_hosts() -> list[str]:
    """Qualified names of the host classes that have a rule, sorted."""
    return sorted(_RULES)


def known_exceptions() -> dict[str, str]:
    """Qualified name of each class that calls itself attention and has no site -> why not."""
    return dict(sorted(_EXCEPTIONS.items()))


def indices(rows: tuple[slice, ...]) -> list[int]:
    """The row numbers that slices stand for, in their order."""
    return [row for part in rows for row in range(part.start, part.stop)]


def is_transposed(owner: nn.Module) -> bool:
    """Whether ``owner`` keeps its weight as (in features, out features): transformers' ``Conv1D`` (GPT-2)."""
    return any(qualified_name(cls) == "transformers.pytorch_utils.Conv1D" for cls in type(owner).__mro__)


def as_matrix(owner: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` of ``owner`` as a matrix (out features, in features)."""
    return weight.T if is_transposed(owner) else weight.flatten(1)


def _out_features(owner: nn.Module, parameter: str) -> int:
    return getattr(owner, parameter).shape[1 if is_transposed(owner) else 0]


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside attention that has no site."""
    excepted: list[str] = []
    for name, module in model.named_modules():
        if not any(_contains(outer, name) for outer in excepted):
            yield name, module
            if _attends(type(module)):
                excepted.append(name)


def _attends(cls: type) -> bool:
    """Whether it is attention that is known to have no site."""
    return any(qualified_name(base) in _ATTENDING for base in cls.__mro__)


def _contains(outer: str, inner: str) -> bool:
    return not outer or f"{inner}.".startswith(f"{outer}.")
