"""Condition a model, fold or remove its conditioning, and report how it is conditioned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .attention.adapters import inner, is_adapter, is_copying
from .attention.rules import UnsupportedAttention, describe_unsupported, find_sites, find_unsupported, known_hosts
from .attention.site import AttentionSite, Place
from .attention.tokens import TokenEntry
from .kernels.private import forget_compiled
from .layers.adapted import check_adapter, follow_all
from .layers.class_swap import check_can_restore
from .layers.correction import check_weights_of, corrected_modules
from .layers.first_forward import FirstForward
from .layers.fusion import allow_fusion
from .layers.overrides import CorrectedWeightOverride
from .methods.base import Method, registered_methods
from .methods.initial_weights import InitialWeightsMethod, random_numbers_apart
from .methods.parsing import DEFAULT, Conditioning, parse
from .wording import some


@dataclass(frozen=True)
class Report:
    """Result of :func:`condition`.

    Attributes:
        methods: The methods that were applied, in order.
        conditioned: Names of the sites that were conditioned.
        left_out: Names of the sites that were left as they were: by ``include`` and ``exclude``, or because no method
            acts at sites.
        elsewhere: Names of the other modules that were conditioned, which are no sites; '' is the model itself.
        partial: Site, method and parts, such as ('layers.0.cross_attn', SpectralCorrection(...), ('q', 'k')), for each
            conditioned site that lacks parts which the method would change.
    """

    methods: tuple[Method, ...]
    conditioned: tuple[str, ...]
    left_out: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
    partial: tuple[tuple[str, Method, tuple[str, ...]], ...] = ()

    def __str__(self) -> str:
        if not self.methods:
            return "conditioning: none"
        total = len(self.conditioned) + len(self.left_out)
        done = [f"{len(self.conditioned)} of {total} attention sites"] if self.conditioned else []
        done += [f"the input of {name or 'the model'}" for name in self.elsewhere]
        text = f"conditioned {' and '.join(done)}: {'+'.join(map(str, self.methods))}"
        text += f"; left out: {', '.join(self.left_out)}" if self.left_out and self.conditioned else ""
        return text + "".join(f"; {line}" for line in self._partial_lines())

    def _partial_lines(self) -> Iterator[str]:
        """Say of each method at which sites it changes only a part."""
        lacking: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for site, method, parts in self.partial:
            lacking.setdefault((str(method), parts), []).append(site or "the model itself")
        for (name, parts), sites in lacking.items():
            yield f"{name} changes no {' and no '.join(parts)}, for lack of projections, at {some(sites)}"


def condition(
    model: nn.Module,
    conditioning: Conditioning = DEFAULT,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Report:
    """Condition the attention sites of ``model`` in place.

    If there is an error, no site is conditioned. The keys of the state dict stay; a correction that depends on the
    weights adds one buffer for each layer. Condition a model after all other changes: if a layer is replaced later
    (when heads are pruned), its conditioning is lost. Adapters (LoRA of PEFT) may be added before or after, and may
    be merged: their update is added to the conditioned layer. The first forward of a site, and of a model whose
    embedded tokens are conditioned, raises a ``RuntimeError`` if it does not call the modules that the rule names.

    Args:
        model: Any torch model.
        conditioning: ``'none'`` (changes nothing), ``'pc'``, ``'sc'``, ``'sc(strength=3.0)+pc'``, or the long form; see
            :func:`condattn.methods.parse`. Default: ``'pc'``.
        include: Glob patterns over module names; a pattern that matches a module takes all sites in it. Default:
            every site.
        exclude: Glob patterns over module names, in the same way, of sites to leave out.

    Returns:
        The sites that were conditioned and those that were left out. A warning names attention that has no site, with
        the reason.

    Raises:
        ValueError: If the conditioning is unknown or invalid, no site is found, a pattern matches no site, or a chosen
            site cannot be conditioned, is conditioned by the same method already, or shares a layer with another.
        TypeError: If ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    methods = parse(conditioning)
    if not methods and include is None and exclude is None:
        return Report((), (), ())
    sites, unsupported = find_sites(model), find_unsupported(model)
    if not sites and (not methods or any(method.acts_at_sites() for method in methods)):
        reasons = f"; {describe_unsupported(unsupported)}" if unsupported else ""
        raise ValueError(
            f"{type(model).__name__} has no attention site to condition: none of its modules is of the "
            f"{len(known_hosts())} classes that condattn knows{reasons}"
        )
    selected = _select([*sites, *unsupported], include, exclude)
    if methods and (left := [one for one in selected if isinstance(one, UnsupportedAttention)]):
        warnings.warn(f"left unconditioned: {describe_unsupported(left)}", stacklevel=2)
    chosen = [one for one in selected if isinstance(one, AttentionSite)]
    if sites and not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave no attention site to condition")
    places = [(method, place) for method in methods for place in method.places(model, chosen)]
    taken = {type(method): {id(place.module) for place, _ in method.find(model, sites)} for method in methods}
    for method, place in places:
        if id(place.module) in taken[type(method)]:
            raise ValueError(f"{place}: {type(method).__name__} is applied already; condition a site once")
        method.check(place)
    _check_combination([*places, *((method, place) for place, method in conditioned_places(model, sites))])
    _check_nothing_is_shared(places)
    _check_adapters(model, places)
    _apply(places)
    conditioned = {place.name: place for _, place in places if isinstance(place, AttentionSite)}
    for site in conditioned.values():
        FirstForward.of_site(site)
    for _, place in places:
        if isinstance(place, TokenEntry):
            FirstForward.of_tokens(model, place)
    follow_all(model)
    forget_compiled()
    left_out = tuple(site.name for site in sites if site.name not in conditioned)
    elsewhere = dict.fromkeys(place.name for _, place in places if not isinstance(place, AttentionSite))
    partial = tuple(
        (place.name, method, tuple(missing)) for method, place in places if (missing := method.missing(place))
    )
    return Report(tuple(methods), tuple(conditioned), left_out, tuple(elsewhere), partial)


def fold(model: nn.Module) -> int:
    """Merge the corrections of weights into the weights, in place and exactly; other conditioning stays.

    A model that has no other conditioning then has the modules, parameters and keys of the unconditioned one, and
    computes the same as before. Fold after the training: from then on, the weights W + C train as one.

    Returns:
        The number of modules whose weights were merged.

    Raises:
        ValueError: If a weight to be merged is computed (pruned, or parametrized), is that of another layer as well, or
            is divided among processes (FSDP2), or if a conditioned layer was replaced (quantised, or wrapped); in these
            cases nothing is merged.
    """
    foldable = corrected_modules(model)
    check_can_restore(foldable)
    check_weights_of(model, foldable)
    sites = find_sites(model)
    for module in foldable:
        module.fold()
    allow_fusion(model)
    for reader in model.modules():
        CorrectedWeightOverride.detach(reader)
    follow_all(model)
    conditioned = {id(place.module) for place, _ in conditioned_places(model)}
    for site in sites:
        if id(site.module) not in conditioned:
            FirstForward.forget(site.module)
    forget_compiled()
    return len(foldable)


def remove(model: nn.Module) -> int:
    """Remove all conditioning of ``model``, in place.

    Classes, hooks and buffers become those of the unconditioned model again, and the trained weights stay as they are.
    A model that was trained with a conditioning therefore computes something else without it; :func:`fold` preserves
    the function.

    Returns:
        The number of sites, and of other modules, that were conditioned.

    Raises:
        NotImplementedError: If a method does not define how it is removed.
        ValueError: If a conditioned layer is parametrized, accelerate has replaced its forward, or PEFT trains a copy
            of it. In these cases nothing is changed.
    """
    check_can_restore(model.modules())
    conditioned = conditioned_places(model)
    for place, method in conditioned:
        if type(method).remove.__func__ is Method.remove.__func__:  # type: ignore[attr-defined]
            method.remove(place)  # raises
        copying = [layer for layer in method.layers(place) if is_copying(layer)]
        if copying:
            raise ValueError(
                f"{place}: a {type(copying[0]).__name__} of PEFT trains a copy of one of its layers; call "
                "merge_and_unload first"
            )
    for place, method in reversed(conditioned):
        method.remove(place)
    for module in model.modules():
        FirstForward.forget(module)
    follow_all(model)
    forget_compiled()
    return len({id(place.module) for place, _ in conditioned})


def initialize(model: nn.Module) -> None:
    """Set the initial weights from the conditioning of ``model`` again, after the model was initialised again.

    Call this from code that initialises a model after it was built, as OpenMMLab's ``init_weights`` does, and never
    after a checkpoint was loaded.
    """
    with random_numbers_apart():
        for place, method in conditioned_places(model):
            method.initialize(place)


def conditioning_of(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """Return how each attention site of ``model`` is conditioned.

    Returns:
        Site name -> the methods of that site in the long form of a config; an empty list for an unconditioned site.
        Other modules that are conditioned follow, by their names; '' is the model itself.
    """
    found: dict[str, list[dict[str, Any]]] = {site.name: [] for site in find_sites(model)}
    for place, method in conditioned_places(model):
        found.setdefault(place.name, []).append(method.to_dict())
    return found


def same_conditioning(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Return whether two entries of :func:`conditioning_of`, which may come from a file, stand for the same function.

    Methods that change no function, such as initial weights, are ignored, and so are settings that change gradients
    alone. A setting that an entry lacks, because its method did not have it when the file was written, has its default.
    """
    classes = {cls.__name__: cls for cls in registered_methods()}

    def complete(method: dict[str, Any]) -> dict[str, Any]:
        cls = classes.get(method.get("type", ""))
        settings = {field.name: field.default for field in fields(cls)} if cls else {}
        return {
            name: value
            for name, value in (settings | method).items()
            if cls is None or name not in cls.gradient_settings
        }

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return sorted((key, plain(child)) for key, child in value.items())
        if isinstance(value, list | tuple):
            return [plain(child) for child in value]
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    unimportant = {name for name, cls in classes.items() if not cls.changes_function}
    first, second = (
        sorted(repr(plain(complete(method))) for method in methods if method.get("type") not in unimportant)
        for methods in (one, other)
    )
    return first == second


def _select(
    found: list[AttentionSite | UnsupportedAttention],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> list[AttentionSite | UnsupportedAttention]:
    included = _matching(found, include, "include") if include is not None else found
    excluded = _matching(found, exclude, "exclude") if exclude is not None else []
    return [one for one in included if one not in excluded]


def _matching(
    found: list[AttentionSite | UnsupportedAttention], patterns: str | Sequence[str], argument: str
) -> list[AttentionSite | UnsupportedAttention]:
    matched = []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{argument} is {patterns!r}; expected a pattern of module names, or a list of patterns")
    for pattern in patterns:
        hits = [one for one in found if _matches(one.name, pattern)]
        if not hits:
            names = ", ".join(repr(one.name) for one in found if isinstance(one, AttentionSite))
            raise ValueError(f"{argument} pattern {pattern!r} matches no attention site; the sites are {names}")
        matched.extend(hits)
    return [one for one in found if one in matched]


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def _apply(places: list[tuple[Method, Place]]) -> None:
    """Apply all methods or, if there is an error, none.

    Each method is checked again, because an earlier one may have changed what it needs.
    """
    applied: list[tuple[Method, Place]] = []
    try:
        with random_numbers_apart():
            for method, place in places:
                method.check(place)
                applied.append((method, place))
                method.apply(place)
    except Exception:
        for method, place in reversed(applied):
            with suppress(NotImplementedError, AttributeError):  # the last one may lack what it should remove
                method.remove(place)
        raise


def conditioned_places(model: nn.Module, sites: list[AttentionSite] | None = None) -> list[tuple[Place, Method]]:
    """Return the places of ``model`` that are conditioned, each with its method, ordered by method."""
    sites = find_sites(model) if sites is None else sites
    return [one for cls in registered_methods() for one in cls.find(model, sites)]


def _check_combination(places: list[tuple[Method, Place]]) -> None:
    """Methods that make no sense together at one place are refused with the reason."""
    for one, place in places:
        for other, same in places:
            if same.module is place.module and (reason := one.excludes(other)):
                raise ValueError(f"{place}: {one} and {other} make no sense together: {reason}")


def _check_adapters(model: nn.Module, places: list[tuple[Method, Place]]) -> None:
    """Raise a ``ValueError`` if a layer to be conditioned has an adapter that does not add to its output."""
    owners = {inner(layer) for method, place in places for layer in method.layers(place)}
    for module in model.modules():
        if is_adapter(module) and inner(module) in owners:
            check_adapter(module, inner(module))


def _weights(site: AttentionSite) -> set[Tensor]:
    """Return the weights of the layers that project queries, keys, values and head outputs."""
    weights = {getattr(part.owner, part.parameter) for part in (site.q, site.k, site.v) if part is not None}
    output = None if site.out is None else getattr(site.out.projection, "weight", None)
    return weights if output is None else {*weights, output}


def _check_nothing_is_shared(places: list[tuple[Method, Place]]) -> None:
    """Raise a ``ValueError`` if two places share a layer that each would condition, or a weight that each would set."""
    users: dict[object, Place] = {}
    for method, place in places:
        sets = isinstance(method, InitialWeightsMethod) and isinstance(place, AttentionSite)
        weights = _weights(place) if sets else set()  # type: ignore[arg-type]  # a site
        for shared in (*map(inner, method.layers(place)), *weights):
            other = users.setdefault(shared, place)
            if other is not place:
                raise ValueError(f"{other} and {place} share a {type(shared).__name__}; exclude one of them")
