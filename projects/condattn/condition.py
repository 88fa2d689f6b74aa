"""Condition a model, fold it, and tell how it is conditioned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .methods.base import Conditioning, Method, parse, registered_methods
from .methods.correction import CorrectedModule, Lender
from .sites import AttentionSite, find_siteless, find_sites, known_hosts


@dataclass(frozen=True)
class Report:
    """What :func:`condition` did.

    Attributes:
        methods: The methods that were applied, in order.
        conditioned: Names of the sites that were conditioned.
        left_out: Names of the sites that ``include`` and ``exclude`` left as they were.
    """

    methods: tuple[Method, ...]
    conditioned: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        if not self.methods:
            return "conditioning: none"
        total = len(self.conditioned) + len(self.left_out)
        text = f"conditioned {len(self.conditioned)} of {total} attention sites: {' + '.join(map(str, self.methods))}"
        return text + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")


def condition(
    model: nn.Module,
    conditioning: Conditioning = "pc",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Report:
    """Condition the attention sites of ``model`` in place.

    Either all chosen sites are conditioned or, with an error, none. State-dict keys stay as they are; only
    corrections that depend on the weights add a buffer each.

    Args:
        model: Any torch model.
        conditioning: ``'none'`` (changes nothing), ``'pc'``, ``'sc'``, ``'sc+pc'``, or the long form; see
            :func:`condattn.methods.parse`.
        include: Glob patterns over module names; a pattern that matches a module takes all sites in it. Default:
            every site.
        exclude: Patterns of sites to leave out, likewise.

    Returns:
        The sites that were conditioned and those that were left out. Attention that has no site
        is named in a warning, with the reason.

    Raises:
        ValueError: If the conditioning is unknown or invalid, no site is found, a pattern matches no site, or a chosen
            site cannot be conditioned or is conditioned by the same method already.
    """
    methods = parse(conditioning)
    if not methods:
        return Report((), (), ())
    sites = find_sites(model)
    siteless = find_siteless(model)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no attention site to condition: none of its modules is of the "
            f"{len(known_hosts())} classes that condattn knows{''.join(f'; {text}' for text in siteless)}"
        )
    if siteless:
        warnings.warn(f"left unconditioned: {'; '.join(siteless)}", stacklevel=2)
    chosen = _select(sites, include, exclude)
    for method in methods:
        for site in chosen:
            if method.applied_to(site) is not None:
                raise ValueError(f"{site}: {type(method).__name__} is applied already; condition a site once")
            method.check(site)
    for method in methods:
        for site in chosen:
            method.apply(site)
    names = tuple(site.name for site in chosen)
    return Report(tuple(methods), names, tuple(site.name for site in sites if site.name not in names))


def fold(model: nn.Module) -> int:
    """Merge weight corrections into the weights, in place and exactly; preconditioners stay.

    A model with spectral corrections alone has the modules, parameters and keys of the unconditioned one afterwards,
    and computes the same as before. Fold after training: from then on the weights W + C train as one.

    Returns:
        The number of modules whose weights were merged.
    """
    foldable = [m for m in model.modules() if isinstance(m, CorrectedModule) and m.corrections]
    for module in foldable:
        module.fold()
    for module in model.modules():
        Lender.detach(module)
    return len(foldable)


def conditioning_of(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """How each attention site of ``model`` is conditioned.

    Returns:
        Site name -> the methods of that site in the long form of a config; an empty list for an unconditioned site.
    """
    return {
        site.name: [method.to_dict() for cls in registered_methods() if (method := cls.applied_to(site)) is not None]
        for site in find_sites(model)
    }


def _select(
    sites: list[AttentionSite], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> list[AttentionSite]:
    included = _matching(sites, include, "include") if include is not None else sites
    excluded = _matching(sites, exclude, "exclude") if exclude is not None else []
    chosen = [site for site in included if site not in excluded]
    if not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave no attention site to condition")
    return chosen


def _matching(sites: list[AttentionSite], patterns: str | Sequence[str], argument: str) -> list[AttentionSite]:
    matched = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [site for site in sites if _matches(site.name, pattern)]
        if not hits:
            names = ", ".join(repr(site.name) for site in sites)
            raise ValueError(f"{argument} pattern {pattern!r} matches no attention site; the sites are {names}")
        matched.extend(hits)
    return [site for site in sites if site in matched]


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))
