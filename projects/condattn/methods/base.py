"""The base class of all methods, and the registry of methods."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ..attention.site import AttentionSite, Place

_METHODS: dict[str, type[Method]] = {}
_ALIASES: dict[str, str] = {}


class Method(ABC):
    """Base class of the ways to condition attention; a frozen dataclass whose fields are the settings.

    Most methods derive from a subclass that knows where they act, and define one function:
    :class:`.weight.WeightMethod`, :class:`.head_output.HeadOutputMethod`, :class:`.model_input.ModelInputMethod`, or
    :class:`.initial_weights.InitialWeightsMethod`. A method is registered with :func:`register_method`.

    Attributes:
        alias: Short name.
        alias_settings: Settings that the short name implies, if they differ from the defaults of the class.
        gradient_settings: Names of settings that change gradients alone. Checkpoints that differ in them fit.
        changes_function: Whether a model with the method computes something else than a model without it that has the
            same weights. Only such methods count when a checkpoint's conditioning is compared with a model's.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    alias: ClassVar[str]
    alias_settings: ClassVar[Mapping[str, Any]] = {}
    gradient_settings: ClassVar[Sequence[str]] = ()
    changes_function: ClassVar[bool] = True

    @classmethod
    def places(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> Sequence[Place]:
        """Return where the method acts in ``model``; by default at ``sites``, the chosen attention sites."""
        return sites

    @classmethod
    def acts_at_sites(cls) -> bool:
        """Whether the method acts at attention sites, and not elsewhere in a model."""
        return cls.places.__func__ is Method.places.__func__  # type: ignore[attr-defined]

    @abstractmethod
    def check(self, place: Any) -> None:
        """Raise a one-line ``ValueError`` if the method cannot act at ``place``; nothing is changed."""

    @abstractmethod
    def apply(self, place: Any) -> None:
        """Condition ``place`` in place; called after :meth:`check` has passed."""

    @classmethod
    @abstractmethod
    def applied_to(cls, place: Any) -> Method | None:
        """Return the method of exactly this class that conditions ``place`` now, or None."""

    @classmethod
    def find(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> list[tuple[Place, Method]]:
        """Return the places in ``model``, with attention sites ``sites``, that methods of this class condition."""
        return [(site, method) for site in sites if (method := cls.applied_to(site)) is not None]

    def excludes(self, other: Method) -> str:
        """Why the method makes no sense beside ``other`` at one place; '' if it does."""
        return ""

    def layers(self, place: Any) -> list[nn.Module]:
        """Return the layers at ``place`` that the method changes, with the adapters around them.

        Two places that share one cannot both be conditioned, and adapters other than LoRA must not be around one.
        Default: all projections of an attention site, and nothing elsewhere.
        """
        site = isinstance(place, AttentionSite)
        parts = (place.q, place.k, place.v, place.out) if site else ()
        return [part.owner for part in parts if part is not None]

    def parts(self, place: Any) -> str:
        """Return which parts of ``place`` the method conditions, for a table of sites; :meth:`check` has passed."""
        return "yes"

    def missing(self, place: Any) -> Sequence[str]:
        """Return which parts the method would condition, but ``place`` does not have."""
        return ()

    @classmethod
    def remove(cls, place: Any) -> None:
        """Undo :meth:`apply` of the method that conditions ``place`` now; the trained weights stay as they are.

        Raises:
            NotImplementedError: If the class does not define how.
        """
        raise NotImplementedError(f"{place}: {cls.__name__} cannot be removed: the class does not define remove")

    def initialize(self, place: Any) -> None:  # noqa: B027
        """Set initial weights at ``place``: when it is conditioned, and after each initialisation of the model."""

    def __str__(self) -> str:
        """Return the text that :func:`.parsing.parse` reads: 'pc', or 'sc(strength=3.0, relative=True)'."""
        default = type(self)(**self.alias_settings)
        names = [field.name for field in dataclasses.fields(self)]
        changed = [name for name in names if getattr(self, name) != getattr(default, name)]
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)
        return f"{self.alias}({settings})" if settings else self.alias

    def to_dict(self) -> dict[str, Any]:
        """Return the long form of a config, ``dict(type=..., ...)``, which ``parse`` reads."""
        return {"type": type(self).__name__, **dataclasses.asdict(self)}


def check_flags(method: Method, *names: str) -> None:
    """Raise a ``ValueError`` unless the settings called ``names`` are True or False."""
    for name in names:
        if not isinstance(value := getattr(method, name), bool):
            raise ValueError(f"{type(method).__name__}: {name} is {value!r}; expected True or False")


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: let configs name ``cls`` by its class name and by its ``alias``.

    Raises:
        ValueError: If the name or the alias is taken.
    """
    for name in (cls.__name__, cls.alias):
        if name in _METHODS or name in _ALIASES:
            raise ValueError(f"the conditioning method name {name!r} is taken; choose another")
    _METHODS[cls.__name__] = cls
    _ALIASES[cls.alias] = cls.__name__
    return cls


def registered_methods() -> list[type[Method]]:
    """Return the registered method classes, in order of registration."""
    return list(_METHODS.values())


def method_class(name: Any) -> type[Method]:
    """Return the registered class with the class name or alias ``name``.

    Raises:
        ValueError: If there is none.
    """
    full = _ALIASES.get(name, name)
    if full not in _METHODS:
        raise ValueError(f"unknown conditioning {name!r}. {known_methods()}")
    return _METHODS[full]


def known_methods() -> str:
    """Return the names of all methods, as a sentence for messages."""
    names = ", ".join(f"'{alias}' ({name})" for alias, name in _ALIASES.items())
    return f"Known: {names}, several of them joined by '+', and 'none' by itself"
