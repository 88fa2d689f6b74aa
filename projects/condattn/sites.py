"""Attention sites: what every softmax-attention module has in common, whoever wrote it.

A *rule* describes the sites of one host class. Rules are matched by the qualified name of the class (subclasses
included), so describing a class never imports the library it belongs to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """One linear map of a site: some rows of a weight matrix.

    Attributes:
        owner: The module that evaluates the map (an ``nn.Linear``, or the attention module itself where it calls
            its projections functionally, as ``nn.MultiheadAttention`` does).
        parameter: Name of the weight in ``owner``, a matrix of shape (out features, in features).
        rows: The rows of that matrix that belong to the map.
    """

    owner: nn.Module
    parameter: str
    rows: slice

    @property
    def weight(self) -> Tensor:
        """The rows of the trained weight, without any correction: (out features of the map, in features)."""
        return self.owner.get_parameter(self.parameter)[self.rows]


@dataclass(frozen=True)
class AttentionSite:
    """Where one attention module projects q, k and v, and where its concatenated head outputs go.

    Attributes:
        name: Qualified name of ``module`` in the model that was searched; '' for the model itself.
        module: The host module.
        num_heads: Number of heads; q, k, v and the input of ``out`` are laid out head after head.
        q: The query projection.
        k: The key projection.
        v: The value projection.
        out: The projection that takes the concatenated head outputs, or None where something (a norm, a gate)
            stands between the heads and the output projection.
    """

    name: str
    module: nn.Module
    num_heads: int
    q: Projection
    k: Projection
    v: Projection
    out: Projection | None

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'} ({type(self.module).__name__})"


Describe = Callable[[Any], Mapping[str, Any]]
_RULES: dict[str, Describe] = {}


def register_rule(class_name: str, describe: Describe) -> None:
    """Teach :func:`find_sites` a host class.

    Args:
        class_name: Qualified name of the class, for instance ``'mmdet.models.backbones.swin.WindowMSA'``.
        describe: Takes an instance and returns the fields ``num_heads``, ``q``, ``k``, ``v`` and ``out`` of its
            :class:`AttentionSite`; :func:`whole` and :func:`thirds` make the projections.

    Raises:
        ValueError: If the class has a rule already.
    """
    if class_name in _RULES:
        raise ValueError(f"{class_name} has a rule already; register each attention class once")
    _RULES[class_name] = describe


def whole(linear: nn.Linear) -> Projection:
    """All rows of ``linear`` as one projection."""
    return Projection(linear, "weight", slice(0, linear.weight.shape[0]))


def thirds(owner: nn.Module, parameter: str = "weight") -> dict[str, Projection]:
    """q, k and v as the three equal parts, in this order, of the rows of one fused weight."""
    size = owner.get_parameter(parameter).shape[0] // 3
    return {name: Projection(owner, parameter, slice(i * size, (i + 1) * size)) for i, name in enumerate("qkv")}


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """All attention sites of ``model`` that a rule describes, in the order of ``model.named_modules()``.

    Sites are found alike before and after conditioning.
    """
    sites = []
    for name, module in model.named_modules():
        describe = _rule_of(type(module))
        if describe is not None:
            sites.append(AttentionSite(name=name, module=module, **describe(module)))
    return sites


def known_hosts() -> list[str]:
    """Qualified names of the host classes that have a rule, sorted."""
    return sorted(_RULES)


def _rule_of(cls: type) -> Describe | None:
    for base in cls.__mro__:
        describe = _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if describe is not None:
            return describe
    return None
