"""Find the attention sites of a model by rules, one for each attention class."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .builders import MissingWeightError
from .classes import check_qualified, qualified_name
from .site import AttentionSite, HeadOutputs, Place, Projection, is_within

Describe = Callable[[Any], Mapping[str, Any]]
_RULES: dict[str, Describe] = {}
_EXCEPTIONS: dict[str, str] = {}
_ATTENDING: set[str] = set()


def register_rule(class_name: str, describe: Describe) -> None:
    """Register the rule of a host class for :func:`find_sites`.

    Subclasses have the rule as well, unless they have a rule or an exception of their own. A rule takes precedence over
    an exception of the same class.

    Args:
        class_name: Qualified name of the class, for instance ``'mmdet.models.backbones.swin.WindowMSA'``.
        describe: Takes an instance and returns the fields of its :class:`AttentionSite`, except ``name`` and
            ``module``. :func:`whole`, :func:`thirds`, :func:`split`, :func:`split_each_head` and :func:`into` build
            these fields.

    Raises:
        ValueError: If the class has a rule already, or is not named by its module and name.
    """
    check_qualified(class_name)
    if class_name in _RULES:
        raise ValueError(f"{class_name} has a rule already; register each attention class once")
    _RULES[class_name] = describe


def register_exception(class_name: str, reason: str, attends: bool = False) -> None:
    """Register the reason why a class that is named like attention has no site.

    Args:
        class_name: Qualified name of the class.
        reason: Completes the sentence "it has no site: ...".
        attends: Whether the class computes attention nevertheless. Then no sites are searched for inside it, and
            :func:`condattn.condition` warns that it is left out.

    Raises:
        ValueError: If the class has a rule, or is not named by its module and name.
    """
    check_qualified(class_name)
    if class_name in _RULES:
        raise ValueError(f"{class_name} has a rule, which an exception does not replace; use exclude to leave it out")
    _EXCEPTIONS[class_name] = reason
    if attends:
        _ATTENDING.add(class_name)
    else:
        _ATTENDING.discard(class_name)


@dataclass(frozen=True)
class UnsupportedAttention(Place):
    """Attention that has no site.

    Attributes:
        reason: Why it has no site, as registered by :func:`register_exception`, or which layer has no weight; '' if
            no rule describes it.
    """

    reason: str


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """Find all attention sites of ``model`` that a rule describes, in the order of ``model.named_modules()``.

    The sites are the same before and after conditioning. Attention with a layer that has no weight (quantised, or in a
    wrapper that is not known) is left out; :func:`find_unsupported` finds it.

    Raises:
        ValueError: If a rule is wrong, or a conditioned attention module has such a layer.
    """
    return [found for found in _apply_rules(model).values() if isinstance(found, AttentionSite)]


def _apply_rules(model: nn.Module) -> dict[str, AttentionSite | UnsupportedAttention]:
    """Return what the rules say of the modules of ``model`` that have one, by their names."""
    described = ((name, module, _RULES.get(_entry(type(module)))) for name, module in _named_modules(model))
    return {name: _site(name, module, describe) for name, module, describe in described if describe is not None}


def _site(name: str, module: nn.Module, describe: Describe) -> AttentionSite | UnsupportedAttention:
    """Apply a rule, and raise a ``ValueError`` that names the class if the rule is wrong."""
    try:
        site = AttentionSite(name=name, module=module, **describe(module))
        parts = {"q": site.q, "k": site.k, "v": site.v}
        if wrong := [key for key, part in parts.items() if not isinstance(part, Projection | None)]:
            found = type(parts[wrong[0]]).__name__
            raise TypeError(
                f"expected {wrong[0]} made by whole(layer), thirds(layer) or split(layer, ...), found a {found}"
            )
        if not isinstance(site.out, HeadOutputs | None):
            raise TypeError(f"expected out made by into(layer), found a {type(site.out).__name__}")
    except MissingWeightError as error:
        if any("host_class" in vars(part) for part in module.modules()):
            raise ValueError(
                f"{Place(name, module)} was conditioned, and then a layer was replaced: {error}; fold the model, or "
                "remove the conditioning, before layers are replaced"
            ) from error
        return UnsupportedAttention(name, module, str(error))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the rule for {qualified_name(type(module))} is wrong: {type(error).__name__}: {reason}; expected a "
            "dictionary with num_heads, q, k, v and out"
        ) from error
    return site


def find_unsupported(model: nn.Module) -> list[UnsupportedAttention]:
    """Find attention of ``model`` that has no site.

    There are three kinds: classes registered as exceptions with ``attends=True``, modules with a rule that names a
    layer without a weight, and modules that look like attention but have neither a rule nor an exception. A module
    looks like attention if its class name says so, it has weights of its own, and no site is inside or around it.
    """
    ruled = _apply_rules(model)
    sites = [name for name, one in ruled.items() if isinstance(one, AttentionSite)]
    unsupported = []
    for name, module in _named_modules(model):
        if name in ruled:
            if isinstance(one := ruled[name], UnsupportedAttention):
                unsupported.append(one)
            continue
        cls = type(module)
        reason = _EXCEPTIONS.get(_entry(cls), "")
        if reason:
            found = _attends(cls)
        else:
            calls_itself = re.search("atte?n|mhs?a$|msa$", cls.__name__, re.IGNORECASE) is not None
            weights = any(parameter.ndim > 1 for parameter in module.parameters())
            found = calls_itself and weights and not any(is_within(s, name) or is_within(name, s) for s in sites)
        if found:
            unsupported.append(UnsupportedAttention(name, module, reason))
    return unsupported


def describe_unsupported(unsupported: Sequence[UnsupportedAttention]) -> str:
    """Describe unsupported attention in one text: each class once, where it is, why it has no site, and what to do."""
    places: dict[tuple[str, str], list[str]] = {}
    for one in unsupported:
        key = qualified_name(type(one.module)), one.reason or "no rule describes it"
        places.setdefault(key, []).append(one.name or "the model itself")
    texts = []
    for (cls, reason), (first, *others) in places.items():
        texts.append(f"{cls} ({first}{f' and {len(others)} more' if others else ''}): {reason}")
    if not all(one.reason for one in unsupported):
        texts.append(RULE)
    return "; ".join(texts)


RULE = (
    "add a rule: condattn.register_rule('MODULE.CLASS', "
    "lambda m: dict(num_heads=m.num_heads, out=into(m.proj), **thirds(m.qkv))), "
    "with into and thirds of condattn; where its forward uses a weight without calling the layer, "
    "**read_by(m, thirds(m.qkv)) or out=into(m.proj, reader=m)"
)
"""Advice for messages: how to write the most common kind of rule."""


def known_hosts() -> list[str]:
    """Return the qualified names of the host classes that have a rule, sorted."""
    return sorted(_RULES)


def known_exceptions() -> dict[str, str]:
    """Return a dictionary: qualified name of each class that is named like attention -> why it has no site."""
    return dict(sorted(_EXCEPTIONS.items()))


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules except those inside attention that is registered as having no site."""
    excepted: list[str] = []
    for name, module in model.named_modules():
        if not any(is_within(name, outer) for outer in excepted):
            yield name, module
            if _attends(type(module)):
                excepted.append(name)


def _entry(cls: type) -> str:
    """Return the name of the class, or of its nearest base class, that has a rule or an exception; '' if none has."""
    names = map(qualified_name, cls.__mro__)
    return next((name for name in names if name in _RULES or name in _EXCEPTIONS), "")


def attending_exceptions() -> set[str]:
    """Return the qualified names of the classes in :func:`known_exceptions` that compute attention."""
    return set(_ATTENDING)


def _attends(cls: type) -> bool:
    """Return whether the class is registered as attention that has no site."""
    entry = _entry(cls)
    return entry in _ATTENDING and entry not in _RULES
